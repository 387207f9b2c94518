"""How the damage of a run came about, stage by stage, on the same held-out windows."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from torch.nn.functional import cross_entropy

from pocketlm.measure.quality import compare
from pocketlm.model.judge import divergence_of, judge
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.respelling import Respelled, respell, text_loss
from pocketlm.model.source import load, set_aside
from pocketlm.model.vocabulary import spellings
from pocketlm.pipeline.stages import PACKED, Compressed, Progress, put_decoded, read_packed
from pocketlm.run.engine import Engine

STAGE_WINDOWS = 4

Measures = tuple[Callable[[LanguageModel], float], Callable[[Path, Path], float]]
"""What measures the damage of a model in torch, and of a file beside the original's in the engine."""


def damage_by_stage(
    original: LanguageModel, compressed: Compressed, files: dict[str, Path], test: Tensor, progress: Progress
) -> tuple[tuple[str, float], ...]:
    """Return the KL to the original, in nats per token, behind each stage that changed the model.

    Where the vocabulary was trimmed: the text's nats per token of the original's, less the original's own. Stages are
    read in torch from what they left on disk, then the exported file in the engine, under the name `llama.cpp`.

    Args:
        original: As it was given.
        compressed: What the recipe made of it.
        files: The GGUF files by role: `original` and `compressed`.
        test: (windows, length) of the original's token ids that nothing else has seen; the first few are read.
        progress: Called after each stage.
    """
    windows, found = test[:STAGE_WINDOWS], []
    trimmed = compressed.model.network.config.vocab_size != original.network.config.vocab_size
    in_torch, in_engine = _by_loss(original, compressed, windows) if trimmed else _by_divergence(original, windows)
    first, *others, last = compressed.stages
    plain = first.folder / "hf"
    with set_aside(original, plain):
        for done, finished in enumerate(others, 1):
            progress("measuring the damage of each stage", done, len(compressed.stages))
            plain = finished.folder / "hf" if (finished.folder / "hf").exists() else plain
            model = load(str(plain), original.network.dtype)
            if (finished.folder / PACKED).exists():
                put_decoded(model, read_packed(finished.folder))
            found.append((finished.facts["step"], in_torch(model)))
        found.append((last.facts["step"], in_torch(compressed.model)))
    return (*found, ("llama.cpp", in_engine(files["original"], files["compressed"])))


def _by_divergence(original: LanguageModel, windows: Tensor) -> Measures:
    opinion = judge(original.network, windows)

    def in_engine(before: Path, after: Path) -> float:
        length = windows.shape[1]
        with Engine(before, context=length) as truth, Engine(after, context=length) as engine:
            return compare({"before": truth.logits, "after": engine.logits}, windows).qualities["after"].kl.value

    return lambda model: divergence_of(model.network, windows, opinion), in_engine


def _by_loss(original: LanguageModel, compressed: Compressed, windows: Tensor) -> Measures:
    room = original.network.config.max_position_embeddings
    windows = windows[:, : room // 2]  # they are longer in other tokens
    count = windows.numel() - len(windows)

    def spelled(model: LanguageModel) -> Respelled:
        return respell(windows, spellings(original.tokenizer, model.tokenizer), room)

    own = text_loss(original.network, spelled(original))

    def in_engine(before: Path, after: Path) -> float:
        return (_loss_in_engine(after, spelled(compressed.model)) - _loss_in_engine(before, spelled(original))) / count

    return lambda model: (text_loss(model.network, spelled(model)) - own) / count, in_engine


def _loss_in_engine(path: Path, text: Respelled) -> float:
    """Return the nats that a text costs a file in the engine."""
    length, total = text.ids.shape[1], 0.0
    with Engine(path, context=length) as engine:
        for row, ids in enumerate(text.ids.tolist()):
            here = text.places // length == row
            logits = engine.logits(ids)[text.places[here] % length]
            total += cross_entropy(logits, text.labels[here], reduction="sum").item()
    return total
