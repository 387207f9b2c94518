"""Whether hidden states, relations or the student's own words help, on a model small enough for several seeds.

    python benchmarks/distill_variants.py stories260K.bin tok512.bin tinystories.txt [--tokens 61440] [--seeds 2]

The teacher is stories260K of llama2.c (5 blocks of width 64; .bin and tokenizer as llama2.c stores them), the student 3
of its blocks, cut by pocketlm. It learns the teacher's probabilities and the text's tokens, half each, plainly and with
one thing more, on the same batches, once per seed (which decides the order of the text and the draws). Held-out stories
are measured in transformers. Each finished training is kept in pocketlm's cache: the same command goes on where it was
stopped. Writes a page (Markdown) and the same as JSON.
"""

import argparse
import datetime
import struct
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from common import command_line, write_results
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from torch import Tensor

from pocketlm.measure.device import machine, versions
from pocketlm.model.gguf_tokenizer import merges_by_score
from pocketlm.model.judge import judge
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.learning import Lessons, held_out_loss
from pocketlm.model.source import load
from pocketlm.model.text import as_tokens, pack_windows
from pocketlm.pipeline.cache import stage
from pocketlm.pipeline.stages import silent
from pocketlm.plan.sensitivity import depth_damage
from pocketlm.steps.distil import Distil, distil
from pocketlm.steps.prune_depth import PruneDepth, prune_depth
from pocketlm.tensors.divergence import Loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LENGTH, HELD_OUT = 256, 32
RATE = 1e-3
VARIANTS = {
    "plain": {},
    "hidden states 0.5": {"hidden_states": 0.5},
    "hidden states 2": {"hidden_states": 2.0},
    "relations 0.05": {"relations": 0.05},
    "relations 0.5": {"relations": 0.5},
    "on-policy 0.25": {"on_policy": 0.25},
}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("text", type=Path, help="of stories, <|endoftext|> between two")
    parser.add_argument("--tokens", type=int, default=61_440, help="of each training")
    parser.add_argument("--seeds", type=int, default=2)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{today}-distill-variants.md")
    return parser.parse_args()


def read_tokenizer(path: Path) -> "PreTrainedTokenizerFast":
    """Read llama2.c's tokenizer: three special tokens, all bytes, then SentencePiece's pieces with their scores."""
    from transformers import PreTrainedTokenizerFast

    data, place, pieces = path.read_bytes(), 4, []
    while place < len(data):
        score, length = struct.unpack_from("<fi", data, place)
        pieces.append((data[place + 8 : place + 8 + length].decode().replace(" ", "\u2581"), score))
        place += 8 + length
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(word for word, _ in pieces[259:])]
    merges = merges_by_score(dict(pieces[259:]))
    vocabulary = {word: index for index, word in enumerate(words)}
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken(word, normalized=False) for word in words[:3]])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def write_folder(model: Path, tokenizer: Path, folder: Path) -> None:
    """Write a model of llama2.c as a Hugging Face folder."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    data = model.read_bytes()
    width, ffn, blocks, heads, kv_heads, vocabulary, length = struct.unpack_from("<7i", data)
    numbers = torch.frombuffer(bytearray(data[28:]), dtype=torch.float32)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    network, place = AutoModelForCausalLM.from_config(config), 0

    def take(*shape: int) -> Tensor:
        nonlocal place
        part = numbers[place : place + torch.Size(shape).numel()].view(shape)
        place += part.numel()
        return part

    def turned(weight: Tensor) -> Tensor:
        """Pairs that rotate together are neighbours in llama2.c, half a head apart in transformers."""
        return weight.view(-1, width // heads // 2, 2, width).transpose(1, 2).reshape(-1, width)

    kv = kv_heads * width // heads
    weights = {"embed_tokens.weight": take(vocabulary, width)}
    for name, shape in (
        ("input_layernorm", (width,)),
        ("self_attn.q_proj", (width, width)),
        ("self_attn.k_proj", (kv, width)),
        ("self_attn.v_proj", (kv, width)),
        ("self_attn.o_proj", (width, width)),
        ("post_attention_layernorm", (width,)),
        ("mlp.gate_proj", (ffn, width)),
        ("mlp.down_proj", (width, ffn)),
        ("mlp.up_proj", (ffn, width)),
    ):
        for block, weight in enumerate(take(blocks, *shape)):
            rotates = name.endswith(("q_proj", "k_proj"))
            weights[f"layers.{block}.{name}.weight"] = turned(weight) if rotates else weight
    weights["norm.weight"] = take(width)
    network.model.load_state_dict(weights)
    network.save_pretrained(folder)
    read_tokenizer(tokenizer).save_pretrained(folder)


def student(teacher: LanguageModel, solving: Tensor) -> LanguageModel:
    """Return the student before it learns."""
    model = load(teacher.origin.source)
    damage = depth_damage(model.network, solving[:8], judge(model.network, solving[:8]), 2, silent)
    return prune_depth(model, PruneDepth(drop=tuple(sorted(block for block, _ in damage)), repair=True), solving)[0]


def measured(teacher: LanguageModel, model: LanguageModel, windows: Tensor) -> dict[str, list[float]]:
    """Return each window's KL and cross-entropy, in nats per token."""
    pairs = {"kl": (teacher.network, Loss()), "loss": (None, Loss(cross_entropy=1.0))}
    return {
        name: [held_out_loss(judging, model.network, Lessons(row[None]), loss) for row in windows]
        for name, (judging, loss) in pairs.items()
    }


