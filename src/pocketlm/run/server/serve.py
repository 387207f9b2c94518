"""`pocketlm serve`: from a file to a server that runs until it is told to end."""

import asyncio
import errno
import signal
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pocketlm.errors import BadInputError, MissingExtraError
from pocketlm.run.server.engine_process import EngineSettings

if TYPE_CHECKING:
    from pocketlm.run.server.app import Service
    from pocketlm.run.server.escalation import Escalation
    from pocketlm.run.server.local import LocalModel

_LAST_WORDS = 2.0  # seconds to send what is written when all answers are done, or were cut off by a second signal


@dataclass(frozen=True, slots=True)
class Serve:
    """What to serve and to whom.

    Attributes:
        path: A GGUF file.
        compare: Another one to compare it with, served beside it.
        host: The address to listen on.
        port: The port; any free one if 0.
        api_key: What clients must send; nothing if None.
        slots: Answers that each model writes at the same time.
        queue: Requests that may wait for each model; what comes beyond is refused with status 429.
        context: Longest prompt and answer of one request in tokens; that of the model, at most 4096, if None.
        threads: CPU threads of each engine; its choice if None.
        escalation: When to ask a larger model; None for never.
        auto: Whether threads, cache and batch are chosen by measuring before the server starts.
        draft: A small file that drafts for `path` where that is measured to be faster.
    """

    path: Path
    compare: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    slots: int = 4
    queue: int = 64
    context: int | None = None
    threads: int | None = None
    escalation: "Escalation | None" = None
    auto: bool = False
    draft: Path | None = None


def serve(job: Serve) -> None:
    """Serve until SIGTERM or Ctrl-C; then finish what was accepted, and return. A second one does not wait.

    Raises:
        BadInputError: The engine cannot load a file, the address cannot be listened on, or the key is empty.
        MissingExtraError: The packages of the extra `serve` are missing.
    """
    check_installed()
    if job.api_key == "":
        raise BadInputError("The key is empty, so anyone would be let in. Give one with --api-key, or leave it out")
    asyncio.run(_serve(job))


def check_installed() -> None:
    """See that the packages of the extra `serve` are there.

    Raises:
        MissingExtraError: They are not.
    """
    try:
        import aiohttp  # noqa: F401
        import prometheus_client  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"Serving needs {error.name}: pip install 'pocketlm[serve]'") from None


async def _serve(job: Serve) -> None:
    from aiohttp import web

    from pocketlm.run.server.admission import LOOPBACK
    from pocketlm.run.server.app import Service, application
    from pocketlm.run.server.local import LocalModel

    listener = _listener(job.host, job.port)
    engines = await _measured(job, _engines(job))
    models = [LocalModel(settings, job.queue) for settings in engines]
    service = Service(models, job.api_key, job.host in LOOPBACK, job.escalation)
    stop, hurry = _signals()
    try:
        if not await _loaded(models, stop):
            return
        app = application(service)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=_LAST_WORDS)
        await runner.setup()
        site = web.SockSite(runner, listener, backlog=1024)
        await site.start()
        sys.stdout.write(_greeting(job, service, listener) + "\n")
        sys.stdout.flush()
        await stop.wait()
        service.draining = True
        await asyncio.sleep(0.1)  # whoever connected meanwhile is told, and not cut off
        await site.stop()
        if service.in_flight:
            await asyncio.wait(
                [asyncio.ensure_future(service.idle.wait()), asyncio.ensure_future(hurry.wait())],
                return_when=asyncio.FIRST_COMPLETED,
            )
        await runner.cleanup()
    finally:
        await asyncio.gather(*(model.stop() for model in models))
        listener.close()


async def _loaded(models: list["LocalModel"], stop: asyncio.Event) -> bool:
    """Load the models; return whether they were there before the server was told to end."""

    async def load() -> None:
        for model in models:  # one after the other: where one fails, none is left half started
            await model.start()

    loading, told = asyncio.ensure_future(load()), asyncio.ensure_future(stop.wait())
    await asyncio.wait([loading, told], return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    if loading.done():
        loading.result()  # raises what went wrong
        return True
    loading.cancel()
    await asyncio.gather(loading, return_exceptions=True)
    return False


def _engines(job: Serve) -> list[EngineSettings]:
    names = [model_name(job.path)]
    if job.compare:
        name = model_name(job.compare)
        names.append(f"{name}-compared" if name == names[0] else name)
    paths = filter(None, (job.path, job.compare))
    return [
        EngineSettings(str(path), name, slots=job.slots, context=job.context, threads=job.threads)
        for path, name in zip(paths, names, strict=True)
    ]


async def _measured(job: Serve, engines: list[EngineSettings]) -> list[EngineSettings]:
    """Return the engines' settings with what measuring chose; what holds for the first holds for the one beside it."""
    from pocketlm.run.server.tuning import drafted, tuned

    def say(line: str) -> None:
        sys.stderr.write(line + "\n")

    if job.auto:
        first = await tuned(engines[0], say)
        engines = [replace(each, threads=first.threads, cache=first.cache, batch=first.batch) for each in engines]
    if job.draft:
        engines[0] = await drafted(engines[0], job.draft, say)
    return engines


def model_name(path: Path) -> str:
    """Name a model after its file, or after the folder that `fit` made for it."""
    return path.parent.resolve().name if path.name == "model.gguf" else path.stem


def _listener(host: str, port: int) -> socket.socket:
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except UnicodeError as error:  # what is no name of a host at all, such as one of over 63 letters without a dot
        raise BadInputError(f"Cannot listen on {host}: it is no name of a host. Give another --host") from error
    except OSError as error:
        unknown = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        other = "--host" if unknown else "--port"
        raise BadInputError(f"Cannot listen on {host}, port {port}: {error.strerror}. Give another {other}") from error
    return listener


def _signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Return what the first and the second request to end set off."""
    loop, stop, hurry = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

    def end() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(end))
    return stop, hurry


def _greeting(job: Serve, service: "Service", listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    names = " and ".join(model.name for model in service.models)
    open_to_all = "" if service.local_only or job.api_key else "; anyone who reaches this machine may use it"
    return f"{names} at http://{f'[{host}]' if ':' in host else host}:{port} (API under /v1; Ctrl-C ends{open_to_all})"
