"""A customer-service desk: a small model names what a customer wants, and passes hard cases to a larger one.

    python examples/support.py [--train FILE --test FILE] [--model demo] [--escalate-to URL --escalate-model NAME]

Files are .jsonl (`prompt`, `answer`), .csv (`utterance`, `intent`) or clinc150's data_full.json; without, a small set
that comes with this example. What happens, all of it with pocketlm's own commands and functions:

1. MODEL is fine-tuned on the training requests; a student of a few blocks is cut from it, learns from it, and is stored
   in 5 bits.
2. `calibrate` finds, on requests held back, the confidence below which the larger model should be asked so that both
   together reach the target accuracy.
3. Both are served; the test requests are asked over HTTP; then once more, with the larger model killed in the middle.

Where no --escalate-to is given, the larger model is the fine-tuned MODEL itself, served here in F16.
"""

import argparse
import asyncio
import json
import signal
import statistics
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from common import Reply, ask_all, drawn, read_labelled, served, share, stored, taught, write_examples

from pocketlm.api import Distil
from pocketlm.cli.terminal import Screen
from pocketlm.export.gguf import write_gguf
from pocketlm.model.examples import Example
from pocketlm.model.source import load
from pocketlm.run.server.calibration import Calibration, calibrate, is_right
from pocketlm.run.server.calibration import lines as calibration_lines
from pocketlm.run.server.engine_process import EngineSettings
from pocketlm.run.server.escalation import Escalation

QUESTION = "What does this customer want?"
BUILT_IN = Path(__file__).with_suffix(".jsonl")
ANSWER_TOKENS = 16
AT_ONCE = 4


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--train", type=Path, default=BUILT_IN)
    parser.add_argument("--test", type=Path, help="where none is given, a part of --train is held back")
    parser.add_argument("--student", default="depth=12,ffn=768")
    parser.add_argument("--format", default="Q5_0", help="of the student's file")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--teacher-rate", type=float, default=1e-4)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--learn-from", type=int, default=10**6, help="training requests at most")
    parser.add_argument("--limit", type=int, default=500, help="requests at most to calibrate on, and to test on")
    parser.add_argument("--target", type=float, default=0.95, help="accuracy that both models together shall reach")
    parser.add_argument("--escalate-to", help="the larger model's API, such as https://host/v1")
    parser.add_argument("--escalate-model", default="larger", help="its name there")
    parser.add_argument("--out", type=Path, default=Path("support-out"))
    return parser.parse_args()


