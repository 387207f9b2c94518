"""What commands share: options, names of files, and how a result is printed."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pocketlm.errors import BadInputError
from pocketlm.report.content import to_json

MOST_THREADS = 512  # of llama.cpp (GGML_MAX_N_THREADS), which ends the process beyond

Model = Annotated[str, typer.Argument(help="A Hugging Face folder, a hub id, a GGUF file, or `demo`.")]
Data = Annotated[
    list[Path] | None,
    typer.Option("--data", help="Plain text, or .jsonl with `text` or `messages` a line; repeatable."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; one per core if not given.", min=1, max=MOST_THREADS)]
Seed = Annotated[
    int,
    typer.Option(
        help="The same seed gives the same file, where no time is given; a recipe has its own.", min=0, max=2**63 - 1
    ),
]


def gguf_file(name: str) -> Path:
    """Return the GGUF file that a name stands for: itself, the one in a folder made by `fit`, or the demo's."""
    path = Path(name)
    if path.is_dir():
        inside = path / "model.gguf"
        if not inside.is_file():
            model = path / "hf" if (path / "hf").is_dir() else path
            raise BadInputError(f"There is no model.gguf in {path}. Make one: pocketlm quantize {model} --format q8_0")
        return inside
    if path.suffix == ".gguf":
        return path
    from pocketlm.model.source import DEMO, demo_file

    return demo_file() if name == DEMO else path


def read_format(text: str) -> str:
    """Return a format's name as its kind writes it (Q4_0 in GGUF, int4-g32 elsewhere), whatever case a person used."""
    from pocketlm.tensors.formats.integer import NAMES

    return text.lower() if text.lower() in NAMES else text.upper()


def fixed_formats(texts: list[str]) -> tuple[tuple[str, str], ...]:
    """Read NAME=FORMAT options."""
    pairs = [text.partition("=")[::2] for text in texts]
    for text, (name, form) in zip(texts, pairs, strict=True):
        if not name or not form:
            raise BadInputError(f"Cannot read `{text}`. Write it like embedding=Q8_0 or 'model.layers.0.*=Q5_0'")
    return tuple((name, read_format(form)) for name, form in pairs)


def print_result(lines: list[str], data: dict[str, Any], json_output: bool) -> None:
    """Print a result for a person, or as one JSON object, which in an encoding of less than Unicode is all ASCII."""
    plain = sys.stdout is not None and sys.stdout.encoding.lower() != "utf-8"
    print(to_json(data, ascii_only=plain) if json_output else "\n".join(lines))
