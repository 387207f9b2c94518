"""The stages of a run: each finished one is kept, each starts from what the one before left on disk.

    text ─> original (16 bit) ─> [trim_vocabulary ─> prune_depth ─> prune_width ─> distil ─> sparsify ─> prepare]
         ─> quantize [─> tune]

A stage loads what it needs from the stage before it, in a fresh run as in a resumed one, so that both end in the
same bytes.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from pocketlm.model.anatomy import overwrite_weight
from pocketlm.model.importance import token_importance
from pocketlm.model.language_model import LanguageModel, save
from pocketlm.model.respelling import Respeller, Spelling
from pocketlm.model.sampling import sample_documents
from pocketlm.model.source import load, set_aside
from pocketlm.model.sweep import Importance
from pocketlm.model.text import (
    WINDOW,
    Corpus,
    Tokens,
    as_tokens,
    check_length,
    pack_windows,
    python_topics,
    read_corpus,
)
from pocketlm.model.training import LOSSES
from pocketlm.model.vocabulary import spellings
from pocketlm.pipeline.cache import Finished, stage, unfinished
from pocketlm.plan.recipe import Recipe
from pocketlm.steps.distil import Distil, distil
from pocketlm.steps.prepare import Prepare, prepare
from pocketlm.steps.prune_depth import PruneDepth, prune_depth
from pocketlm.steps.prune_width import PruneWidth, prune_width
from pocketlm.steps.quantize import Quantize, quantize
from pocketlm.steps.sparsify import Sparsify, sparsify
from pocketlm.steps.trim_vocabulary import TrimVocabulary, trim_vocabulary
from pocketlm.steps.tune import Tune, tune
from pocketlm.tensors.formats import Packed, find_format, unpack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SAMPLES = 16  # documents that the model writes itself
STATISTICS_WINDOWS = 32  # of calibration text, for the statistics of steps that do not say how many
LEARNING_WINDOWS = 2048  # of calibration text at most, to learn from: what `best` learns once, where there is that much
VALIDATION_WINDOWS = 8
TEST_WINDOWS = 12
NORMS = "norms.safetensors"
PACKED = "packed.json"  # of a stage that quantizes: which formats
IMPORTANCE = "importance.safetensors"

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def silent(what: str, done: int, total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class Texts:
    """The text of a run, by what it is for: as windows of tokens, and as the documents that they were cut from."""

    calibration: Tokens
    validation: Tokens
    test: Tokens
    documents: dict[str, list[str]]

    def cut_by(self, tokenizer: "PreTrainedTokenizerFast") -> "Texts":
        """Return the same text in windows of another tokenizer's tokens."""
        windows = _windows(self.documents, tokenizer, self.test.windows.shape[1])
        return replace(self, **{part: as_tokens(getattr(self, part).name, rows) for part, rows in windows.items()})

    @cached_property
    def sha256(self) -> dict[str, str]:
        """The hashes of what a recipe's steps and the trials of candidates read."""
        read = [self.documents.get(part, []) for part in ("calibration", "validation")]
        documents = hashlib.sha256(json.dumps(read).encode()).hexdigest()
        return {
            "calibration": self.calibration.sha256,
            "validation": self.validation.sha256,
            "documents": documents,
        }


def gather_texts(
    model: LanguageModel, data: list[Path], seed: int, progress: Progress, learning: int = LEARNING_WINDOWS
) -> Texts:
    """Return the person's text, or the model's own samples with Python's help topics, split three ways.

    Samples only calibrate: what judges a model was not written by it. At most `learning` windows teach.

    Raises:
        BadInputError: A file of text cannot be used, or the text is too short.
    """
    corpus = read_corpus(data, model.tokenizer) if data else python_topics()
    length = min(WINDOW, getattr(model.network.config, "max_position_embeddings", WINDOW))

    def produce(folder: Path) -> None:
        samples = []
        if not data:
            progress("the model writes calibration text", 0, 1)
            samples = sample_documents(model, SAMPLES, seed)
        (folder / "samples.json").write_text(json.dumps(samples))
        windows = _windows(_documents(corpus, samples), model.tokenizer, length, learning)
        for part in ("calibration", "validation", "test"):
            check_length(corpus, part, windows[part], length)
        save_file(windows, folder / "windows.safetensors")

    inputs = {"model": model.origin.key, "text": corpus.sha256, "own": not data, "seed": seed, "learning": learning}
    done = stage("text", inputs, produce)
    windows = load_file(done.folder / "windows.safetensors")
    names = {"calibration": f"{corpus.name} and the model's own samples" if not data else corpus.name}
    documents = _documents(corpus, json.loads((done.folder / "samples.json").read_text()))
    tokens = {part: as_tokens(names.get(part, corpus.name), rows) for part, rows in windows.items()}
    return Texts(**tokens, documents=documents)


