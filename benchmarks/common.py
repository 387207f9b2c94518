"""What the benchmarks share."""

import re
import shlex
import sys


def command_line() -> str:
    """Return the command that is running, with the names of files instead of where they lie on this machine."""
    return re.sub(r"(?<=[\s='])/[^\s=']*/", "", shlex.join(["python", *sys.argv]))
