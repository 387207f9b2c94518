"""Memory and time that a layout takes in the engine on this machine: measured on files of that very layout, all zeros.

What a format costs while running does not follow from its bytes: llama.cpp keeps some types in memory twice, rearranged
for its kernels, and 2-bit types are slow on x86. A file of zeros has the shapes and types of one that does not
exist yet, is written in a moment, and the engine treats it alike.
"""

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import nn

from pocketlm.export.gguf import write_gguf
from pocketlm.measure.device import measure_speed
from pocketlm.model.anatomy import anatomy_of
from pocketlm.model.gguf_layout import gguf_part
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.surgery import keep_blocks
from pocketlm.plan.sensitivity import Progress
from pocketlm.plan.sizes import Shape, Sizes, sizes_of
from pocketlm.run.header import read_header
from pocketlm.run.speed import WORKER
from pocketlm.steps.quantize import format_name
from pocketlm.tensors.formats import FORMATS, Packed

PROMPT, GENERATED = 256, 32  # tokens; memory peaks while a batch of prompt is read
FORMAT_ROUNDS, ROUNDS = 2, 3  # processes to measure a format in, and a layout that was chosen


@dataclass(frozen=True)
class Costs:
    """What each format costs in the engine here.

    Attributes:
        context: Tokens of context that memory is for.
        base: Bytes of everything that is no matrix: cache of keys and values, buffers.
        memory: Resident bytes per weight, by format.
        seconds: Per weight and generated token, by format; what is no matrix is spread over them.
    """

    context: int
    base: float
    memory: dict[str, float]
    seconds: dict[str, float]

    def of(self, sizes: Sizes, shape: Shape, formats: Mapping[str, str]) -> tuple[float, float]:
        """Return bytes of memory and seconds per token that a layout should take; `formats` by group or pattern."""
        tensors = sizes.tensors(shape).items()
        memory, seconds = self.of_tensors(
            sizes, shape, {name: format_name(formats, name, group) for name, (group, _) in tensors}
        )
        return self.base + memory, seconds

    def of_tensors(self, sizes: Sizes, shape: Shape, formats: Mapping[str, str]) -> tuple[float, float]:
        """Return bytes of memory and seconds per token of tensors, by name in a format each.

        A format that was not measured, because only a person would choose it, counts as F16, the dearest.
        """
        shapes, memory, seconds = sizes.shapes_at(shape), 0.0, 0.0
        for name, form in formats.items():
            weights = prod(shapes[name])
            known = form if form in self.memory else "F16"
            memory += weights * self.memory[known]
            seconds += weights * self.seconds[known] * _multiplied(sizes, name)
        return memory, seconds

    def least(self, sizes: Sizes, shape: Shape) -> tuple[float, float]:
        """Return the least memory and the least seconds per token that any mix of formats takes."""
        best = []
        for kind in (self.memory, self.seconds):
            formats = {group: min(sizes.allowed(group, shape), key=kind.__getitem__) for group in sizes.group_names}
            best.append(self.of(sizes, shape, formats))
        return best[0][0], best[1][1]


@dataclass(frozen=True)
class Footprint:
    """What a layout takes in the engine here.

    Attributes:
        memory: Bytes that the model adds to a process at its peak.
        speed: Tokens generated per second, in the middle of some runs: what was asked for is to be had on a usual one.
    """

    memory: int
    speed: float


def measure_costs(model: LanguageModel, sizes: Sizes, context: int, progress: Progress) -> Costs:
    """Return what each format costs here, from one hollow file per format; groups that it does not fit take Q8_0."""
    names = sorted({name for group in sizes.group_names for name in sizes.allowed(group)} | {"F16"})
    weights, computed, memories, times = [], [], [], []
    for done, name in enumerate(names):
        formats = {group: _instead(name, sizes.allowed(group)) for group in sizes.group_names}
        # The best of few runs, since other work on the machine only slows them: the table compares formats, and refuses
        # what none reaches. What a plan expects, and the finished file is judged by, is the middle of more.
        found = measure_layout(model, sizes.original, formats, context, rounds=FORMAT_ROUNDS, speed_of=max)
        of_all, of_computed = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
        for tensor, group in sizes.groups.items():
            of_all[formats[group]] += prod(sizes.shapes[tensor])
            of_computed[formats[group]] += prod(sizes.shapes[tensor]) * _multiplied(sizes, tensor)
        weights.append(list(of_all.values()))
        computed.append(list(of_computed.values()))
        memories.append(found.memory)
        times.append(1 / found.speed)
        progress("memory and speed of number formats", done + 1, len(names))
    plain = names.index("F16")
    base = max(0.0, memories[plain] - 2.0 * sum(weights[plain]))  # F16 is mapped from the file as it is
    at_least = [FORMATS[name].bits / 8 if name in FORMATS else 2.0 for name in names]
    fastest = min(time / sum(row) for time, row in zip(times, computed, strict=True))
    return Costs(
        context=context,
        base=base,
        memory=_per_weight(names, weights, [memory - base for memory in memories], at_least),
        # A format that fits few tensors is measured badly: noise must not make it free.
        seconds=_per_weight(names, computed, times, [fastest / 2] * len(names)),
    )


