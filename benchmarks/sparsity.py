"""What cutting connections costs: perplexity and KL by magnitude, Wanda and SparseGPT, half of the weights and 2:4.

    python benchmarks/sparsity.py --model MODEL --calibrate FILE... --text FILE... --out benchmarks/results/sparsity.md

Some text calibrates, other text measures. The network is measured with its weights rounded to bfloat16, as they are
saved, and computes in bfloat16 where the hardware does. Bytes are those of the tensors as bitmasks; a GGUF file stores
zeros like any other number.
"""

import argparse
import time
from functools import cache
from pathlib import Path

from common import command_line, write_results
from texts import windows_in_turn

from pocketlm.cli.terminal import Screen
from pocketlm.export.sparse_bitmask import predicted_bytes, zero_counts
from pocketlm.measure.device import machine, versions
from pocketlm.measure.quality import Logits, compare
from pocketlm.model.compute import fast_forward
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.source import load
from pocketlm.steps.sparsify import Sparsify, sparsify

import torch  # isort: skip

METHODS = ("sparsegpt", "wanda_absorbed", "wanda", "magnitude")
CHOICES = [
    *(Sparsify(sparsity=0.5, method=method) for method in METHODS),
    *(Sparsify(pattern="2:4", method=method) for method in METHODS),
    *(Sparsify(sparsity=0.5, method=method, allocation="owl") for method in ("sparsegpt", "wanda")),
]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibrate", type=Path, nargs="+", required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="to measure on")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--calibration-windows", type=int, default=32, help="of 512 tokens")
    parser.add_argument("--windows", type=int, default=12, help="of 512 tokens, to measure on")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def logits_of(model: LanguageModel) -> Logits:
    """Return a function from token ids to the logits of a network, float32, each window's kept."""

    @cache
    @torch.no_grad()
    def logits(ids: tuple[int, ...]) -> torch.Tensor:
        with fast_forward(next(model.network.parameters()).device):
            return model.network(torch.tensor([ids]), use_cache=False).logits[0].float()

    return lambda ids: logits(tuple(ids))


def bytes_of(model: LanguageModel) -> int:
    """Return the bytes of the tensors with the blocks as bitmasks."""
    shapes = {name: tuple(weight.shape) for name, weight in model.network.named_parameters()}
    return predicted_bytes(shapes, zero_counts(model))


def row_of(config: Sparsify, args: argparse.Namespace, dense: Logits, screen: Screen) -> dict:
    """Cut and measure; return the figures."""
    model = load(args.model)
    calibration, held_out = (
        windows_in_turn(files, model.tokenizer, count, 512)
        for files, count in ((args.calibrate, args.calibration_windows), (args.text, args.windows))
    )
    began = time.process_time()
    model, report = sparsify(model, config, calibration, lambda i, n: screen.progress(config.method, i, n))
    seconds = time.process_time() - began
    for parameter in model.network.parameters():
        parameter.data = parameter.data.bfloat16().float()
    models = {"dense": dense, "cut": logits_of(model)}
    qualities = compare(models, held_out, lambda i, n: screen.progress("measuring", i, n)).qualities
    figures = {key: vars(getattr(qualities["cut"], key)) for key in ("perplexity", "ratio", "kl", "agreement")}
    errors = report.details["output_error"]
    return {
        "sparsity": config.pattern or f"{config.sparsity:.0%}",
        "method": config.method,
        "allocation": config.allocation,
        "cpu_seconds": round(seconds, 1),
        "bytes": bytes_of(model),
        "output_error": sum(errors) / len(errors),
        "dense_perplexity": vars(qualities["dense"].perplexity),
        **figures,
    }


def page(rows: list[dict], args: argparse.Namespace, dense: LanguageModel) -> list[str]:
    """Lay the figures out as Markdown."""
    here = machine(args.out.parent)
    shapes = {name: tuple(weight.shape) for name, weight in dense.network.named_parameters()}
    lines = [
        "# Cutting connections",
        "",
        f"`{command_line()}`",
        "",
        f"{here.cpu}, {torch.get_num_threads()} thread(s); torch {versions()['torch']}. "
        f"{args.calibration_windows} windows of 512 tokens calibrate, {args.windows} measure; 95 % intervals "
        f"(bootstrap over windows, paired). The dense model has perplexity {_cell(rows[0]['dense_perplexity'], 2)}, "
        f"and its tensors take {predicted_bytes(shapes, {}):,} bytes in 16 bits. Bytes of the cut models are with a "
        "bitmask; in a GGUF file zeros save nothing.",
        "",
        "| zeros | method | allocation | perplexity | ratio | KL | output error | bytes | CPU seconds |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        cells = [row["sparsity"], row["method"], row["allocation"], _cell(row["perplexity"], 2), _cell(row["ratio"], 3)]
        cells += [_cell(row["kl"], 3), f"{row['output_error']:.4f}", f"{row['bytes']:,}", f"{row['cpu_seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Cut in every way, measure, write the table; a run that is cut off leaves the rows that it has."""
    args = arguments()
    dense = load(args.model)
    of_dense, rows = logits_of(dense), []
    with Screen() as screen:
        for config in (choice for choice in CHOICES if choice.method in args.methods):
            rows.append(row_of(config, args, of_dense, screen))
            write_results(args.out, page(rows, args, dense), rows)
    print("\n".join(page(rows, args, dense)))


def _cell(interval: dict, digits: int) -> str:
    return "{value:.{d}f} [{low:.{d}f}, {high:.{d}f}]".format(**interval, d=digits)


if __name__ == "__main__":
    main()
