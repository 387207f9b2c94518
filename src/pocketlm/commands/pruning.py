"""Pruning by itself: a model of another stock shape, what was chosen for it, and what each step cost.

model ─> text ─> damage of dropping blocks ─> [trim_vocabulary ─> prune_depth ─> prune_width ─> distil ─> sparsify]
      ─> GGUF of each step ─> measure
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pocketlm.errors import BadInputError
from pocketlm.export.gguf import write_gguf
from pocketlm.export.sparse_bitmask import saves_bytes, write_sparse_bitmask
from pocketlm.measure.quality import Quality
from pocketlm.model.anatomy import anatomy_of
from pocketlm.model.judge import judge
from pocketlm.model.language_model import LanguageModel, copy_notices
from pocketlm.model.source import load
from pocketlm.pipeline.artefact import facts_of_text, new_folder
from pocketlm.pipeline.cache import Finished, remove_leftovers, stage
from pocketlm.pipeline.planning import sizes_before
from pocketlm.pipeline.preflight import OUT_COPIES, check_resources, check_solving, load_if_room
from pocketlm.pipeline.proof import measure_as_f16
from pocketlm.pipeline.stages import Progress, Texts, gather_texts, run_recipe, silent
from pocketlm.plan.decide import healing_rate
from pocketlm.plan.pace import tokens_in
from pocketlm.plan.recipe import Recipe, from_dict, to_dict, to_yaml
from pocketlm.plan.sensitivity import depth_damage
from pocketlm.plan.sizes import MULTIPLE, recipe_bytes
from pocketlm.report.choices import choices_page
from pocketlm.report.content import TextUsed, to_json
from pocketlm.report.write import replace_text, write_manifest
from pocketlm.steps.distil import Distil
from pocketlm.steps.prune_depth import PruneDepth
from pocketlm.steps.prune_width import WIDTHS, PruneWidth, checked, present_widths
from pocketlm.steps.quantize import Quantize
from pocketlm.steps.sparsify import Sparsify, check_sparsity
from pocketlm.steps.trim_vocabulary import TrimVocabulary, choose

# Of held-out text, on which removals of blocks are tried. On two windows the choice is mostly luck: of two such pairs
# one chose six blocks of the reference model without which perplexity was 52, the other 73.
DEPTH_WINDOWS = 8
# Of calibration text at most, that what is left is solved on; more of it where what makes channels is re-solved too.
SOLVING_WINDOWS, CHANNEL_WINDOWS = 128, 256

PARTS = ("depth", "ffn", "kv_groups", "heads", "hidden", "vocab", "sparsity", "pattern")


@dataclass(frozen=True, kw_only=True)
class Prune:
    """What a person asks for; a width that is None stays."""

    model: str  # a folder, a hub id, a GGUF file, or `demo`
    depth: int | None = None  # blocks that are left
    ffn: int | None = None
    kv_groups: int | None = None
    heads: int | None = None
    hidden: int | None = None
    vocab: int | None = None  # tokens that are left
    sparsity: float | None = None  # share of the blocks' connections that go
    pattern: str | None = None  # of which n in every m neighbours stay, such as 2:4
    method: str | None = None  # how connections are chosen: sparsegpt if not given
    heal: float = 0.0  # seconds of distillation afterwards
    out: Path = Path("pocketlm-out")
    data: tuple[Path, ...] = ()  # text files; the model's samples and Python's help topics where empty
    seed: int = 0
    force: bool = False  # replace `out`

    @property
    def cuts_connections(self) -> bool:
        """Whether single connections go."""
        return self.sparsity is not None or self.pattern is not None

    @property
    def widths(self) -> dict[str, int]:
        """The widths that were given."""
        return {name: getattr(self, name) for name in WIDTHS if getattr(self, name) is not None}


@dataclass(frozen=True)
class Cut:
    """One step of a pruning.

    Attributes:
        step: Its name; `original` for the first.
        summary: What was chosen, in words.
        details: What was chosen, with scores.
        parameters: Of the model behind it.
        quality: Of the model behind it, its F16 file read in llama.cpp, against the original.
    """

    step: str
    summary: str
    details: dict[str, Any]
    parameters: int
    quality: Quality


@dataclass(frozen=True)
class Pruned:
    """What was made.

    Attributes:
        cuts: The original, then every step.
        predicted_bytes: Of the GGUF file.
        actual_bytes: Of the GGUF file.
        healing_tokens: How many tokens of distillation such a cut usually takes to heal.
        text: That the qualities were read on.
        bitmask_bytes: Of the weights in the folder of bitmasks; None where there is none.
    """

    cuts: tuple[Cut, ...]
    predicted_bytes: int
    actual_bytes: int
    healing_tokens: int
    text: TextUsed
    bitmask_bytes: int | None = None


def prune(job: Prune, progress: Progress = silent) -> Pruned:
    """Give a model a smaller stock shape, and write the folder `job.out`, whole or not at all.

    The folder has `hf`, which plain transformers loads, `model.gguf` in F16, the recipe, and the choices as a page;
    where connections were cut also `bitmask`, which stores no zeros.

    Raises:
        BadInputError: A shape does not exist for the model, or there is nothing to do.
    """
    remove_leftovers()
    with new_folder(job.out, job.force, (job.model, *job.data)) as folder:
        model = load_if_room(job.model)
        check_shape(model, job)
        _check_room(model, job)
        texts = gather_texts(model, list(job.data), job.seed, progress)
        if job.depth is not None or job.widths:
            check_solving(model, texts.calibration.first(narrowing(job.widths).windows).numel(), job.ffn or 0)
        recipe, damage = _decide(model, job, texts, progress)
        predicted = recipe_bytes(sizes_before(model, recipe, texts), recipe)
        compressed = run_recipe(model, recipe, texts, progress)
        write_gguf(compressed.model, compressed.packed, folder / "model.gguf")
        shutil.copytree(compressed.folder, folder / "hf")
        copy_notices(model.origin, folder)
        bitmasks = _bitmasks(compressed.model, job, folder / "bitmask")
        stages = [done for done in compressed.stages if done.facts["step"] != "quantize"]
        del compressed  # its weights: those of each step are read next
        cuts = _measured(model, stages, texts, progress)
        (folder / "recipe.yaml").write_text(to_yaml(recipe), encoding="utf-8")
        tokens = healing_tokens(1 - cuts[-1].parameters / cuts[0].parameters)
        actual, text = (folder / "model.gguf").stat().st_size, facts_of_text(texts.test, held_out=True)
        made = Pruned(tuple(cuts), predicted, actual, tokens, text, bitmasks)
        (folder / "choices.html").write_text(choices_page(model.origin.base_model, made, damage), encoding="utf-8")
        replace_text(folder / "pruning.json", to_json(asdict(made)) + "\n")
        write_manifest(folder)
    return made


def _check_room(model: LanguageModel, job: Prune) -> None:
    """Refuse work that would run out of disk or memory: each step leaves a model, and its file is measured."""
    steps = sum(map(bool, (job.vocab, job.depth, job.widths, job.heal, job.cuts_connections)))
    written = OUT_COPIES + job.cuts_connections
    check_resources(model, job.out, trained=job.heal > 0, more=steps, written=written)


def _bitmasks(model: LanguageModel, job: Prune, folder: Path) -> int | None:
    """Write the weights without their zeros where connections were cut and that saves bytes; return the bytes."""
    if not job.cuts_connections or not saves_bytes(model):
        return None
    write_sparse_bitmask(model, folder, job.pattern)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def check_shape(model: LanguageModel, job: Prune) -> None:
    """Refuse a shape before any work.

    Raises:
        BadInputError: It is no smaller shape of the model's family, or a width does not divide by MULTIPLE.
    """
    if all(getattr(job, part) is None for part in PARTS):
        raise BadInputError(f"Nothing to prune. Give one or more of {', '.join(map(_option, PARTS))}")
    if job.vocab is not None:
        _check_vocabulary(model, job.vocab)
    blocks = model.network.config.num_hidden_layers
    _check_depth(model, blocks if job.depth is None else job.depth)
    if job.cuts_connections:
        check_sparsity(model, _sparsify(job))
    elif job.method:
        raise BadInputError("--method is how connections are chosen: give --sparsity or --pattern too, or leave it out")
    for option, width in (("--ffn", job.ffn), ("--hidden", job.hidden)):
        if width is not None and (width < MULTIPLE or width % MULTIPLE):
            near = width // MULTIPLE * MULTIPLE
            fits = f"{near} or {near + MULTIPLE}" if near > 0 else str(MULTIPLE)
            raise BadInputError(
                f"{option} {width} is no multiple of {MULTIPLE}, which number formats need. Nearest that fit: {fits}"
            )
    as_wide = checked(model.network, narrowing(job.widths)) == present_widths(model.network)
    whole = job.depth in (None, blocks) and job.vocab in (None, model.network.config.vocab_size)
    if as_wide and whole and not job.cuts_connections:
        raise BadInputError("Nothing to prune: the model has that shape already. `pocketlm inspect` shows it")
    if job.vocab is not None and not job.data:
        raise BadInputError(
            "Tokens are chosen by text of the kind that the model is for, and there is none. "
            "Give some with --data, or leave --vocab out"
        )


def _check_vocabulary(model: LanguageModel, tokens: int) -> None:
    present = min(len(model.tokenizer), model.network.config.vocab_size)  # of either, some have more than of the other
    if not 1 <= tokens <= present:
        raise BadInputError(
            f"Cannot keep {tokens:,} tokens: the model has {present:,}. Give --vocab at most as many, and at least 1"
        )
    choose(model, TrimVocabulary(size=tokens), ["0"])  # how few must stay does not depend on the text


def _check_depth(model: LanguageModel, kept: int) -> None:
    blocks = model.network.config.num_hidden_layers
    least = min(2, blocks)
    if kept < least:
        raise BadInputError(f"Cannot keep fewer than {least} of {blocks} blocks: the first and the last always stay")
    if kept > blocks:
        raise BadInputError(f"Cannot keep {kept} blocks: the model has {blocks}. Give --depth {least} to {blocks}")
    if kept != blocks and not anatomy_of(model.network).uniform_blocks:
        raise BadInputError(
            f"Blocks of `{model.family}` alternate in kind, so none can be dropped. Use --ffn, --kv-groups or --hidden"
        )


def narrowing(widths: Mapping[str, int]) -> PruneWidth:
    """Return the step to some widths, by the names of `PruneWidth`, with all that makes it better."""
    # What makes channels undoes an eighth of what narrower FFNs cost; without six blocks it was no better.
    channels = "ffn" in widths
    windows = CHANNEL_WINDOWS if channels else SOLVING_WINDOWS
    return PruneWidth(**widths, channels=channels, measured="kv_groups" in widths, windows=windows)


def _sparsify(job: Prune) -> Sparsify:
    return Sparsify(sparsity=job.sparsity, pattern=job.pattern, method=job.method or "sparsegpt")


def _option(part: str) -> str:
    return f"--{part.replace('_', '-')}"


def healing_tokens(removed: float) -> int:
    """Return how many tokens of distillation heal the removal of a share of the parameters, to one digit.

    About 30M tokens for a tenth, 300M for a fifth, 3B for 30 %: the published curves of Minitron
    (https://arxiv.org/abs/2408.11796) and Sheared LLaMA (https://arxiv.org/abs/2310.06694), roughly.
    """
    tokens = 10 ** (6.5 + 10 * min(max(removed, 0.0), 0.5))
    digits = len(str(int(tokens))) - 1
    return round(tokens / 10**digits) * 10**digits


def _decide(
    model: LanguageModel, job: Prune, texts: Texts, progress: Progress
) -> tuple[Recipe, list[tuple[int, float]]]:
    """Return the steps for a shape and the damage of dropping blocks; the same question is answered from the cache."""
    asked = {name: getattr(job, name) for name in (*PARTS, "method", "heal", "seed")}

    def produce(_: Path) -> dict[str, Any]:
        steps: list[Any] = [] if job.vocab is None else [TrimVocabulary(size=job.vocab)]
        most = model.network.config.num_hidden_layers - (job.depth or model.network.config.num_hidden_layers)
        damage = []
        if most:
            windows = texts.validation.first(DEPTH_WINDOWS)
            damage = depth_damage(model.network, windows, judge(model.network, windows), most, progress)
            drop = tuple(sorted(block for block, _ in damage))
            steps.append(PruneDepth(drop=drop, repair=True, windows=SOLVING_WINDOWS))
        if job.widths:
            steps.append(narrowing(job.widths))
        if job.heal:
            tokens = tokens_in(model, texts.calibration, job.heal)
            rate = healing_rate(tokens, trimmed=job.vocab is not None)
            steps.append(Distil(tokens=tokens, learning_rate=rate, seed=job.seed))
        if job.cuts_connections:  # last: healing would fill the zeros again
            steps.append(_sparsify(job))
        steps.append(Quantize(formats={"*": "F16"}, keep_zeros=job.cuts_connections))
        return {"recipe": to_dict(Recipe(steps=tuple(steps), seed=job.seed)), "damage": damage}

    done = stage("prune-plan", {"model": model.origin.key, "asked": asked, **texts.sha256}, produce)
    return from_dict(done.facts["recipe"], "the plan"), [(block, kl) for block, kl in done.facts["damage"]]


def _measured(model: LanguageModel, stages: Sequence[Finished], texts: Texts, progress: Progress) -> list[Cut]:
    """Read every step's model in llama.cpp, on text that no step has seen; one is in memory at a time."""

    def cut(done: Finished, parameters: int, quality: Quality) -> Cut:
        return Cut(done.facts["step"], done.facts["summary"], done.facts["details"], parameters, quality)

    def measured(done: Finished) -> tuple[Quality, Cut]:
        left = load(str(done.folder / "hf"))
        original, quality = measure_as_f16(model, left, texts.test.windows, progress)
        return original, cut(done, left.parameters, quality)

    first, *others = stages
    originals, cuts = zip(*map(measured, others), strict=True)
    return [cut(first, model.parameters, originals[0]), *cuts]
