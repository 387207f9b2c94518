"""The card of a model's folder: its licence is read as it is meant, and what a model came from goes with its copies."""

from pathlib import Path

import pytest
from tests.tiny import tiny_folder

from pocketlm.model.card import read_card
from pocketlm.model.language_model import save
from pocketlm.model.source import load


@pytest.mark.parametrize(
    ("front", "license"),
    [
        ("license: apache-2.0  # with a comment", "apache-2.0"),
        ("license: 'mit'", "mit"),
        ("license:\n- mit\n- apache-2.0", "mit, apache-2.0"),
        ("license:\nlanguage: en", None),
        ("license: [1, 2]", None),
        ("license: [", None),
        ("date: 2024-13-45", None),
        ("- license", None),
    ],
)
def test_a_licence_is_read_as_yaml(front: str, license: str | None, tmp_path: Path):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    assert read_card(tmp_path) == (license, None)


def test_a_copy_keeps_name_and_licence(tmp_path: Path):
    source, copy = tiny_folder("llama", tmp_path / "model"), tmp_path / "hf"
    (source / "README.md").write_text("---\nlicense: mit\nbase_model: lab/parent\n---\n")
    model = load(str(source))
    assert model.origin.base_model == "model", "a card of others says what the model was trained from"
    save(model, copy)
    origin = load(str(copy)).origin
    assert (origin.base_model, origin.license) == ("model", "mit")
    (copy / "README.md").write_text("mine")
    save(model, copy)
    assert (copy / "README.md").read_text() == "mine"
