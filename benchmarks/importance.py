"""What it is worth to count tokens by their importance: the KL of some blocks, coarsely stored, on text not seen.

    python benchmarks/importance.py MODEL --calibrate FILE... [--blocks 10 20] [--rounding 64] \
        --out benchmarks/results/importance.md

Stores blocks in 2 to 4 bits with codes by `descent`, from the same windows of text and with all else equal, once with
every token counting alike, once by its importance, and with --rounding once more with so many iterations of learned
rounding a block behind that, and measures the KL to the original on held-out windows.
"""

import argparse
import time
from pathlib import Path

import torch
from common import command_line, write_results
from torch import Tensor

from pocketlm.measure.device import machine, versions
from pocketlm.model.anatomy import anatomy_of, blocks_of
from pocketlm.model.importance import token_importance
from pocketlm.model.judge import Judge, divergence_of, judge
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.source import load
from pocketlm.model.sweep import Importance
from pocketlm.model.text import read_corpus
from pocketlm.steps.quantize import Quantize, quantize, tensors_of

FORMATS = {
    "embedding": "F16",
    "query_key": "IQ4_NL",
    "value": "IQ4_NL",
    "attention_out": "MXFP4",
    "ffn_in": "Q2_0",
    "ffn_out": "IQ2_S",
}
HELD_OUT = 12  # windows


def stored(
    model: LanguageModel,
    blocks: range,
    windows: Tensor,
    importance: Importance | None,
    rounding: int,
    held_out: Tensor,
    opinion: Judge,
) -> float:
    """Return the KL of a model whose blocks are stored in FORMATS; its weights are as before afterwards."""
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    prefixes = tuple(f"{anatomy_of(model.network).blocks}.{index}." for index in blocks)
    tensors = tensors_of(model)
    coarse = {name: FORMATS[group] for name, (group, _) in tensors.items() if name.startswith(prefixes)}
    formats = {group: "F16" for group, _ in tensors.values()} | coarse
    quantize(model, Quantize(formats=formats, learned_rounding=rounding), windows, importance=importance)
    found = divergence_of(model.network, held_out, opinion)
    model.network.load_state_dict(before)
    return found


def main() -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibrate", type=Path, nargs="+", required=True)
    parser.add_argument("--blocks", type=int, nargs=2, default=(10, 20), metavar=("FIRST", "BEHIND"))
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--rounding", type=int, default=0, help="iterations of learned rounding")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model, corpus = load(args.model, torch.float32), read_corpus(args.calibrate)
    windows = corpus.tokens("calibration", model.tokenizer, args.windows).windows
    held_out = corpus.tokens("validation", model.tokenizer, HELD_OUT).windows
    blocks = range(args.blocks[0], min(args.blocks[1], len(blocks_of(model.network))))
    opinion = judge(model.network, held_out)
    rows = []
    ways = [("alike", 0), ("by importance", 0)]
    ways += [(f"by importance, {args.rounding} iterations of learned rounding", args.rounding)] if args.rounding else []
    importance = None
    for name, rounding in ways:
        began = time.monotonic()
        if name != "alike" and importance is None:
            importance = token_importance(model.network, windows)
        kl = stored(model, blocks, windows, importance, rounding, held_out, opinion)
        rows.append({"tokens count": name, "kl": kl, "seconds": time.monotonic() - began})
        print(rows[-1], flush=True)
    here = machine(args.out.parent)
    lines = [
        "# What it is worth to count tokens by their importance",
        "",
        f"`{command_line()}`",
        "",
        f"{here.cpu}, {here.cores} cores; torch {versions()['torch']}. Blocks {blocks[0]} to {blocks[-1]} stored as "
        f"{', '.join(f'{group}: {form}' for group, form in FORMATS.items() if form != 'F16')}, all else as it was; "
        f"{len(windows)} windows of 512 tokens to choose codes from, KL to the original on {len(held_out)} others.",
        "",
        "| tokens count | KL, nats per token | seconds |",
        "|---|---|---|",
        *(f"| {row['tokens count']} | {row['kl']:.4f} | {row['seconds']:.0f} |" for row in rows),
    ]
    write_results(args.out, lines, rows)


if __name__ == "__main__":
    main()
