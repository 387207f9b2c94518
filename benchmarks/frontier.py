"""The frontier of a model: what each size costs in perplexity, KL and tasks, beside formats alone at the same bytes.

    python benchmarks/frontier.py MODEL --sizes 40MB 50MB 60MB 75MB 90MB --calibrate FILE... --measure FILE... \
        --task arc_easy.jsonl piqa.jsonl hellaswag.jsonl --items 500 [--peer NAME=FILE.gguf]... \
        --work FOLDER --out benchmarks/results/frontier.md

Every size is made twice by `pocketlm fit --sweep`'s own machinery: with all that it may do (joint), and with formats
alone (plain). Files and scores are kept, in --work and in the cache: a run that was stopped goes on where it was.
Tasks are what `pocketlm evaluate --task` reads; all files are read in llama.cpp. Writes Markdown, JSON and a picture.
"""

import argparse
import json
import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import NormalDist

from common import command_line, write_results

from pocketlm.api import Fit, evaluate, load, sweep
from pocketlm.cli.terminal import Screen
from pocketlm.errors import ImpossibleBudgetError
from pocketlm.interval import Interval
from pocketlm.measure.device import machine, versions
from pocketlm.measure.task_files import Task, read_task
from pocketlm.measure.tasks import Outcome, pair
from pocketlm.model.files import file_sha256
from pocketlm.pipeline.cache import stage
from pocketlm.pipeline.proof import original_file
from pocketlm.pipeline.scoring import outcomes
from pocketlm.plan.budget import parse_time
from pocketlm.report.charts import scatter
from pocketlm.report.pages import style
from pocketlm.report.write import replace_text

ORIGINAL = "original"
Z = NormalDist().inv_cdf(0.975)
KINDS = {"joint": True, "plain": False}  # whether parts may be removed
LOOKS = {"original": "peer", "plain": "plain", "compressed": "joint"}  # kind of file by the style's class; last on top
NAMES = {"peer": "other files (--peer)", "plain": "formats alone", "joint": "joint"}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sizes", nargs="+", required=True)
    parser.add_argument("--calibrate", type=Path, nargs="*", default=[], help="pocketlm's own text if not given")
    parser.add_argument("--measure", type=Path, nargs="*", default=[], help="Python's help topics if not given")
    parser.add_argument("--windows", type=int, default=12, help="of 512 tokens to measure on")
    parser.add_argument("--task", type=Path, nargs="*", default=[])
    parser.add_argument("--items", type=int, default=500, help="of each task")
    parser.add_argument("--heal", help="time for recovery after pruning, such as 30m")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def make(args: argparse.Namespace, screen: Screen) -> dict[str, dict]:
    """Make every size both ways; return file and seconds by name, and why a size cannot be met."""
    made: dict[str, dict] = {}
    heal = None if args.heal is None else parse_time(args.heal)
    for kind, prune in KINDS.items():
        data = tuple(args.calibrate)
        said = ["pocketlm", "fit" if prune else "quantize", args.model]
        said += [f"--data={path}" for path in data] + ([f"--heal={args.heal}"] if args.heal and prune else [])
        for size in args.sizes:
            name, began = f"{kind} {size}", time.monotonic()
            kept, command = args.work / f"{kind}-{size}.json", shlex.join([*said, f"--size={size}"])
            job = Fit(model=args.model, data=data, prune=prune, heal=heal, out=args.work / kind, command=command)
            try:
                (folder,) = sweep(job, (size,), screen.progress).reports
            except ImpossibleBudgetError as error:
                made[name] = {"refused": str(error)}
                continue
            if not kept.exists():  # of the run that made it, not of one that finds it
                replace_text(kept, json.dumps(round(time.monotonic() - began)))
            made[name] = {
                "file": str(job.out / folder / "model.gguf"),
                "seconds": json.loads(kept.read_text()),
                "recipe": (job.out / folder / "recipe.yaml").read_text(),
            }
    return made


def quality(args: argparse.Namespace, file: Path, screen: Screen) -> dict:
    """Measure a file against the original on held-out text."""
    inputs = {"file": file_sha256(file), "model": args.model, "windows": args.windows}
    inputs |= {"text": [file_sha256(path) for path in args.measure]}

    def produce(folder: Path) -> dict:
        found = evaluate(str(file), args.model, args.measure, args.windows, screen.progress).qualities["model"]
        return asdict(found)

    return stage("frontier-quality", inputs, produce).facts


def solve(file: Path, tasks: list[Task], screen: Screen) -> list[list[bool]]:
    """Return which items of each task a file has right, by what its kind of task is judged by."""

    def produce(folder: Path) -> list:
        return [[_hit(each) for each in row] for row in outcomes(file, load(str(file)), tasks, screen.progress)]

    inputs = {"file": file_sha256(file), "tasks": [asdict(task) for task in tasks]}
    return stage("frontier-tasks", inputs, produce).facts


def _hit(outcome: Outcome) -> bool:
    return outcome.right if outcome.normed is None else outcome.normed


