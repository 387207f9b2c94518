"""The commands of serving; `pocketlm.cli.main` has the others."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from pocketlm.cli.options import Debug, Json, Threads, gguf_file, print_result
from pocketlm.errors import BadInputError

KEY_VARIABLE = "POCKETLM_API_KEY"
File = Annotated[str, typer.Argument(help="A folder made by `fit`, a GGUF file, or `demo`.")]
Url = Annotated[
    str | None, typer.Option(help="API of a larger model, such as https://host/v1. Its key: POCKETLM_ESCALATE_KEY.")
]
LargerModel = Annotated[str | None, typer.Option(help="The larger model's name there.")]
Slots = Annotated[int, typer.Option(help="Answers written at the same time.", min=1, max=256)]
Context = Annotated[
    int | None,
    typer.Option(help="Tokens of one prompt and its answer; the model's, at most 4096, if not given.", min=8),
]
Measure = Annotated[
    Literal["mean", "min"],
    typer.Option(help="Confidence: the geometric mean of the answer's token probabilities, or the least of them."),
]


def serve(
    file: File,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Any free one if 0.", min=0, max=65535)] = 8080,
    api_key: Annotated[
        str | None, typer.Option(envvar=KEY_VARIABLE, help="What clients must send; nothing if not given.")
    ] = None,
    slots: Slots = 4,
    queue: Annotated[int, typer.Option(help="Requests that may wait; more are refused with 429.", min=0)] = 64,
    context: Context = None,
    threads: Threads = None,
    compare: Annotated[str | None, typer.Option(help="Another file to serve beside it, such as the original.")] = None,
    auto: Annotated[
        bool, typer.Option("--auto", help="Measure first which threads, cache and batch serve best on this machine.")
    ] = False,
    draft: Annotated[
        str | None, typer.Option(help="A small model of the same vocabulary that drafts, if measured to be faster.")
    ] = None,
    escalate_to: Url = None,
    escalate_model: LargerModel = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            help="Ask the larger model below this confidence, of 0 to 1; above 1 always (`pocketlm calibrate`). "
            "The temperature is then 0 where a request gives none.",
            min=0,
            max=2,
        ),
    ] = None,
    confidence: Measure = "mean",
    escalate_timeout: Annotated[float, typer.Option(help="Seconds the larger model may take.", min=0.1)] = 30.0,
    debug: Debug = False,
) -> None:
    """Serve a model with OpenAI's API, in llama.cpp, and a page to chat on.

    Example: pocketlm serve p70 --port 8080
    """
    from pocketlm.run.server.serve import Serve, check_installed
    from pocketlm.run.server.serve import serve as run

    check_installed()
    run(
        Serve(
            path=gguf_file(file),
            compare=None if compare is None else gguf_file(compare),
            host=host,
            port=port,
            # An empty variable is nothing to typer; here it is an empty key, which is refused.
            api_key=os.environ.get(KEY_VARIABLE) if api_key is None else api_key,
            slots=slots,
            queue=queue,
            context=context,
            threads=threads,
            auto=auto,
            draft=None if draft is None else gguf_file(draft),
            escalation=_escalation(escalate_to, escalate_model, threshold, confidence, escalate_timeout),
        )
    )


def calibrate(
    file: File,
    data: Annotated[Path, typer.Argument(help="JSON lines with `prompt` (or `messages`) and `answer`.")],
    target_accuracy: Annotated[float, typer.Option(help="To be reached by both models together.", min=0, max=1)] = 0.95,
    escalate_to: Url = None,
    escalate_model: LargerModel = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="JSON file to write.")] = Path("calibration.json"),
    slots: Slots = 4,
    context: Context = None,
    threads: Threads = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Find the confidence below which `serve --escalate-to` should ask the larger model, on your own examples.

    They are answered at temperature 0 in at most 64 tokens, unless a line gives `temperature` or `max_tokens`.

    Example: pocketlm calibrate p70 questions.jsonl --target-accuracy 0.95
    """
    from pocketlm.run.server.serve import check_installed

    check_installed()
    from pocketlm.cli.terminal import Screen
    from pocketlm.report.content import to_json
    from pocketlm.report.write import replace_text
    from pocketlm.run.server.calibration import calibrate as run
    from pocketlm.run.server.calibration import is_calibration, lines
    from pocketlm.run.server.engine_process import EngineSettings

    if out.is_dir() or not out.parent.is_dir() or not os.access(out.parent, os.W_OK):  # before hours of answers
        raise BadInputError(
            f"Cannot write {out}: its folder cannot be written, or it is one. Give another file with -o"
        )
    if out.exists() and not is_calibration(out):
        raise BadInputError(f"{out} exists already and is no calibration. Give another file with -o")
    threshold = 0.0 if escalate_to or escalate_model else None
    larger = _escalation(escalate_to, escalate_model, threshold, "mean", timeout=120)
    settings = EngineSettings(str(gguf_file(file)), file, slots=slots, context=context, threads=threads)
    with Screen() as screen:
        kept = out.with_name(f".{out.name}.answers")
        found = run(settings, data, target_accuracy, larger, kept, screen.progress)
    replace_text(out, to_json(asdict(found)) + "\n")
    kept.unlink()
    print_result([*lines(found), "", f"wrote {out}"], asdict(found), json_output)


def _escalation(
    url: str | None, model: str | None, threshold: float | None, measure: str, timeout: float
) -> object | None:
    from pocketlm.run.server.escalation import Escalation

    given = (url is not None, model is not None, threshold is not None)
    if not any(given):
        return None
    if not all(given):
        raise BadInputError("Escalation needs --escalate-to, --escalate-model and (to serve) --threshold together")
    if not url.startswith(("http://", "https://")):
        raise BadInputError(f"`{url}` is no address of an API. It begins like https:// and ends like /v1")
    return Escalation(url, model, threshold, measure, timeout)
