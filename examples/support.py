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
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import httpx
from common import drawn, read_labelled, served, share, stored, taught, write_examples

from pocketlm.export.gguf import write_gguf
from pocketlm.model.examples import Example
from pocketlm.model.source import load
from pocketlm.run.server.calibration import Calibration, calibrate, is_right
from pocketlm.run.server.calibration import lines as calibration_lines
from pocketlm.run.server.engine_process import EngineSettings
from pocketlm.run.server.escalation import Escalation
from pocketlm.terminal import Screen

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


async def ask_all(url: str, examples: list[Example], halfway: Callable[[], None] = lambda: None) -> list[dict]:
    """Ask a server every request, a few at a time; `halfway` is called when half of them were asked."""
    gate, asked = asyncio.Semaphore(AT_ONCE), 0

    async with httpx.AsyncClient(timeout=300) as client:

        async def one(example: Example) -> dict:
            nonlocal asked
            async with gate:
                asked += 1
                if asked == len(examples) // 2:
                    halfway()
                body = {"messages": [{"role": "user", "content": example.prompt}], "temperature": 0}
                began = time.monotonic()
                response = await client.post(f"{url}/chat/completions", json=body | {"max_tokens": ANSWER_TOKENS})
                seconds, answer = time.monotonic() - began, response.json()
            said = answer["choices"][0]["message"]["content"] if response.status_code == 200 else ""
            mark = answer.get("pocketlm", {})
            return {
                "status": response.status_code,
                "right": is_right(said or "", (example.answer,)),
                "seconds": seconds,
                "escalated": mark.get("escalated", False),
                "failed": "escalation_failed" in mark,
            }

        return await asyncio.gather(*(one(example) for example in examples))


def summary(answers: list[dict]) -> dict:
    """Return the figures of a round of requests."""
    seconds = sorted(answer["seconds"] for answer in answers)
    return {
        "requests": len(answers),
        "failed requests": sum(answer["status"] != 200 for answer in answers),
        "right": sum(answer["right"] for answer in answers),
        "escalated": sum(answer["escalated"] for answer in answers),
        "answered locally with a mark": sum(answer["failed"] for answer in answers),
        "median seconds": statistics.median(seconds),
        "95th percentile seconds": seconds[int(0.95 * (len(seconds) - 1))],
    }


def main() -> None:
    """Teach, calibrate, serve, ask, report."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    learning, calibrating, test = split(args)
    task = write_examples(learning, args.out / "learning.jsonl")
    held_back = write_examples(calibrating, args.out / "calibrating.jsonl")
    small, larger = args.out / "small.gguf", args.out / "larger.gguf"
    with Screen() as screen:
        teacher = taught(args.model, args.model, task, args.epochs, args.teacher_rate, screen.progress)
        student = taught(str(teacher), args.student, task, args.epochs, args.learning_rate, screen.progress)
        stored(student, args.format, learning, small)
        if not args.escalate_to:
            write_gguf(load(str(teacher)), {}, larger)
    figures: dict = {"learnt from": len(learning), "calibrated on": len(calibrating), "bytes": small.stat().st_size}
    with served(larger) if not args.escalate_to else nullcontext() as stand_in:
        url = args.escalate_to or stand_in.url
        endpoint = Escalation(url, args.escalate_model if args.escalate_to else "larger", 0.0, timeout=120)
        with Screen() as screen:
            settings = EngineSettings(str(small), "small", key="", slots=AT_ONCE, context=None, threads=None)
            found = calibrate(settings, held_back, args.target, endpoint, screen.progress)
        print("\n".join(calibration_lines(found)))
        point = found.chosen or max(found.curve, key=lambda each: each.accuracy)
        options = ["--escalate-to", url, "--escalate-model", endpoint.model]
        options += ["--threshold", point.threshold, "--confidence", found.measure]
        with served(small, "--slots", AT_ONCE) as alone:
            figures["small alone"] = summary(asyncio.run(ask_all(alone.url, test)))
        with served(small, "--slots", AT_ONCE, *options) as desk:
            figures["with escalation"] = summary(asyncio.run(ask_all(desk.url, test)))
        if not args.escalate_to:
            figures["larger alone"] = summary(asyncio.run(ask_all(url, test)))
            with served(small, "--slots", AT_ONCE, *options) as desk:
                killed = ask_all(desk.url, test, partial(stand_in.process.send_signal, signal.SIGKILL))
                figures["larger killed in the middle"] = summary(asyncio.run(killed))
    (args.out / "result.json").write_text(json.dumps(figures, indent=1) + "\n")
    text = page(args, figures, found, point.threshold)
    (args.out / "result.md").write_text(text)
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