def trained(teacher: LanguageModel, name: str, step: Distil, windows: dict[str, Tensor]) -> dict[str, list[float]]:
    """Return what one training ends in, done once."""

    def produce(_: Path) -> dict:
        model, began = student(teacher, windows["learn"][:64]), time.process_time()
        model, report = distil(teacher, model, step, windows["learn"], windows["choose"])
        print(f"{name}, seed {step.seed}: {report.summary}", flush=True)
        return measured(teacher, model, windows["test"]) | {"seconds": time.process_time() - began}

    inputs = {"teacher": teacher.origin.key, "step": asdict(step), "text": as_tokens("", windows["learn"]).sha256}
    return stage("benchmark-variant", inputs, produce).facts


def row(name: str, runs: list[dict], plain: list[dict] | None = None) -> str:
    """Return a line of the table: means over seeds, and of the difference to plain training with the same seed."""

    def mean(run: dict, what: str) -> float:
        return torch.tensor(run[what]).mean().item()

    def spread(values: list[float], digits: int, sign: str = "") -> str:
        middle, low, high = sum(values) / len(values), min(values), max(values)
        return f"{middle:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"

    cells = [name, spread([mean(run, "kl") for run in runs], 4)]
    cells.append(spread([torch.tensor(mean(run, "loss")).exp().item() for run in runs], 3))
    for what in ("kl", "loss"):
        away = [mean(run, what) - mean(other, what) for run, other in zip(runs, plain or runs, strict=True)]
        cells.append(spread(away, 4, "+") if plain else "")
    seconds = [run["seconds"] for run in runs if "seconds" in run]
    return "| " + " | ".join([*cells, f"{sum(seconds) / len(seconds):.0f}" if seconds else ""]) + " |"


def main() -> None:
    """Train every student in every way, measure, write."""
    args = arguments()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "stories260K"  # a folder's name is part of what trainings are kept under
        write_folder(args.model, args.tokenizer, folder)
        teacher = load(str(folder))
        text = args.text.read_text(encoding="utf-8")
        stories = [f"<s>{story.strip()}" for story in text.split("<|endoftext|>") if story.strip()]
        every = pack_windows(stories, teacher.tokenizer, 10**6, LENGTH)
        parts = {"test": every[:HELD_OUT], "choose": every[HELD_OUT : HELD_OUT + 16], "learn": every[HELD_OUT + 16 :]}
        plain = Distil(
            tokens=args.tokens, learning_rate=RATE, windows_per_step=8, evaluations=2, warm_up=0.05, cross_entropy=0.5
        )
        found = {
            name: [trained(teacher, name, replace(plain, seed=seed, **more), parts) for seed in range(args.seeds)]
            for name, more in VARIANTS.items()
        }
        base = {
            "teacher": measured(teacher, teacher, parts["test"]),
            "student, untrained": measured(teacher, student(teacher, parts["learn"][:64]), parts["test"]),
        }
    here = machine(args.out.parent)
    lines = [
        "# What to learn besides the teacher's probabilities: stories260K",
        "",
        f"`{command_line()}`",
        "",
        f"{here.cpu}, {torch.get_num_threads()} threads; "
        + ", ".join(f"{name} {which}" for name, which in versions().items())
        + ".",
        f"{args.tokens:,} tokens each, 8 windows of {LENGTH} a step; {HELD_OUT} held-out windows, in transformers.",
        f"Means over {args.seeds} seeds, lowest and highest in brackets; differences to plain training seed by seed.",
        "Seconds are of one core's work, measuring included.",
        "",
        "| learns | KL | perplexity | KL, difference | log-perplexity, difference | seconds |",
        "|---|---|---|---|---|---|",
    ]
    lines += [row(name, [each]) for name, each in base.items()]
    lines += [row(name, runs, None if name == "plain" else found["plain"]) for name, runs in found.items()]
    write_results(args.out, lines, {"base": base, **found})
    print("\n".join(lines))


if __name__ == "__main__":
    main()
