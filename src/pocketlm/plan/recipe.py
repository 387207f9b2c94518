"""A recipe: the list of typed steps that a run follows, as YAML, checked by pydantic."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import yaml
from pydantic import ConfigDict, Discriminator, TypeAdapter, ValidationError
from torch import nn

from pocketlm.errors import BadInputError
from pocketlm.model.anatomy import blocks_of
from pocketlm.model.text import WINDOW
from pocketlm.steps.distil import Distil
from pocketlm.steps.prepare import Prepare
from pocketlm.steps.prune_depth import PruneDepth, blocks_to_drop
from pocketlm.steps.prune_width import PruneWidth, checked
from pocketlm.steps.quantize import Quantize
from pocketlm.steps.sparsify import Sparsify
from pocketlm.steps.trim_vocabulary import TrimVocabulary
from pocketlm.steps.tune import Tune
from pocketlm.tensors.sparsity import sparsity_of

Kinds = TrimVocabulary | PruneDepth | PruneWidth | Sparsify | Distil | Prepare | Quantize | Tune
Step = Annotated[Kinds, Discriminator("step")]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to do, in order. `trim_vocabulary` comes first; nothing but `tune` may follow `quantize`."""

    steps: tuple[Step, ...]
    seed: int = 0


for kind in (*get_args(Kinds), Recipe):
    kind.__pydantic_config__ = ConfigDict(extra="forbid")  # a misspelt key is an error, not a default
_adapter = TypeAdapter(Recipe)


def to_dict(recipe: Recipe) -> dict:
    """Return a recipe as plain data."""
    return _adapter.dump_python(recipe, mode="json")


def to_yaml(recipe: Recipe) -> str:
    """Return a recipe as the text of recipe.yaml."""
    return yaml.safe_dump(to_dict(recipe), sort_keys=False, default_flow_style=None, width=100)


def from_dict(data: object, where: str) -> Recipe:
    """Check plain data and return the recipe in it.

    Raises:
        BadInputError: A key is unknown or missing, a value has the wrong type, or the steps are in another order.
    """
    try:
        recipe = _adapter.validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise BadInputError(f"{where}: {place}: {first['msg']}. See docs/recipes.md for what a recipe holds") from error
    names = [step.step for step in recipe.steps]
    last = names[:-1] if names[-1:] == ["tune"] else names
    if names.count("quantize") != 1 or "tune" in last or last[-1:] != ["quantize"]:
        raise BadInputError(
            f"{where}: a recipe ends with one `quantize` step, which one `tune` may follow; "
            f"this one has: {', '.join(names) or 'none'}"
        )
    _check_numbers(recipe, where)
    _check_zeros_stay(recipe, where)
    if "trim_vocabulary" in names[1:]:
        raise BadInputError(
            f"{where}: `trim_vocabulary` can only be the first step, as all others work on its tokens; "
            f"this recipe has: {', '.join(names)}"
        )
    return recipe


def _check_numbers(recipe: Recipe, where: str) -> None:
    """Refuse numbers that a step could only fail on, after the steps before it."""
    for step in recipe.steps:
        match step:
            case Quantize(windows=windows, learned_rounding=rounds) if windows < 1 or rounds < 0:
                raise BadInputError(
                    f"{where}: `quantize` needs `windows` of at least 1 and `learned_rounding` of at least 0; "
                    f"given: {windows}, {rounds}"
                )
            case PruneDepth(windows=windows) | PruneWidth(windows=windows) if windows < 1:
                raise BadInputError(f"{where}: `{step.step}` needs `windows` of at least 1; given: {windows}")
            case TrimVocabulary(size=size) if size < 1:
                raise BadInputError(f"{where}: `trim_vocabulary` needs a `size` of at least 1; given: {size}")
            case Distil() | Tune():
                _check_training(step, where)
    if isinstance(recipe.steps[0], TrimVocabulary):
        for step in recipe.steps:
            if isinstance(step, Distil):
                step.check_for_spellings()


def _check_training(step: Distil | Tune, where: str) -> None:
    counts = {name: getattr(step, name) for name in ("tokens", "windows_per_step", "evaluations")}
    more = ("patience", "adapters") if isinstance(step, Distil) else ()
    others = {name: getattr(step, name) for name in ("warm_up", "stop", "seconds", *more)}
    if min(counts.values()) < 1 or not 0 <= step.warm_up <= 1 or min(others.values()) < 0:
        given = ", ".join(f"{name} {value:g}" for name, value in (counts | others).items())
        raise BadInputError(
            f"{where}: `{step.step}` needs `tokens`, `windows_per_step` and `evaluations` of at least 1 and `warm_up` "
            f"from 0 to 1, the others of at least 0; given: {given}"
        )
    if isinstance(step, Distil):
        step.check()
    elif not (0 < step.scale_rate < math.inf and 0 < step.code_rate < math.inf):
        raise BadInputError(
            f"{where}: `tune` needs a `scale_rate` and a `code_rate` above 0; "
            f"given: {step.scale_rate:g}, {step.code_rate:g}"
        )


def check_shapes(recipe: Recipe, network: nn.Module) -> None:
    """Refuse a recipe whose shapes a model does not have, before any step runs.

    Raises:
        BadInputError: A block does not exist, or a width is none.
    """
    blocks = len(blocks_of(network))
    for step in recipe.steps:
        if isinstance(step, PruneDepth):
            blocks -= len(blocks_to_drop(step, blocks))
    widths = [step for step in recipe.steps if isinstance(step, PruneWidth)]
    for first in widths[:1]:  # a second one meets another shape than this
        checked(network, first)


def _check_zeros_stay(recipe: Recipe, where: str) -> None:
    """Refuse a recipe that makes zeros and loses them again without a word."""
    sparse = False
    for step in recipe.steps:
        match step:
            case Sparsify():
                sparsity_of(step.sparsity, step.pattern)
                sparse = True
            case Distil() | PruneWidth() | PruneDepth(repair=True) | Tune(train="weights") if sparse:
                raise BadInputError(
                    f"{where}: `{step.step}` changes every weight, so the zeros of `sparsify` would be lost. "
                    "Put it before `sparsify`; `tune` may follow with `train: scales`"
                )
            case Quantize(keep_zeros=False) if sparse:
                raise BadInputError(
                    f"{where}: `quantize` would lose the zeros of `sparsify`. Give it `keep_zeros: true`"
                )


def read_recipe(path: Path) -> Recipe:
    """Read recipe.yaml.

    Raises:
        BadInputError: The file cannot be read, is not YAML, or is not a recipe.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(f"Cannot read {path}: {error.strerror}. Check the path given with --recipe") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path} is not YAML: {str(error).splitlines()[0]}") from error
    return from_dict(data, str(path))


def learnt_tokens(recipe: Recipe) -> int:
    """Return from how many tokens the steps of a recipe learn: at most, where one stops early in windows of fewer."""
    return sum(
        min(step.tokens, step.stop * step.windows_per_step * WINDOW) if step.stop else step.tokens
        for step in recipe.steps
        if isinstance(step, Distil | Tune)
    )
