"""Finished work, kept under a hash of everything it depends on, so that no run does it twice.

A stage works in a folder of its own that gets its final name only when the stage is done: a killed run leaves
nothing that looks finished, and the same command goes on where it was cut off. Of several runs that need a stage one
makes it, and the others wait for it: a lock of the system's says who, which ends with its process however that ends.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import pocketlm
from pocketlm.errors import BadInputError, OutOfResourcesError, is_disk_full
from pocketlm.measure.device import versions

try:
    import fcntl
except ImportError:  # Windows has none: there, one run at a time
    fcntl = None

DONE = "done.json"
STAGE = re.compile(r"\.?[\w-]+-[0-9a-f]{24}(\.partial|\.unfinished)?")  # the name of a stage's folder
MADE: set[Path] = set()  # by this process
# Rooms whose code decides what a stage computes; a change there must not reuse old results.
ROOMS = ("tensors", "model", "steps", "plan", "export", "measure", "run", "pipeline", "commands")


@dataclass(frozen=True)
class Finished:
    """A finished stage.

    Attributes:
        folder: What it left.
        key: The hash of all it depends on; part of the key of what builds on it.
        facts: What it said about itself.
        seconds: How long it took when it ran.
        reused: Whether that was in another process than this one.
    """

    folder: Path
    key: str
    facts: Any
    seconds: float
    reused: bool


def cache_folder() -> Path:
    """Return where stages are kept: `$POCKETLM_CACHE`, else `~/.cache/pocketlm`.

    Raises:
        BadInputError: That is a file.
    """
    folder = Path(os.environ.get("POCKETLM_CACHE") or Path.home() / ".cache" / "pocketlm")
    if folder.exists() and not folder.is_dir():
        raise BadInputError(f"The cache {folder} is not a folder. Set POCKETLM_CACHE to one")
    return folder


@cache
def code_hash() -> str:
    """Return the hash of what computes stages: this program's code, and the versions of the libraries."""
    root = Path(pocketlm.__file__).parent
    rooms = (path for room in ROOMS for path in sorted((root / room).rglob("*.py")))
    # The server answers, and computes no stage.
    files = [path for path in rooms if "server" not in path.relative_to(root).parts]
    code = b"".join(path.read_bytes() for path in files)
    return hashlib.sha256(code + json.dumps(versions()).encode()).hexdigest()


def stage(name: str, inputs: dict[str, Any], produce: Callable[[Path], Any]) -> Finished:
    """Return a finished stage, running it only where no other run did; one that is at it now is waited for.

    Args:
        name: For the folder's name.
        inputs: Plain data that, with the code, decides the result: hashes, settings.
        produce: Fills a folder and returns facts about the stage as plain data.

    Raises:
        OutOfResourcesError: The disk is full.
        BadInputError: The cache cannot be written.
    """
    folder, key = _place(name, inputs)
    _make_cache(folder.parent)
    try:
        _in_use(folder.parent)
        if not (folder / DONE).is_file():
            _check_writable(folder.parent)
            lock = folder.parent / f".{folder.name}.lock"
            with held(lock, wait=True):
                if not (folder / DONE).is_file():  # nobody finished it while this process waited
                    _make(folder, produce)
            lock.unlink(missing_ok=True)  # no one needs it any more: what is finished is not made again
    except Exception as error:
        if is_disk_full(error):
            places = (cache_folder(), Path(tempfile.gettempdir()))
            full = min(places, key=lambda place: shutil.disk_usage(place).free)
            raise OutOfResourcesError(
                f"The disk of {full} is full. Free some space, or run `pocketlm clean --yes`, and start again"
            ) from error
        raise
    record = json.loads((folder / DONE).read_text())
    return Finished(folder, key, record["facts"], record["seconds"], reused=folder not in MADE)


