"""How fast llama.cpp runs each number format on this machine.

    python benchmarks/format_speed.py MODEL --out benchmarks/results/format-speed.md

Makes a Llama of random weights (rows of 1024 and 3072, so that every format fits) with MODEL's tokenizer, stores all
its matrices in one format after another, and times prompt reading and generation, all files in turns.
"""

import argparse
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import torch
from common import command_line, write_results

from pocketlm.export.gguf import write_gguf
from pocketlm.measure.device import machine, measure_speed, versions
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.source import load
from pocketlm.run.speed import WORKER
from pocketlm.tensors.formats import FORMATS, Packed, pack, round_to_nearest

BLOCKS = 4


def random_llama(source: str) -> LanguageModel:
    """Return a Llama of about 100M random weights with the tokenizer of `source`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = load(source)
    config = LlamaConfig(
        vocab_size=model.network.config.vocab_size, hidden_size=1024, intermediate_size=3072, num_hidden_layers=BLOCKS,
        num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    return replace(model, network=LlamaForCausalLM(config).eval())


def stored(model: LanguageModel, name: str) -> dict[str, Packed]:
    """Return all matrices in one format; rows of a sample are repeated, since values do not change speed."""
    packed, known = {}, {}
    for parameter, weight in model.network.named_parameters():
        if weight.dim() == 2:
            rows, columns = weight.shape
            if columns not in known:
                known[columns] = pack(round_to_nearest(weight[:64].detach(), FORMATS[name])).rows
            data = known[columns].repeat(-(-rows // 64), 1)[:rows].contiguous()
            packed[parameter] = Packed(FORMATS[name], data, (rows, columns))
    return packed


def main() -> None:
    """Make, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = random_llama(args.model)
    with tempfile.TemporaryDirectory() as temporary:
        files = {"F16": Path(temporary) / "F16.gguf"}
        write_gguf(model, {}, files["F16"])
        for name in FORMATS:
            files[name] = Path(temporary) / f"{name}.gguf"
            write_gguf(model, stored(model, name), files[name])
        speeds = measure_speed(list(files.values()), WORKER, prompt=128, generate=24, repeat=1, rounds=3)
        rows = [
            {
                "format": name,
                "bits": FORMATS[name].bits if name in FORMATS else 16,
                "bytes": path.stat().st_size,
                "prefill": asdict(speed.prefill),
                "decode": asdict(speed.decode),
                "memory": speed.memory_bytes.mean,
            }
            for (name, path), speed in zip(files.items(), speeds.files, strict=True)
        ]
    here = machine(args.out.parent)
    base = rows[0]
    lines = [
        "# Speed of each number format in llama.cpp",
        "",
        f"`{command_line()}`",
        "",
        f"{here.cpu}, {here.cores} cores, {speeds.threads} threads; {speeds.engine}; torch {versions()['torch']}.",
        "A random Llama of 100M weights, everything in one format; tokens/s ± deviation, and relative to F16.",
        "",
        "| format | bits per weight | file (MB) | prefill tok/s | decode tok/s | prefill / F16 | decode / F16 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        prefill, decode = row["prefill"], row["decode"]
        lines.append(
            f"| {row['format']} | {row['bits']:.4g} | {row['bytes'] / 1e6:.1f} "
            f"| {prefill['mean']:.0f} ± {prefill['deviation']:.0f} | {decode['mean']:.1f} ± {decode['deviation']:.1f} "
            f"| {prefill['mean'] / base['prefill']['mean']:.2f} | {decode['mean'] / base['decode']['mean']:.2f} |"
        )
    write_results(args.out, lines, rows)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
