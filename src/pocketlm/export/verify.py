"""Proof that an exported file does in the engine what was predicted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pocketlm.errors import VerificationError
from pocketlm.model.anatomy import is_transposed
from pocketlm.model.gguf_file import read_gguf
from pocketlm.model.gguf_layout import from_gguf, gguf_part, to_gguf
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.source import read_tensors
from pocketlm.tensors.divergence import kl_divergence
from pocketlm.tensors.formats import Packed, unpack

POSITIONS = 64
# The engine multiplies with activations rounded to 8 bits, so its logits differ from torch's by a little noise, here
# 2 to 4 % of their spread; weights in a wrong order or place differ by far more than this bound.
LARGEST_NOISE = 0.1
# Where torch prefers its own token by less than so many times the noise at that position, the engine may prefer
# another: a near-tie.
NEAR_TIE = 5
_PLAIN = {"F16": torch.float16, "BF16": torch.bfloat16}  # the writer takes the second where F16 cannot hold a weight
TEXTS = (
    "The quick brown fox didn't jump over 1,234 lazy dogs.\n\n\tIt said: “naïve café” – Straße, 漢字, 😀!",
    "def area(r):\n    return 3.14159 * r**2  # in m²",
)


@dataclass(frozen=True)
class Check:
    """One thing that was verified."""

    name: str
    passed: bool
    detail: str


def check_bytes(path: Path, predicted: int) -> None:
    """Refuse a file that has not the bytes that were predicted: a budget stands on them.

    Raises:
        VerificationError: It has more or fewer.
    """
    actual = path.stat().st_size
    if actual != predicted:
        raise VerificationError(
            f"The exported file has {actual:,} bytes where {predicted:,} were predicted. No output was written; "
            "please report this with the recipe and the output of `pocketlm doctor`"
        )


def check_weights(
    path: Path,
    model: LanguageModel,
    packed: Mapping[str, Packed],
    engine_decode: Callable[[str, bytes, int], Tensor],
) -> Check:
    """Compare the file's weights, decoded by the gguf package, bit for bit with what was predicted.

    The first row of every quantized tensor is also decoded by the engine itself.

    Args:
        path: The exported file.
        model: The model as it was exported; what is not packed is expected in the plain type that it has in the file.
        packed: The quantized tensors by parameter name.
        engine_decode: From a type name, bytes and a count of weights to the engine's decoded weights.
    """
    found, stored = read_tensors(path), read_gguf(path).tensors
    wrong = []
    for name, parameter in model.network.named_parameters():
        if name in packed:
            expected = unpack(packed[name]).decode()
            row = engine_decode(packed[name].format.name, bytes(packed[name].rows[0].numpy()), packed[name].shape[1])
            if not torch.equal(row, expected[0]):
                wrong.append(f"{name} (engine)")
            module = model.network.get_submodule(name.rpartition(".")[0])
            expected = expected.T if is_transposed(module) else expected
        else:
            info = stored.get(gguf_part(model.family, name)[0])
            expected = _through_file(model, name, parameter.detach().float(), info.type if info else "F32")
        if name not in found or not torch.equal(found[name], expected):
            wrong.append(name)
    detail = f"{len(packed)} quantized tensors bit-equal" if not wrong else f"differ: {', '.join(wrong[:5])}"
    return Check("decoded weights are the predicted ones", not wrong, detail)


def _through_file(model: LanguageModel, name: str, parameter: Tensor, kind: str) -> Tensor:
    """Return what is read back of a parameter in a plain type: Gemma's norms, to which 1 is added, lose last bits."""
    config, (_, change) = model.network.config, gguf_part(model.family, name)
    stored = to_gguf(parameter, change, config)
    return from_gguf(stored.to(_PLAIN.get(kind, torch.float32)).float(), change, config)


@torch.no_grad()
def check_choices(model: LanguageModel, windows: Tensor, engine_logits: Callable[[Sequence[int]], Tensor]) -> Check:
    """Compare the engine's most likely next tokens with torch's on the decoded weights.

    Args:
        model: The network has the exported file's weights.
        windows: (windows, length) token ids; POSITIONS positions are spread over them.
        engine_logits: The engine on one window.
    """
    ours, theirs = [], []
    each = POSITIONS // len(windows)
    for window in windows:
        places = torch.linspace(1, len(window) - 1, each).long()
        ours.append(model.network(window[None]).logits[0, places].float())
        theirs.append(engine_logits(window.tolist())[places])
    truth, engine = torch.cat(ours), torch.cat(theirs)
    loss = truth.amax(-1) - truth.gather(-1, engine.argmax(-1, keepdim=True)).squeeze(-1)
    difference = truth - engine
    same = int((loss == 0).sum())
    near = int(((loss > 0) & (loss <= NEAR_TIE * difference.std(-1))).sum())
    share = (difference.std() / truth.std()).item()
    cost = kl_divergence(truth, engine).mean().item()
    detail = (
        f"{same} of {len(loss)} the same, {near} near-ties; logits differ by {share:.1%} of their spread, "
        f"which the engine's 8-bit activations cost: KL {cost:.4f}"
    )
    passed = same + near == len(loss) and share <= LARGEST_NOISE
    return Check("top-1 next tokens agree with torch", passed, detail)


def check_tokens(model: LanguageModel, tokenize: Callable[[str], list[int]]) -> Check:
    """Compare the engine's tokenizer with the model's on a few awkward texts."""
    ours = [model.tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS]
    same = all(mine == tokenize(text) for mine, text in zip(ours, TEXTS, strict=True))
    return Check("the file's tokenizer splits text alike", same, f"{len(TEXTS)} texts of many scripts, digits and code")


def check_turn_ends(model: LanguageModel, ends: Callable[[int], bool], ended: dict[str, int], asked: int) -> Check:
    """Judge whether the engine ends a chat turn at the token that the model ends it with.

    How many answers do end is said beside it, and proves nothing: a model that lost much may go on and on.

    Args:
        model: What was exported.
        ends: Whether the engine stops at a token.
        ended: Answers that ended before the limit, by role.
        asked: How many there were.
    """
    detail = f"{ended['compressed']} of {asked} answers ended by themselves; {ended['original']} of the original's"
    end = model.tokenizer.eos_token_id
    return Check("the engine ends a chat turn where the model does", end is None or ends(end), detail)
