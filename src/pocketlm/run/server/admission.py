"""Who may ask: those who know the key and do not come from another site's page, while the server is not ending."""

import hmac
from urllib.parse import urlsplit

from aiohttp import web

from pocketlm.run.server.refusals import RefusalError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_OPEN = ("/", "/health")  # without a key


def admit(request: web.Request, key: str | None, local_only: bool, draining: bool) -> None:
    """Let a request in or not.

    Args:
        request: What came; nothing of its body is read.
        key: What clients must know; None if nothing.
        local_only: Whether the server listens to this machine alone.
        draining: Whether it is about to end.

    Raises:
        RefusalError: Status 401, 403, or 503 where the server is ending.
    """
    host = request.headers.get("Host", "")
    if local_only and _parts(f"//{host}")[0] not in LOOPBACK:
        # Another site whose name was pointed at this machine.
        raise RefusalError(403, "This server answers to localhost only; serve with --host to change that")
    origin = request.headers.get("Origin")
    if origin and _parts(origin)[1] != host:
        raise RefusalError(403, "Pages of other sites may not use this server")
    given = request.headers.get("Authorization", "").removeprefix("Bearer ").encode("utf-8", "surrogateescape")
    if key and request.path not in _OPEN and not hmac.compare_digest(given, key.encode()):
        raise RefusalError(401, "Incorrect API key. Send it as `Authorization: Bearer KEY`", code="invalid_api_key")
    if draining and request.method == "POST":
        raise RefusalError(503, "The server is shutting down", code="shutting_down", headers={"Connection": "close"})


def _parts(url: str) -> tuple[str, str | None]:
    """Return the name of a URL's host, and the host with its port; nobody's where it is no URL."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "", None
    return (parts.hostname or "").lower(), parts.netloc
