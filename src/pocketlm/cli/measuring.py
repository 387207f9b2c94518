"""The commands that measure and change nothing; `pocketlm.cli.main` has the others."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from pocketlm.cli.options import MOST_THREADS, Data, Debug, Json, Model, gguf_file, print_result
from pocketlm.errors import BadInputError


def inspect(model: Model, json_output: Json = False, debug: Debug = False) -> None:
    """Show what a model is made of, and which budgets `fit` can meet."""
    from pocketlm import api
    from pocketlm.cli.terminal import inspection_lines

    found = api.inspect(model)
    print_result(inspection_lines(found), asdict(found), json_output)


def evaluate(
    model: Model,
    reference: Annotated[
        str | None, typer.Option(help="The original to compare with; anything that MODEL can be.")
    ] = None,
    data: Data = None,
    windows: Annotated[int, typer.Option(help="Windows of 512 tokens to measure on.", min=4)] = 12,
    task: Annotated[
        list[Path] | None,
        typer.Option(help="JSONL of prompt with choices and answer, with label, or with answer alone; repeatable."),
    ] = None,
    harness: Annotated[
        list[str] | None,
        typer.Option(help="A task of lm-evaluation-harness, or a YAML file of one; repeatable."),
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Put the questions of --harness as a chat, as instruct models want.")
    ] = False,
    limit: Annotated[int, typer.Option(help="Items to take of each task.", min=1)] = 500,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a model in llama.cpp: perplexity, KL and agreement against a reference, or scores on tasks."""
    from pocketlm import api
    from pocketlm.cli.terminal import Screen, evaluation_lines, harness_lines, task_lines

    if bool(task) + bool(harness) + bool(data) > 1:
        raise BadInputError("Give one of --task, --harness and --data: they are measured apart")
    if chat_template and not harness:
        raise BadInputError("--chat-template is for --harness: give one of its tasks, or leave it out")
    if not task and not harness and reference is None:
        raise BadInputError("Give the original with --reference MODEL, or tasks with --task FILE")
    with Screen() as screen:
        if task:
            results = api.evaluate_tasks(model, reference, task, limit, screen.progress)
            lines, found = task_lines(results), {"tasks": [asdict(result) for result in results]}
        elif harness:
            scores = api.evaluate_harness(model, reference, harness, limit, chat_template)
            lines, found = harness_lines(scores), {"tasks": [asdict(score) for score in scores]}
        else:
            made = api.evaluate(model, reference, list(data or []), windows, screen.progress)
            lines = evaluation_lines(made, windows)
            found = {name: asdict(quality) for name, quality in made.qualities.items()} | {"text": asdict(made.text)}
    print_result(lines, found, json_output)


def diff(
    first: Annotated[Path, typer.Argument(help="A folder made by `fit`.")],
    second: Annotated[Path, typer.Argument(help="Another.")],
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Lay two results side by side: shape, bytes and formats by part, quality, speed.

    Example: pocketlm diff frontier/60MB frontier/80MB
    """
    from pocketlm.report.difference import cautions, differences
    from pocketlm.report.write import read_report

    reports = read_report(first), read_report(second)
    rows, said = differences(*reports), cautions(*reports)
    table = [("", first.name, second.name), *rows]
    widths = [max(len(row[column]) for row in table) + 2 for column in (0, 1)]
    lines = [f"{name:<{widths[0]}}{one:<{widths[1]}}{other}".rstrip() for name, one, other in table]
    data = {"rows": [dict(zip(("measure", "first", "second"), row, strict=True)) for row in rows], "cautions": said}
    print_result([*lines, *said], data, json_output)


def bench(
    files: Annotated[list[Path], typer.Argument(help="GGUF files or folders made by `fit`; compared to the first.")],
    threads: Annotated[
        list[int] | None,
        typer.Option(help="CPU threads; one per core if not given; repeatable.", min=1, max=MOST_THREADS),
    ] = None,
    prompt: Annotated[list[int] | None, typer.Option(help="Tokens to read, 512 by default; repeatable.", min=1)] = None,
    generate: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 64,
    repeat: Annotated[int, typer.Option(help="Measurements per process.", min=1)] = 3,
    cache: Annotated[
        Literal["f16", "q8_0", "q4_0"], typer.Option(help="How keys and values are stored while it runs.")
    ] = "f16",
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Measure load time, time to the first token, speed, memory and energy of files in llama.cpp, in turns.

    Example: pocketlm bench p70 demo --prompt 64 --prompt 1024 --threads 1 --threads 2
    """
    from pocketlm import api
    from pocketlm.cli.terminal import speed_lines

    paths = [gguf_file(str(file)) for file in files]
    measured = api.bench(paths, threads or (), prompt or (512,), generate, repeat, cache)
    lines = [line for speeds in measured for line in (*speed_lines(speeds), "")]
    print_result(lines[:-1], {"speeds": [asdict(speeds) for speeds in measured]}, json_output)


def doctor(json_output: Json = False, debug: Debug = False) -> None:
    """Show what this machine and this installation can do."""
    from pocketlm import api
    from pocketlm.cli.terminal import doctor_lines

    found = api.doctor()
    print_result(doctor_lines(found), found, json_output)