def _instead(name: str, allowed: list[str]) -> str:
    return next((form for form in (name, "Q8_0") if form in (*allowed, "F16")), "F16")


def _per_weight(
    names: list[str], weights: list[list[int]], totals: list[float], least: list[float]
) -> dict[str, float]:
    """Solve for each format's cost per weight, at least `least`, given files that have some of several."""
    from scipy.optimize import lsq_linear

    scale = np.max(weights)
    bounds = np.array(least) * scale
    found = lsq_linear(np.array(weights) / scale, np.array(totals), (bounds * (1 - 1e-9), np.inf))
    return dict(zip(names, (found.x / scale).tolist(), strict=True))


def measure_layout(
    model: LanguageModel,
    shape: Shape,
    formats: Mapping[str, str],
    context: int,
    rounds: int = ROUNDS,
    speed_of: Callable[[Sequence[float]], float] = median,
) -> Footprint:
    """Return what a layout takes in the engine, from a hollow file of it.

    Args:
        model: Whose tokenizer and family the file has.
        shape: Blocks and FFN channels.
        formats: By group or pattern, as in `Quantize`.
        context: Tokens.
        rounds: Processes to measure in.
        speed_of: From the speeds of all runs to the one that is told.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hollow.gguf"
        write_hollow(model, shape, formats, path)
        return measure_file(path, context, rounds, speed_of)


def measure_file(
    path: Path, context: int, rounds: int = ROUNDS, speed_of: Callable[[Sequence[float]], float] = median
) -> Footprint:
    """Return what a file takes in the engine, with room for a context in tokens; the rest is as in `measure_layout`."""
    room = min(context, read_header(path).positions or context)
    generate = min(GENERATED, room - 1)
    prompt = min(PROMPT, room - generate)
    worker = (*WORKER, f"--context={context}")
    speeds = measure_speed([path], worker, prompt=prompt, generate=generate, repeat=1, rounds=rounds)
    return Footprint(int(speeds.files[0].memory_bytes.median), speed_of(speeds.files[0].decode.values))


def write_hollow(model: LanguageModel, shape: Shape, formats: Mapping[str, str], path: Path) -> None:
    """Write a GGUF file of zeros with a shape and formats by group or pattern."""
    hollow = replace(model, network=_without_weights(model, shape))
    groups, packed = sizes_of(model).groups, {}
    for name, parameter in hollow.network.named_parameters():
        form = format_name(formats, name, groups[name]) if name in groups else None
        if form in FORMATS:
            kind, (rows, columns) = FORMATS[form], _rows_and_columns(hollow, name, parameter)
            row = torch.zeros(1, columns // kind.block * kind.block_bytes, dtype=torch.uint8)
            packed[name] = Packed(kind, row.expand(rows, -1), (rows, columns))
    write_gguf(hollow, packed, path)


def _rows_and_columns(model: LanguageModel, name: str, parameter: nn.Parameter) -> tuple[int, int]:
    rows, columns = parameter.shape
    return (columns, rows) if gguf_part(model.family, name)[1] == "transposed" else (rows, columns)


def _without_weights(model: LanguageModel, shape: Shape) -> nn.Module:
    """Return a network of another shape whose zeros take no memory."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model.network.config)
    keep_blocks(config, range(shape.blocks))
    setattr(config, anatomy_of(model.network).ffn_width, shape.ffn)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    network.generation_config = model.network.generation_config
    zeros: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            hollow = nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False)
            setattr(module, name, zeros.setdefault(id(parameter), hollow))  # a tied head stays tied
    return network


def _multiplied(sizes: Sizes, name: str) -> bool:
    """Whether all of a matrix is read for each token: not an embedding that is only looked up."""
    return sizes.tied or name != sizes.embedding
