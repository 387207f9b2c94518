import hashlib
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import yaml

from pocketlm.errors import BadInputError, VerificationError
from pocketlm.interval import Interval, mean_ratio
from pocketlm.pipeline.artefact import sensitivity_of
from pocketlm.plan.search import Damages, Plan
from pocketlm.plan.sizes import Shape
from pocketlm.report import charts, tables, wording
from pocketlm.report.answers import compare, folded, repeats_itself
from pocketlm.report.content import (
    BudgetFacts,
    Change,
    Check,
    LimitFacts,
    MeasuredFile,
    ModelFacts,
    PartSize,
    Rate,
    Report,
    Sensitivity,
    Speed,
    StageDamage,
    StageRun,
    TaskScore,
    TextUsed,
    UnitCost,
    Waterfall,
    from_dict,
    to_dict,
)
from pocketlm.report.pages import cell, fence, html_page, markdown_page
from pocketlm.report.verdict import against_one, check_budgets_met, faster, judge, lower
from pocketlm.report.write import read_report, write_manifest, write_reports

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)> | `````\n# not a heading & {{ 7 * 7 }}"


def speed(prefill: float, decode: float, memory: int, joules: float | None = None) -> Speed:
    return Speed(
        prefill_tokens_per_second=Rate(prefill, prefill * 0.012),
        decode_tokens_per_second=Rate(decode, decode * 0.015),
        time_to_first_token_milliseconds=1000 * 64 / prefill,
        load_seconds=0.21,
        peak_memory_bytes=memory,
        joules_per_token=joules,
    )


def report_of_smollm2() -> Report:
    """The shape of a real run, SmolLM2-135M-Instruct from 98 MB to 70 MB; the figures are invented."""
    answers = (
        compare(
            "What is the capital of France?",
            "The capital of France is Paris.",
            "The capital of France is Paris.",
        ),
        compare(
            "Explain in two sentences why the sky is blue.",
            "The sky is blue because of Rayleigh scattering. The short waves of sunlight,"
            " such as blue, are scattered more by the molecules of the air than long ones.",
            "The sky appears blue because of the way sunlight is scattered by the atmosphere. Blue light has"
            " a shorter wavelength, so more of it reaches our eyes from all directions.",
        ),
        compare(
            "Write a Python function that adds two numbers.",
            "```python\ndef add(a, b):\n    return a + b\n```",
            "Here is the function. Here is the function. Here is the function. Here is the function.",
        ),
        compare("Show me a web page.", "<h1>Hello</h1>", HOSTILE),
        compare("Say nothing.", "I have nothing to say.", " \n"),
    )
    losses = [
        (step, round(1.9 * math.exp(-step / 90) + 0.31 + 0.03 * math.sin(step), 4)) for step in range(10, 410, 10)
    ]
    return Report(
        command="pocketlm fit demo --budget 70MB --out smollm2-70mb --seed 0",
        created="2026-11-23",
        pocketlm="0.1.0",
        versions={
            "python": "3.11.2",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "gguf": "0.19.0",
            "xllamacpp": "2026.10",
            "llama.cpp": "b11434",
        },
        machine={
            "processor": "Intel Xeon (Sapphire Rapids)",
            "threads": 2,
            "memory": "16 GB",
            "system": "Linux 6.1",
        },
        seed=0,
        settings={"distillation tokens": 1048576, "learning rate": 0.0002, "threads": 2},
        model=ModelFacts(
            name="HuggingFaceTB/SmolLM2-135M-Instruct",
            source="demo",
            kind="gguf",
            license="Apache-2.0",
            family="llama",
            sha256=hashlib.sha256(b"weights").hexdigest(),
            is_chat=True,
            parameters=Change(134515008, 112386240),
            blocks=Change(30, 27),
            ffn_width=Change(1536, 1280),
            vocabulary=Change(49152, 49152),
        ),
        budget=BudgetFacts("70MB", 70_000_000, 69_874_112, 69_911_808),
        parts=(
            PartSize("embedding", Change(28311552, 28311552), Change(30081024, 19464192), ("Q5_0",)),
            PartSize("attention", Change(26542080, 23887872), Change(16588800, 13436928), ("IQ4_NL",)),
            PartSize("ffn", Change(79626240, 60162048), Change(49766400, 34990848), ("IQ4_NL", "Q5_0")),
            PartSize("norms", Change(35136, 31680), Change(140544, 126720), ("F32",)),
            PartSize("head", Change(0, 0), Change(0, 0), ()),
            PartSize("metadata", Change(0, 0), Change(1785664, 1893120), ()),
        ),
        stages=(
            StageRun("load", 3.4, False, "Loaded 134.5 M parameters from a GGUF file."),
            StageRun(
                "prune depth",
                41.8,
                False,
                "Dropped blocks 21, 24 and 25, those whose loss the next tokens felt least.",
                {
                    "damage by block": {
                        str(i): round(0.02 + 0.9 / (1 + i) + 0.004 * abs(24 - i), 4) for i in range(30)
                    },
                    "dropped": [21, 24, 25],
                },
            ),
            StageRun("prune width", 58.1, True, "Cut the FFN from 1,536 to 1,280 columns and refitted the rest."),
            StageRun(
                "distil",
                1512.6,
                False,
                "Learned from the original for 400 steps on 1,048,576 tokens.",
                {"loss, nats per token": losses, "tokens": 1048576, "learning rate": 0.0002},
            ),
            StageRun(
                "quantize",
                212.3,
                False,
                "Rounded with GPTQ into IQ4_NL and Q5_0, least error first.",
                {"error by kind": {"attention": 0.0121, "ffn": 0.0163, "embedding": 0.0009}},
            ),
            StageRun("export", 2.2, False, "Wrote 69,911,808 bytes of GGUF."),
        ),
        files=(
            MeasuredFile(
                "original",
                "Q4_1 with a Q8_0 embedding",
                "SmolLM2-135M-Instruct.Q4_1.gguf",
                98362432,
                Interval(17.412, 16.803, 18.043),
                None,
                None,
                None,
                speed(741.3, 121.9, 201_326_592, 0.104),
            ),
            MeasuredFile(
                "plain",
                "round-to-nearest Q2_0",
                "plain-Q2_0.gguf",
                70_312_448,
                Interval(24.815, 23.702, 25.981),
                Interval(1.4252, 1.3901, 1.4611),
                Interval(0.4318, 0.4102, 0.4534),
                Interval(0.6612, 0.6507, 0.6716),
                speed(51.2, 42.3, 172_031_232),
            ),
            MeasuredFile(
                "compressed",
                "pruned, distilled, IQ4_NL",
                "SmolLM2-135M-Instruct-70MB.gguf",
                69_911_808,
                Interval(19.226, 18.513, 19.967),
                Interval(1.1042, 1.0911, 1.1174),
                Interval(0.1213, 0.1142, 0.1284),
                Interval(0.8127, 0.8041, 0.8213),
                speed(1012.7, 168.4, 165_675_008, 0.0713),
            ),
        ),
        measured_text=TextUsed(
            "pydoc_data.topics", hashlib.sha256(b"measured").hexdigest(), 65536, 128, 512, held_out=True
        ),
        calibration_text=TextUsed(
            "samples of the model itself",
            hashlib.sha256(b"samples").hexdigest(),
            131072,
            256,
            512,
            held_out=False,
        ),
        answers=answers,
        verification=(
            Check("the engine loads the file", True, "xllamacpp 2026.10, 0.21 s"),
            Check("same next token", True, "64 of 64 positions agree with the weights that were written"),
            Check("size as predicted", True, "off by 0.05%"),
            Check("same tokens", True, "12 texts give the same ids in the engine and in transformers"),
        ),
        recipe=(
            "model: demo\nbudget: 70MB\nsteps:\n"
            "  - {step: prune-depth, blocks: 3}\n  - {step: prune-width, width: 1280}\n"
            "  - {step: distil, tokens: 1048576}\n  - {step: quantize, formats: [IQ4_NL, Q5_0]}\n"
        ),
        notes=(
            "Energy of the plain file was not measured: the meter of the processor was busy.",
            "The embedding is tied to the head and counted once.",
        ),
        hashes={"SmolLM2-135M-Instruct-70MB.gguf": hashlib.sha256(b"product").hexdigest()},
        waterfall=Waterfall(
            2,
            (
                StageDamage("prune_depth", 0.6112),
                StageDamage("prune_width", 0.9034),
                StageDamage("distil", 0.2213),
                StageDamage("quantize", 0.1177),
                StageDamage("llama.cpp", 0.1213),
            ),
        ),
        sensitivity=Sensitivity("Q3_K", invented_units()),
        tasks=(
            TaskScore(
                "arc_easy", "acc_norm", 500,
                Interval(0.486, 0.442, 0.530), Interval(0.4621, 0.4187, 0.5059), Interval(-0.024, -0.05, 0.004),
                lost=30, won=18, faults={},
            ),
            TaskScore(
                "capitals", "acc", 100,
                Interval(0.81, 0.72, 0.88), Interval(0.61, 0.51, 0.7), Interval(-0.2, -0.29, -0.11),
                lost=21, won=1, faults={"empty": 3, "repeats itself": 4},
            ),
        ),
    )  # fmt: skip


def invented_units() -> tuple[UnitCost, ...]:
    """A mix of formats for 27 blocks, coarser in the middle."""
    units = [UnitCost("embedding", None, "Q5_0", 19_464_192, 0.0021, 0.0314)]
    for block in range(27):
        for rank, (group, form) in enumerate((("query_key", "Q3_K"), ("value", "Q5_K"), ("ffn_in", "IQ4_NL"))):
            alike = 0.01 * (rank + 1) / (1 + min(block, 26 - block))
            units.append(UnitCost(group, block, form if block < 13 else "Q4_K", 300_000 + block, alike / 4, alike))
    return tuple(units)


@pytest.fixture(scope="module")
def report() -> Report:
    return report_of_smollm2()


def with_product(report: Report, **changes: object) -> Report:
    """`report` with fields of its compressed file replaced."""
    files = tuple(replace(file, **changes) if file.role == "compressed" else file for file in report.files)
    return replace(report, files=files)


class _Page(HTMLParser):
    """What a browser would see: the elements, their attributes and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_all_files_appear_and_nothing_else_is_left(report, tmp_path):
    write_reports(report, tmp_path / "new")
    write_reports(report, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "README.md",
        "report.html",
        "report.json",
        "report.md",
    ]


def test_json_comes_back_as_the_same_report(report, tmp_path):
    write_reports(report, tmp_path)
    data = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert data["schema"] == 1
    assert data["budget"]["met"] is True
    # JSON has no tuples: only the details of stages, which have no declared type, come back as lists.
    assert from_dict(data) == from_dict(to_dict(report))
    assert replace(from_dict(data), stages=()) == replace(report, stages=())
    assert to_dict(from_dict(data)) == data


def test_json_of_another_schema_or_with_a_field_missing_is_refused(report):
    data = to_dict(report)
    with pytest.raises(BadInputError, match="schema 2"):
        from_dict({**data, "schema": 2})
    with pytest.raises(BadInputError, match="lacks the field 'seed'"):
        from_dict({key: value for key, value in data.items() if key != "seed"})


@pytest.mark.parametrize(
    ("field", "value"), [("files", 5), ("command", 3), ("seed", "x"), ("budget", "70MB"), ("parts", [7])]
)
def test_json_with_a_value_of_another_type_is_no_report(field, value, report, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps({**to_dict(report), field: value}))
    with pytest.raises(BadInputError, match=r"report.json is no report of pocketlm"):
        read_report(tmp_path)


def test_a_run_without_a_command_has_no_empty_block(report, tmp_path):
    silent = replace(report, command="")
    write_reports(silent, tmp_path)
    assert not [path.name for path in tmp_path.glob("*.md") if "```sh\n\n" in path.read_text()]
    assert "<pre></pre>" not in html_page(silent)
    assert report.command in html_page(report)


