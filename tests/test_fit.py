"""The main job on tiny models, from a folder to a verified file, as a person calls it."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.command_line import command, environment, pocketlm
from tests.tiny import tiny_folder

from pocketlm.cli.options import print_result
from pocketlm.cli.terminal import evaluation_lines
from pocketlm.commands.inspection import Evaluation
from pocketlm.errors import BadInputError, VerificationError
from pocketlm.export.gguf import write_gguf
from pocketlm.export.verify import check_bytes
from pocketlm.fit import fit
from pocketlm.pipeline.artefact import new_folder
from pocketlm.pipeline.planning import Fit, load_for
from pocketlm.report.content import TextUsed
from pocketlm.report.write import write_manifest

RECIPE = """
steps:
- {step: prune_depth, drop: [1]}
- {step: prune_width, ffn: 96}
- {step: distil, tokens: 2048, evaluations: 2}
- step: quantize
  formats: {embedding: Q8_0, query_key: Q5_0, value: Q8_0, attention_out: IQ4_NL, ffn_in: Q4_0,
    ffn_out: Q5_0}
seed: 0
"""
STAGES = ("text", "original", "prune_depth", "prune_width", "distil", "quantize", "plain")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_folder("llama", tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    lines = [f"Paragraph {n}: the {n % 7} small models went to market number {n * n}.\n\n" for n in range(4000)]
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def uninterrupted(llama, recipe, text, tmp_path_factory):
    """One run of the whole recipe: its folder and its cache."""
    place = tmp_path_factory.mktemp("uninterrupted")
    done = pocketlm("fit", llama, "--recipe", recipe, "--data", text, "-o", place / "out", cache=place / "cache")
    assert done.returncode == 0, done.stderr
    return place / "out", place / "cache"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text", "gpt2"])
def test_every_family_fits_a_budget(family, text, tmp_path):
    folder = tiny_folder(family, tmp_path / family)
    out = tmp_path / "out"
    arguments = ("fit", folder, "--size", "60%", "--preset", "fast", "--data", text, "-o", out, "--json")
    done = pocketlm(*arguments, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    size = (out / "model.gguf").stat().st_size
    assert size <= report["budget"]["bytes"]
    assert size == report["budget"]["predicted_bytes"]
    assert all(check["passed"] for check in report["verification"])
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(out / "hf")
    assert network.config.num_hidden_layers == report["model"]["blocks"]["after"]


@pytest.mark.slow
def test_the_folder_is_whole(uninterrupted):
    out, _ = uninterrupted
    names = {path.name for path in out.iterdir()}
    expected = {
        "model.gguf",
        "hf",
        "recipe.yaml",
        "report.html",
        "report.md",
        "report.json",
        "README.md",
        "manifest.json",
    }
    assert names == expected
    for entry in json.loads((out / "manifest.json").read_text())["files"]:
        assert sha256(out / entry["path"]) == entry["sha256"]
    report = json.loads((out / "report.json").read_text())
    product = next(file for file in report["files"] if file["role"] == "compressed")
    assert product["perplexity"]["low"] <= product["perplexity"]["value"] <= product["perplexity"]["high"]
    original = next(file for file in report["files"] if file["role"] == "original")
    assert original["speed"]["decode_ratio"] is None
    ratio, rate = (product["speed"][name] for name in ("decode_ratio", "decode_tokens_per_second"))
    assert 0 < ratio["low"] < ratio["value"] < ratio["high"]
    assert rate["runs"] == 3
    assert report["model"]["blocks"] == {"before": 3, "after": 2}
    assert report["model"]["ffn_width"]["after"] == 96
    assert not {"method", "preset", "pruning allowed"} & report["settings"].keys(), "the recipe says all that is done"
    names, divergences = zip(*(stage.values() for stage in report["waterfall"]["stages"]), strict=True)
    assert names == ("prune_depth", "prune_width", "distil", "quantize", "llama.cpp")
    assert min(divergences) > 0
    # The engine reads what torch reads from the same weights, on the same windows.
    assert divergences[-1] == pytest.approx(divergences[-2], rel=0.1)
    assert len(set(divergences)) == len(divergences)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_from_an_empty_cache(uninterrupted, llama, recipe, text, tmp_path):
    arguments = ("fit", llama, "--recipe", recipe, "--data", text, "-o", tmp_path / "again")
    done = pocketlm(*arguments, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert sha256(tmp_path / "again" / "model.gguf") == sha256(uninterrupted[0] / "model.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_in_any_stage_ends_in_the_same_file(stage, uninterrupted, llama, recipe, text, tmp_path):
    """SIGKILL as soon as the stage has begun, then the same command again."""
    cache, out = tmp_path / "cache", tmp_path / "out"
    arguments = ("fit", llama, "--recipe", recipe, "--data", text, "-o", out)
    process = subprocess.Popen(
        command(*arguments), env=environment(cache), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(cache.glob(f".{stage}-*.partial")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, f"the run was over before {stage} was seen"
    assert not out.exists()
    done = pocketlm(*arguments, cache=cache)
    assert done.returncode == 0, done.stderr
    assert sha256(out / "model.gguf") == sha256(uninterrupted[0] / "model.gguf")
    assert not list(cache.glob(".*.partial"))


@pytest.mark.slow
def test_a_finished_run_is_reused(uninterrupted, llama, recipe, text, tmp_path):
    _, cache = uninterrupted
    arguments = ("fit", llama, "--recipe", recipe, "--data", text, "-o", tmp_path / "again", "--json")
    done = pocketlm(*arguments, cache=cache)
    report = json.loads(done.stdout)
    assert {stage["reused"] for stage in report["stages"]} == {True}
    assert sha256(tmp_path / "again" / "model.gguf") == sha256(uninterrupted[0] / "model.gguf")


@pytest.mark.slow
def test_a_dry_run_predicts_and_writes_nothing(llama, text, tmp_path):
    arguments = ("fit", llama, "--size", "60%", "--data", text, "-o", tmp_path / "out", "--dry-run", "--json")
    done = pocketlm(*arguments, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert 0 < plan["predicted_bytes"] <= plan["budget_bytes"]
    assert not (tmp_path / "out").exists()


def test_a_file_that_fails_its_proof_is_not_left_under_a_final_name(llama, text, tmp_path, monkeypatch):
    def write_wrongly(model, packed, path):
        write_gguf(model, packed, path)
        data = bytearray(path.read_bytes())
        data[-4] ^= 1  # the last bit of the last weight
        path.write_bytes(data)

    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("pocketlm.fit.write_gguf", write_wrongly)
    job = Fit(model=str(llama), size=None, format="Q4_0", method="rtn", prune=False, data=(text,), out=tmp_path / "out")
    with pytest.raises(VerificationError, match="fails a check: decoded weights"):
        fit(job)
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


def test_a_large_model_that_only_quantizes_is_read_in_16_bits(llama, text, tmp_path, monkeypatch):
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("pocketlm.pipeline.planning.LARGE", 0)
    job = Fit(model=str(llama), size=None, format="Q4_0", prune=False, data=(text,), out=tmp_path / "out")
    assert load_for(job).network.dtype == torch.bfloat16
    assert load_for(replace(job, format=None, size="60%", prune=True)).network.dtype == torch.float32
    report = fit(job)
    assert all(check.passed for check in report.verification)
    assert (job.out / "model.gguf").stat().st_size == report.budget.predicted_bytes


def test_an_impossible_budget_is_refused_with_the_range(llama, tmp_path):
    done = pocketlm("fit", llama, "--size", "1kB", "-o", tmp_path / "out", cache=tmp_path / "cache")
    assert done.returncode == 3
    assert "cannot be met" in done.stderr
    assert "--size" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*out*"))


def test_an_output_folder_that_exists_needs_force(llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    done = pocketlm("fit", llama, "--size", "60%", "-o", tmp_path / "out", cache=tmp_path / "cache")
    assert done.returncode == 2
    assert "--force" in done.stderr
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep me"


def test_force_replaces_results_alone(llama, tmp_path):
    """Not what somebody else put there, not what is read, not where one stands."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep me")
    (tmp_path / "file").write_text("keep me")
    (tmp_path / "link").symlink_to(tmp_path / "notes")
    made = tmp_path / "made"
    shutil.copytree(llama, made / "model")
    (made / "words.txt").write_text("words")
    write_manifest(made)
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_text('{"name": "an app of the web"}')
    for out in (tmp_path / "notes", tmp_path / "file", tmp_path / "link", tmp_path / "app"):
        with pytest.raises(BadInputError, match="not a folder that pocketlm wrote"), new_folder(out, force=True):
            pass
    for read in (made / "model", made / "words.txt", made):
        with pytest.raises(BadInputError, match="which is read"), new_folder(made, True, ("demo", read)):
            pass
    done = pocketlm("quantize", "model", "--format", "q8_0", "-o", ".", "--force", cache=tmp_path / "cache", cwd=made)
    assert done.returncode == 2, done.stderr
    assert (made / "words.txt").read_text() == "words"
    assert (tmp_path / "notes" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "keep me"
    (made / "mine.txt").write_text("keep me")
    with pytest.raises(BadInputError, match=r"mine\.txt in it, which pocketlm did not write"), new_folder(made, True):
        pass
    (made / "mine.txt").unlink()
    with new_folder(made, True) as folder:
        (folder / "new").write_text("")
    assert [path.name for path in made.iterdir()] == ["new"]
    assert not list(tmp_path.glob(".*"))


def test_what_fails_leaves_the_old_result(tmp_path):
    (tmp_path / "made").mkdir()
    write_manifest(tmp_path / "made")
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "made", True):
        raise ZeroDivisionError
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "made", True) as folder:
        shutil.rmtree(folder)  # so that it cannot take its name
    assert (tmp_path / "made" / "manifest.json").exists()
    (tmp_path / "made").rename(tmp_path / ".made.replaced")  # killed when the old result had left its name
    with pytest.raises(BadInputError, match="exists already"), new_folder(tmp_path / "made", False):
        pass
    assert (tmp_path / "made" / "manifest.json").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInputError, match="Cannot write"), new_folder(tmp_path / "file" / "out", False):
        pass


