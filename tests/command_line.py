"""The `pocketlm` command as a person calls it: a process of its own, with a cache of its own."""

import os
import subprocess
import sys
from pathlib import Path


def command(*arguments: object) -> list[str]:
    """Return the words that start `pocketlm` with these arguments."""
    return [sys.executable, "-m", "pocketlm", *map(str, arguments)]


def environment(cache: Path) -> dict[str, str]:
    """Return the environment of a run whose cache is the folder `cache`, on one thread: tiny models want no more."""
    return os.environ | {"POCKETLM_CACHE": str(cache), "OMP_NUM_THREADS": "1"}


def pocketlm(*arguments: object, cache: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `pocketlm` with these arguments; `options` are those of `subprocess.run`."""
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        env=environment(cache),
        check=False,
        timeout=300,
        **options,
    )
