"""Tokens per second and memory of distillation: pocketlm beside trl's GKD trainer, in turns.

    python benchmarks/distill_speed.py TEACHER STUDENT --text FILE... --peer PYTHON_WITH_TRL [--rounds 3] [--steps 6]
    python benchmarks/distill_speed.py TEACHER STUDENT --task FILE --peer PYTHON_WITH_TRL [--rounds 3] [--steps 6]

Both are Hugging Face folders. The same student learns from the same teacher on the same text: windows of which every
token is learnt, or the answers of a task (.jsonl of `prompt` and `answer`). Both learn by forward KL at temperature 1
with AdamW, in bfloat16 where the hardware has it. A task's examples share pocketlm's windows; trl is given as many per
step as those hold, each a row of its own, padded to the longest. Tokens are counted without padding. Every run is a
process of its own, and its first step is left out. On a busy machine the clock says little: the processor's own
seconds, all threads together, are given too. Writes a page (Markdown) and the same as JSON.
"""

import argparse
import datetime
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from common import command_line, write_results
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pocketlm.measure.device import machine, versions
from pocketlm.model.examples import pack_examples, read_examples
from pocketlm.model.learning import Lessons
from pocketlm.model.source import load
from pocketlm.model.text import pack_windows, read_corpus
from pocketlm.steps.distil import Distil, distil

LENGTH = 512
RATE = 3e-4


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("student")
    taught = parser.add_mutually_exclusive_group(required=True)
    taught.add_argument("--text", type=Path, nargs="+")
    taught.add_argument("--task", type=Path)
    parser.add_argument("--peer", type=Path, required=True, help="a Python that has trl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4, help=f"windows of {LENGTH} tokens")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{today}-distill-speed.md")
    return parser.parse_args()


def lessons_of(args: argparse.Namespace) -> Lessons:
    """Return what is learnt, as many windows as all steps need."""
    tokenizer, count = load(args.teacher).tokenizer, args.batch * args.steps
    if args.task:
        return pack_examples(read_examples(args.task), tokenizer, LENGTH)[:count]
    return Lessons(pack_windows(read_corpus(args.text).documents, tokenizer, count, LENGTH))


def rows_of(lessons: Lessons) -> tuple[list[Tensor], list[Tensor]]:
    """Return each text or example alone: its ids, and its labels, -100 where nothing is learnt."""
    if lessons.places is None:
        return list(lessons.ids), list(lessons.ids)
    ids, labels = [], []
    for window, places, counted in zip(lessons.ids, lessons.places, lessons.counted, strict=True):
        edges = [*(places == 0).nonzero().flatten().tolist(), len(window)]
        for start, stop in pairwise(edges):
            if counted[start:stop].any():  # what is not is the window's padding
                ids.append(window[start:stop])
                labels.append(window[start:stop].masked_fill(~counted[start:stop], -100))
    return ids, labels


def ours(teacher: str, student: str, data: Path, batch: int, steps: int) -> None:
    """Train with pocketlm and print the figures; runs in a process of its own."""
    ends: list[tuple[float, float]] = []
    tensors = load_file(data)
    lessons = Lessons(*(tensors.get(name) for name in ("ids", "places", "counted")))
    config = Distil(tokens=steps * batch * LENGTH, windows_per_step=batch, learning_rate=RATE, evaluations=1)
    _, report = distil(
        load(teacher),
        load(student),
        config,
        lessons if lessons.places is not None else lessons.ids,
        lessons[:1] if lessons.places is not None else lessons.ids[:1],
        lambda *_: ends.append((time.perf_counter(), time.process_time())),
    )
    # The last step has the held-out evaluation in it.
    seconds, work = ([later[i] - earlier[i] for earlier, later in pairwise(ends[:-1])] for i in (0, 1))
    figures = {"step_seconds": statistics.median(seconds), "step_cpu_seconds": statistics.median(work)}
    figures["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    print(json.dumps(figures | {"losses": report.details["losses"]}))


def spread(values: list[float]) -> str:
    """Return the median with the lowest and the highest."""
    return f"{statistics.median(values):.0f} [{min(values):.0f}, {max(values):.0f}]"


def main() -> None:
    """Run both in turns, write."""
    args = arguments()
    # Each run starts where this file is.
    args.teacher, args.student = (str(Path(name).resolve()) for name in (args.teacher, args.student))
    lessons = lessons_of(args)
    ids, labels = rows_of(lessons)
    per_step = round(len(ids) / len(lessons) * args.batch)
    real = sum(map(len, ids)) / len(lessons) * args.batch  # tokens in a step, on average
    runs: dict[str, list[dict]] = {"pocketlm": [], "trl": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parts = {name: getattr(lessons, name) for name in ("ids", "places", "counted")}
        save_file({name: part for name, part in parts.items() if part is not None}, folder / "lessons.safetensors")
        padded = {"windows": pad_sequence(ids, batch_first=True), "labels": pad_sequence(labels, True, -100)}
        padded["lengths"] = torch.tensor([len(row) for row in ids])
        save_file(padded, folder / "rows.safetensors")
        program = f"from distill_speed import ours; ours({args.teacher!r}, {args.student!r}, "
        program += f"{str(folder / 'lessons.safetensors')!r}, {args.batch}, {args.steps})"
        here = Path(__file__).parent
        peer = [args.peer, here / "peers" / "trl_gkd.py", "--teacher", args.teacher, "--model", args.student]
        peer += ["--windows", folder / "rows.safetensors", "--out", folder, "--batch", per_step]
        peer += ["--steps", args.steps, "--learning-rate", RATE]
        for _ in range(args.rounds):
            done = subprocess.run([sys.executable, "-c", program], cwd=here, check=True, stdout=subprocess.PIPE)
            runs["pocketlm"].append(json.loads(done.stdout.splitlines()[-1]))
            subprocess.run([str(word) for word in peer], check=True, stdout=subprocess.DEVNULL)
            found = json.loads((folder / "results.json").read_text())
            runs["trl"].append(found | found["settings"])
            print({name: each[-1]["step_seconds"] for name, each in runs.items()}, flush=True)
    here = machine(args.out.parent)
    what = f"{args.batch} windows of {LENGTH} tokens a step"
    if args.task:
        what = f"the answers of {per_step} examples a step, {real:.0f} tokens in {args.batch} windows"
    lines = [
        "# Speed of distillation",
        "",
        f"`{command_line()}`",
        "",
        f"{here.cpu}, {torch.get_num_threads()} threads; trl {runs['trl'][0]['version']}; "
        + ", ".join(f"{name} {which}" for name, which in versions().items())
        + ".",
        f"Learnt: {what}. {args.steps} steps, {args.rounds} rounds in turns: median step of each round, the first step "
        "left out; lowest and highest round in brackets.",
        "",
        "| trainer | tokens/s | tokens per CPU second | peak memory, MB | loss of the first and last step |",
        "|---|---|---|---|---|",
    ]
    for name, each in runs.items():
        cells = [spread([real / run[what] for run in each]) for what in ("step_seconds", "step_cpu_seconds")]
        peak = max(run["peak_mb"] for run in each)
        losses = each[-1]["losses"]
        lines.append(f"| {name} | {' | '.join(cells)} | {peak:,.0f} | {losses[0]:.3f}, {losses[-1]:.3f} |")
    write_results(args.out, lines, runs)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
