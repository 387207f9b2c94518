"""The routes."""

import asyncio
import re
import sys
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.resources import files

import aiohttp
from aiohttp import web

from pocketlm.run.server.admission import admit
from pocketlm.run.server.answers import chunks, event_bytes, events, legacy_logprobs, trimmed
from pocketlm.run.server.escalation import Escalation, better
from pocketlm.run.server.local import LocalModel, down
from pocketlm.run.server.metrics import Metrics
from pocketlm.run.server.refusals import RefusalError
from pocketlm.run.server.requests import Chat, Completion, Embedding, parse

LARGEST_REQUEST = 4 * 2**20  # bytes
_PATIENCE = 60.0  # seconds that a client may take to send a request, or to take a piece of an answer
# The page is one file; whatever it shows, it can reach nothing but this server.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_STREAM_HEADERS = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_ANSWERED_BY = "x-pocketlm-answered-by"
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _ClientLeft(Exception):
    """Nobody is there to read the answer."""


@dataclass
class Service:
    """What the routes work with.

    Attributes:
        models: The optimised model and, where there is one, the model it is compared with.
        key: What clients must know; None if nothing.
        local_only: Whether the server listens to this machine alone.
        escalation: When to ask a larger model; None for never.
        metrics: What is counted.
        in_flight: Requests that are being answered.
        draining: Whether the server is about to end and takes no new requests.
        idle: Set where nothing is in flight.
    """

    models: list[LocalModel]
    key: str | None
    local_only: bool
    escalation: Escalation | None
    metrics: Metrics = field(default_factory=Metrics)
    in_flight: int = 0
    draining: bool = False
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    began: int = field(default_factory=lambda: int(time.time()))


_SERVICE = web.AppKey("service", Service)
_OUTSIDE = web.AppKey("outside", aiohttp.ClientSession)


def application(service: Service) -> web.Application:
    """Return the server as an application of aiohttp."""
    app = web.Application(client_max_size=LARGEST_REQUEST, middlewares=[_answer_or_refuse])
    app[_SERVICE] = service
    app.add_routes(
        [
            web.get("/", _page),
            web.get("/health", _health),
            web.get("/metrics", _metrics),
            web.get("/v1/models", _models),
            web.get("/v1/models/{name}", _model),
            web.post("/v1/chat/completions", _chat),
            web.post("/v1/completions", _completion),
            web.post("/v1/embeddings", _embedding),
        ]
    )
    if service.escalation:
        app.cleanup_ctx.append(_outside)
    return app


async def _outside(app: web.Application) -> AsyncIterator[None]:
    async with aiohttp.ClientSession() as app[_OUTSIDE]:
        yield