def _documents(corpus: Corpus, samples: list[str]) -> dict[str, list[str]]:
    return {
        "calibration": samples + corpus.split("calibration"),
        "validation": corpus.split("validation"),
        "test": corpus.split("test"),
    }


def _windows(
    documents: dict[str, list[str]],
    tokenizer: "PreTrainedTokenizerFast",
    length: int,
    learning: int = LEARNING_WINDOWS,
) -> dict[str, Tensor]:
    limits = {"calibration": learning, "validation": VALIDATION_WINDOWS, "test": TEST_WINDOWS}
    return {part: pack_windows(documents[part], tokenizer, limit, length) for part, limit in limits.items()}


@dataclass(frozen=True)
class Teacher:
    """Who later steps learn from.

    Attributes:
        model: The original.
        texts: The run's text in its tokens.
        spelling: The ids that are left for each of its tokens, where the vocabulary was trimmed.
    """

    model: LanguageModel
    texts: Texts
    spelling: Spelling | None = None

    @property
    def speaker(self) -> LanguageModel | Respeller:
        """The original as its students hear it: through the spelling where they have fewer tokens."""
        return self.model if self.spelling is None else Respeller(self.model, self.spelling)


@dataclass(frozen=True)
class Compressed:
    """What a recipe made of a model.

    Attributes:
        model: The network with the decoded weights, ready to be exported.
        packed: The quantized tensors by parameter name.
        folder: The pruned and healed model as a plain 16-bit folder.
        stages: All finished stages, in order.
        texts: The run's text as the model reads it: cut anew where its vocabulary was trimmed.
    """

    model: LanguageModel
    packed: dict[str, Packed]
    folder: Path
    stages: tuple[Finished, ...]
    texts: Texts


def run_recipe(original: LanguageModel, recipe: Recipe, texts: Texts, progress: Progress) -> Compressed:
    """Run a recipe's steps, reusing every finished one.

    Args:
        original: Saved as 16-bit first; later steps start from what is on disk.
        recipe: Its last step quantizes, or tunes what was quantized. After `trim_vocabulary`, the original still
            teaches, its tokens spelled with those that are left.
        texts: To take statistics on and to learn from.
        progress: Called as the steps go on.
    """
    done = [stage("original", {"model": original.origin.key}, lambda folder: _keep(original, folder))]
    teacher = Teacher(original, texts)
    for step in recipe.steps:
        before = done[-1]
        inputs = {"before": before.key, "step": asdict(step), **texts.sha256}
        match step:
            case TrimVocabulary():
                done.append(_trim(original, before, step, texts))
                trimmed = _reload(original, done[-1])
                texts = texts.cut_by(trimmed.tokenizer)
                teacher = replace(teacher, spelling=spellings(original.tokenizer, trimmed.tokenizer))
                continue
            case Quantize():
                plain = before  # the model as it is before its numbers become coarse
                produce = partial(_quantize, original, (done[0], before), step, texts, progress)
            case Tune():
                produce = partial(_tune, teacher, (plain, before), step, progress)
            case _:
                produce = partial(_change, teacher, before, step, texts, progress)
        done.append(stage(step.step, inputs, produce))
    model = _reload(original, plain)
    packed = read_packed(done[-1].folder)
    put_decoded(model, packed)
    put_norms(model, done[-1].folder)
    return Compressed(model, packed, plain.folder / "hf", tuple(done), texts)


def _keep(model: LanguageModel, folder: Path) -> dict:
    save(model, folder / "hf")
    return {"step": "original", "summary": "the original in 16 bits", "details": {}}


def _reload(original: LanguageModel, finished: Finished) -> LanguageModel:
    return replace(load(str(finished.folder / "hf"), original.network.dtype), origin=original.origin)


def _trim(original: LanguageModel, before: Finished, step: TrimVocabulary, texts: Texts) -> Finished:
    documents = texts.documents["calibration"]
    text = hashlib.sha256("\0".join(documents).encode()).hexdigest()

    def produce(folder: Path) -> dict[str, Any]:
        model, report = trim_vocabulary(_reload(original, before), step, documents)
        save(model, folder / "hf")
        return asdict(report)

    return stage(step.step, {"before": before.key, "step": asdict(step), "text": text}, produce)


