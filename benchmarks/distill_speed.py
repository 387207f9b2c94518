"""Tokens per second and memory of distillation: pocketlm beside trl's GKD trainer, in turns.

    python benchmarks/distill_speed.py TEACHER STUDENT --text FILE... --peer PYTHON_WITH_TRL [--rounds 3] [--steps 6]

Both are Hugging Face folders. The same student learns from the same teacher on batches of the same windows: forward KL
at temperature 1, AdamW, bfloat16 where the hardware has it. Every run is a process of its own, and its first step is
left out. On a busy machine the clock says little: the processor's own seconds, all threads together, are given too.
Writes a page (Markdown) and the same as JSON.
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

from pocketlm.artefact import versions
from pocketlm.measure.device import machine
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
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--peer", type=Path, required=True, help="a Python that has trl")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4, help=f"windows of {LENGTH} tokens")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{today}-distill-speed.md")
    return parser.parse_args()


def ours(teacher: str, student: str, windows: Path, batch: int, steps: int) -> None:
    """Train with pocketlm and print the figures; runs in a process of its own."""
    ends: list[tuple[float, float]] = []
    text = load_file(windows)["windows"]
    config = Distil(tokens=steps * batch * LENGTH, windows_per_step=batch, learning_rate=RATE, evaluations=1)
    _, report = distil(
        load(teacher),
        load(student),
        config,
        text,
        text[:1],
        lambda *_: ends.append((time.perf_counter(), time.process_time())),
    )
    # The last step has the held-out evaluation in it.
    seconds, work = ([later[i] - earlier[i] for earlier, later in pairwise(ends[:-1])] for i in (0, 1))
    figures = {"tokens_per_second": round(batch * LENGTH / statistics.median(seconds), 1)}
    figures["tokens_per_cpu_second"] = round(batch * LENGTH / statistics.median(work), 1)
    figures["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
    print(json.dumps(figures | {"losses": report.details["losses"]}))


def spread(values: list[float]) -> str:
    """Return the median with the lowest and the highest."""
    return f"{statistics.median(values):.0f} [{min(values):.0f}, {max(values):.0f}]"


def main() -> None:
    """Run both in turns, write."""
    args = arguments()
    model = load(args.teacher)
    windows = pack_windows(read_corpus(args.text).documents, model.tokenizer, args.batch * args.steps, LENGTH)
    runs: dict[str, list[dict]] = {"pocketlm": [], "trl": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_file({"windows": windows}, folder / "windows.safetensors")
        program = f"from distill_speed import ours; ours({args.teacher!r}, {args.student!r}, "
        program += f"{str(folder / 'windows.safetensors')!r}, {args.batch}, {args.steps})"
        here = Path(__file__).parent
        peer = [args.peer, here / "peers" / "trl_gkd.py", "--teacher", args.teacher, "--model", args.student]
        peer += ["--windows", folder / "windows.safetensors", "--out", folder, "--batch", args.batch]
        peer += ["--steps", args.steps, "--learning-rate", RATE]
        for _ in range(args.rounds):
            done = subprocess.run([sys.executable, "-c", program], cwd=here, check=True, stdout=subprocess.PIPE)
            runs["pocketlm"].append(json.loads(done.stdout.splitlines()[-1]))
            subprocess.run([str(word) for word in peer], check=True, stdout=subprocess.DEVNULL)
            found = json.loads((folder / "results.json").read_text())
            runs["trl"].append(found | {"losses": found["settings"]["losses"]})
            print({name: each[-1]["tokens_per_second"] for name, each in runs.items()}, flush=True)
    here = machine(args.out.parent)
    lines = [
        "# Speed of distillation",
        "",
        f"`{command_line()}`",
        "",
        f"{here.cpu}, {torch.get_num_threads()} threads; trl {runs['trl'][0]['version']}; "
        + ", ".join(f"{name} {which}" for name, which in versions().items())
        + ".",
        f"{args.batch} windows of {LENGTH} tokens a step, {args.steps} steps, {args.rounds} rounds in turns: median",
        "step of each round, the first step left out; lowest and highest round in brackets.",
        "",
        "| trainer | tokens/s | tokens per CPU second | peak memory, MB | loss of the first and last step |",
        "|---|---|---|---|---|",
    ]
    for name, each in runs.items():
        cells = [spread([run[what] for run in each]) for what in ("tokens_per_second", "tokens_per_cpu_second")]
        peak = max(run["peak_mb"] for run in each)
        losses = each[-1]["losses"]
        lines.append(f"| {name} | {' | '.join(cells)} | {peak:,.0f} | {losses[0]:.3f}, {losses[-1]:.3f} |")
    write_results(args.out, lines, runs)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