def mean_of(values: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the mean of the tasks' means with its normal 95 % interval."""
    means = [sum(each) / len(each) for each in values]
    variances = [
        sum((value - mean) ** 2 for value in each) / max(1, len(each) - 1) / len(each)
        for mean, each in zip(means, values, strict=True)
    ]
    mean, half = sum(means) / len(means), Z * math.sqrt(sum(variances)) / len(means)
    return {"value": mean, "low": mean - half, "high": mean + half}


def scores(tasks: list[Task], ours: list[list[bool]], original: list[list[bool]]) -> dict:
    """Return a file's mean over the tasks, its paired difference to the original's, and each task's."""
    change = [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(ours, original, strict=True)]
    each = {
        task.name: {
            "items": len(rows),
            "value": sum(rows) / len(rows),
            "difference": asdict(pair(before, rows).difference),
        }
        for task, rows, before in zip(tasks, ours, original, strict=True)
    }
    return {"mean": mean_of(ours), "difference": mean_of(change), "each": each}


def row_of(args: argparse.Namespace, name: str, facts: dict, tasks: list[Task], screen: Screen) -> dict:
    """Return all figures of a file."""
    if "refused" in facts:
        return {"name": name, **facts}
    file = Path(facts["file"])
    row = {"name": name, "bytes": file.stat().st_size, "seconds": facts.get("seconds"), "recipe": facts.get("recipe")}
    if name != ORIGINAL:
        found = quality(args, file, screen)
        row |= {"ratio": found["ratio"], "kl": found["kl"]}
    if tasks:
        original = solve(original_file(load(args.model)), tasks, screen)
        row["tasks"] = scores(tasks, solve(file, tasks, screen), original)
    return row


def table(rows: list[dict]) -> list[str]:
    """Lay the figures out as Markdown, smallest file first, then what cannot be made."""
    heads = ("file", "bytes", "perplexity ratio", "KL, nats per token", "mean of tasks", "to the original", "seconds")
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        if "refused" in row:
            continue
        tasks = row.get("tasks")
        cells = [row["name"], f"{row['bytes']:,}", _cell(row.get("ratio")), _cell(row.get("kl"))]
        cells += [_cell(tasks["mean"], 100, "%"), _cell(tasks["difference"], 100, " points")] if tasks else ["", ""]
        cells.append("" if row["seconds"] is None else f"{row['seconds']:,}")
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", *(f"{row['name']}: {row['refused']}" for row in rows if "refused" in row)]


def _cell(interval: dict | None, scale: float = 1, unit: str = "") -> str:
    if interval is None:
        return ""
    value, low, high = (f"{scale * interval[end]:.{3 if scale == 1 else 1}f}" for end in ("value", "low", "high"))
    return f"{value}{unit} [{low}, {high}]"


def picture(rows: list[dict]) -> str:
    """Return the frontier as SVG: the rise of perplexity as a logarithm, and the mean of the tasks if there are any."""
    drawn = [row for row in rows if "refused" not in row and row["name"] != ORIGINAL]
    panels = [("Logarithm of the perplexity ratio (nats per token) over megabytes", _lost)]
    if any("tasks" in row for row in drawn):
        panels.append(("Mean of the tasks over megabytes", lambda row: row["tasks"]["mean"]))
    parts = []
    for index, (title, of) in enumerate(panels):
        series = []
        for look, kind in LOOKS.items():
            members = [row for row in drawn if _kind(row["name"]) == kind]
            series.append((look, [(row["bytes"] / 1e6, Interval(**of(row)), "") for row in members]))
        body = scatter(series, title)
        parts.append(f'<svg x="20" y="{46 + 330 * index}" width="720"><text y="12">{title}</text>')
        parts.append(f'<svg y="26" width="720">{body}</svg></svg>')
    for place, (look, kind) in enumerate(LOOKS.items()):
        at = 26 + 240 * place
        parts.append(f'<circle fill="var(--{look})" cx="{at}" cy="20" r="5"/>')
        parts.append(f'<text x="{at + 12}" y="24">{NAMES[kind]}</text>')
    height = 330 * len(panels) + 46
    look = style() + "svg { font: 13px sans-serif; } text { fill: var(--ink); } .back { fill: var(--paper); }"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="760" height="{height}"><style>{look}</style>'
    return f'{head}<rect class="back" width="100%" height="100%"/>{"".join(parts)}</svg>\n'


def _lost(row: dict) -> dict[str, float]:
    return {end: math.log(value) for end, value in row["ratio"].items()}


def _kind(name: str) -> str:
    kind = name.partition(" ")[0]
    return kind if kind in KINDS else "peer"


def main() -> None:
    """Make, measure, write."""
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    with Screen() as screen:
        tasks = [read_task(path, args.items) for path in args.task]
        files = {ORIGINAL: {"file": str(original_file(load(args.model)))}, **make(args, screen)}
        files |= {name: {"file": path} for name, _, path in (peer.partition("=") for peer in args.peer)}
        rows = [row_of(args, name, facts, tasks, screen) for name, facts in files.items()]
    rows.sort(key=lambda row: row.get("bytes", 0))
    here = machine(args.out.parent if args.out.parent.exists() else Path())
    head = [
        "# Quality against size",
        "",
        f"`{command_line()}`",
        "",
        f"{here.cpu}, {here.cores} cores; " + ", ".join(f"{name} {which}" for name, which in versions().items()) + ".",
        f"{args.windows} windows of held-out text, all files read in llama.cpp, by tasks with Q2_0 as Q4_0 (the same",
        "weights). Joint files may lose parts and heal,",
        "plain ones choose formats alone. Brackets are 95 % intervals: bootstrap over windows, paired; over items"
        + (f" of tasks ({', '.join(f'{task.name}: {len(task.items)}' for task in tasks)})." if tasks else "."),
        "Seconds are of the whole `fit`, its proof included; the first size also measures what the others find in the",
        "cache.",
        "",
    ]
    write_results(args.out, [*head, *table(rows), "", f"![frontier]({args.out.stem}.svg)"], rows)
    args.out.with_suffix(".svg").write_text(picture(rows))
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
