"""What the benchmarks share."""

import json
import re
import shlex
import sys
from pathlib import Path


def command_line() -> str:
    """Return the command that is running, with the names of files instead of where they lie on this machine."""
    return re.sub(r"(?<=[\s='])/[^\s=']*/", "", shlex.join(["python", *sys.argv]))


def write_results(out: Path, lines: list[str], rows: list[dict] | dict) -> None:
    """Write a page as Markdown and its figures as JSON beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join([*lines, ""]))
    out.with_suffix(".json").write_text(json.dumps(rows, indent=1))
