"""Peak memory of quantizing a 1B-parameter Llama of random weights to 4 bits.

    python benchmarks/memory.py MODEL [--format q4_0] --out benchmarks/results/memory-1b.md

Writes a random Llama as wide as Llama 3.2 1B, of 18 blocks, with MODEL's tokenizer to a temporary folder (2.5 GB),
quantizes it in a process of its own with `pocketlm quantize`'s steps (text, statistics, codes by its default method,
GGUF), and reads that process's peak.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from common import command_line

from pocketlm.cli.terminal import Screen
from pocketlm.export.gguf import write_gguf
from pocketlm.measure.device import machine
from pocketlm.model.language_model import save
from pocketlm.model.source import load
from pocketlm.model.text import python_topics
from pocketlm.pipeline.planning import Fit, load_for, prepare
from pocketlm.pipeline.stages import run_recipe


def random_llama(source: str, folder: Path) -> None:
    """Write the model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = load(source)
    config = LlamaConfig(
        vocab_size=model.network.config.vocab_size, hidden_size=2048, intermediate_size=8192, num_hidden_layers=18,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    network = LlamaForCausalLM(config).eval()
    print(f"{sum(p.numel() for p in network.parameters()):,} parameters")
    save(replace(model, network=network), folder)


def main() -> None:
    """Make the model, quantize it elsewhere, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--format", default="q4_0")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        random_llama(args.model, args.out)
        return
    if args.here:
        text = args.out.with_suffix(".txt")  # else the model would write its own, which is slow and beside the point
        text.write_text("\n\n".join(python_topics().documents))
        job = Fit(model=args.model, format=args.format, prune=False, out=args.out, data=(text,))
        began = time.monotonic()
        with Screen() as screen:
            model = load_for(job)
            texts, planned = prepare(job, model, screen.progress)
            compressed = run_recipe(model, planned.recipe, texts, screen.progress)
            write_gguf(compressed.model, compressed.packed, args.out)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{time.monotonic() - began:.0f} s, peak {peak:.2f} GB, file {args.out.stat().st_size / 1e6:,.1f} MB")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder, file = Path(temporary) / "random-1b", Path(temporary) / "random-1b.gguf"
        made = subprocess.run(
            [sys.executable, __file__, args.model, "--make", "--out", str(folder)],
            check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        command = [sys.executable, __file__, str(folder), "--format", args.format, "--here", "--out", str(file)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    here = machine(args.out.parent)
    lines = [
        "# Peak memory of quantizing a 1B model",
        "",
        f"`{command_line()}`",
        "",
        f"{here.cpu}, {here.cores} cores. {made.stdout.strip()}, {args.format.upper()}: {done.stdout.strip()}",
        "",
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
