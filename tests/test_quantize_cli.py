"""`pocketlm quantize` as a person calls it: what cannot be done is refused in one line, and plans are exact."""

import json
import math

import pytest
from tests.command_line import pocketlm
from tests.tiny import tiny_folder

from pocketlm.commands import integers
from pocketlm.commands.integers import quantize_integers
from pocketlm.interval import Interval
from pocketlm.measure.quality import Quality
from pocketlm.pipeline.planning import Fit


def run(*arguments, cache):
    return pocketlm("quantize", *arguments, cache=cache)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_folder("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    lines = [f"Paragraph {n}: the {n % 7} small models went to market number {n * n}.\n\n" for n in range(4000)]
    path.write_text("".join(lines))
    return path


def assert_refused(done, code, said):
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    *before, last = done.stderr.splitlines()
    assert last.startswith("error: ")
    assert all(line.startswith("[") for line in before), "nothing else but progress"
    assert done.stdout == ""


GOALS = "Give one of --size (such as 60MB), --bits (such as 4.25) and --format (such as q4_0)"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), GOALS),
        (("--size", "60%", "--bits", "4"), GOALS),
        (("--format", "q4_0", "--size", "60%"), GOALS),
        (("--bits", "4.5", "--format", "q4_0"), GOALS),
        (("--bits", "4.5", "--format", "q4_0", "--size", "60%"), GOALS),
        (("--bits", "0"), "--bits 0 is nothing"),
        (("--size", "lots"), "Write it like 70MB"),
        (("--size", "60%", "--tune", "soon"), "Write it like 30s"),
        (("--format", "q9_9"), "Unknown format `Q9_9`"),
        (("--format", "q4_k"), "Q4_K needs rows that divide by 256"),
        (("--format", "q4_k"), "Formats that fit: F16, Q2_0, MXFP4, NVFP4, Q4_0"),
        (("--format", "q4_0", "--tensor", "embedding"), "Cannot read `embedding`. Write it like embedding=Q8_0"),
        (("--format", "q4_0", "--tensor", "=q8_0"), "Cannot read `=q8_0`"),
        (("--format", "q4_0", "--tensor", "embedding="), "Cannot read `embedding=`"),
        (("--format", "q4_0", "--tensor", "embeding=q8_0"), "`embeding` is neither a group nor does any tensor's name"),
        (("--format", "q4_0", "--tensor", "value=q9_9"), "Unknown format `Q9_9` for `value`"),
        (("--format", "q4_0", "--method", "magic"), "magic"),
        (("--size", "60%", "--tensor", "embeding=q8_0"), "`embeding` is neither a group nor does any tensor's name"),
        (("--size", "60%", "--tensor", "value=q9_9"), "Q9_9"),
        (("--size", "60%", "--tensor", "value=q4_k"), "Q4_K"),
        (("--format", "q4_0", "--tensor", "value=INT8-G32"), "int8-g32 is a format of compressed-tensors folders"),
        (("--format", "int4-g32", "--tensor", "value=q8_0"), "Unknown integer format `Q8_0`"),
        (("--format", "int4-g32", "--tensor", "value=int8-g32"), "vLLM joins q_proj, k_proj, v_proj"),
        (("--format", "int4-g32-asym", "--tensor", "ffn_out=int8-g32"), "only where all linears have that one format"),
    ],
)
def test_bad_input_gets_one_line_and_its_code(arguments, said, llama, text, tmp_path):
    done = run(llama, *arguments, "--data", text, "-o", tmp_path / "out", "--dry-run", cache=tmp_path / "cache")
    assert_refused(done, 2, said)
    assert not (tmp_path / "out").exists()


def test_an_impossible_budget_is_refused(llama, text, tmp_path):
    arguments = (llama, "--bits", "1.5", "--data", text, "-o", tmp_path / "out", "--dry-run")
    assert_refused(run(*arguments, cache=tmp_path / "cache"), 3, "cannot be met")


@pytest.fixture(scope="module")
def planned(llama, text, tmp_path_factory):
    """A plan in JSON, and the place it was made at."""
    place = tmp_path_factory.mktemp("planned")
    arguments = (llama, "--bits", "5", "--tensor", "value=q8_0", "--data", text, "-o", place / "out")
    done = run(*arguments, "--dry-run", "--json", cache=place / "cache")
    assert done.returncode == 0, done.stderr
    assert not (place / "out").exists()
    return json.loads(done.stdout), arguments, place


def test_a_dry_run_prints_units_and_bytes(planned):
    data, _, _ = planned
    assert 0 < data["predicted_bytes"] <= data["budget_bytes"]
    units = data["plan"]["units"]
    groups = ("query_key", "value", "attention_out", "ffn_in", "ffn_out")
    assert set(units) == {"embedding", *(f"{i}.{group}" for i in range(3) for group in groups)}
    assert {units[f"{i}.value"][0] for i in range(3)} == {"Q8_0"}
    assert sum(size for _, size, _ in units.values()) < data["predicted_bytes"] == data["plan"]["bytes"]
    assert data["plan"]["drop"] == []
    assert data["recipe"]["steps"][-1]["step"] == "quantize"


