"""Make a model easier to quantize without changing what it computes: scales move between norms and columns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pocketlm.model.anatomy import anatomy_of, read_weight, scale_space
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.sweep import sweep
from pocketlm.steps.quantize import check_formats, format_name, tensors_of
from pocketlm.steps.report import StepReport
from pocketlm.tensors.formats import find_format
from pocketlm.tensors.scaling import activation_scale


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Activation-aware scaling (AWQ) for the formats that the weights will be stored in."""

    step: Literal["prepare"] = "prepare"
    formats: dict[str, str]
    """As in `Quantize`; spaces whose readers stay 16-bit are left alone."""


def prepare(
    model: LanguageModel,
    config: Prepare,
    windows: Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[LanguageModel, StepReport]:
    """Scale the columns of each space for its format and fold the inverse into what writes the space.

    Args:
        model: Changed in place; its function stays the same.
        config: The formats.
        windows: (windows, length) token ids to take statistics on.
        progress: Called after each block with how many are done and how many there are.

    Raises:
        BadInputError: A format is unknown or does not fit a tensor's row length, or a key matches nothing.
    """
    check_formats(tensors_of(model), config.formats, whole=False)
    network, anatomy = model.network, anatomy_of(model.network)
    spread: dict[str, list[float]] = {}
    for layer in sweep(network, windows, spaces=tuple(space for space, _ in anatomy.scaled_by)):
        for space, _ in anatomy.scaled_by:
            edges = [edge for edge in layer.edges if edge.reads == space]
            names = {format_name(config.formats, layer.parameter_name(edge), edge.group) for edge in edges} - {
                "F16",
                None,
            }
            if not names:
                continue
            weights = [read_weight(layer.module.get_submodule(edge.path)) for edge in edges]
            coarsest = min((find_format(name, weights[0].shape[1]) for name in names), key=lambda form: form.bits)
            scale = activation_scale(weights, layer.gram[space], coarsest)
            scale_space(layer.module, anatomy, space, scale)
            spread.setdefault(space, []).append((scale.max() / scale.min()).item())
        progress(layer.index + 1, network.config.num_hidden_layers)
    means = {space: sum(values) / len(values) for space, values in spread.items()}
    moved = sum(value > 1.001 for values in spread.values() for value in values)
    total = sum(map(len, spread.values()))
    return model, StepReport("prepare", f"scaled {moved} of {total} spaces for their formats", {"scale_range": means})
