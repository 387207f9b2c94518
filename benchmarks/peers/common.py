"""What the scripts of the Python peers share: their arguments, the exact int4 grid, and what they write.

Not a script. Importing it takes this folder off the module search path: `auto_round.py` here has the name of the
package that it runs, and a package must not find the script instead of itself.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).parent.resolve()]

GROUP = 32  # weights per scale: SmolLM2's width of 576 does not divide by the usual 128
CODES = (-8, 7)  # of int4


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of the arguments that all peers take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the model")
    parser.add_argument("--windows", type=Path, required=True, help="safetensors file: `windows`, (N, length) int64")
    parser.add_argument("--out", type=Path, required=True, help="folder for the dequantized model and results.json")
    parser.add_argument("--limit", type=int, help="use the first LIMIT windows only")
    return parser


def read_windows(path: Path, limit: int | None) -> Tensor:
    """Return the calibration windows, (N, length) token ids."""
    return load_file(path)["windows"][:limit].contiguous()


def measured(work: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, float]]:
    """Run the peer; return its model, the wall time and the largest resident size of the process so far."""
    start = time.perf_counter()
    model = work()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return model, {"seconds": round(seconds, 1), "peak_mb": round(peak, 1)}


def exact_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """Return codes x scale in float32: what the peer means, without the rounding of its own dequantized copy.

    Raises:
        ValueError: The weights are not int4 codes times these scales.
    """
    wide = scale.float().repeat_interleave(GROUP, dim=1)
    ratio = weight.float() / wide
    codes = ratio.round()
    # 0.05 is three times what rounding 8 to bfloat16 can do.
    if (ratio - codes).abs().max() > 0.05 or codes.min() < CODES[0] or codes.max() > CODES[1]:
        raise ValueError(f"Not on the int4 grid of group {GROUP}")
    return codes * wide


def save(source: Path, out: Path, weights: dict[str, Tensor]) -> str:
    """Write the source model with these weights as a plain folder; return its dtype.

    The dtype is the source's, unless that would alter a weight: then float32.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    if any(not torch.equal(weight, weight.to(model.dtype).float()) for weight in weights.values()):
        model = model.float()
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        parameters[name].data.copy_(weight)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    return str(model.dtype).removeprefix("torch.")


def write_results(out: Path, package: str, figures: dict[str, float], settings: dict[str, object]) -> None:
    """Write OUT/results.json and print it."""
    versions = {name: version(name) for name in ("torch", "transformers")}
    results = {"tool": package, "version": version(package), **figures, "settings": settings, "versions": versions}
    results["threads"] = torch.get_num_threads()
    text = json.dumps(results, indent=2)
    (out / "results.json").write_text(text + "\n", encoding="utf-8")
    print(text)