@web.middleware
async def _answer_or_refuse(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Answer, or say in OpenAI's shape why not; count both."""
    service = request.app[_SERVICE]
    resource = request.match_info.route.resource
    route = resource.canonical if resource else "unknown"
    service.in_flight += 1
    service.idle.clear()
    began = time.monotonic()
    try:
        try:
            admit(request, service.key, service.local_only, service.draining)
            response = await handler(request)
        except _ClientLeft:
            raise
        except RefusalError as error:
            response = _refuse(error)
        except web.HTTPException as error:
            response = _refuse(_from_http(error))
        except web.RequestPayloadError:
            response = _refuse(
                RefusalError(400, "The body of the request cannot be read: it is cut off or badly packed")
            )
            response.force_close()  # where the next request begins is not known
        except Exception:
            traceback.print_exc(file=sys.stderr)
            response = _refuse(RefusalError(500, "The server failed; its log has the reason"))
        service.metrics.requests.labels(route, response.status).inc()
        service.metrics.latency.labels(route).observe(time.monotonic() - began)
        return response
    except asyncio.CancelledError:
        service.metrics.left.labels(route).inc()
        raise
    except _ClientLeft:
        service.metrics.left.labels(route).inc()
        if request.transport:  # one that only stopped reading would not take the end either
            request.transport.abort()
        return web.Response(status=499)  # as nginx says it, to nobody
    finally:
        service.in_flight -= 1
        if not service.in_flight:
            service.idle.set()


def _refuse(error: RefusalError) -> web.Response:
    return web.json_response(error.body(), status=error.status, headers=error.headers)


def _from_http(error: web.HTTPException) -> RefusalError:
    messages = {
        404: "There is no such route. Those under /v1 are OpenAI's: models, chat/completions, completions, embeddings",
        405: "This route does not take this method",
        413: f"The request is larger than {LARGEST_REQUEST // 2**20} MiB",
    }
    return RefusalError(error.status, messages.get(error.status, error.reason))


async def _page(request: web.Request) -> web.Response:
    page = files("pocketlm.run") / "page" / "index.html"
    if not page.is_file():
        raise web.HTTPNotFound
    return web.Response(text=page.read_text(encoding="utf-8"), content_type="text/html", headers=_PAGE_HEADERS)


async def _health(request: web.Request) -> web.Response:
    service = request.app[_SERVICE]
    models = {model.name: "ok" if model.ready else "starting" for model in service.models}
    well = all(model.ready for model in service.models) and not service.draining
    says = "ending" if service.draining else "ok" if well else "starting"
    return web.json_response({"status": says, "models": models}, status=200 if well else 503)


async def _metrics(request: web.Request) -> web.Response:
    service = request.app[_SERVICE]
    for model in service.models:
        service.metrics.running.labels(model.name).set(model.line.running)
        service.metrics.waiting.labels(model.name).set(model.line.waiting)
        service.metrics.engine_up.labels(model.name).set(model.ready is not None)
        service.metrics.engine_starts.labels(model.name).set(model.starts)
    return web.Response(body=service.metrics.text(), headers={"Content-Type": Metrics.content_type})


def _described(model: LocalModel, service: Service) -> dict:
    known = {"id": model.name, "object": "model", "created": service.began, "owned_by": "pocketlm"}
    context = {"context_length": model.ready.context} if model.ready else {}
    return known | {"meta": {"size": model.size}} | context


async def _models(request: web.Request) -> web.Response:
    service = request.app[_SERVICE]
    return web.json_response({"object": "list", "data": [_described(model, service) for model in service.models]})


async def _model(request: web.Request) -> web.Response:
    service = request.app[_SERVICE]
    return web.json_response(_described(_pick(service, request.match_info["name"]), service))


def _pick(service: Service, name: str | None) -> LocalModel:
    """Return the model of this name; the optimised one if none is named."""
    for model in service.models:
        if not name or model.name == name:
            return model
    known = ", ".join(model.name for model in service.models)
    raise RefusalError(
        404, f"The model `{name}` is not served here. Known: {known}", code="model_not_found", param="model"
    )


@asynccontextmanager
async def _turn(service: Service, model: LocalModel) -> AsyncIterator[None]:
    async with model.line.turn() as waited:
        service.metrics.queueing.labels(model.name).observe(waited)
        yield


async def _chat(request: web.Request) -> web.StreamResponse:
    service = request.app[_SERVICE]
    asked = parse(Chat, await _body(request))
    model = _pick(service, asked.model)
    if not model.ready:
        raise down()
    if not model.ready.chats:
        raise RefusalError(400, f"`{model.name}` has no chat template: it goes on with texts, at /v1/completions")
    judged = service.escalation is not None and model is service.models[0]
    body = asked.for_engine(model.ready.wraps_tools, judged)
    if judged:
        return await _chat_or_escalate(request, asked, body)
    return await _respond(request, model, "/v1/chat/completions", asked, body)


async def _chat_or_escalate(request: web.Request, asked: Chat, body: dict) -> web.StreamResponse:
    """Wait for the whole local answer, judge it, and give it or the larger model's; a stream starts after that."""
    service, model = request.app[_SERVICE], request.app[_SERVICE].models[0]
    async with _turn(service, model):
        answer = await model.answer("/v1/chat/completions", body)
    _count(service, model.name, answer)
    answer = await better(answer, asked, service.escalation, request.app[_OUTSIDE])
    mark = answer["pocketlm"]
    service.metrics.confidence.observe(mark["confidence"])
    if mark["escalated"]:
        failed = "escalation_failed" in mark
        service.metrics.escalations.labels("failed" if failed else "answered").inc()
        if not failed:
            _count(service, mark["answered_by"], answer)
    headers = {_ANSWERED_BY: mark["answered_by"]}
    if not asked.stream:
        return web.json_response(answer, headers=headers)
    response = web.StreamResponse(headers=_STREAM_HEADERS | headers)
    await response.prepare(request)
    for chunk in chunks(answer, bool(asked.stream_options and asked.stream_options.include_usage)):
        await _write(response, chunk)
    return response


async def _completion(request: web.Request) -> web.StreamResponse:
    asked = parse(Completion, await _body(request))
    model = _pick(request.app[_SERVICE], asked.model)
    return await _respond(request, model, "/v1/completions", asked, asked.for_engine())


async def _embedding(request: web.Request) -> web.Response:
    service = request.app[_SERVICE]
    asked = parse(Embedding, await _body(request))
    model = _pick(service, asked.model)
    async with _turn(service, model):
        answer = await model.embed(asked.inputs(), asked.encoding_format or "float")
    _count(service, model.name, answer)
    return web.json_response(answer)


async def _respond(
    request: web.Request, model: LocalModel, path: str, asked: Chat | Completion, body: dict
) -> web.StreamResponse:
    """Give the engine's answer, whole or as a stream."""
    service = request.app[_SERVICE]
    headers = {_ANSWERED_BY: model.name}
    # The engine's own stream is what was asked for, but for probabilities of the old API and for no alternatives.
    unread = asked.alternatives is None or (isinstance(asked, Chat) and asked.alternatives > 0)
    async with _turn(service, model):
        if not asked.stream:
            answer = await model.answer(path, body)
            _count(service, model.name, answer)
            return web.json_response(_as_asked(answer, asked), headers=headers)
        if asked.stream_options:
            body["stream_options"] = {"include_usage": asked.stream_options.include_usage}
        async with model.post(path, body) as upstream:
            response = web.StreamResponse(headers=_STREAM_HEADERS | headers)
            await response.prepare(request)
            pieces = upstream.content.iter_any()
            last = await _pass_on(pieces if unread else _each_as_asked(pieces, asked), response)
        _count_stream(service, model, last)
    return response


async def _pass_on(pieces: AsyncIterator[bytes], response: web.StreamResponse) -> bytes:
    """Pass a stream on as it comes; return its last bytes, which have the counts."""
    last = rest = b""
    try:
        async for piece in pieces:
            whole, end, rest = (rest + piece).rpartition(b"\n\n")  # half an event would spoil the one that says why
            if end:
                await _write(response, whole + end)
                last = (last + whole + end)[-2048:]
    except aiohttp.ClientError:
        pass
    if b"data: [DONE]" not in last:
        await _write(response, event_bytes(down().body()))
    return last


def _as_asked(answer: dict, asked: Chat | Completion, offset: int = 0) -> dict:
    """Give an answer, or what begins at `offset` of one, the probabilities that were asked for, as its API has them."""
    if asked.alternatives is None or "choices" not in answer:
        return answer
    answer = trimmed(answer, asked.alternatives)
    return legacy_logprobs(answer, offset) if isinstance(asked, Completion) else answer


async def _each_as_asked(pieces: AsyncIterator[bytes], asked: Chat | Completion) -> AsyncIterator[bytes]:
    offset = 0
    async for event in events(pieces):
        yield event_bytes(_as_asked(event, asked, offset))
        offset += sum(len(choice.get("text") or "") for choice in event.get("choices", ()))
    yield b"data: [DONE]\n\n"


async def _body(request: web.Request) -> bytes:
    try:
        async with asyncio.timeout(_PATIENCE):
            return await request.read()
    except TimeoutError as error:
        late = f"The body of the request did not come within {_PATIENCE:g} seconds"
        # What comes later still is no new request.
        raise RefusalError(408, late, headers={"Connection": "close"}) from error


async def _write(response: web.StreamResponse, data: bytes) -> None:
    """Write a piece of an answer; a client that does not take it is as good as gone, and must not hold a slot."""
    try:
        async with asyncio.timeout(_PATIENCE):
            await response.write(data)
    except (ConnectionError, TimeoutError) as error:
        raise _ClientLeft from error


def _count(service: Service, name: str, answer: dict) -> None:
    """Count the tokens of an answer for the model of this name, here or elsewhere."""
    usage = answer.get("usage") or {}
    service.metrics.prompt_tokens.labels(name).inc(usage.get("prompt_tokens") or 0)
    service.metrics.answer_tokens.labels(name).inc(usage.get("completion_tokens") or 0)


def _count_stream(service: Service, model: LocalModel, last: bytes) -> None:
    """Count the tokens of a stream from the timings in its last event."""
    counts = {name: int(count) for name, count in re.findall(rb'"(cache_n|prompt_n|predicted_n)":(\d+)', last)}
    read = counts.get(b"cache_n", 0) + counts.get(b"prompt_n", 0)
    service.metrics.prompt_tokens.labels(model.name).inc(read)
    service.metrics.answer_tokens.labels(model.name).inc(counts.get(b"predicted_n", 0))
