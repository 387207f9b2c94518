"""Several sizes in one run, and two results side by side, as a person calls them."""

import json
import math
import os
import re
from dataclasses import replace

import pytest
from tests.command_line import pocketlm
from tests.test_report import report as invented_report
from tests.tiny import tiny_folder

from pocketlm.interval import Interval
from pocketlm.report.charts import scatter
from pocketlm.report.content import Report, from_dict, to_dict
from pocketlm.report.difference import cautions, differences
from pocketlm.report.frontier import frontier_data, frontier_lines, frontier_markdown, frontier_page, smallest_within

report = invented_report  # the fixture of a whole report


@pytest.mark.slow
def test_a_sweep_makes_each_size_once_and_lays_them_side_by_side(tmp_path):
    folder, out = tiny_folder("llama", tmp_path / "model"), tmp_path / "out"
    seen = json.loads(pocketlm("inspect", folder, "--json", cache=tmp_path).stdout)
    small, large = seen["smallest"] + 1000, seen["largest"]
    asked = ("fit", folder, "--sweep", f"{small}B,10B,{large}B", "--preset", "fast", "--heal", "0", "-o", out, "--json")
    done = pocketlm(*asked, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [point["bytes"] <= point["budget_bytes"] for point in found["points"]] == [True, True]
    assert "cannot be met" in found["refused"]["10B"]
    for name in (f"{small}B", f"{large}B"):
        assert (out / name / "model.gguf").is_file()
    assert {path.name for path in out.iterdir() if path.is_file()} == {"frontier.json", "frontier.md", "frontier.html"}
    before = {path: path.stat().st_mtime_ns for path in out.rglob("model.gguf")}
    assert pocketlm(*asked, cache=tmp_path).returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("model.gguf")}, "nothing is made twice"
    changed = folder / "config.json"
    changed.touch()
    assert "exists already" in pocketlm(*asked, cache=tmp_path).stderr, "another model may be in the folder now"
    os.utime(changed, (0, 0))
    (out / f"{small}B" / "model.gguf").unlink()
    assert "--force" in pocketlm(*asked, cache=tmp_path).stderr
    assert pocketlm(*asked, "--force", cache=tmp_path).returncode == 0
    assert (out / f"{small}B" / "model.gguf").is_file()
    beside = pocketlm("diff", out / f"{small}B", out / f"{large}B", cache=tmp_path)
    assert beside.returncode == 0, beside.stderr
    assert re.search(r"^embedding +\S.*\d", beside.stdout, re.MULTILINE)
    nothing = pocketlm("diff", out / f"{small}B", tmp_path / "none", cache=tmp_path)
    assert nothing.returncode == 2
    assert "There is no report" in nothing.stderr


def test_every_folder_of_a_sweep_is_looked_at_before_any_work(tmp_path):
    (tmp_path / "out" / "60MB").mkdir(parents=True)
    done = pocketlm("fit", "demo", "--sweep", "40MB,60MB,60 MB", "-o", tmp_path / "out", cache=tmp_path / "cache")
    assert done.returncode == 2
    assert "60MB exists already" in done.stderr
    assert not (tmp_path / "cache").exists(), "not even the model was read"


@pytest.mark.parametrize("name", ["frontier.md", "frontier.json"])
def test_a_persons_file_is_no_frontier_to_replace(name, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('["mine"]')
    done = pocketlm("fit", "demo", "--sweep", "40MB", "-o", tmp_path / "out", cache=tmp_path / "cache")
    assert done.returncode == 2
    assert f"{name} exists already, and no sweep made it" in done.stderr
    assert not (tmp_path / "cache").exists(), "not even the model was read"


def test_a_time_is_of_one_run(tmp_path):
    done = pocketlm("fit", "demo", "--sweep", "40MB,60MB", "--time", "30m", "-o", tmp_path / "out", cache=tmp_path)
    assert done.returncode == 2
    assert "--time is for one size" in done.stderr


def test_the_smallest_within_a_bound_is_named_with_its_whole_interval(report):
    def like(size: int, high: float) -> Report:
        found = replace(report.product, bytes=size, perplexity_ratio=Interval(1.01, 1.0, high))
        others = tuple(each for each in report.files if each is not report.product)
        return replace(report, files=(*others, found))

    several = {"large": like(300, 1.04), "middle": like(200, 1.15), "small": like(100, 1.2), "wide": like(50, 1.51)}
    assert smallest_within(several) == {"1.05": "large", "1.15": "middle", "1.5": "small"}
    assert smallest_within({"wide": several["wide"]}) == {"1.05": None, "1.15": None, "1.5": None}
    data = frontier_data({"only": report})
    assert data["points"][0]["bytes"] == report.product.bytes
    page = frontier_page({"<b>": report}, {"1MB": "cannot & will not"})
    assert "<b>" not in page
    assert "formats alone where pruning won" in page, "what is beside a result is not always plain"
    assert "cannot &amp; will not" in page


def test_a_broken_size_of_an_earlier_sweep_stops_no_frontier(report):
    """What is not finite comes back from report.json as None."""
    broken = Interval(math.inf, math.nan, math.inf)
    product = replace(report.product, perplexity=broken, perplexity_ratio=broken, divergence=broken, agreement=broken)
    others = tuple(each for each in report.files if each is not report.product)
    made = replace(report, files=(*others, product), perplexity_ratio_to_plain=broken)
    kept = {"40MB": from_dict(json.loads(json.dumps(to_dict(made)))), "70MB": report}
    assert smallest_within(kept) == smallest_within({"70MB": report})
    assert frontier_data(kept)["points"][0]["perplexity_ratio"] is None
    assert "not finite" in frontier_page(kept, {})
    assert "not finite" in frontier_markdown(kept, {})
    assert any("not finite" in line for line in frontier_lines(kept, {}))


def test_a_kl_that_cannot_be_is_told_from_one_that_was_not_measured(report):
    trimmed = replace(report.product, divergence=None, bits_per_byte=Interval(1.2, 1.1, 1.3))
    others = tuple(each for each in report.files if each is not report.product)
    respelled = replace(report, files=(*others, trimmed))
    assert "another vocabulary" in frontier_page({"1MB": respelled}, {})
    unmeasured = replace(trimmed, bits_per_byte=None)
    assert "another vocabulary" not in frontier_page({"1MB": replace(report, files=(*others, unmeasured))}, {})


def test_a_result_differs_from_itself_in_nothing(report):
    assert all(one == other for _, one, other in differences(report, report))
    assert cautions(report, report) == ["Both have the same recipe"]


def test_points_are_drawn_to_scale():
    points = [(10.0, Interval(1.0, 1.0, 1.0), "a"), (20.0, Interval(2.0, 1.5, 2.0), "b")]
    drawn = str(scatter([("compressed", points)], "t"))
    places = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)%" cy="([\d.]+)"', drawn)]
    assert places == [(8.0, 250.0), (92.0, 10.0)]