def test_the_lines_of_a_plan_show_every_unit_once(planned):
    data, arguments, place = planned
    done = run(*arguments, "--dry-run", cache=place / "cache")
    assert done.returncode == 0, done.stderr
    predicted = f"{data['predicted_bytes']:,} bytes"
    assert predicted in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("embedding", "value", "ffn_in"))]
    sizes = sum(int(row[2].replace(",", "")) for row in rows)
    units = data["plan"]["units"].items()
    parts = ("embedding", "value", "ffn_in")
    assert sizes == sum(size for unit, (_, size, _) in units if unit.rpartition(".")[2] in parts)
    assert [row[1:2] + row[4:] for row in rows if row[0] == "value"] == [["Q8_0", "0-2"]]


def dry_run_in_one_format(llama, text, place, form, tensor):
    """What `--dry-run` says of one format with an exception, and the formats of its recipe."""
    arguments = (llama, "--format", form, "--tensor", tensor, "--data", text, "-o", place / "out")
    done = run(*arguments, "--dry-run", "--json", cache=place / "cache")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    (step,) = data["recipe"]["steps"]
    return data, step["formats"]


def test_one_format_for_all_needs_no_measurement(llama, text, tmp_path):
    data, formats = dry_run_in_one_format(llama, text, tmp_path, "q4_0", "embedding=q8_0")
    assert set(formats.values()) == {"Q4_0", "Q8_0"}
    assert data["plan"] is None
    assert data["budget_bytes"] == data["predicted_bytes"]


def test_a_dry_run_of_an_integer_format_writes_nothing_and_any_case_will_do(llama, text, tmp_path):
    data, formats = dry_run_in_one_format(llama, text, tmp_path, "INT4-G32", "ffn_out=Int8-g32")
    assert formats["ffn_out"] == "int8-g32"
    assert set(formats.values()) == {"F16", "int4-g32", "int8-g32"}
    assert data["predicted_bytes"] > 0
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_file_has_the_planned_bytes(planned):
    data, arguments, place = planned
    done = run(*arguments, "--json", cache=place / "cache")
    assert done.returncode == 0, done.stderr
    assert (place / "out" / "model.gguf").stat().st_size == data["predicted_bytes"]
    assert all(check["passed"] for check in json.loads(done.stdout)["verification"])


@pytest.mark.slow
def test_an_integer_format_gives_a_folder_that_transformers_loads(llama, text, tmp_path):
    from transformers import AutoModelForCausalLM

    out = tmp_path / "int4"
    done = run(llama, "--format", "int4-g32", "--data", text, "-o", out, "--json", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    network = AutoModelForCausalLM.from_pretrained(out / "model", dtype="float32")
    assert network.config.quantization_config.quant_method == "compressed-tensors"
    assert facts["predicted_bytes"] < facts["actual_bytes"] < facts["predicted_bytes"] + 20_000, "a header on top"
    assert 0 < facts["quality"]["compressed"]["kl"]["value"] < 1
    assert {file.name for file in out.iterdir()} == {"model", "recipe.yaml", "quality.json", "manifest.json"}


@pytest.mark.slow
def test_a_tuned_file_is_made_whole(llama, text, tmp_path):
    out = tmp_path / "tuned"
    done = run(
        llama, "--bits", "4.6", "--tune", "2s", "--data", text, "-o", out, "--json", cache=tmp_path / "cache"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [stage["name"] for stage in report["stages"]] == ["original", "quantize", "tune"]
    assert report["stages"][-1]["details"]["held out kl"][0][1] > 0
    assert (
        report["budget"]["predicted_bytes"] == report["budget"]["actual_bytes"] == (out / "model.gguf").stat().st_size
    )
    assert any(note.startswith("Recommended type of the cache") for note in report["notes"])
    assert any(note.startswith("Speed and time to the first token are those of 48 tokens") for note in report["notes"])


def test_a_time_to_tune_is_turned_into_tokens_once(llama, text, tmp_path):
    """A run that was killed goes on from its checkpoint only if it is the same work."""
    arguments = (llama, "--format", "q4_0", "--tune", "10m", "--data", text, "-o", tmp_path / "out")
    runs = [run(*arguments, "--dry-run", "--json", cache=tmp_path / "cache") for _ in range(2)]
    assert [done.returncode for done in runs] == [0, 0], runs[0].stderr
    first, second = (json.loads(done.stdout)["recipe"] for done in runs)
    assert first == second
    assert [step["step"] for step in first["steps"]] == ["quantize", "tune"]


def test_a_quality_that_is_not_finite_is_json_all_the_same(llama, text, tmp_path, monkeypatch):
    broken = Interval(math.inf, math.nan, math.inf)
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(integers, "measure_as_f16", lambda *_: [Quality(broken, broken, broken, broken)] * 2)
    quantize_integers(Fit(model=str(llama), format="int4-g32", prune=False, data=(text,), out=tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "quality.json").read_text(), parse_constant=pytest.fail)
    assert found["compressed"]["perplexity"] == {"value": None, "low": None, "high": None}