def test_numbers_that_are_not_finite_stay_valid_json_and_are_said_in_words(report, tmp_path):
    broken = with_product(
        report,
        perplexity=Interval(math.inf, math.inf, math.inf),
        perplexity_ratio=Interval(math.inf, math.nan, math.inf),
    )
    write_reports(broken, tmp_path)

    def refuse(constant):
        raise AssertionError(constant)

    data = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert data["files"][2]["perplexity"]["value"] is None
    assert "not finite" in (tmp_path / "report.html").read_text()
    assert judge(broken)["quality"].tone == "bad"
    write_reports(from_dict(data), tmp_path)  # and the report that comes back can be shown
    front = (tmp_path / "README.md").read_text().split("---\n")[1]
    assert "perplexity" not in [
        metric["type"] for metric in yaml.safe_load(front)["model-index"][0]["results"][0]["metrics"]
    ]


def test_page_needs_nothing_from_elsewhere(report):
    page = html_page(report)
    seen = _Page(page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(seen.tags)
    assert not [name for name, _ in seen.attributes if name in {"src", "href", "srcset"} or name.startswith("on")]
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "@font-face" not in style
    assert "default-src 'none'" in page


def test_every_figure_of_the_page_is_in_report_json(report, tmp_path):
    write_reports(report, tmp_path)
    again = from_dict(json.loads((tmp_path / "report.json").read_text("utf-8")))
    assert html_page(again) == (tmp_path / "report.html").read_text("utf-8")


def test_costs_of_the_blocks_that_are_left_are_those_of_the_same_blocks_of_the_original():
    kls = {"embedding": 1.0, "0.ffn_in": 2.0, "1.ffn_in": 4.0, "2.ffn_in": 8.0}
    formats = {unit: {"Q4_0": kl, "Q8_0": kl / 10} for unit, kl in kls.items()}
    units = {"embedding": ("Q8_0", 30, 0.1), "0.ffn_in": ("Q4_0", 20, 2.0), "1.ffn_in": ("Q4_0", 20, 8.0)}
    plan = Plan(Shape(2, 64), (1,), {}, 70, 10.1, units)
    found = sensitivity_of(plan, Damages(formats=formats))
    assert found.format == "Q4_0"
    assert [(unit.group, unit.block, unit.alike, unit.expected) for unit in found.units] == [
        ("embedding", None, 1.0, 0.1),
        ("ffn_in", 0, 2.0, 2.0),
        ("ffn_in", 1, 8.0, 8.0),
    ]


def test_parts_and_stages_show_what_they_cost(report):
    page = html_page(report)
    assert page.count("<title>block 3, ffn_in, IQ4_NL: ") == 2
    assert page.count("<title>block 13, ffn_in, Q4_K: ") == 2
    seen = " ".join(_Page(page).text.split())
    for words in ("0.9034 (+0.2922)", "0.2213 (-0.6821)", "In Q3_K everywhere", "21 lost, 1 won: more than noise"):
        assert words in seen
    assert "empty: 3; repeats itself: 4" in seen
    bare = html_page(replace(report, waterfall=None, sensitivity=None, tasks=()))
    assert not {'id="sensitivity"', 'id="tasks"', "everywhere"} & set(re.findall(r'id="\w+"|everywhere', bare))
    text = markdown_page(report)
    assert "| ffn in | 0." in text
    assert "| distil | 0.2213 |" in text
    assert "| arc\\_easy" not in text
    assert "| arc_easy, acc_norm | 49% (44–53%) |" in text


def test_curves_and_bars_are_drawn_where_a_stage_brings_them(report):
    assert html_page(report).count('class="curve"') == 1
    undistilled = replace(report, stages=tuple(stage for stage in report.stages if stage.name != "distil"))
    assert 'class="curve"' not in html_page(undistilled)
    assert 'aria-label="damage by block"' in html_page(report)
    assert "[21, 24, 25]" in html_page(report)


def test_what_json_does_not_know_becomes_text(report, tmp_path):
    odd = replace(report, settings={"out": tmp_path}, stages=(StageRun("x", 1.0, False, "y", {"a": {1: tmp_path}}),))
    write_reports(odd, tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["settings"]["out"] == str(tmp_path)
    assert data["stages"][0]["details"] == {"a": {"1": str(tmp_path)}}


def test_hostile_answers_are_shown_not_obeyed(report):
    attacked = replace(
        report,
        model=replace(report.model, name="<script>x</script>"),
        notes=(HOSTILE,),
        command=HOSTILE,
        recipe=HOSTILE,
        stages=(StageRun(HOSTILE, 1.0, False, HOSTILE, {HOSTILE: {HOSTILE: 1.0}, "a": HOSTILE}),),
        verification=(Check(HOSTILE, False, HOSTILE),),
        machine={HOSTILE: HOSTILE},
        budget=BudgetFacts(HOSTILE, 1, 1, 1),
    )
    seen = _Page(html_page(attacked))
    assert not {"script", "img"} & set(seen.tags)
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert seen.text.count("<script>alert(1)</script>") >= 6
    assert "{{ 7 * 7 }}" in seen.text


def test_page_holds_every_number(report):
    text = " ".join(_Page(html_page(report)).text.split())
    for file in report.files:
        assert wording.size(file.bytes) in text
        assert f"{file.bytes:,} bytes" in text
        assert wording.size(file.speed.peak_memory_bytes) in text
        assert wording.rate(file.speed.decode_tokens_per_second) in text
        assert wording.rate(file.speed.prefill_tokens_per_second) in text
        for estimate in (file.perplexity, file.perplexity_ratio, file.divergence):
            assert wording.middle(estimate) in text or file.role == "original"
            assert estimate is None or wording.interval(estimate) in text
    for part in report.parts:
        assert wording.size(part.bytes.before) in text
        assert wording.size(part.bytes.after) in text
        assert wording.count(part.parameters.after) in text
    for stage in report.stages:
        assert wording.duration(stage.seconds) in text
    for words in (
        "81.3%",
        "80.4–82.1%",
        "0.071",
        "not available",
        "69,874,112",
        "65,536 tokens",
        "reused",
    ):
        assert words in text
    for finding in judge(report).values():
        assert finding.sentence in text
        assert finding.word.lower() in text.lower()


def test_page_of_a_report_with_hardly_anything_measured(report, tmp_path):
    bare = with_product(report, perplexity=None, perplexity_ratio=None, divergence=None, agreement=None, speed=None)
    bare = replace(
        bare,
        files=tuple(file for file in bare.files if file.role == "compressed"),
        measured_text=None,
        calibration_text=None,
        answers=(),
        verification=(),
        notes=(),
        stages=(),
        parts=(),
        machine={},
        waterfall=None,
        sensitivity=None,
        tasks=(),
    )
    assert set(judge(bare)) == {"budget"}
    write_reports(bare, tmp_path)
    assert "not measured" in (tmp_path / "report.html").read_text()
    with pytest.raises(BadInputError, match="compressed"):
        write_reports(replace(bare, files=()), tmp_path)


def _tables(markdown: str) -> list[list[str]]:
    outside = re.sub(r"^(`{3,}).*?^\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    blocks = re.findall(r"(?:^\|.*\|\n)+", outside, flags=re.MULTILINE)
    return [block.splitlines() for block in blocks]


@pytest.mark.parametrize("name", ["report.md", "README.md"])
def test_markdown_tables_are_well_formed(report, tmp_path, name):
    spiteful = replace(
        report,
        stages=(StageRun("a|b", 1.0, False, HOSTILE),),
        verification=(Check("c|d\ne", True, HOSTILE),),
    )
    write_reports(spiteful, tmp_path)
    text = (tmp_path / name).read_text()
    tables = _tables(text)
    assert len(tables) == {"report.md": 8, "README.md": 1}[name]
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
        assert len(widths) == 1, table
        assert re.fullmatch(r"\|(-{3}:?\|)+", table[1])
        assert len(table) > 2
    assert "\n\n\n" not in re.sub(r"^(`{3,}).*?^\1$", "code", text, flags=re.DOTALL | re.MULTILINE)


def test_markdown_has_the_verdict_and_cannot_be_broken_out_of(report):
    text = markdown_page(report)
    for finding in judge(report).values():
        assert finding.sentence in text
    assert fence(HOSTILE) in text
    assert fence(HOSTILE).startswith("``````text\n")
    assert cell("a|b\n<i>*x*") == "a\\|b &lt;i&gt;\\*x\\*"
    assert cell("_a_ ~~b~~ Q4_0 __init__") == "\\_a\\_ \\~\\~b\\~\\~ Q4_0 \\_\\_init\\_\\_"


@pytest.mark.parametrize(
    ("ratio", "outcome", "words"),
    [
        (
            Interval(1.10, 1.09, 1.11),
            "worse",
            "1.100 times the original's (1.090–1.110): worse, by more than noise",
        ),
        (
            Interval(0.95, 0.93, 0.97),
            "better",
            "0.950 times the original's (0.930–0.970): better, by more than noise",
        ),
        (
            Interval(1.01, 0.99, 1.03),
            "within noise",
            "1.010 times the original's (0.990–1.030): within noise",
        ),
        (Interval(1.02, 1.00, 1.04), "within noise", "within noise"),
    ],
)
def test_quality_is_worded_by_its_interval(report, ratio, outcome, words):
    assert against_one(ratio) == outcome
    finding = judge(with_product(report, perplexity_ratio=ratio))["quality"]
    assert words in finding.sentence
    assert outcome in finding.word


def test_a_text_that_was_not_held_out_is_said(report):
    seen = replace(report, measured_text=replace(report.measured_text, held_out=False))
    assert "flatters" in judge(seen)["quality"].sentence
    assert "flatters" not in judge(report)["quality"].sentence


def test_budget_missed_by_one_byte_is_missed(report):
    missed = replace(report, budget=BudgetFacts("70MB", 70_000_000, 69_000_000, 70_000_001))
    finding = judge(missed)["budget"]
    assert (finding.tone, finding.word) == ("bad", "budget missed")
    assert "misses the budget of 70MB by 1 byte." in finding.sentence
    exact = replace(report, budget=BudgetFacts("70MB", 70_000_000, 69_000_000, 70_000_000))
    assert judge(exact)["budget"].word == "budget met"


def test_limits_besides_bytes_are_judged_by_what_was_measured(report):
    quality = LimitFacts("quality 0.95", "0.931 (0.920 to 0.940)", met=False)
    memory = LimitFacts("200 MB of memory at 2,048 tokens of context", "121 MB", met=True)
    asked = BudgetFacts("200MB of memory, quality 0.95", None, 69_000_000, 70_000_000, (memory, quality))
    kept, missing = (replace(report, budget=replace(asked, limits=limits)) for limits in ((memory,), (memory, quality)))
    with pytest.raises(VerificationError, match=r"is kept.*\(60MB: 0\.931 .*, not quality 0\.95\)\. Ask"):
        check_budgets_met({"50MB": kept, "60MB": missing})
    check_budgets_met({"50MB": kept})
    missed = judge(replace(report, budget=asked))["budget"]
    assert (missed.tone, missed.word) == ("bad", "budget missed")
    assert missed.aside == "0.931 (0.920 to 0.940), not quality 0.95"
    assert "misses the budget of 200MB of memory, quality 0.95. Of 200 MB of memory at" in missed.sentence
    kept = judge(replace(report, budget=replace(asked, limits=(memory,))))["budget"]
    assert kept.word == "budget met"
    assert "spare" not in kept.sentence, "no size was asked for"
    both = judge(replace(report, budget=BudgetFacts("70MB, x", 70_000_000, 1, 71_000_000, (memory, quality))))["budget"]
    assert both.aside == "1.00 MB over 70MB, x; 0.931 (0.920 to 0.940), not quality 0.95"
    page = html_page(replace(report, budget=asked))
    assert "budget 200MB" not in page, "a line for bytes that nobody asked for"


PLAIN_FITS = BudgetFacts("71MB", 71_000_000, 69_874_112, 69_911_808)


@pytest.mark.parametrize(
    ("ratio", "divergence", "own_bytes", "budget", "tone", "word"),
    [
        (1.10, 0.12, 69_911_808, None, "good", "better than plain"),
        (1.10, 0.12, 90_000_000, None, "even", "better than plain, and larger"),
        (1.60, 0.60, 69_911_808, PLAIN_FITS, "bad", "loses to plain"),
        (1.60, 0.60, 69_911_808, None, "even", "plain is better, but does not fit"),
        (1.42, 0.43, 69_911_808, None, "even", "no better than plain"),
        (1.42, 0.43, 60_000_000, None, "good", "as good as plain, and smaller"),
        (1.60, 0.12, 69_911_808, PLAIN_FITS, "even", "mixed against plain"),
    ],
)
def test_comparison_with_the_plain_file(report, ratio, divergence, own_bytes, budget, tone, word):
    changed = with_product(
        report,
        bytes=own_bytes,
        perplexity_ratio=Interval(ratio, ratio - 0.01, ratio + 0.01),
        divergence=Interval(divergence, divergence - 0.01, divergence + 0.01),
    )
    finding = judge(replace(changed, budget=budget or report.budget))["plain"]
    assert (finding.tone, finding.word) == (tone, word)
    assert "round-to-nearest Q2_0 (70.3 MB" in finding.sentence


FLOOR = LimitFacts("quality 0.95", "0.957 (0.941 to 0.968)", met=True)
LARGER, LOSES, UNFIT = "plain is better, but larger", "loses to plain", "plain is better, but does not fit"


@pytest.mark.parametrize(
    ("size", "limits", "own_bytes", "tone", "word", "ending"),
    [
        (None, (FLOOR,), 55_000_000, "even", LARGER, "and takes more bytes for it."),
        (None, (FLOOR,), 69_911_808, "bad", LOSES, "the better choice here."),
        (80_000_000, (FLOOR,), 69_911_808, "bad", LOSES, "the better choice here."),
        (60_000_000, (FLOOR,), 55_000_000, "even", UNFIT, "does not fit the budget."),
        (80_000_000, (), 55_000_000, "bad", LOSES, "the better choice here, and it fits the budget."),
    ],
)
def test_the_plain_file_is_not_said_to_fit_what_was_not_measured_of_it(
    report, size, limits, own_bytes, tone, word, ending
):
    losing = with_product(report, bytes=own_bytes, perplexity_ratio=Interval(1.6, 1.59, 1.61), divergence=None)
    finding = judge(replace(losing, budget=BudgetFacts("asked", size, 1, own_bytes, limits)))["plain"]
    assert (finding.tone, finding.word) == (tone, word)
    assert finding.sentence.endswith(ending)


def test_loss_to_the_plain_file_is_said_on_every_page(report, tmp_path):
    losing = with_product(report, perplexity_ratio=Interval(1.6, 1.59, 1.61), divergence=Interval(0.6, 0.59, 0.61))
    write_reports(replace(losing, budget=PLAIN_FITS), tmp_path)
    for name in ("report.html", "report.md", "README.md"):
        assert "The plain file is the better choice here" in (tmp_path / name).read_text()


def test_a_paired_ratio_decides_where_intervals_overlap(report):
    close = with_product(report, perplexity_ratio=Interval(1.42, 1.39, 1.45), divergence=None)
    assert "(within noise)" in judge(close)["plain"].sentence
    paired = replace(close, perplexity_ratio_to_plain=Interval(0.996, 0.994, 0.998))
    assert "(better)" in judge(paired)["plain"].sentence


def test_speed_counts_only_beyond_its_noise(report):
    assert faster(Rate(100, 2), Rate(105, 2)) == "within noise"
    assert faster(Rate(120, 2), Rate(105, 2)) == "better"
    assert faster(Rate(90, 2), Rate(105, 2)) == "worse"
    slow = with_product(report, speed=speed(500, 60, 1))
    assert judge(slow)["speed"].word == "slower decoding"
    same = with_product(report, speed=speed(500, 121, 1))
    assert judge(same)["speed"].word == "speed within noise"


def test_speeds_are_judged_by_their_ratio_in_rounds_else_by_the_error_of_their_means(report):
    original, slow = Rate(59.1, 21.1, runs=4), Rate(25.8, 4.5, runs=4)
    assert faster(slow, original) == "worse", "a busy moment of one run hides no factor of 2.3"
    assert faster(slow, original, Interval(0.44, 0.15, 1.3)) == "within noise"
    assert faster(original, slow, Interval(2.3, 1.9, 2.7)) == "better"
    assert faster(slow, original, Interval(math.nan, math.nan, math.nan)) == "worse"
    paired = replace(speed(500, 121, 1), decode_ratio=Interval(0.93, 0.91, 0.95))
    finding = judge(with_product(report, speed=paired))["speed"]
    assert (finding.word, finding.figure) == ("slower decoding", "×0.930")
    assert finding.sentence.endswith("the original writes 121.9: slower, 0.930 times the speed (0.910–0.950).")


def test_a_mean_of_ratios_is_that_of_their_logarithms_with_students_interval():
    found = mean_ratio([math.exp(each) for each in (-0.1, 0.0, 0.1)])
    assert found.value == pytest.approx(1)
    assert math.log(found.high) == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    assert found.low == pytest.approx(1 / found.high), "neither file is the one that counts"
    assert mean_ratio([2.0, 2.0]) == Interval(*[pytest.approx(2)] * 3)
    assert mean_ratio([2.0]) is None, "one round says nothing of the next"


def test_overlapping_intervals_are_noise_and_a_broken_file_is_worse():
    assert lower(Interval(1, 0.9, 1.1), Interval(1.15, 1.05, 1.25)) == "within noise"
    assert lower(Interval(1, 0.9, 1.1), Interval(1.3, 1.2, 1.4)) == "better"
    assert lower(Interval(math.inf, math.nan, math.inf), Interval(1.3, 1.2, 1.4)) == "worse"


@pytest.mark.parametrize(
    "text",
    [
        "The cat sat on the mat. The cat sat on the mat. The cat sat on the mat. ",
        "I am I am I am I am I am I am I am I am I am I am",
        "猫が好きです。とても猫が好きです。とても猫が好きです。とても",
        "\n".join(f"{n}. The first thing that you need to do is to go" for n in range(8)),
    ],
)
def test_loops_are_found(text):
    assert repeats_itself(text)
    assert "repeats itself" in compare("q", "fine", text).notes


@pytest.mark.parametrize(
    "text",
    [
        "| a | b |\n|---|---|\n| 1 | 2 |\n------------------------------",
        "for i in range(3):\n    for j in range(3):\n        for k in range(3):\n            print(i, j, k)",
        "The sky is blue because air scatters short waves more than long ones. At dusk light has a longer "
        "way, so red is what remains of it when it reaches us.",
        "No, no, no.",
    ],
)
def test_honest_text_is_no_loop(text):
    assert not repeats_itself(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("First.\n" + "Boil an egg:\n" * 23 + "Boil", "First.\nBoil an egg: … [23 times]\nBoil"),
        ("ha" * 40, "ha … [40 times]"),
        ("| a |\n" + "-" * 40, "| a |\n" + "-" * 40),
        ("No, no, no.", "No, no, no."),
    ],
)
def test_loops_are_shown_once(text, shown):
    assert folded(text) == shown


def test_answer_notes():
    assert compare("q", "a", "a ").notes == ("same as the original",)
    assert compare("q", "", "fine").notes == ("original: empty",)
    assert compare("q", "fine", "\n").notes == ("empty",)
    assert compare("q", "fine", "caf\ufffd").notes == ("broken characters",)


def test_manifest_is_right_and_leaves_itself_out(tmp_path):
    (tmp_path / "sub").mkdir()
    contents = {"b.txt": b"bee", "a.bin": bytes(range(256)) * 99, "sub/z": b"", "README.md": b"x"}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    write_manifest(tmp_path)
    first = (tmp_path / "manifest.json").read_bytes()
    write_manifest(tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == first
    assert json.loads(first)["files"] == [
        {"path": name, "bytes": len(contents[name]), "sha256": hashlib.sha256(contents[name]).hexdigest()}
        for name in sorted(contents)
    ]


def test_model_card_has_measured_front_matter(report, tmp_path):
    write_reports(report, tmp_path)
    card = (tmp_path / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["license"] == "apache-2.0"
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data["base_model_relation"] == "quantized"
    assert (data["library_name"], data["pipeline_tag"]) == ("gguf", "text-generation")
    assert {"gguf", "pruned", "distilled", "conversational"} <= set(data["tags"])
    (result,) = data["model-index"][0]["results"]
    metrics = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert metrics["perplexity"] == report.product.perplexity.value
    assert metrics["kl_divergence"] == report.product.divergence.value
    assert metrics["bytes"] == report.product.bytes
    for words in (
        "llama-cli -m ./SmolLM2",
        "pocketlm chat",
        "ollama create",
        "## Limits",
        "## Calibration data",
    ):
        assert words in body
    assert "3 of 5 sample answers" not in body
    assert "2 of 5 sample answers have a fault" in body


def test_model_card_of_an_unlicensed_base_model_in_a_new_format(report, tmp_path):
    parts = (replace(report.parts[0], formats=("Q2_0",)),)
    bare = replace(report, model=replace(report.model, license=None, is_chat=False), parts=parts, calibration_text=None)
    write_reports(with_product(bare, file_name="my model's.gguf"), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "unknown"
    assert "The source states no licence" in card
    assert "tensors in Q2_0" in card
    assert "no chat template" in card
    assert """llama-cli -m './my model'"'"'s.gguf'""" in card
    assert "ollama run my-model-s" in card


def test_numbers_are_worded():
    assert tables.spread([0.0124, 0.00003]) == "<0.0001–0.0124"
    assert tables.spread([0.5, 0.5]) == "0.5000"
    assert wording.interval(Interval(-0.2, -0.29, -0.11), 100, "%") == "-29 to -11%"
    assert wording.size(69_911_808) == "69.9 MB"
    assert wording.size(999_960) == "1.00 MB"
    assert wording.size(1_234_000_000) == "1.23 GB"
    assert wording.size(1) == "1 byte"
    assert wording.count(134_515_008) == "134.5 M"
    assert wording.count(9216) == "9,216"
    assert wording.duration(252.4) == "4 min 12 s"
    assert wording.duration(3599.7) == "1 h 00 min"
    assert wording.duration(59.7) == "1 min 00 s"
    assert wording.duration(0.41) == "0.41 s"
    assert wording.middle(Interval(17.412, 16.803, 18.043)) == "17.4"
    assert wording.interval(Interval(0.1213, 0.1142, 0.1284)) == "0.114–0.128"
    assert wording.interval(Interval(0.8127, 0.8041, 0.8213), 100, "%") == "80.4–82.1%"
    assert wording.rate(Rate(139.24, 2.06)) == "139.2 ± 2.1"


def test_settings_and_changes_read_as_people_write_them():
    assert wording.setting(["a.txt", "b.txt"]) == "a.txt, b.txt"
    assert wording.setting(True) == "yes"
    assert wording.setting(0.5) == "0.5"
    assert wording.change(Change(30, 24)) == "30 to 24"
    assert wording.change(Change(1536, 1536)) == "1,536"


def test_files_of_one_budget_stand_at_one_place():
    points = [(39.99738, Interval(3.0, 2.6, 3.4), "plain"), (39.99741, Interval(1.8, 1.5, 2.1), "40MB")]
    drawn = str(charts.scatter([("compressed", points)], "t"))
    one, other = (float(x) for x in re.findall(r'cx="([\d.]+)%"', drawn))
    assert 20 < one < 80
    assert abs(one - other) < 0.1


@pytest.mark.parametrize(("low", "high"), [(0.99, 1.46), (0.0, 0.45), (65.1, 82.2), (1.0, 1.0), (-3, 11)])
def test_ticks_enclose_the_values_and_are_even(low, high):
    ticks = charts.nice_ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert 2 <= len(ticks) <= 8
    steps = [b - a for a, b in pairwise(ticks)]
    assert max(steps) - min(steps) < 1e-9


def test_a_waterfall_and_a_heat_map_draw_to_scale():
    drawn = str(charts.waterfall([("cut", 2.0), ("heal", 0.5), ("end", 1.0)], "t"))
    bars = re.findall(r'<rect class="(\w+)" x="([\d.]+)%"[^>]* width="([\d.]+)%"', drawn)
    assert bars == [("more", "0.000", "100.000"), ("less", "25.000", "75.000"), ("compressed", "0.000", "50.000")]
    cells = str(charts.heat([("a", "", [(4.0, "x"), (1.0, "<y>")]), ("b", "", [(0.0, "z")])], "t"))
    shades = [float(shade) for shade in re.findall(r"fill-opacity:([\d.]+)", cells)]
    assert shades == [1.0, 0.53, 0.06]
    assert re.findall(r'<rect[^>]* x="([\d.]+)%"', cells) == ["0.000", "50.000", "0.000"]
    assert "&lt;y&gt;" in cells


def test_charts_draw_to_scale():
    drawn = str(charts.stacked([("a", "x", [30, 10]), ("b", "y", [20, 0])], 25, "limit"))
    widths = [float(width) for width in re.findall(r'<rect[^>]* width="([\d.]+)%"', drawn)]
    assert widths == [75, 25, 50, 0]
    assert 'class="limit" x1="62.500%"' in drawn
    assert drawn.index('class="limit"') < drawn.index(">b</text>"), "names stand over the line"
    points = re.search(r'points="([^"]*)"', str(charts.curve([(0, 2.0), (1, 1.0), (2, math.nan), (4, 0.0)], "t")))
    assert points[1] == "0.0,0.0 250.0,50.0 1000.0,100.0"


@pytest.mark.parametrize(("x", "side"), [(70.0, 'dx="9"'), (80.0, 'dx="-9" text-anchor="end"')])
def test_a_name_in_a_scatter_does_not_run_into_the_ticks(x: float, side: str):
    """A chart is narrow on a phone, and a name stands left of its dot only where it has room there."""
    ends = [(60.0, Interval(1, 1, 1), ""), (100.0, Interval(1.2, 1.2, 1.2), "")]
    drawn = str(charts.scatter([("compressed", [*ends, (x, Interval(1.1, 1.07, 1.13), "compressed")])], "t"))
    assert re.search(rf'<text class="small halo" x="[0-9.]+%" {side} y', drawn)
