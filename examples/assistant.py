"""An assistant on the phone: a fitted general model summarises notifications and drafts replies.

    python examples/assistant.py [FITTED] [--model demo]

FITTED is a folder made by `fit` or `quantize`, or a GGUF file; where none is given, MODEL is stored in 4.5 bits by
GPTQ. It and MODEL as it is are served and asked the cases of assistant.jsonl over HTTP, or those of --cases. Nobody
judges how an answer reads; what is counted are things that a program can check: whether it has the facts that it must
have, whether it has numbers that nobody gave, whether it is as short as was asked, whether it repeats itself, and
whether the JSON is whole.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

from common import Reply, ask_all, served, share, stored

from pocketlm.cli.options import gguf_file
from pocketlm.model.source import load
from pocketlm.pipeline.proof import original_file

CASES = Path(__file__).with_suffix(".jsonl")
WORDS = 50  # that an answer may have
ANSWER_TOKENS = 120
SAMPLING = {"temperature": 0, "repeat_penalty": 1.1}  # without the penalty so small a model says one thing for ever
REPEATED = 4  # words in a row that come twice are a repetition
RESAMPLES = 2000
SCHEMA = {
    "type": "object",
    "properties": {"text": {"type": "string"}},
    "required": ["text"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Case:
    """A job for the assistant.

    Attributes:
        job: `summary` or `reply`.
        prompt: What is asked.
        facts: What an answer must mention, each in any of some wordings.
    """

    job: str
    prompt: str
    facts: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Checked:
    """What a program can say about an answer: facts mentioned, and of each check whether it is passed."""

    text: str
    mentioned: int
    whole: bool
    short: bool
    fresh: bool  # without repetition
    honest: bool  # without numbers that nobody gave


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fitted", nargs="?", help="a folder made by fit or quantize, or a GGUF file")
    parser.add_argument("--model", default="demo", help="the original")
    parser.add_argument("--format", default="IQ4_NL", help="of the original's matrices, where nothing fitted is given")
    parser.add_argument("--cases", type=Path, default=CASES)
    parser.add_argument("--out", type=Path, default=Path("assistant-out"))
    return parser.parse_args()


def read_cases(path: Path) -> list[Case]:
    """Read cases and write the prompts for them."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Case(row["job"], prompt_of(row), tuple(tuple(fact.split("|")) for fact in row["facts"])) for row in rows]


def prompt_of(row: dict) -> str:
    """Return what the assistant is asked in a case."""
    if row["job"] == "summary":
        listed = "\n".join(f"- {notification}" for notification in row["notifications"])
        return f"Summarise my notifications in at most {WORDS} words. Leave out none.\n{listed}"
    return (
        f'{row["sender"]} wrote to me: "{row["message"]}"\n'
        f"Write my reply in at most {WORDS} words. What I want to say: {row['wish']}."
    )


def request(case: Case) -> dict:
    """Return the body of the request that asks a case."""
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    messages = [{"role": "user", "content": f'{case.prompt}\nAnswer as JSON: {{"text": "..."}}'}]
    return {"messages": messages, "response_format": form, "max_tokens": ANSWER_TOKENS, **SAMPLING}


def checked(case: Case, reply: Reply) -> Checked:
    """Check an answer; one that was cut off is read as far as it goes."""
    try:
        text, whole = json.loads(reply.text)["text"], True
    except ValueError:
        text, whole = reply.text.partition(":")[2], False
    words = re.findall(r"\w+", text.casefold())
    runs = [tuple(words[start : start + REPEATED]) for start in range(len(words) - REPEATED + 1)]
    numbers, given = (set(re.findall(r"\d+", each)) for each in (text, case.prompt))
    return Checked(
        text=text,
        mentioned=sum(any(mentions(text, way) for way in fact) for fact in case.facts),
        whole=whole,
        short=len(text.split()) <= WORDS,
        fresh=len(set(runs)) == len(runs),
        honest=numbers <= given,
    )


