"""What calibration text, damping and descents are worth: the output error of one block on text that was not seen.

    python benchmarks/calibration.py MODEL --calibrate FILE... [--block 2] --out benchmarks/results/calibration.md

Takes the second moments of one block's inputs on more and more windows of 512 tokens, chooses codes with each, and
compares the squared errors of the outputs on eight other windows of the same text. Rows are a sample.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

import torch
from common import command_line, write_results
from torch import Tensor

from pocketlm.measure.device import machine, versions
from pocketlm.model.anatomy import anatomy_of, blocks_of, read_weight
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.source import load
from pocketlm.model.sweep import sweep
from pocketlm.model.text import read_corpus
from pocketlm.tensors.elimination import gptq, output_errors
from pocketlm.tensors.formats import FORMATS

CASES = (("ffn_out", "Q2_0"), ("ffn_in", "Q2_0"), ("query_key", "IQ4_NL"))
WINDOWS, DAMPINGS, DESCENTS = (32, 64, 128), (0.01, 0.1), (0, 2, 4)
ROWS = 256  # of all matrices of a group
PART = 8  # windows whose statistics are taken together; the last of them are held out


def grams_of(model: LanguageModel, block: int, windows: Tensor) -> dict[str, Tensor]:
    """Return the second moments of what the linears of an unchanged model's block read, by space."""
    return next(layer.gram for layer in sweep(model.network, windows) if layer.index == block)


def main() -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibrate", type=Path, nargs="+", required=True)
    parser.add_argument("--block", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = load(args.model, torch.float32)
    most = WINDOWS[-1] + PART
    windows = read_corpus(args.calibrate).tokens("calibration", model.tokenizer, most).windows
    if len(windows) < most:
        sys.exit(f"The text has {len(windows)} windows, of which {most} are needed: give more with --calibrate")
    parts = [grams_of(model, args.block, part) for part in windows.split(PART)]
    block = blocks_of(model.network)[args.block]
    linears = [(edge, block.get_submodule(edge.path)) for edge in anatomy_of(model.network).edges]
    rows = []
    for group, name in CASES:
        edges = [(edge, linear) for edge, linear in linears if edge.group == group]
        weight, space = torch.cat([read_weight(linear) for _, linear in edges]), edges[0][0].reads
        weight = weight[:: max(1, len(weight) // ROWS)].contiguous()
        for count, damping, descents in product(WINDOWS, DAMPINGS, DESCENTS):
            gram = torch.stack([part[space] for part in parts[: count // PART]]).sum(0)
            decoded = gptq(weight, gram, FORMATS[name], damping, descents=descents).decode()
            error = output_errors(weight, decoded, parts[-1][space]).sum().item()
            base = next((row["error"] for row in rows if (row["group"], row["format"]) == (group, name)), error)
            rows.append(
                {"group": group, "format": name, "windows": count, "damping": damping, "descents": descents}
                | {"error": error, "relative": error / base}
            )
    here = machine(args.out.parent)
    lines = [
        "# What calibration text, damping and descents are worth",
        "",
        f"`{command_line()}`",
        "",
        f"{here.cpu}; torch {versions()['torch']}. Squared error of the outputs of block {args.block} on",
        f"{PART} windows of 512 tokens that were not calibrated on, relative to GPTQ with {WINDOWS[0]} "
        f"windows and damping {DAMPINGS[0]}.",
        "",
        "| tensors | format | windows | damping | " + " | ".join(f"{n} descents" for n in DESCENTS) + " |",
        "|" + "---|" * (4 + len(DESCENTS)),
    ]
    for start in range(0, len(rows), len(DESCENTS)):
        row = rows[start]
        cells = " | ".join(f"{each['relative']:.3f}" for each in rows[start : start + len(DESCENTS)])
        lines.append(f"| {row['group']} | {row['format']} | {row['windows']} | {row['damping']} | {cells} |")
    write_results(args.out, lines, rows)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
