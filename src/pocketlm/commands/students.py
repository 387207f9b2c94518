"""Students that are to learn from a teacher: cut from it by pocketlm's own steps, or models of their own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pocketlm.commands.pruning import DEPTH_WINDOWS
from pocketlm.errors import BadInputError
from pocketlm.model.judge import judge
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.source import load
from pocketlm.pipeline.cache import stage
from pocketlm.pipeline.stages import Progress, Texts, run_recipe
from pocketlm.plan.importance import block_influence
from pocketlm.plan.recipe import Recipe
from pocketlm.plan.sensitivity import depth_damage
from pocketlm.steps.distil import alike
from pocketlm.steps.prune_depth import PruneDepth
from pocketlm.steps.prune_width import PruneWidth
from pocketlm.steps.quantize import Quantize

SHAPE = ("depth", "ffn", "kv_groups", "heads", "hidden")
# Up to this share of the blocks, those go that measured damage misses least, tried one by one; beyond, which takes too
# long, those that turn the hidden states least.
TRIED_SHARE = 1 / 3


@dataclass(frozen=True)
class Start:
    """A student before it learns."""

    source: str
    key: str
    summaries: tuple[str, ...]


def read_shape(student: str) -> dict[str, int]:
    """Read a shape such as `depth=12,ffn=768`; nothing where it is the name of a model.

    Raises:
        BadInputError: It looks like a shape and is none.
    """
    if "=" not in student:
        return {}
    shape = {}
    for part in student.split(","):
        name, _, value = part.strip().partition("=")
        name = name.strip().replace("-", "_")
        if name not in SHAPE or not value.strip().isdecimal():
            raise BadInputError(
                f"Cannot read `{part}` in the student `{student}`. Write a shape like depth=12,ffn=768, of "
                f"{', '.join(SHAPE)}, or the name of a model"
            )
        shape[name] = int(value)
    return shape


def cut(teacher: LanguageModel, shape: dict[str, int], texts: Texts, progress: Progress) -> Start:
    """Cut the student from the teacher by pocketlm's own steps."""
    blocks = teacher.network.config.num_hidden_layers
    gone, steps = blocks - shape.get("depth", blocks), []
    if gone:
        steps.append(PruneDepth(drop=_blocks_to_drop(teacher, gone, texts, progress), repair=True))
    widths = {name: value for name, value in shape.items() if name != "depth"}
    if widths:
        steps.append(PruneWidth(**widths))
    recipe = Recipe(steps=(*steps, Quantize(formats={"*": "F16"})))
    done = [each for each in run_recipe(teacher, recipe, texts, progress).stages if each.facts["step"] != "quantize"]
    summaries = tuple(each.facts["summary"] for each in done[1:])
    return Start(str(done[-1].folder / "hf"), done[-1].key, summaries)


def _blocks_to_drop(teacher: LanguageModel, gone: int, texts: Texts, progress: Progress) -> tuple[int, ...]:
    """Return the blocks that are missed least; the first and the last always stay."""
    windows = texts.validation.first(DEPTH_WINDOWS)
    blocks = teacher.network.config.num_hidden_layers

    def produce(_: Path) -> dict[str, Any]:
        if gone <= TRIED_SHARE * blocks:
            damage = depth_damage(teacher.network, windows, judge(teacher.network, windows), gone, progress)
            return {"drop": sorted(block for block, _ in damage)}
        influence = block_influence(teacher.network, windows)
        return {"drop": sorted(sorted(range(1, blocks - 1), key=influence.__getitem__)[:gone])}

    inputs = {"model": teacher.origin.key, "gone": gone, **texts.sha256}
    return tuple(stage("distill-blocks", inputs, produce).facts["drop"])


def stock(student: str, teacher: LanguageModel) -> Start:
    """Take a model of its own as the student."""
    model = load(student)
    if not alike(teacher, model):
        raise BadInputError(
            f"{student} has another tokenizer than {teacher.origin.source}, so their probabilities cannot be compared. "
            "Take a student of the same family, cut one (--student depth=12), or let the teacher answer prompts: serve "
            f"it, then `pocketlm distill {student} --student {student} --task PROMPTS.jsonl --remote http://...`"
        )
    return Start(student, model.origin.key, (f"the student is {model.origin.base_model}",))