def split(args: argparse.Namespace) -> tuple[list[Example], list[Example], list[Example]]:
    """Return what is learnt, what calibrates, and what tests; no request is in two of them."""
    known = drawn(read_labelled(args.train, QUESTION), 10**6)
    held_back = min(args.limit, len(known) // 4)
    calibrating, learning = known[:held_back], known[held_back:]
    if args.test:
        test = drawn(read_labelled(args.test, QUESTION, "test"), args.limit)
    else:
        test, calibrating = calibrating[::2], calibrating[1::2]
    seen = {example.prompt for example in (*learning, *calibrating)}
    return learning[: args.learn_from], calibrating, [example for example in test if example.prompt not in seen]


def requests(examples: list[Example]) -> list[dict]:
    """Return the bodies of the requests that ask examples."""
    common = {"temperature": 0, "max_tokens": ANSWER_TOKENS}
    return [{"messages": [{"role": "user", "content": example.prompt}], **common} for example in examples]


def summary(examples: list[Example], replies: list[Reply]) -> dict:
    """Return the figures of a round of requests."""
    seconds = sorted(reply.seconds for reply in replies)
    pairs = zip(examples, replies, strict=True)
    return {
        "requests": len(replies),
        "failed requests": sum(reply.status != 200 for reply in replies),
        "right": sum(is_right(reply.text, (example.answer,)) for example, reply in pairs),
        "escalated": sum(reply.mark.get("escalated", False) for reply in replies),
        "answered locally with a mark": sum("escalation_failed" in reply.mark for reply in replies),
        "median seconds": statistics.median(seconds),
        "95th percentile seconds": seconds[int(0.95 * (len(seconds) - 1))],
    }


def teach(args: argparse.Namespace, task: Path, learning: list[Example], small: Path, larger: Path) -> None:
    """Teach both models and store them; the larger one is needed only where no other is asked."""
    with Screen() as screen:
        rate = args.teacher_rate
        alone = Distil(tokens=0, windows_per_step=2, learning_rate=rate, evaluations=4, cross_entropy=1.0)
        teacher = taught(args.model, args.model, task, args.epochs, alone, screen.progress)
        listening = replace(alone, learning_rate=args.learning_rate, cross_entropy=0.5)
        student = taught(str(teacher), args.student, task, args.epochs, listening, screen.progress)
        stored(str(student), args.format, learning, small)
        if not args.escalate_to:
            write_gguf(load(str(teacher)), {}, larger)


def main() -> None:
    """Teach, calibrate, serve, ask, report."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    learning, calibrating, test = split(args)
    task = write_examples(learning, args.out / "learning.jsonl")
    held_back = write_examples(calibrating, args.out / "calibrating.jsonl")
    small, larger = args.out / "small.gguf", args.out / "larger.gguf"
    teach(args, task, learning, small, larger)
    asked = requests(test)
    figures: dict = {"learnt from": len(learning), "calibrated on": len(calibrating), "bytes": small.stat().st_size}
    with served(larger) if not args.escalate_to else nullcontext() as stand_in:
        url = args.escalate_to or stand_in.url
        endpoint = Escalation(url, args.escalate_model if args.escalate_to else "larger", 0.0, timeout=120)
        with Screen() as screen:
            settings = EngineSettings(str(small), "small", slots=AT_ONCE)
            kept = args.out / "calibrating.answers"
            found = calibrate(settings, held_back, args.target, endpoint, kept, screen.progress)
        print("\n".join(calibration_lines(found)))
        point = found.chosen or max(found.curve, key=lambda each: each.accuracy)
        options = ["--escalate-to", url, "--escalate-model", endpoint.model]
        options += ["--threshold", point.threshold, "--confidence", found.measure]
        with served(small, "--slots", AT_ONCE) as alone:
            figures["small alone"] = summary(test, asyncio.run(ask_all(alone.url, asked, AT_ONCE)))
        with served(small, "--slots", AT_ONCE, *options) as desk:
            figures["with escalation"] = summary(test, asyncio.run(ask_all(desk.url, asked, AT_ONCE)))
        if not args.escalate_to:
            figures["larger alone"] = summary(test, asyncio.run(ask_all(url, asked, AT_ONCE)))
            with served(small, "--slots", AT_ONCE, *options) as desk:
                kill = partial(stand_in.process.send_signal, signal.SIGKILL)
                replies = asyncio.run(ask_all(desk.url, asked, AT_ONCE, kill))
                figures["larger killed in the middle"] = summary(test, replies)
    (args.out / "result.json").write_text(json.dumps(figures, indent=1) + "\n")
    text = page(args, figures, found, point.threshold)
    (args.out / "result.md").write_text(text, encoding="utf-8")
    kept.unlink()
    print(text)


def page(args: argparse.Namespace, figures: dict, found: Calibration, threshold: float) -> str:
    """Return the result as Markdown."""
    rounds = {name: row for name, row in figures.items() if isinstance(row, dict)}
    lines = [
        "# Intents of customers, with escalation",
        "",
        f"{figures['learnt from']:,} requests taught {args.student} of {Path(args.model).name}, stored in "
        f"{args.format}: {figures['bytes']:,} bytes. {figures['calibrated on']:,} others set the threshold "
        f"({threshold:.6g}, {found.measure}) for {args.target:.0%}; there the small model was right in "
        f"{found.local_accuracy:.1%}, "
        + (f"the larger in {found.larger_accuracy:.1%}." if found.larger_accuracy is not None else "")
        + ("" if found.chosen else " No threshold reached the target; the best there is was taken."),
        "",
        "| test requests | right | escalated | failed | local answer with a mark | median | 95th percentile |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rounds.items():
        cells = [name, share(row["right"], row["requests"]), share(row["escalated"], row["requests"])]
        cells += [str(row["failed requests"]), str(row["answered locally with a mark"])]
        cells += [f"{1000 * row['median seconds']:.0f} ms", f"{1000 * row['95th percentile seconds']:.0f} ms"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "In brackets 95 % intervals (Wilson).", ""])


if __name__ == "__main__":
    main()
