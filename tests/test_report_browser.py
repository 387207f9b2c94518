"""The report in a real browser: at the width of a phone and of a desk nothing is cut, and no letters lie on others."""

from dataclasses import replace
from importlib.util import find_spec

import pytest
from tests.browser import CHROMIUM, chromium
from tests.test_report import report_of_smollm2, with_product

from pocketlm.interval import Interval
from pocketlm.report.frontier import frontier_page
from pocketlm.report.pages import html_page

WIDTHS = {390: 844, 1280: 800}
PAINTED = """() => {
  const width = document.documentElement.clientWidth, cut = [], over = [];
  for (const element of document.querySelectorAll("main *")) {
    const box = element.getBoundingClientRect();
    if (box.width && (box.left < -1 || box.right > width + 1)) cut.push(element.outerHTML.slice(0, 80));
    if (element.scrollWidth > element.clientWidth + 1 && element.clientWidth && element.matches(".scroll"))
      cut.push(element.outerHTML.slice(0, 80));
  }
  for (const picture of document.querySelectorAll("svg.chart")) {
    const boxes = [...picture.querySelectorAll("text")].map(text => [text.getBoundingClientRect(), text.textContent]);
    boxes.forEach(([one, said], index) => boxes.slice(index + 1).forEach(([other, also]) => {
      const across = Math.min(one.right, other.right) - Math.max(one.left, other.left);
      const down = Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top);
      if (across > 1 && down > 3) over.push(`${said} / ${also}`);
    }));
  }
  return {cut, over};
}"""


def frontier() -> str:
    """A page of five sizes; the figures are invented."""
    reports = {}
    for size, ratio in ((40, 1.62), (50, 1.33), (60, 1.16), (75, 1.06), (90, 1.02)):
        found = Interval(ratio, ratio - 0.02, ratio + 0.02)
        made = with_product(report_of_smollm2(), bytes=size * 10**6 - 100, perplexity_ratio=found)
        plain = Interval(1.2 * ratio, 1.17 * ratio, 1.23 * ratio)
        files = [
            replace(file, bytes=size * 10**6 - 9000, perplexity_ratio=plain) if file.role == "plain" else file
            for file in made.files
        ]
        reports[f"{size}MB"] = replace(made, files=tuple(files))
    return frontier_page(reports, {"20MB": "cannot be met"})


@pytest.mark.slow
@pytest.mark.skipif(not (find_spec("playwright") and CHROMIUM), reason="there is no browser, or no driver of one")
def test_nothing_is_cut_and_no_letters_overlap(tmp_path):
    pages = {"report": html_page(report_of_smollm2()), "frontier": frontier()}
    with chromium() as browser:
        for name, text in pages.items():
            (tmp_path / f"{name}.html").write_text(text)
            for width, height in WIDTHS.items():
                page = browser.new_page(viewport={"width": width, "height": height}, is_mobile=width < 500)
                page.goto((tmp_path / f"{name}.html").as_uri())
                assert page.evaluate(PAINTED) == {"cut": [], "over": []}, (name, width)
                page.close()


@pytest.mark.slow
@pytest.mark.skipif(not (find_spec("playwright") and CHROMIUM), reason="there is no browser, or no driver of one")
def test_the_story_is_on_one_screen_of_a_desk_and_dark_is_dark(tmp_path):
    (tmp_path / "report.html").write_text(html_page(report_of_smollm2()))
    with chromium() as browser:
        for scheme, dark in (("light", False), ("dark", True)):
            page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=scheme)
            page.goto((tmp_path / "report.html").as_uri())
            assert page.locator(".note").first.bounding_box()["y"] < 700
            colour = page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(", ")
            assert (max(map(int, colour)) < 64) is dark
            page.close()
