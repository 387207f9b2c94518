"""A smart home: a small model turns a spoken command into the JSON action that is meant, under a JSON schema.

    python examples/home.py [--data FOLDER] [--model demo]

The model learns from generated commands and is tested on 100 others that come with this example, written by hand. With
a FOLDER of home-assistant-datasets (`conversation.jsonl`) it is tested on those too; one of snips
(`train_*_full.json`, `validate_*.json`) is learnt and tested instead. What happens:

1. A student of a few blocks is cut from MODEL, learns commands and their actions, and is stored in 5 bits.
2. It is served, and asked every test command over HTTP, one after another; the engine's grammar keeps the schema.
3. So is MODEL as it is, told the schema and eight examples.
"""

import argparse
import asyncio
import json
import statistics
from pathlib import Path

from common import Reply, ask_all, drawn, served, share, stored, taught, write_examples
from home_commands import Command, generated, hand_written, home_assistant, snips

from pocketlm.api import Distil
from pocketlm.cli.terminal import Screen
from pocketlm.model.examples import Example
from pocketlm.model.source import load
from pocketlm.pipeline.proof import original_file

SHOWN = 8  # examples that the original is told
ANSWER_TOKENS = 160


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data", type=Path, help="a folder of snips or of home-assistant-datasets")
    parser.add_argument("--student", default="depth=12,ffn=768")
    parser.add_argument("--format", default="Q5_0", help="of the student's file")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--learn-from", type=int, default=3000, help="commands at most")
    parser.add_argument("--limit", type=int, default=400, help="commands at most to test on")
    parser.add_argument("--out", type=Path, default=Path("home-out"))
    return parser.parse_args()


def commands(args: argparse.Namespace) -> tuple[list[Command], dict[str, list[Command]]]:
    """Return what is learnt and what tests, by name; nothing that tests is learnt."""
    conversations = args.data and args.data / "conversation.jsonl"
    if args.data is None or conversations.exists():
        learning, tests = generated(args.learn_from), {"written by hand": hand_written()}
        if args.data:
            tests["home-assistant"] = home_assistant(conversations)
    else:
        learning, test = snips(args.data)
        tests = {"snips": test}
    asked = {command.prompt.casefold() for test in tests.values() for command in test}
    learning = drawn([command for command in learning if command.prompt.casefold() not in asked], args.learn_from)
    return learning, {name: drawn(test, args.limit) for name, test in tests.items()}


def request(command: Command, told: str | None = None) -> dict:
    """Return the body of the request that asks for a command's action."""
    form = {"type": "json_schema", "json_schema": {"name": "action", "schema": command.schema}}
    messages = [{"role": "system", "content": told}] if told else []
    messages.append({"role": "user", "content": command.prompt})
    return {"messages": messages, "response_format": form, "temperature": 0, "max_tokens": ANSWER_TOKENS}


def instructions(command: Command, shown: list[Command]) -> str:
    """Return what a model that has not learnt the task is told."""
    examples = "\n\n".join(f"Command: {each.prompt}\n{each.answer}" for each in shown)
    schema = json.dumps(command.schema, separators=(",", ":"))
    return f"Answer a command with the JSON action that is meant.\n\n{examples}\n\nThe schema of actions:\n{schema}"


def summary(file: Path, test: list[Command], replies: list[Reply]) -> dict:
    """Return the figures of a model, and what it got wrong."""
    actions = [action_of(reply) for reply in replies]
    pairs = list(zip(actions, test, strict=True))
    wrong = [(command.prompt, command.action, action) for action, command in pairs if not same(action, command.action)]
    seconds = sorted(reply.seconds for reply in replies)
    return {
        "bytes": file.stat().st_size,
        "commands": len(test),
        "right": len(test) - len(wrong),
        "right action": sum(action.get("action") == command.action["action"] for action, command in pairs),
        "whole actions": sum(bool(action) for action in actions),
        "median seconds": statistics.median(seconds),
        "95th percentile seconds": seconds[int(0.95 * (len(seconds) - 1))],
        "wrong": wrong,
    }


def action_of(reply: Reply) -> dict:
    """Return the action that was answered; an empty one where the answer was cut off."""
    try:
        return json.loads(reply.text)
    except ValueError:
        return {}


def same(action: dict, other: dict) -> bool:
    """Whether two actions are the same but for small and capital letters."""
    texts = (json.dumps(each, sort_keys=True).casefold() for each in (action, other))
    return len(set(texts)) == 1


def main() -> None:
    """Teach, store, serve, ask, report."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    learning, tests = commands(args)
    lessons = [Example(command.prompt, command.answer) for command in learning]
    task = write_examples(lessons, args.out / "learning.jsonl")
    small = args.out / "small.gguf"
    with Screen() as screen:
        how = Distil(tokens=0, learning_rate=args.learning_rate, windows_per_step=1, evaluations=3, cross_entropy=1.0)
        student = taught(args.model, args.student, task, args.epochs, how, screen.progress)
        stored(str(student), args.format, lessons, small)
        original = original_file(load(args.model))
    rounds = []
    for name, file, shown in (("fitted", small, []), ("original", original, learning[:SHOWN])):
        with served(file, "--slots", 1) as server:
            for of, test in tests.items():
                bodies = [request(command, instructions(command, shown) if shown else None) for command in test]
                replies = asyncio.run(ask_all(server.url, bodies, 1))
                rounds.append({"test": of, "model": name} | summary(file, test, replies))
    (args.out / "result.json").write_text(json.dumps({"learnt from": len(learning), "rounds": rounds}, indent=1) + "\n")
    text = page(args, len(learning), rounds)
    (args.out / "result.md").write_text(text, encoding="utf-8")
    print(text)


def page(args: argparse.Namespace, learnt: int, rounds: list[dict]) -> str:
    """Return the result as Markdown."""
    lines = [
        "# Spoken commands to JSON actions",
        "",
        f"{learnt:,} commands taught {args.student} of {Path(args.model).name}, stored in {args.format}; "
        f"the original was told the schema and {SHOWN} examples. Both answered under the schema's grammar.",
        "",
        "| test | model | bytes | exactly right | right kind of action | whole JSON | median | 95th percentile |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rounds:
        cells = [f"{row['test']}, {row['commands']}", row["model"], f"{row['bytes']:,}"]
        cells += [share(row[what], row["commands"]) for what in ("right", "right action", "whole actions")]
        cells += [f"{1000 * row[what]:.0f} ms" for what in ("median seconds", "95th percentile seconds")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "One command at a time; in brackets 95 % intervals (Wilson).", ""])


if __name__ == "__main__":
    main()