def mentions(text: str, way: str) -> bool:
    """Whether a text has a wording: whole numbers, beginnings of words."""
    return bool(re.search(rf"\b{re.escape(way)}(?!\d)", text, re.IGNORECASE))


def main() -> None:
    """Serve, ask, check, report."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    cases = read_cases(args.cases)
    made = args.out / "fitted.gguf"
    fitted = gguf_file(args.fitted) if args.fitted else stored(args.model, args.format, [], made)
    files = {"fitted": fitted, "original": original_file(load(args.model))}
    rounds = []
    for name, file in files.items():
        with served(file, "--slots", 1) as server:
            replies = asyncio.run(ask_all(server.url, [request(case) for case in cases], 1))
        answers = [checked(case, reply) for case, reply in zip(cases, replies, strict=True)]
        for job in dict.fromkeys(case.job for case in cases):
            chosen = [index for index, case in enumerate(cases) if case.job == job]
            seconds = [replies[index].seconds for index in chosen]
            figures = summary([cases[index] for index in chosen], [answers[index] for index in chosen])
            rounds.append({"job": job, "model": name, "bytes": file.stat().st_size} | figures | {"seconds": seconds})
    (args.out / "result.json").write_text(json.dumps(rounds, indent=1) + "\n")
    text = page(rounds)
    (args.out / "result.md").write_text(text, encoding="utf-8")
    print(text)


def summary(cases: list[Case], answers: list[Checked]) -> dict:
    """Return the figures of a model in a job."""
    facts = [(answer.mentioned, len(case.facts)) for case, answer in zip(cases, answers, strict=True)]
    checks = {name: sum(getattr(answer, name) for answer in answers) for name in ("whole", "short", "fresh", "honest")}
    return {
        "cases": len(cases),
        "facts": mentioned(facts),
        "facts interval": interval(facts),
        **checks,
        "answers": [{"prompt": case.prompt, "text": answer.text} for case, answer in zip(cases, answers, strict=True)],
    }


def mentioned(facts: list[tuple[int, int]]) -> float:
    """Return the share of facts mentioned, from how many were and had to be in each case."""
    return sum(found for found, _ in facts) / sum(wanted for _, wanted in facts)


def interval(facts: list[tuple[int, int]]) -> tuple[float, float]:
    """Return the 95 % interval of the share of facts mentioned, by a bootstrap over cases."""
    draw = random.Random(0)
    shares = sorted(mentioned(draw.choices(facts, k=len(facts))) for _ in range(RESAMPLES))
    return shares[int(0.025 * RESAMPLES)], shares[int(0.975 * RESAMPLES)]


def page(rounds: list[dict]) -> str:
    """Return the result as Markdown."""
    lines = [
        "# Notifications summarised, replies drafted",
        "",
        "Facts that must be mentioned, with an interval by a bootstrap over cases; answers whose JSON is whole, of at "
        f"most {WORDS} words, without {REPEATED} words in a row that come twice, without numbers that nobody gave.",
        "",
        "| job, cases | model | bytes | facts | whole | short | no repetition | no invention | median | longest |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rounds:
        low, high = row["facts interval"]
        cells = [f"{row['job']}, {row['cases']}", row["model"], f"{row['bytes']:,}"]
        cells.append(f"{row['facts']:.1%} [{low:.1%}, {high:.1%}]")
        cells += [share(row[check], row["cases"]) for check in ("whole", "short", "fresh", "honest")]
        cells += [f"{1000 * found(row['seconds']):.0f} ms" for found in (statistics.median, max)]
        lines.append("| " + " | ".join(cells) + " |")
    for job in dict.fromkeys(row["job"] for row in rounds):
        of_job = [row for row in rounds if row["job"] == job]
        quoted = of_job[0]["answers"][0]["prompt"].replace("\n", "\n> ")
        lines += ["", f"> {quoted}", ""]
        lines += [f"- {row['model']}: {row['answers'][0]['text']}" for row in of_job]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
