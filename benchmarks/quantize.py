"""Bytes against damage: pocketlm, plain rounding and other quantizers, every file read in llama.cpp.

    python benchmarks/quantize.py MODEL --calibrate FILE... --measure FILE... --sizes 62MB 75MB 90MB \
        [--tuned 62MB --tune 10m] [--peer NAME=FILE_OR_FOLDER]... --out benchmarks/results/quantize.md

MODEL is a Hugging Face folder. Files of text calibrate, other files measure. For every size one file is made by
`pocketlm quantize`'s own pipeline, and for those under --tuned one more with --tune. A peer is a GGUF file, or a folder
of dequantized weights (benchmarks/peers/ makes both), whose bytes are counted as if its codes were stored. Writes a
table (Markdown), the same as JSON, and the curve as a picture (SVG).
"""

import argparse
import json
import platform
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import matplotlib
from common import command_line, write_results
from matplotlib import pyplot

from pocketlm.cli.terminal import Screen
from pocketlm.export.gguf import write_gguf
from pocketlm.measure.device import machine, versions
from pocketlm.measure.quality import Comparison, compare
from pocketlm.model.anatomy import linears_of
from pocketlm.model.source import load
from pocketlm.model.text import pack_windows, read_corpus
from pocketlm.pipeline.planning import Fit, prepare
from pocketlm.pipeline.stages import run_recipe
from pocketlm.plan.budget import parse_time
from pocketlm.run.engine import Engine
from pocketlm.tensors.formats import FORMATS

LENGTH = 512
matplotlib.use("svg")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibrate", type=Path, nargs="+", required=True)
    parser.add_argument("--measure", type=Path, nargs="+", required=True)
    parser.add_argument("--sizes", nargs="*", default=[])
    parser.add_argument("--formats", nargs="*", default=[], help="one format for everything, by GPTQ and by rounding")
    parser.add_argument("--tuned", nargs="*", default=[], help="sizes of which a tuned file is made too")
    parser.add_argument("--tune", default="10m", help="time that tuning takes")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--windows", type=int, default=6, help="of 512 tokens, per text")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def make(args: argparse.Namespace, folder: Path, screen: Screen) -> dict[str, tuple[Path, dict]]:
    """Make pocketlm's files; return them by name with what was predicted and how long it took."""
    files = {}
    jobs = [(f"pocketlm {size}", {"size": size}) for size in args.sizes]
    jobs += [(f"pocketlm {size} tuned", {"size": size, "tune": parse_time(args.tune)}) for size in args.tuned]
    for form in args.formats:
        jobs += [(f"pocketlm {form}", {"format": form}), (f"rounding {form}", {"format": form, "method": "rtn"})]
    for name, settings in jobs:
        began = time.monotonic()
        model = load(args.model)
        job = Fit(
            model=args.model,
            data=tuple(args.calibrate),
            prune=False,
            out=folder / "unused",
            **settings,
        )
        texts, planned = prepare(job, model, screen.progress)
        compressed = run_recipe(model, planned.recipe, texts, screen.progress)
        path = folder / f"{name.replace(' ', '-')}.gguf"
        write_gguf(compressed.model, compressed.packed, path)
        facts = {"seconds": round(time.monotonic() - began), "predicted_bytes": planned.predicted_bytes}
        if planned.plan:
            facts["predicted_kl"] = planned.plan.damage + planned.engine
        files[name] = path, facts
    return files


def as_gguf(path: Path, folder: Path) -> tuple[Path, dict]:
    """Return a GGUF file, itself or a folder's weights as F16, and for a folder the bytes that its codes would take."""
    if path.is_file():
        return path, {}
    model = load(str(path))
    written = folder / f"{path.name}.gguf"
    write_gguf(model, {}, written, plain="F16")
    settings = json.loads((path / "results.json").read_text())["settings"]
    saved = 16 - settings["bits"] - 16 / settings["group"]
    weights = sum(linear.weight.numel() for _, linear in linears_of(model.network).values())
    return written, {"bytes": written.stat().st_size - round(weights * saved / 8)}


def measure(files: dict[str, Path], args: argparse.Namespace, screen: Screen) -> dict[str, Comparison]:
    """Measure all files on the windows of each text; the first file is the reference."""
    tokenizer = load(args.model).tokenizer
    found = {}
    with ExitStack() as stack:
        engines = {name: stack.enter_context(Engine(path, context=LENGTH)) for name, path in files.items()}
        for text in args.measure:
            windows = pack_windows(read_corpus([text]).documents, tokenizer, args.windows, LENGTH)
            models = {name: engine.logits for name, engine in engines.items()}
            found[text.stem] = compare(models, windows, lambda i, n, t=text: screen.progress(f"on {t.stem}", i, n))
    return found


