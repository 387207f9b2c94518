"""The command `distill`: students of every kind, folders that are whole or not there, a way out of every mistake."""

import json
import math
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from tests.command_line import command, environment, pocketlm
from tests.tiny import tiny_folder
from transformers import AutoModelForCausalLM

from pocketlm import api
from pocketlm.cli.main import app
from pocketlm.commands import distillation
from pocketlm.commands.distillation import Distillation, Distilled, distil_settings, distill
from pocketlm.commands.students import read_shape
from pocketlm.errors import BadInputError
from pocketlm.interval import Interval
from pocketlm.measure.quality import Quality
from pocketlm.model.files import file_sha256
from pocketlm.report.content import TextUsed
from pocketlm.report.distilled import distilled_page
from pocketlm.steps.distil import Distil

QUICK = ("--tokens", 2048, "--learning-rate", "1e-3")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher, a student of its own, a model with another tokenizer, text and a task."""
    base = tmp_path_factory.mktemp("distillation")
    text = base / "text.txt"
    text.write_text("\n\n".join(f"The {n}th of many short paragraphs of text, {n * n} of them." for n in range(3000)))
    empty = base / "empty.txt"
    empty.touch()
    task = base / "task.jsonl"
    task.write_text("\n".join(json.dumps({"prompt": f"Is {n} odd", "answer": ["no", "yes"][n % 2]}) for n in range(50)))
    return {
        "teacher": tiny_folder("llama", base / "teacher", num_hidden_layers=5),
        "stock": tiny_folder("llama", base / "stock", 1, num_hidden_layers=1),
        "stranger": tiny_folder("qwen2", base / "stranger"),
        "text": text,
        "empty": empty,
        "task": task,
        "cache": base / "cache",
    }


def test_shapes_are_read():
    assert read_shape("depth=12,ffn=768") == {"depth": 12, "ffn": 768}
    assert read_shape("kv-groups=1, hidden=64") == {"kv_groups": 1, "hidden": 64}
    assert read_shape("some/model") == {}
    for wrong in ("depth=x", "depth=²", "layers=3", "depth=3,", "depth=-1"):
        with pytest.raises(BadInputError, match="Write a shape like depth=12,ffn=768"):
            read_shape(wrong)


def test_in_no_time_nothing_is_learnt(tmp_path: Path):
    job = Distillation(teacher="", student="depth=4", how=Distil(tokens=0), seconds=0.0, out=tmp_path / "out")
    for seconds in (0.0, None):  # and of no tokens neither
        with pytest.raises(BadInputError, match="Give a --time such as 30m, or --tokens"):
            distill(replace(job, seconds=seconds))


class Asked(Exception):
    """What was asked for."""


def asked(job: Distillation, *_: object):
    raise Asked(job)


@pytest.mark.parametrize(
    ("student", "given", "rate"),
    [
        ("depth=12,ffn=768", {}, 3e-4),
        ("some/model", {}, 1e-4),
        ("some/model", {"adapters": 8}, 3e-4),
        ("depth=12", {"learning_rate": 2e-5}, 2e-5),
    ],
)
def test_students_learn_alike_from_python_and_on_the_command_line(
    student: str, given: dict, rate: float, monkeypatch: pytest.MonkeyPatch
):
    assert distil_settings(student, **given) == Distil(
        tokens=0, learning_rate=rate, warm_up=0.05, evaluations=8, adapters=given.get("adapters", 0)
    )
    monkeypatch.setattr(api, "distill", asked)
    options = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    with pytest.raises(Asked) as found:
        typer.main.get_command(app).main(["distill", "t", "--student", student, *options], standalone_mode=False)
    assert found.value.args[0].how == distil_settings(student, **given)


def test_how_a_student_learns_may_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distillation, "_check", asked)
    with pytest.raises(Asked) as found:
        distill(Distillation(teacher="", student="depth=4", seconds=60.0, out=tmp_path / "out"))
    assert found.value.args[0].how == distil_settings("depth=4")


def test_a_page_says_what_it_was_made_of_and_cannot_be_broken_out_of():
    inputs = {"teacher": {"sha256": "0f3a"}, "settings": {"seed": 7}}
    text = TextUsed("a|b.txt", "5b2c", 2048, 4, 512, True)
    page = distilled_page(
        "<b>", "depth=4|", Distilled(("*so*",), (2, 1), {}, 8, {"tokens_per_second": 9.0}, text, inputs)
    )
    assert "# &lt;b&gt;, distilled" in page
    assert "Student: depth=4\\|, 1 parameters" in page
    assert "- \\*so\\*" in page
    assert (
        "Text: 4 windows of 512 tokens, a\\|b.txt, sha256 5b2c. Seed 7; the teacher's weights: SHA-256\n0f3a." in page
    )


def test_a_student_that_broke_leaves_json_that_every_program_reads(folders, tmp_path: Path, monkeypatch):
    broken = Interval(math.inf, math.nan, math.inf)
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(distillation, "measure_as_f16", lambda *_: [Quality(broken, broken, broken, broken)] * 2)
    how, data = distil_settings("depth=4", tokens=1024), (folders["text"],)
    job = Distillation(teacher=str(folders["teacher"]), student="depth=4", how=how, out=tmp_path / "out", data=data)
    distill(job)
    found = json.loads((tmp_path / "out" / "distillation.json").read_text(), parse_constant=pytest.fail)
    assert found["qualities"]["student"]["kl"] == {"value": None, "low": None, "high": None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("student", "more"),
    [
        ("depth=4,ffn=96", ("--gguf",)),
        ("depth=2", ("--targets", "sampled")),
        ("depth=4", ("--adapters", 2, "--loss", "jensen_shannon")),
        ("stock", ("--cross-entropy", 0.5, "--targets", "top")),
        ("stock", ("--task", "task", "--on-policy", 0.5)),
        ("stock", ("--hidden-states", 0.5, "--relations", 0.5, "--on-policy", 0.25)),
    ],
    ids=["cut", "targets", "adapters", "stock", "task", "insides"],
)
def test_students_of_every_kind(student: str, more: tuple, folders: dict[str, Path], tmp_path: Path):
    out = tmp_path / "out"
    more = [folders.get(word, word) if isinstance(word, str) else word for word in more]
    done = pocketlm(
        *("distill", folders["teacher"], "--student", folders.get(student, student), *QUICK, *more),
        *("--data", folders["text"], "-o", out, "--json"),
        cache=folders["cache"],
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert set(made["qualities"]) == {"teacher", "student before", "student"}
    assert made["parameters"][1] < made["parameters"][0]
    assert json.loads((out / "distillation.json").read_text()) == made
    inputs = made["inputs"]
    assert inputs["teacher"]["sha256"] == file_sha256(folders["teacher"] / "model.safetensors")
    assert inputs["settings"].items() >= {"seed": 0, "tokens": 2048}.items()
    assert inputs["learnt"]["data"] == [str(folders["text"])]
    assert (made["text"]["name"], made["text"]["held_out"]) == ("text.txt", True)
    losses = (out / "loss.csv").read_text().splitlines()
    assert losses[0] == "step,tokens,loss,held_out_kl"
    assert len(losses) == 2 + len(made["details"]["losses"])
    assert "student before" in (out / "report.md").read_text()
    assert (out / "model.gguf").exists() == ("--gguf" in more)
    listed = {entry["path"] for entry in json.loads((out / "manifest.json").read_text())["files"]}
    assert {"hf/config.json", "loss.csv", "report.md", "distillation.json"} <= listed
    network = AutoModelForCausalLM.from_pretrained(out / "hf")
    assert network.config.num_hidden_layers == {"depth=2": 2, "stock": 1}.get(student, 4)
    if "--targets" in more:
        assert made["details"]["target_bytes"] < 64


@pytest.mark.slow
def test_a_killed_run_ends_the_same(folders: dict[str, Path], tmp_path: Path):
    words = ("distill", folders["teacher"], "--student", "depth=3", "--tokens", 30000, "--data", folders["text"])
    with subprocess.Popen(
        command(*words, "-o", tmp_path / "killed"),
        env=environment(tmp_path / "cache"),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stderr:
            if "distilling" in line:
                process.send_signal(signal.SIGKILL)
                break
    assert not (tmp_path / "killed").exists()
    for name, cache in (("killed", "cache"), ("whole", "other")):
        done = pocketlm(*words, "-o", tmp_path / name, cache=tmp_path / cache)
        assert done.returncode == 0, done.stderr
    one, other = (tmp_path / name / "hf" / "model.safetensors" for name in ("killed", "whole"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--student", "depth=9"), "the model has 5"),
        (("--student", "depth=1"), "Cannot keep fewer than 2"),
        (("--student", "stranger"), "another tokenizer"),
        (("--student", "stranger", "--task", "task"), "let the teacher answer prompts"),
        (("--student", "depth=4", "--task", "text"), "line 1: not JSON"),
        (("--student", "depth=4", "--task", "task", "--remote", "http://127.0.0.1:9"), "Nothing answers at"),
        (("--student", "depth=4", "--data", "empty"), "is empty"),
        (("--student", "depth=4", "--on-policy", "0.5", "--targets", "top"), "need the teacher itself"),
        (("--student", "depth=4", "--loss", "kl"), "Unknown --loss `kl`"),
        (("--student", "depth=4", "--temperature", "0"), "`temperature` above 0"),
        (("--student", "depth=4", "--targets", "sampled", "--loss", "reverse_kl"), "forward KL at temperature 1"),
        (("--student", "depth=4", "--task", "missing.jsonl"), "Cannot read missing.jsonl"),
    ],
    ids=str,
)
def test_mistakes_have_a_way_out_and_leave_nothing(
    words: tuple[str, ...], message: str, folders: dict[str, Path], tmp_path: Path
):
    words = tuple(folders.get(word, word) for word in words)
    done = pocketlm(
        *("distill", folders["teacher"], *words, *QUICK, "--data", folders["text"], "-o", tmp_path / "out"),
        cache=folders["cache"],
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith(("[", "Writing", "Loading"))]
    assert len(errors) <= 3, errors
    assert not list(tmp_path.iterdir())
