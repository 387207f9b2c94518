"""Make the page's pictures anew: `python -m tests.page_pictures FOLDER [MODEL.gguf ORIGINAL.gguf]`.

Two sizes, light and dark: before the first question, a comparison, an answer being written, the settings.
Without files the demo model is compared with itself.
"""

import sys
import tempfile
from pathlib import Path

from tests.browser import DEMO, chromium, free_port, linked, missing, served

SIZES = {"phone": {"width": 390, "height": 844}, "wide": {"width": 1280, "height": 800}}
QUESTIONS = (
    "Explain in two sentences why the sky is blue.",
    "List three things to pack for a day in the mountains, and why.",
)


def take(page: object, stem: Path) -> None:
    """Use the page at its address, and save a picture of each of its states as `stem-STATE.png`."""
    message = page.get_by_label("Your message")
    idle = page.get_by_role("button", name="Send")

    def picture(state: str) -> None:
        page.screenshot(path=f"{stem}-{state}.png", animations="disabled")

    page.get_by_role("button", name=QUESTIONS[0]).wait_for()
    picture("start")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Longest answer").fill("120")
    page.get_by_label("Temperature").fill("0")
    picture("settings")
    page.keyboard.press("Escape")
    message.fill(QUESTIONS[0])
    message.press("Enter")
    page.mouse.move(0, 400)
    idle.wait_for()
    picture("comparison")
    message.fill(QUESTIONS[1])
    message.press("Enter")
    page.locator(".turn").nth(1).locator("li").first.wait_for()
    picture("writing")
    idle.wait_for()
    picture("lists")


def main(folder: Path, models: list[Path]) -> None:
    """Serve the files and take every picture."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        model, original = models or linked(DEMO, Path(place))
        with served(model, "--compare", original, port=free_port(), cache=Path(place)) as address:
            take_all(address, folder)


def take_all(address: str, folder: Path) -> None:
    """Take every picture of a running server's page."""
    with chromium() as browser:
        for size, viewport in SIZES.items():
            for scheme in ("light", "dark"):
                page = browser.new_page(viewport=viewport, color_scheme=scheme, is_mobile=size == "phone")
                page.set_default_timeout(120_000)
                page.goto(address)
                take(page, folder / f"{size}-{scheme}")
                page.close()


if __name__ == "__main__":
    if missing():
        sys.exit(missing())
    out, *models = map(Path, sys.argv[1:])
    main(out, models)
