"""What was predicted of files beside what they are: bytes, memory while running, tokens per second.

    python benchmarks/footprint.py FITTED... [--context 2048]

Each is a folder that `pocketlm fit` or `quantize` wrote. The prediction of a plan adds up what each format costs in the
engine on this machine (hollow files, one per format, are run for it); behind it stands a hollow file of the very
layout, which `--ram` and `--speed` run before anything is computed; then the file itself. Speed on a busy machine is
noise. Writes a page (Markdown) and the same as JSON.
"""

import argparse
import datetime
from pathlib import Path

from common import command_line, write_results

from pocketlm.cli.terminal import Screen
from pocketlm.measure.device import machine
from pocketlm.model.source import load
from pocketlm.plan.footprint import measure_costs, measure_file, measure_layout
from pocketlm.plan.recipe import read_recipe
from pocketlm.plan.sizes import sizes_of
from pocketlm.steps.quantize import Quantize


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fitted", type=Path, nargs="+")
    parser.add_argument("--context", type=int, default=2048)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{today}-footprint.md")
    return parser.parse_args()


def compared(folder: Path, context: int, screen: Screen) -> dict:
    """Return what was predicted of a fitted folder's file, and what it is."""
    model = load(str(folder / "hf"))
    sizes = sizes_of(model)
    (step,) = (step for step in read_recipe(folder / "recipe.yaml").steps if isinstance(step, Quantize))
    costs = measure_costs(model, sizes, context, screen.progress)
    memory, seconds = costs.of(sizes, sizes.original, step.formats)
    hollow = measure_layout(model, sizes.original, step.formats, context)
    real = measure_file(folder / "model.gguf", context)
    return {
        "name": folder.name,
        "bytes": (sizes.total(sizes.original, step.formats), (folder / "model.gguf").stat().st_size),
        "memory": (memory, hollow.memory, real.memory),
        "speed": (1 / seconds, hollow.speed, real.speed),
    }


def main() -> None:
    """Measure, compare, write."""
    args = arguments()
    with Screen() as screen:
        rows = [compared(folder, args.context, screen) for folder in args.fitted]
    lines = [
        "# Predicted and measured: bytes, memory, speed",
        "",
        f"`{command_line()}`",
        "",
        f"{machine(args.out.parent).cpu}; {args.context} tokens of context; in brackets: off what was measured by.",
        "",
        "| file | bytes | memory: added up | hollow file | the file | tokens/s: added up | hollow file | the file |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        expected, actual = row["bytes"]
        cells = [f"{actual:,} " + ("as predicted" if expected == actual else f"({expected:,} predicted)")]
        for what, scale, unit in (("memory", 1e6, " MB"), ("speed", 1, "")):
            *guesses, real = row[what]
            cells += [f"{guess / scale:.1f}{unit} ({guess / real - 1:+.0%})" for guess in guesses]
            cells.append(f"{real / scale:.1f}{unit}")
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    write_results(args.out, lines, rows)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
