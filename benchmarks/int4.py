"""Int4 in groups of 32, body only: pocketlm beside llm-compressor's GPTQ and auto-round, on the same windows.

    python benchmarks/int4.py MODEL --windows WINDOWS.safetensors --measure FILE... --out benchmarks/results/int4.md \
        [--forms Q4_0 IQ4_NL] [--rounding 64] [--llm-compressor PYTHON] [--auto-round PYTHON [--iters 200]] \
        [--keep FOLDER]

All take 4.5 bits per weight (a 16-bit scale per 32 weights); embedding and head stay as they are. pocketlm runs its
GPTQ alone, and its default method with the weighing of tokens that belongs to it; with --rounding also learned rounding
of so many iterations a block behind that. PYTHON is the interpreter of an environment that has the peer
(benchmarks/peers/README.md). Each runs alone, one after the other, as a process of its own that times the quantizing
(the model is loaded already) and reads its own peak memory. Quality is read in llama.cpp from F16 files of the decoded
weights. With --keep each one's decoded weights stay, in a folder of their own under FOLDER.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import command_line, write_results
from safetensors.torch import load_file

from pocketlm.cli.terminal import Screen
from pocketlm.export.gguf import write_gguf
from pocketlm.measure.device import machine, versions
from pocketlm.model.importance import token_importance
from pocketlm.model.language_model import LanguageModel, save
from pocketlm.model.source import load
from pocketlm.model.text import pack_windows, read_corpus
from pocketlm.pipeline.proof import measure_quality
from pocketlm.steps.quantize import Quantize, quantize
from pocketlm.tensors.formats import unpack

import torch  # isort: skip

FORMS = ("Q4_0", "IQ4_NL")


def body_in(form: str) -> dict[str, str]:
    """Return the formats that leave only the body quantized."""
    groups = ("query_key", "value", "attention_out", "ffn_in", "ffn_out")
    return dict.fromkeys(groups, form) | {"embedding": "F16"}


def quantize_here(args: argparse.Namespace) -> None:
    """Quantize in this process and report; run as a subprocess of its own."""
    model: LanguageModel = load(args.model, torch.bfloat16)  # as the file has it, and as the peers load it
    windows = load_file(args.windows)["windows"]
    step = Quantize(formats=body_in(args.form), method=args.method, learned_rounding=args.rounding)
    began = time.monotonic()
    weights = token_importance(model.network, windows, step.seed) if step.method == "descent" else None
    model, packed, _ = quantize(model, step, windows, importance=weights)
    seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    exact = load(args.model)  # what the codes stand for, which bfloat16 would round
    for name, stored in packed.items():
        exact.network.get_parameter(name).data = unpack(stored).decode()
    save(exact, args.out, dtype=torch.float32)
    figures = {"seconds": round(seconds, 1), "peak_mb": round(peak), "settings": {"bits": 4, "group": 32}}
    (args.out / "results.json").write_text(json.dumps(figures))


def run_all(args: argparse.Namespace, jobs: dict[str, list[str]]) -> tuple[list[dict], list[str]]:
    """Run each job in a process of its own, then measure all; return rows of figures and the texts' names."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary, Screen() as screen:
        folder = Path(temporary)
        files = {"original": folder / "original.gguf"}
        write_gguf(load(args.model), {}, files["original"])
        for number, (name, command) in enumerate(jobs.items()):
            screen.progress(name, 0, 1)
            out = (args.keep or folder) / name.replace(" ", "-")
            subprocess.run([*command, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)
            rows.append({"name": name, **json.loads((out / "results.json").read_text())})
            files[name] = folder / f"{number}.gguf"
            write_gguf(load(str(out)), {}, files[name])
        tokenizer = load(args.model).tokenizer
        texts = [text.stem for text in args.measure]
        for text in args.measure:
            windows = pack_windows(read_corpus([text]).documents, tokenizer, args.count)
            qualities = measure_quality(files, windows, screen.progress).qualities
            for row in rows:
                row[text.stem] = {key: vars(getattr(qualities[row["name"]], key)) for key in ("kl", "ratio")}
    return rows, texts


def main() -> None:
    """Run all, measure all, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--windows", type=Path, required=True)
    parser.add_argument("--measure", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--llm-compressor")
    parser.add_argument("--auto-round")
    parser.add_argument("--iters", default="200")
    parser.add_argument("--count", type=int, default=6, help="windows of 512 tokens to measure on, per text")
    parser.add_argument("--forms", nargs="+", default=FORMS)
    parser.add_argument("--rounding", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--form", help=argparse.SUPPRESS)
    parser.add_argument("--method", default="descent", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.form:
        quantize_here(args)
        return
    peers = Path(__file__).parent / "peers"
    same = ["--model", args.model, "--windows", str(args.windows)]
    jobs = {}
    for form in args.forms:
        own = [sys.executable, __file__, args.model, "--windows", str(args.windows), "--form", form]
        jobs[f"pocketlm GPTQ {form}"] = [*own, "--method", "gptq"]
        jobs[f"pocketlm default {form}"] = own
        if args.rounding:
            name = f"pocketlm default {form}, {args.rounding} iterations of learned rounding"
            jobs[name] = [*own, "--rounding", str(args.rounding)]
    if args.llm_compressor:
        jobs["llm-compressor GPTQ"] = [args.llm_compressor, str(peers / "llm_compressor.py"), *same]
    if args.auto_round:
        iters = ["--iters", args.iters]
        jobs[f"auto-round {args.iters} iterations"] = [args.auto_round, str(peers / "auto_round.py"), *same, *iters]
    rows, texts = run_all(args, jobs)
    here = machine(args.out.parent)
    lines = [
        "# Int4, groups of 32, body only",
        "",
        f"`{command_line()}`",
        "",
        f"{here.cpu}, {here.cores} cores; torch {versions()['torch']}. "
        "Seconds of quantizing, peak memory of the process.",
        "",
        "| | seconds | peak MB | " + " | ".join(f"KL {text} | perplexity ratio {text}" for text in texts) + " |",
        "|---" * (3 + 2 * len(texts)) + "|",
    ]
    for row in rows:
        cells = [
            f"{row[text][key]['value']:.4f} [{row[text][key]['low']:.4f}, {row[text][key]['high']:.4f}]"
            for text in texts
            for key in ("kl", "ratio")
        ]
        lines.append(f"| {row['name']} | {row['seconds']:.0f} | {row['peak_mb']:.0f} | " + " | ".join(cells) + " |")
    write_results(args.out, lines, rows)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