def table(rows: list[dict], texts: list[str]) -> list[str]:
    """Lay the figures out as Markdown, smallest file first."""
    heads = ["file", "bytes", *(f"{what} {text}" for text in texts for what in ("KL", "perplexity ratio"))]
    heads += ["predicted KL", "seconds"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row["name"], f"{row['bytes']:,}"]
        for text in texts:
            cells += [_cell(row[text]["kl"]), _cell(row[text]["ratio"])]
        cells += [f"{row['predicted_kl']:.3f}" if "predicted_kl" in row else "", str(row.get("seconds", ""))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(interval: dict | None) -> str:
    return "" if interval is None else f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def picture(rows: list[dict], texts: list[str], path: Path) -> None:
    """Draw KL against bytes, one panel per text."""
    figure, axes = pyplot.subplots(1, len(texts), figsize=(6.5 * len(texts), 4.6), squeeze=False)
    kinds = {
        "pocketlm": ("o", "#0a6ebd"),
        "tuned": ("*", "#063b66"),
        "one format": ("+", "#0a6ebd"),
        "rounding": ("x", "#888888"),
    }
    for axis, text in zip(axes[0], texts, strict=True):
        for kind in (*kinds, "llama.cpp", "other"):
            points = [row for row in rows if _kind(row["name"]) == kind and row[text]["kl"]]
            if not points:
                continue
            marker, colour = kinds.get(kind, ("s", "#c8442c") if kind == "llama.cpp" else ("^", "#7a4fb5"))
            x, y = [row["bytes"] / 1e6 for row in points], [row[text]["kl"]["value"] for row in points]
            axis.plot(x, y, marker, color=colour, label=kind, linestyle="-" if kind == "pocketlm" else "none")
            # Slanted away from the curve, so that neighbours do not write over each other.
            place = {"xytext": (2, 3), "rotation": 35}
            if kind == "tuned":
                place = {"xytext": (-5, -9), "ha": "right"}
            elif kind != "pocketlm":
                place = {"xytext": (2, -3), "rotation": -35, "va": "top"}
            for row, at, kl in zip(points, x, y, strict=True):
                label = row["name"].removeprefix("pocketlm ").removeprefix(f"{kind} ")
                axis.annotate(label, (at, kl), fontsize=6, textcoords="offset points", **place)
        axis.margins(x=0.15)
        axis.set(xlabel="file (MB)", ylabel="KL to the original (nats per token)", title=text, yscale="log")
        axis.set_ylim(top=2)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def _kind(name: str) -> str:
    if name.endswith("tuned"):
        return "tuned"
    first, _, rest = name.partition(" ")
    if first == "pocketlm" and rest in FORMATS:
        return "one format"
    return first if first in ("pocketlm", "rounding", "llama.cpp") else "other"


def main() -> None:
    """Make, measure, write."""
    args = arguments()
    with tempfile.TemporaryDirectory() as temporary, Screen() as screen:
        folder = Path(temporary)
        reference = folder / "original.gguf"
        write_gguf(load(args.model), {}, reference)
        peers = {name: Path(path) for name, _, path in (peer.partition("=") for peer in args.peer)}
        peers = {name: as_gguf(path, folder) for name, path in peers.items()}  # before the work: they may be missing
        made = make(args, folder, screen) | peers
        files = {"original F16": reference} | {name: path for name, (path, _) in made.items()}
        found = measure(files, args, screen)
        texts = list(found)
        rows = []
        for name, path in files.items():
            row = {"name": name, "bytes": path.stat().st_size, **(made[name][1] if name in made else {})}
            for text, comparison in found.items():
                quality = comparison.qualities[name]
                row[text] = {
                    "kl": quality.kl and vars(quality.kl),
                    "ratio": vars(quality.ratio),
                    "perplexity": vars(quality.perplexity),
                }
            rows.append(row)
    rows.sort(key=lambda row: row["bytes"])
    here = machine(args.out.parent)
    head = [
        "# Bytes against damage",
        "",
        f"`{command_line()}`",
        "",
        f"{here.cpu}, {here.cores} cores; " + ", ".join(f"{name} {which}" for name, which in versions().items()),
        f"{platform.system()}. {args.windows} windows of {LENGTH} tokens per text, read in llama.cpp from the files; ",
        "in brackets 95 % intervals (bootstrap over windows, paired). Seconds leave out what earlier files kept.",
        "Decoded weights of a peer are read from an F16 file; its bytes are those of its codes and scales.",
        "",
    ]
    write_results(args.out, [*head, *table(rows, texts), "", f"![curve]({args.out.stem}.svg)"], rows)
    picture(rows, texts, args.out.with_suffix(".svg"))
    print("\n".join(table(rows, texts)))


if __name__ == "__main__":
    main()
