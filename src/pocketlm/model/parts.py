"""Which part of a model a tensor of a GGUF file belongs to, and what the parts weigh."""

from dataclasses import dataclass
from math import prod

from pocketlm.model.gguf_file import GgufFile, tensor_bytes

PARTS = ("embedding", "attention", "ffn", "norms", "head", "metadata")


@dataclass(frozen=True)
class Part:
    """One kind of tensor in a file.

    Attributes:
        name: One of PARTS.
        parameters: How many weights.
        bytes: What they take in the file.
        formats: The types of its tensors, the most used first.
    """

    name: str
    parameters: int
    bytes: int
    formats: tuple[str, ...]


def part_of(tensor: str) -> str:
    """Return the part of a GGUF tensor name."""
    if tensor.startswith(("token_embd.", "position_embd.")):
        return "embedding"
    if tensor == "output.weight":
        return "head"
    if "norm" in tensor or tensor.startswith("rope_"):
        return "norms"
    return "attention" if ".attn_" in tensor else "ffn"


def parts_of(file: GgufFile, file_bytes: int) -> list[Part]:
    """Return what each part of a file weighs; metadata is what is left (tokenizer, settings, padding)."""
    found: dict[str, dict[str, list[int]]] = {name: {} for name in PARTS}
    for name, tensor in file.tensors.items():
        counts = found[part_of(name)].setdefault(tensor.type, [0, 0])
        counts[0] += prod(tensor.shape)
        counts[1] += tensor_bytes(tensor.type, tensor.shape)
    parts = []
    for name, types in found.items():
        parameters, size = (sum(counts[i] for counts in types.values()) for i in (0, 1))
        parts.append(Part(name, parameters, size, tuple(sorted(types, key=lambda kind: -types[kind][1]))))
    rest = file_bytes - sum(part.bytes for part in parts)
    return [part if part.name != "metadata" else Part("metadata", 0, rest, ()) for part in parts]
