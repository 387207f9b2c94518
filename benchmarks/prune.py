"""Smaller shapes without healing: pocketlm's choices, re-solved, against the field's simple ones at equal parameters.

    python benchmarks/prune.py --model MODEL --calibrate FILE... --measure FILE... \
        [--depth 24] [--ffn 1152] [--kv-groups 2] [--hidden 512] [--peer "ffn 1152" torch-pruning FOLDER] \
        --out benchmarks/results/prune.md

MODEL is a Hugging Face folder of a LLaMA-like model, and so is FOLDER, made by a script of `peers`. Some text
calibrates, other text measures, as many windows of each file. Every shape is made alone, from the original, by every
method; nothing is trained. Writes a table (Markdown) and the same as JSON.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from common import command_line, write_results
from simple_choices import FFN, HEADS, narrow_hidden, narrow_inner, statistics
from texts import windows_in_turn
from torch import Tensor, nn

from pocketlm.cli.terminal import Screen
from pocketlm.commands.pruning import CHANNEL_WINDOWS, DEPTH_WINDOWS, SOLVING_WINDOWS, narrowing
from pocketlm.measure.device import machine, versions
from pocketlm.model.judge import judge
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.source import load
from pocketlm.model.surgery import drop_blocks
from pocketlm.model.sweep import final_hidden
from pocketlm.plan.importance import block_influence, perplexity, perplexity_without
from pocketlm.plan.sensitivity import depth_damage
from pocketlm.steps.prune_depth import PruneDepth, prune_depth
from pocketlm.steps.prune_width import prune_width

LENGTH = 512
SCORING_WINDOWS = 16  # of calibration text, for the simple scores
Made = Iterator[tuple[str, str, Callable[[], nn.Module]]]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibrate", type=Path, nargs="+", required=True)
    parser.add_argument("--measure", type=Path, nargs="+", required=True)
    parser.add_argument("--depth", type=int)
    parser.add_argument("--ffn", type=int)
    parser.add_argument("--kv-groups", type=int)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--peer", nargs=3, action="append", default=[], metavar=("SHAPE", "NAME", "FOLDER"))
    parser.add_argument(
        "--solving-windows",
        type=int,
        help="of 512 tokens of calibration text; as many as `pocketlm prune` if not given",
    )
    parser.add_argument("--windows", type=int, default=16, help="of 512 tokens, to measure on")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def methods(args: argparse.Namespace, model: LanguageModel, text: Tensor, progress: Callable) -> Made:
    """Yield shape, method and what makes the network, one after the other."""
    network, trying = model.network, text[-DEPTH_WINDOWS:]  # removals are tried on what nothing is solved on
    scoring = text[:SCORING_WINDOWS]
    seen = statistics(network, scoring) if args.ffn or args.kv_groups or args.hidden else []
    simple = {"magnitude": "magnitude", "activations": "activations (Minitron)", "fluctuation": "fluctuation (FLAP)"}
    for option, asked, space in (
        ("kv_groups", args.kv_groups, HEADS),
        ("ffn", args.ffn, FFN),
        ("hidden", args.hidden, ""),
    ):
        if not asked:
            continue
        shape = f"{option.replace('_', ' ')} {asked}"
        for method, name in simple.items():
            if space:
                yield (
                    shape,
                    name,
                    lambda m=method, s=space, a=asked: narrow_inner(copy.deepcopy(network), seen, m, s, a),
                )
            elif method != "fluctuation":
                yield shape, name, lambda m=method, a=asked: narrow_hidden(copy.deepcopy(network), seen, m, a)
        for _, name, folder in (peer for peer in args.peer if peer[0] == shape):
            yield shape, name, lambda folder=folder: load(folder).network
        step = narrowing({option: asked})
        solving = text[: args.solving_windows or step.windows]
        yield (
            shape,
            "**pocketlm**",
            lambda step=step, solving=solving: prune_width(_copy(model), step, solving)[0].network,
        )
    if args.depth:
        shape, gone = f"{args.depth} blocks", network.config.num_hidden_layers - args.depth
        for name, scores in (
            ("block influence (ShortGPT)", lambda: block_influence(network, scoring)),
            ("perplexity without each", lambda: perplexity_without(network, trying)),
        ):
            yield shape, name, lambda scores=scores: _without(network, _lowest(scores(), gone))
        damage = depth_damage(network, trying, judge(network, trying), gone, progress)
        drop = tuple(sorted(block for block, _ in damage))
        yield shape, "greedy KL", lambda: _without(network, set(drop))
        step, solving = PruneDepth(drop=drop, repair=True), text[: args.solving_windows or SOLVING_WINDOWS]
        yield shape, "**pocketlm**: greedy KL, repaired", lambda: prune_depth(_copy(model), step, solving)[0].network


def _copy(model: LanguageModel) -> LanguageModel:
    return LanguageModel(copy.deepcopy(model.network), model.tokenizer, model.origin)


def _without(network: nn.Module, drop: set[int]) -> nn.Module:
    network = copy.deepcopy(network)
    drop_blocks(network, drop)
    return network


def _lowest(scores: list[float], count: int) -> set[int]:
    return set(sorted(range(len(scores)), key=scores.__getitem__)[:count])


def main() -> None:
    """Make, measure, write."""
    args = arguments()
    torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    model = load(args.model)
    most = args.solving_windows or (CHANNEL_WINDOWS if args.ffn else SOLVING_WINDOWS)
    text = windows_in_turn(args.calibrate, model.tokenizer, most + DEPTH_WINDOWS, LENGTH)
    windows = windows_in_turn(args.measure, model.tokenizer, args.windows, LENGTH)
    opinion, rows = judge(model.network, windows), []

    def measured(shape: str, method: str, network: nn.Module, seconds: float) -> None:
        hidden = final_hidden(network, windows)
        kl = opinion.divergence(hidden.flatten(0, 1), network.lm_head.weight) if rows else 0.0
        row = {"shape": shape, "method": method, "parameters": sum(p.numel() for p in network.parameters())}
        row |= {"perplexity": perplexity(hidden, network.lm_head, windows), "kl": kl, "seconds": round(seconds)}
        row["texts"] = {
            path.name: perplexity(hidden[at :: len(args.measure)], network.lm_head, windows[at :: len(args.measure)])
            for at, path in enumerate(args.measure)
        }
        rows.append(row)
        print(row, flush=True)

    measured("original", "", model.network, 0)
    with Screen() as screen:
        for shape, method, make in methods(args, model, text, screen.progress):
            began = time.monotonic()
            network = make()
            measured(shape, method, network, time.monotonic() - began)
            write_results(args.out, page(args, rows), rows)
    print("\n".join(table(rows)))


def page(args: argparse.Namespace, rows: list[dict]) -> list[str]:
    """Return the lines of the page."""
    here = machine(args.out.parent)
    solved = args.solving_windows or f"{SOLVING_WINDOWS} ({CHANNEL_WINDOWS} for FFN channels)"
    return [
        "# Smaller shapes without healing",
        "",
        f"`{command_line()}`",
        "",
        f"{here.cpu}, {args.threads} threads; {', '.join(f'{name} {which}' for name, which in versions().items())}.",
        f"{args.windows} windows of {LENGTH} tokens measure; {solved} others are solved on. Forward",
        "passes are in bfloat16 where the hardware has it. Nothing is trained; each shape is made alone.",
        "",
        *table(rows),
    ]


def table(rows: list[dict]) -> list[str]:
    """Lay the figures out as Markdown."""
    texts = list(rows[0]["texts"]) if len(rows[0]["texts"]) > 1 else []
    heads = ["shape", "method", "parameters", "perplexity", "share of the best simple choice's increase", "KL"]
    heads += [f"{name}: perplexity (share)" for name in texts] + ["seconds"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row["shape"], row["method"], f"{row['parameters']:,}", f"{row['perplexity']:.2f}"]
        cells += [_share(rows, row, lambda each: each["perplexity"]), f"{row['kl']:.4f}"]
        for name in texts:
            share = _share(rows, row, lambda each, name=name: each["texts"][name])
            cells.append(f"{row['texts'][name]:.2f}" + (f" ({share})" if share else ""))
        lines.append("| " + " | ".join([*cells, str(row["seconds"])]) + " |")
    return lines


def _share(rows: list[dict], row: dict, of: Callable[[dict], float]) -> str:
    """Return a row's increase over that of the best simple choice of its shape, nothing for a simple choice itself."""
    others = [of(each) - of(rows[0]) for each in rows if each["shape"] == row["shape"] and _is_simple(each["method"])]
    if _is_simple(row["method"]) or not others:
        return ""
    return f"{(of(row) - of(rows[0])) / min(others):.2f}"


def _is_simple(method: str) -> bool:
    return not method.startswith(("**pocketlm**", "greedy"))


if __name__ == "__main__":
    main()