def _change(
    teacher: Teacher,
    before: Finished,
    step: PruneDepth | PruneWidth | Sparsify | Distil | Prepare,
    texts: Texts,
    progress: Progress,
    folder: Path,
) -> dict[str, Any]:
    model = _reload(teacher.model, before)
    prunes = isinstance(step, PruneDepth | PruneWidth)
    statistics = texts.calibration.first(step.windows if prunes else STATISTICS_WINDOWS)
    match step:
        case PruneDepth():
            model, report = prune_depth(model, step, statistics, lambda i, n: progress("repairing blocks", i, n))
        case PruneWidth():
            model, report = prune_width(model, step, statistics, lambda i, n: progress("narrowing blocks", i, n))
        case Sparsify():
            model, report = sparsify(model, step, statistics, lambda i, n: progress("cutting connections", i, n))
        case Prepare():
            model, report = prepare(model, step, statistics, lambda i, n: progress("preparing", i, n))
        case Distil():
            model, report = distil(
                teacher.speaker,
                model,
                step,
                teacher.texts.calibration.windows,
                teacher.texts.validation.windows,
                lambda i, n, pace: progress(f"distilling ({pace})", i, n),
                unfinished(folder),
            )
            shutil.copy(unfinished(folder) / LOSSES, folder)
    save(model, folder / "hf")
    return asdict(report)


def _quantize(
    original: LanguageModel,
    stages: tuple[Finished, Finished],
    step: Quantize,
    texts: Texts,
    progress: Progress,
    folder: Path,
) -> dict[str, Any]:
    kept, before = stages
    model = _reload(original, before)
    statistics = texts.calibration.first(step.windows)
    with set_aside(original, kept.folder / "hf"):
        weighed = step.method == "descent" and not step.rounds_nothing
        weights = _importance(model, before, step, texts, progress) if weighed else None
        _, packed, report = quantize(model, step, statistics, lambda i, n: progress("quantizing", i, n), weights)
    write_packed(packed, folder)
    return asdict(report)


def _importance(model: LanguageModel, before: Finished, step: Quantize, texts: Texts, progress: Progress) -> Importance:
    """Return how much each token of a text counts for a model: the same for all formats, so it is kept."""

    def produce(folder: Path) -> dict[str, Any]:
        windows = texts.calibration.first(step.windows)
        found = token_importance(model.network, windows, step.seed, lambda i, n: progress("weighing tokens", i, n))
        save_file({f"{index} {space}": values for (index, space), values in found.items()}, folder / IMPORTANCE)
        return {}

    inputs = {"before": before.key, "windows": step.windows, "seed": step.seed, **texts.sha256}
    kept = load_file(stage("importance", inputs, produce).folder / IMPORTANCE)
    places = {name: name.split(" ") for name in kept}
    return {(int(index), space): kept[name] for name, (index, space) in places.items()}


def _tune(
    teacher: Teacher,
    stages: tuple[Finished, Finished],
    step: Tune,
    progress: Progress,
    folder: Path,
) -> dict[str, Any]:
    plain, before = stages
    student = _reload(teacher.model, plain)
    model, packed, report = tune(
        teacher.speaker,
        student,
        read_packed(before.folder),
        step,
        (teacher.texts.calibration.windows, teacher.texts.validation.windows),
        lambda i, n, pace: progress(f"tuning ({pace})", i, n),
        unfinished(folder),
    )
    write_packed(packed, folder)
    norms = {name: value.detach() for name, value in model.network.named_parameters() if value.dim() == 1}
    save_file(norms, folder / NORMS)
    return asdict(report)


def write_packed(packed: dict[str, Packed], folder: Path) -> None:
    """Keep quantized tensors in a folder."""
    save_file({name: tensor.rows.contiguous() for name, tensor in packed.items()}, folder / "packed.safetensors")
    kinds = {name: [tensor.format.name, *tensor.shape] for name, tensor in packed.items()}
    (folder / PACKED).write_text(json.dumps(kinds))


def read_packed(folder: Path) -> dict[str, Packed]:
    """Read quantized tensors back."""
    kinds = json.loads((folder / PACKED).read_text())
    rows = load_file(folder / "packed.safetensors")
    return {
        name: Packed(find_format(kind, shape[1]), rows[name], tuple(shape)) for name, (kind, *shape) in kinds.items()
    }


def put_norms(model: LanguageModel, folder: Path) -> None:
    """Give a network the norms (and biases) that tuning left in a stage's folder, where it did."""
    if (folder / NORMS).exists():
        model.network.load_state_dict(load_file(folder / NORMS), strict=False)


def put_decoded(model: LanguageModel, packed: dict[str, Packed]) -> None:
    """Give a network the weights that its quantized tensors decode to."""
    for name, tensor in packed.items():
        module = model.network.get_submodule(name.rpartition(".")[0])
        overwrite_weight(module, unpack(tensor).decode())
