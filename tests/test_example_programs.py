"""The programs in examples/, end to end: a tiny model, few commands, the real server."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.command_line import environment
from tests.tiny import tiny_folder

from pocketlm.export.gguf import write_gguf
from pocketlm.model.source import load

EXAMPLES = Path(__file__).parents[1] / "examples"
SLOTS = {"PlayMusic": "artist", "GetWeather": "city"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return a tiny model with room for long prompts, and a cache that the programs share."""
    place = tmp_path_factory.mktemp("examples")
    return tiny_folder("llama", place / "tiny", max_position_embeddings=16_384), place / "cache"


def run(program, tiny, *arguments):
    """Run an example and return what it wrote to result.json and result.md in `out`, the last argument."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{program}.py", *map(str, arguments)],
        env=environment(tiny[1]),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    out = Path(arguments[-1])
    text = (out / "result.md").read_text()
    assert text in done.stdout
    return json.loads((out / "result.json").read_text()), text


def snips(folder):
    """Write requests as snips has them."""
    folder.mkdir()
    for part, count in (("train_{}_full", 24), ("validate_{}", 4)):
        for intent, slot in SLOTS.items():
            requests = [
                {"data": [{"text": f"{part[0]} ask for "}, {"text": f"{slot} {number}", "entity": slot}]}
                for number in range(count)
            ]
            (folder / f"{part.format(intent)}.json").write_text(json.dumps({intent: requests}))
    return folder


@pytest.mark.slow
def test_home_learns_commands_and_answers_under_the_schema(tiny, tmp_path):
    """A random model knows no command, but the grammar lets it say nothing other than actions."""
    arguments = ("--model", tiny[0], "--student", "depth=2", "--format", "Q8_0", "--limit", 6)
    found, text = run("home", tiny, *arguments, "--data", snips(tmp_path / "snips"), "--out", tmp_path / "out")
    assert found["learnt from"] == 48
    fitted, original = found["rounds"]
    assert (fitted["test"], fitted["model"], original["model"]) == ("snips", "fitted", "original")
    assert fitted["bytes"] < original["bytes"]
    for row in (fitted, original):
        assert row["right"] + len(row["wrong"]) == row["commands"] == 6
        assert row["whole actions"] >= row["right action"] >= row["right"]
        said = [answer for _, _, answer in row["wrong"] if answer]  # nothing where it was cut off
        assert all(set(answer) - {"action"} <= {SLOTS[answer["action"]]} for answer in said)
    assert "| snips, 6 | fitted |" in text


@pytest.mark.slow
def test_the_assistant_asks_both_models_every_case(tiny, tmp_path):
    cases, file = tmp_path / "cases.jsonl", tmp_path / "fitted.gguf"
    rows = (EXAMPLES / "assistant.jsonl").read_text().splitlines()
    cases.write_text(f"{rows[0]}\n{rows[-1]}\n")
    write_gguf(load(str(tiny[0])), {}, file)
    found, _ = run("assistant", tiny, file, "--model", tiny[0], "--cases", cases, "--out", tmp_path / "out")
    jobs = [(model, job) for model in ("fitted", "original") for job in ("summary", "reply")]
    assert [(row["model"], row["job"]) for row in found] == jobs
    assert found[0]["answers"] == found[2]["answers"]  # it is the same model


@pytest.fixture
def module(monkeypatch):
    """Return a function that imports a module of the examples."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.mark.parametrize(
    ("answer", "mentioned", "fails"),
    [
        ('{"text": "Anna is late and needs a ride at 18:30."}', 2, ()),
        ('{"text": "She comes at 118:30 or at 18:300."}', 0, ("honest",)),
        ('{"text": "Anna will ride, Anna will ride, Anna will ride."}', 1, ("fresh",)),
        ('{"text": "' + "very " * 51 + '"}', 0, ("short", "fresh")),
        ('{"text": "Anna comes at 18:', 1, ("whole",)),
        ("", 0, ("whole",)),
    ],
)
def test_what_the_assistant_counts(module, answer, mentioned, fails):
    assistant = module("assistant")
    case = assistant.Case("summary", "Anna: pick me up at 18:30", (("anna",), ("18:30",)))
    found = assistant.checked(case, module("common").Reply(200, answer, 0.1, {}))
    assert found.mentioned == mentioned
    assert {name for name in ("whole", "short", "fresh", "honest") if not getattr(found, name)} == set(fails)


def test_the_cases_of_the_assistant_can_be_answered(module):
    """Each fact is in what the assistant is given, in one of its wordings."""
    assistant = module("assistant")
    for case in assistant.read_cases(assistant.CASES):
        for fact in case.facts:
            assert any(way in case.prompt.casefold() for way in fact), (case.prompt, fact)


def test_generated_commands_keep_their_schema_and_are_not_those_that_test(module):
    home = module("home_commands")
    learning, test = home.generated(300), home.hand_written()
    for command in (*learning, *test):
        (kind,) = (kind for kind in command.schema["anyOf"] if set(kind["required"]) == set(command.action))
        assert command.action["action"] in kind["properties"]["action"]["enum"]
        assert all(command.action[name] in command.schema["$defs"][name]["enum"] for name in ("domain", "target"))
        assert json.loads(command.answer) == command.action
    assert learning == home.generated(300)
    assert not {one.prompt.casefold() for one in learning} & {one.prompt.casefold() for one in test}


def test_calls_of_home_assistant_become_actions(module, tmp_path):
    path = tmp_path / "conversation.jsonl"
    call = {"name": "HassLightSet", "arguments": json.dumps({"brightness": 50.0, "name": "Porch Light"})}
    overview = "- names: Porch Light\n  domain: light\n  areas: Balcony\n- names: Fan\n"
    rows = [{"instructions": overview, "input": "Dim it", "tool_calls": [call]}, {"instructions": "", "input": "Pause"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (command,) = module("home_commands").home_assistant(path)
    assert command.action == {"action": "HassLightSet", "domain": "light", "target": "Porch Light", "value": 50}
    assert command.schema["$defs"]["target"]["enum"] == ["Balcony", "Fan", "Porch Light"]