def test_what_appears_during_the_work_stays_and_so_does_the_work(tmp_path):
    def work(out):
        with new_folder(out, False) as new:
            (new / "model").write_text("hours")
            out.mkdir()
            (out / "thesis").write_text("years")

    for times in (2, 3):
        with pytest.raises(BadInputError, match=f"the result is in .*out-{times}"):
            work(tmp_path / "out")
        assert (tmp_path / "out" / "thesis").read_text() == "years"
        assert (tmp_path / f"out-{times}" / "model").read_text() == "hours"
        shutil.rmtree(tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


def test_two_runs_do_not_write_the_same_folder(tmp_path):
    with new_folder(tmp_path / "out", False) as folder:
        (folder / "mine").write_text("")
        with pytest.raises(BadInputError, match="Another run is writing"), new_folder(tmp_path / "out", False):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("fit", "no-such-model", "--size", "1MB"), 2, "There is no file or folder"),
        (("fit", "LLAMA"), 2, "--size"),
        (("fit", "LLAMA", "--size", "lots"), 2, "Write it like 70MB"),
        (("fit", "LLAMA", "--size", "60%", "--heal", "soon"), 2, "Write it like 30s"),
        (("fit", "LLAMA", "--size", "60%", "--data", "EMPTY"), 2, "is empty"),
        (("fit", "LLAMA", "--size", "60%", "--data", "LATIN"), 2, "not UTF-8"),
        (("fit", "LLAMA", "--size", "60%", "--recipe", "EMPTY"), 2, "recipe"),
        (("inspect", "EMPTY"), 2, "GGUF"),
        (("bench", "EMPTY"), 2, "GGUF"),
        (("evaluate", "LLAMA", "--reference", "nothing-here"), 2, "There is no file or folder"),
        (("fit", "LLAMA", "--sise", "60%"), 2, "--size"),
        (("fit", "LLAMA", "--size", "60%", "-o", "\udcff"), 2, "is no UTF-8"),
        (("fit", "LLAMA", "--sweep", "60%,abc"), 2, "Cannot read the size `abc`"),
        (("quantize", "LLAMA", "--bits", "nan"), 2, "--bits"),
        (("quantize", "LLAMA", "--format", "int4-g32", "--tune", "10s"), 2, "Tuning is for GGUF's formats"),
        (("distill", "LLAMA", "--student", "depth=2", "--tokens", "0"), 2, "--tokens"),
        (("distill", "LLAMA", "--student", "depth=2", "--learning-rate", "0"), 2, "learning rate"),
        (("distill", "LLAMA", "--student", "depth=2", "--temperature", "nan"), 2, "temperature"),
        (("inspect", "nowhere/model.gguf"), 2, "There is no file or folder"),
        (("chat", "LLAMA"), 2, "There is no model.gguf"),
    ],
)
def test_bad_input_gets_one_message_and_its_code(arguments, code, said, llama, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("naïve café".encode("latin-1"))
    names = {"LLAMA": llama, "EMPTY": tmp_path / "empty.txt", "LATIN": tmp_path / "latin.txt"}
    done = pocketlm(*(names.get(word, word) for word in arguments), cache=tmp_path / "cache", cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "pocketlm-out").exists()


def stopped_by(number: signal.Signals, ignored: bool, llama, place) -> tuple[int, str]:
    """Quantize, be sent a signal when the work has begun, and return the exit code and the last line."""

    def start() -> None:  # a test that runs in the background would hand down that interrupts are ignored
        signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)

    process = subprocess.Popen(
        command("quantize", llama, "--size", "60%", "-o", place / "out"),
        env=environment(place / "cache"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=start,
    )
    deadline = time.monotonic() + 120
    while not (place / ".out.partial").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=120)[1]
    return process.returncode, said.strip().rpartition("\n")[2]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_run_that_is_stopped_says_so_and_leaves_nothing(llama, tmp_path, name):
    code, said = stopped_by(getattr(signal, name), False, llama, tmp_path)
    assert (code, said) == (130, "error: Stopped. The same command goes on from here")
    assert [path.name for path in tmp_path.iterdir()] in ([], ["cache"])


