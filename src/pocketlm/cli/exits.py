"""How the program ends when something goes wrong."""

import errno
import signal
import sys
import traceback

import typer

from pocketlm.errors import OutOfResourcesError, PocketlmError

INTERRUPTED = 130


def run(app: typer.Typer) -> None:
    """Run a command line; whatever goes wrong becomes one message on standard error and an exit code."""
    _heed_signals()
    try:
        code = app(standalone_mode=False)  # typer turns an interruption into a code that it returns
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code)
    except PocketlmError as error:
        _fail(error, error.exit_code)
    except typer.Exit as end:
        sys.exit(end.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _fail(PocketlmError("Stopped. The same command goes on from here"), INTERRUPTED)
    except (MemoryError, OSError) as problem:
        if isinstance(problem, OSError) and problem.errno != errno.ENOSPC:
            _fail(PocketlmError(f"{problem.strerror}: {problem.filename or 'unknown file'}"), 1)
        full = isinstance(problem, OSError)
        what = "The disk is full. Free some space" if full else "Out of memory. Close other programs"
        error = OutOfResourcesError(f"{what}, and give the same command again: finished stages are kept")
        _fail(error, error.exit_code)
    except Exception as error:
        if type(error).__module__.startswith("click") or type(error).__module__.startswith("typer"):
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        _fail(
            PocketlmError(f"Unexpected {type(error).__name__}: {error}. Run again with --debug and report it"),
            1,
        )


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
