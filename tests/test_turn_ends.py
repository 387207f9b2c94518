"""The engine stops where the model ends a turn; that a damaged model goes on and on is no defect of its file."""

from pathlib import Path

from tests.conftest import Tiny

from pocketlm.export.gguf import write_gguf
from pocketlm.export.verify import check_turn_ends
from pocketlm.run.engine import Engine


def test_a_file_is_refused_for_its_end_token_alone(tiny_model: Tiny, tmp_path: Path):
    model = tiny_model("llama")
    write_gguf(model, {}, tmp_path / "model.gguf")
    with Engine(tmp_path / "model.gguf", context=32) as engine:
        never = check_turn_ends(model, engine.ends_generation, {"original": 3, "compressed": 0}, 4)
        assert never.passed
        assert never.detail == "0 of 4 answers ended by themselves; 3 of the original's"
        wrong = check_turn_ends(
            model, lambda token: engine.ends_generation(token + 1), {"original": 3, "compressed": 3}, 4
        )
        assert not wrong.passed