def test_what_nohup_ignores_stops_nothing(llama, tmp_path):
    assert stopped_by(signal.SIGHUP, True, llama, tmp_path)[0] == 0
    assert (tmp_path / "out" / "model.gguf").is_file()


@pytest.mark.parametrize(
    ("problem", "code", "said"),
    [
        ("__import__('torch').empty(10**15)", 5, "Out of memory. Close other programs"),
        ("bytes(10**18)", 5, "Out of memory. Close other programs"),
        ("throw(OSError(errno.ENOMEM, 'Cannot allocate memory'))", 5, "Out of memory. Close other programs"),
        ("throw(OSError(errno.ENOSPC, 'No space left on device', 'file'))", 5, "The disk is full. Free some space"),
        ("throw(OSError('said by a library'))", 1, "error: said by a library\n"),
        ("open('nowhere/file')", 1, "error: No such file or directory: nowhere/file\n"),
        ("throw(ValueError('what?'))", 1, "Unexpected ValueError: what?. Run again with --debug"),
    ],
)
def test_errors_that_were_not_made_for_a_person_are_worded(problem, code, said):
    program = f"""
import errno
from pocketlm.cli.exits import run
def throw(error):
    raise error
run(lambda **_: {problem})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("printed", "said"),
    [(r"print('\u2013 \ud83d')", "\\u2013 \\ud83d\n"), (r"print_result([], '\u2013 \U0001f600', True)", None)],
    ids=["words", "json"],
)
def test_what_a_terminal_cannot_show_ends_no_run(printed, said):
    program = f"""
