"""How the program ends when something goes wrong."""

import errno
import signal
import sys
import traceback

import typer

from pocketlm.errors import BadInputError, OutOfResourcesError, PocketlmError, is_disk_full

INTERRUPTED = 130
RESUMING = {"fit", "quantize", "prune", "distill", "calibrate"}


def run(app: typer.Typer) -> None:
    """Run a command line; whatever goes wrong becomes one message on standard error and an exit code."""
    _heed_signals()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show must not end a finished run
    try:
        _check_words(sys.argv[1:])
        code = app(standalone_mode=False)  # typer turns an interruption into a code that it returns
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code)
    except PocketlmError as error:
        _fail(error, error.exit_code)
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        more = ". The same command goes on from here" if RESUMING.intersection(sys.argv[1:2]) else ""
        _fail(PocketlmError(f"Stopped{more}"), INTERRUPTED)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        said = _worded(error)
        _fail(said, said.exit_code)


def _check_words(words: list[str]) -> None:
    """Refuse bytes that are no UTF-8, such as a folder's name in an old encoding: no report could say the command.

    Raises:
        BadInputError: There are some.
    """
    for word in words:
        if any("\udc80" <= letter <= "\udcff" for letter in word):
            raise BadInputError(f"{word!r} is no UTF-8, which reports are written in. Rename it")


def _worded(error: Exception) -> PocketlmError:
    """Return what a person is told of an error that was not made for one."""
    number = error.errno if isinstance(error, OSError) else None
    what = "The disk is full. Free some space" if is_disk_full(error) else ""
    # torch has no kind of its own for a CPU's memory: it is a RuntimeError that names its allocator.
    if isinstance(error, MemoryError) or number == errno.ENOMEM or "DefaultCPUAllocator" in str(error):
        what = "Out of memory. Close other programs"
    if what:
        return OutOfResourcesError(f"{what}, and give the same command again: finished stages are kept")
    if isinstance(error, OSError):
        said = error.strerror or str(error)
        return PocketlmError(f"{said}: {error.filename}" if error.filename else said)
    return PocketlmError(f"Unexpected {type(error).__name__}: {error}. Run again with --debug and report it")


def _heed_signals() -> None:
    """Make a run that is told to end tidy up like one that is interrupted; what nohup ignores stays ignored."""
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)


def _fail(error: PocketlmError, code: int) -> None:
    if "--debug" in sys.argv:
        traceback.print_exc()
    print(f"error: {error}", file=sys.stderr)
    sys.exit(code)