def _make_cache(folder: Path) -> None:
    """Make the cache's folder.

    Raises:
        BadInputError: That is not possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (PermissionError, FileNotFoundError, NotADirectoryError) as error:
        raise BadInputError(f"The cache {folder} cannot be made: {error.strerror}. Set POCKETLM_CACHE") from error


def _check_writable(folder: Path) -> None:
    """Refuse a cache that can only be read; what is finished in it is taken all the same.

    Raises:
        BadInputError: It cannot be written.
    """
    if not os.access(folder, os.W_OK):
        raise BadInputError(f"The cache {folder} cannot be written. Set POCKETLM_CACHE to a folder that can")


def _make(folder: Path, produce: Callable[[Path], Any]) -> None:
    """Fill a stage's folder."""
    partial = folder.parent / f".{folder.name}.partial"
    began = time.monotonic()
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a killed run: who has the lock is alone
        partial.mkdir()
        facts = produce(partial)
        seconds = time.monotonic() - began
        (partial / DONE).write_text(json.dumps({"facts": facts, "seconds": seconds}))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        MADE.add(folder)
        shutil.rmtree(unfinished(partial), ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def held(lock: Path, wait: bool) -> Iterator[bool | None]:
    """Have something to oneself; what comes is whether one has it, None where the system has no locks."""
    if fcntl is None:
        yield None
        return
    with lock.open("w") as file:
        yield _taken(file, wait)


def _taken(file: IO[str], wait: bool) -> bool | None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            return False
        name = Path(file.name).stem[1:]
        logging.getLogger(__name__).warning("Another run is at work on %s: waiting for it", name)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a disk in the network may have no locks
        return None
    return True


def is_finished(name: str, inputs: dict[str, Any]) -> bool:
    """Return whether `stage` would reuse an earlier run's work."""
    return (_place(name, inputs)[0] / DONE).is_file()


def latest(name: str, facts: Any) -> Path | None:
    """Return the folder of the newest finished stage of a name that said this about itself, whatever it depends on."""
    finished = sorted(cache_folder().glob(f"{name}-*/{DONE}"), key=lambda path: path.stat().st_mtime)
    return next((path.parent for path in reversed(finished) if json.loads(path.read_text())["facts"] == facts), None)


def _place(name: str, inputs: dict[str, Any]) -> tuple[Path, str]:
    text = json.dumps([name, code_hash(), inputs], sort_keys=True, default=str)
    key = hashlib.sha256(text.encode()).hexdigest()
    return cache_folder() / f"{name}-{key[:24]}", key


def unfinished(folder: Path) -> Path:
    """Return where a stage that works in `folder` keeps what a later run of it can go on from; gone when it is done."""
    return folder.with_suffix(".unfinished")


def remove_leftovers() -> None:
    """Delete the unfinished folders of runs that were killed: those of live ones are locked."""
    if not os.access(cache_folder(), os.W_OK):
        return
    for partial in cache_folder().glob(".*.partial"):
        with held(partial.with_suffix(".lock"), wait=False) as mine:
            if mine:  # the lock stays: another run may wait for it by now
                shutil.rmtree(partial, ignore_errors=True)


def kept() -> list[tuple[str, int]]:
    """Return the name and bytes of every stage in the cache."""
    folders = sorted(path for path in cache_folder().glob("*") if path.is_dir() and _is_stage(path))
    return [
        (folder.name, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())) for folder in folders
    ]


def _is_stage(folder: Path) -> bool:
    """Whether a folder in the cache is of a stage, finished or not; a person may keep other things beside them."""
    return (folder / DONE).is_file() or bool(STAGE.fullmatch(folder.name))


def empty() -> None:
    """Delete every stage.

    Raises:
        BadInputError: Another run uses them.
    """
    folder = cache_folder()
    if not folder.exists():
        return
    with _alone_in(folder):
        for name, _ in kept():
            shutil.rmtree(folder / name)
        for lock in folder.glob(".*.lock"):
            if not lock.stat().st_size:  # as ours are
                lock.unlink()


@cache
def _in_use(folder: Path) -> int | None:
    """Say, for as long as this process lives, that a cache is needed; None where the system has no locks."""
    if fcntl is None:
        return None
    number = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # a disk in the network may have no locks
        fcntl.flock(number, fcntl.LOCK_SH)
    return number


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """While open, no other run can use a cache.

    Raises:
        BadInputError: One does.
    """
    number = _in_use(folder)
    try:
        if number is not None:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        fcntl.flock(number, fcntl.LOCK_SH)
        raise BadInputError(f"Another run uses the cache {folder}. Wait for it to end, or stop it") from error
    except OSError:
        pass
    try:
        yield
    finally:
        if number is not None:
            with suppress(OSError):
                fcntl.flock(number, fcntl.LOCK_SH)