from pocketlm.cli.exits import run
from pocketlm.cli.options import print_result
run(lambda **_: {printed})
"""
    latin = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=latin)
    assert done.returncode == 0, done.stderr
    assert done.stdout == said if said else json.loads(done.stdout) == "\u2013 \U0001f600"


def test_what_is_printed_is_json_that_every_program_reads(capsys):
    print_result([], {"kl": math.nan, "high": [math.inf], "at": Path("file"), 3: True}, json_output=True)
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found == {"kl": None, "high": [None], "at": "file", "3": True}


def test_a_recipe_that_misses_the_budget_is_refused(llama, recipe, text, tmp_path):
    arguments = ("fit", llama, "--recipe", recipe, "--size", "40kB", "--data", text, "-o", tmp_path / "out")
    done = pocketlm(*arguments, cache=tmp_path / "cache")
    assert done.returncode == 3, done.stderr
    assert "more than the budget of 40kB" in done.stderr


@pytest.mark.parametrize(
    "option",
    [
        *(("--ram", "1GB"), ("--speed", "1tok/s"), ("--quality", "0.9"), ("--heal", "1m"), ("--seed", "7")),
        *(("--preset", "balanced"), ("--context", "2048")),
    ],
)
def test_a_recipe_takes_no_limits_that_it_would_ignore(option, llama, recipe, tmp_path):
    done = pocketlm("fit", llama, "--recipe", recipe, *option, "-o", tmp_path / "out", cache=tmp_path / "cache")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search("A recipe says all that is done|are for making a recipe", done.stderr)


def test_a_context_is_of_a_memory(llama, tmp_path):
    done = pocketlm("fit", llama, "--size", "60%", "--context", 64, "-o", tmp_path / "out", cache=tmp_path / "cache")
    assert (done.returncode, done.stdout) == (2, "")
    assert "give --ram too" in done.stderr


def test_a_file_with_other_bytes_than_predicted_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(100))
    check_bytes(path, 100)
    with pytest.raises(VerificationError, match="has 100 bytes where 99 were predicted"):
        check_bytes(path, 99)


def test_inspect_says_what_is_inside(llama, tmp_path):
    done = pocketlm("inspect", llama, "--json", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sum(part["bytes"] for part in found["parts"]) == found["bytes"]
    assert found["smallest"] < found["largest"] < found["bytes"]
    config = json.loads((llama / "config.json").read_text())
    assert found["shape"] == {
        "depth": config["num_hidden_layers"],
        "ffn": config["intermediate_size"],
        "kv_groups": config["num_key_value_heads"],
        "heads": config["num_attention_heads"],
        "hidden": config["hidden_size"],
        "vocab": config["vocab_size"],
        "context": config["max_position_embeddings"],
    }


def test_a_model_is_measured_without_another_too(llama, text, tmp_path):
    arguments = ("evaluate", llama, "--data", text, "--windows", 5, "--json")
    alone = json.loads(pocketlm(*arguments, cache=tmp_path / "cache").stdout)
    both = json.loads(pocketlm(*arguments, "--reference", llama, cache=tmp_path / "cache").stdout)
    assert alone["model"]["perplexity"] == both["reference"]["perplexity"]
    assert alone["model"]["kl"] is None
    assert "reference" not in alone


def test_evaluate_finds_no_difference_between_a_model_and_itself(llama, text, tmp_path):
    arguments = ("evaluate", llama, "--reference", llama, "--data", text, "--windows", 5, "--json")
    done = pocketlm(*arguments, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    read = found["text"]
    assert (read["name"], read["windows"], read["window_length"]) == ("words.txt (test)", 5, 256)
    model = found["model"]
    assert model["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert model["ratio"]["value"] == pytest.approx(1)
    assert model["agreement"]["value"] == 1


def test_an_evaluation_says_on_which_text_and_that_it_was_short():
    lines = evaluation_lines(Evaluation({}, TextUsed("a.txt (test)", "0f3a", 2048, 4, 512, True)), 12)
    assert lines[-1] == "4 windows of 512 tokens, a.txt (test), sha256 0f3a; 12 were asked for, it has no more"


def test_doctor_and_clean(llama, tmp_path):
    done = pocketlm("doctor", "--json", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cache writable"] is True
    kept, photos = tmp_path / "cache" / "plan-1234", tmp_path / "cache" / "photos"
    kept.mkdir(parents=True)
    (kept / "done.json").write_text("{}")
    photos.mkdir()
    shown = pocketlm("clean", cache=tmp_path / "cache")
    assert "plan-1234" in shown.stdout
    assert kept.exists()
    assert pocketlm("clean", "--yes", cache=tmp_path / "cache").returncode == 0
    assert not kept.exists()
    assert photos.exists()
    (tmp_path / "file").write_text("")
    done = pocketlm("doctor", "--json", cache=tmp_path / "file" / "below")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["cache writable"] is False
    done = pocketlm("fit", llama, "--size", "60%", "--dry-run", cache=tmp_path / "file" / "below")
    assert done.returncode == 2, done.stderr
    assert "Set POCKETLM_CACHE" in done.stderr
