"""A twin holds the same weights in another format, and the engine says of it what it says of the file."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st
from tests.tiny import tiny_folder

from pocketlm.export.gguf import write_gguf
from pocketlm.export.twin import FAST, SLOW, twin, widen
from pocketlm.model.gguf_file import read_gguf, read_tensor
from pocketlm.model.source import load
from pocketlm.run.engine import Engine
from pocketlm.run.llamacpp import decode_row
from pocketlm.steps.quantize import Quantize, quantize
from pocketlm.tensors.formats import Packed

ROWS, COLUMNS = 3, 192


@given(st.binary(min_size=ROWS * SLOW.row_bytes(COLUMNS), max_size=ROWS * SLOW.row_bytes(COLUMNS)))
def test_any_bytes_decode_to_the_same_weights(data: bytes):
    rows = np.frombuffer(data, np.uint8).reshape(ROWS, -1).copy()
    rows.reshape(-1, SLOW.block_bytes)[:, 1] &= 0xFB  # a finite scale
    wide = widen(Packed(SLOW, torch.from_numpy(rows), (ROWS, COLUMNS))).rows.numpy()
    decoded = gguf.dequantize(wide, GGMLQuantizationType.Q4_0)
    for row, slow in zip(decoded, rows, strict=True):
        assert (row == decode_row(SLOW.name, slow.tobytes(), COLUMNS)).all()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with attention in Q2_0 and FFNs in Q5_0."""
    folder = tmp_path_factory.mktemp("twin")
    model = load(str(tiny_folder("llama", folder / "tiny")), torch.float32)
    formats = dict.fromkeys(("query_key", "value", "attention_out", "ffn_out"), SLOW.name)
    formats |= {"embedding": "Q8_0", "ffn_in": "Q5_0"}
    done, packed, _ = quantize(model, Quantize(formats=formats, method="rtn"), torch.zeros(1, 8, dtype=torch.long))
    write_gguf(done, packed, folder / "mixed.gguf")
    return folder / "mixed.gguf"


def test_a_twin_differs_in_the_slow_matrices_alone(file: Path):
    before = read_gguf(file)
    with twin(file) as path:
        after = read_gguf(path)
        assert after.fields == before.fields
        assert list(after.tensors) == list(before.tensors)
        for name, info in before.tensors.items():
            assert after.tensors[name].type == (FAST.name if info.type == SLOW.name else info.type)
            assert torch.equal(read_tensor(after, name), read_tensor(before, name))
    assert {info.type for info in before.tensors.values()} >= {SLOW.name, "Q5_0"}
    assert not path.parent.exists()


def test_the_engine_says_the_same_of_both(file: Path):
    tokens = torch.randint(0, 300, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    with twin(file) as path, Engine(file, context=64) as own, Engine(path, context=64) as other:
        before, after = own.logits(tokens), other.logits(tokens)
    assert not torch.equal(before, before.roll(1, 0))
    assert (after - before).abs().max() < 0.02 * before.std()


def test_a_file_without_slow_matrices_is_its_own_twin(file: Path):
    with twin(file) as wide, twin(wide) as same:
        assert same == wide
