"""Files that are there as a whole or not at all, and what is in them."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pocketlm.errors import BadInputError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a name to write under that becomes `path` at the end, so that a kill leaves what was there before."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_lines(path: Path) -> list[Any]:
    """Return the values in a file of JSON lines; none where there is no file.

    A last line that a kill cut off is taken away, so that the next one can be added.
    """
    if not path.exists():
        return []
    written = path.read_bytes()
    if written and not written.endswith(b"\n"):
        written = written[: written.rfind(b"\n") + 1]
        with written_whole(path) as partial:
            partial.write_bytes(written)
    return [json.loads(line) for line in written.splitlines()]


def text_of(path: Path) -> str:
    """Return the text of a file that a person gave.

    Raises:
        BadInputError: It is missing, or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"{path} is not UTF-8 text: byte {error.start} cannot be read. Convert the file to UTF-8"
        ) from error
    except OSError as error:
        raise BadInputError(f"Cannot read {path}: {error.strerror}. Check the path") from error


def json_values(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place, such as `a.jsonl, line 3`, and the value of each line of JSON that a person gave.

    Raises:
        BadInputError: The file cannot be read, a line is no JSON, or has half of a character.
    """
    # Not splitlines(): JSON strings may hold U+2028 and the like as they are.
    for number, line in enumerate(text_of(path).split("\n"), 1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, _value_of_line(line, place)


def _value_of_line(line: str, place: str) -> Any:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise BadInputError(f"{place}: not JSON ({reason}). One JSON object per line") from error
    if "\\ud" in line.lower():  # one surrogate alone, which JSON can name and no tokenizer reads
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise BadInputError(
                f"{place}: {half!a} is half of a character. Remove it, or add the other half"
            ) from error
    return value
