"""Files that are there as a whole or not at all, and what is in them."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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
