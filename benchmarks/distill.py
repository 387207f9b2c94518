"""What distillation buys: a cut model healed by its original, beside training on the same text without it.

    python benchmarks/distill.py heal MODEL --text FILE... --held-out FILE... [--minutes 30 | --tokens N] \
        [--learning-rate R...] [--control-rate R...] [--out benchmarks/results/DATE-distill.md]
    python benchmarks/distill.py cached MODEL --text FILE... --held-out FILE... --tokens N [--learning-rate R]
    python benchmarks/distill.py variants MODEL --text FILE... --held-out FILE... --tokens N [--hidden-states W] \
        [--relations W] [--on-policy SHARE]

MODEL is a Hugging Face folder. Of the files under --text, three quarters of the documents teach, a tenth chooses
checkpoints and the rest is held out, like the files under --held-out. The model is cut by pocketlm's own steps, then
healed with KL (or, with --cross-entropy, a mixture) and, from the same start on the same batches, with cross-entropy,
at each learning rate given; the one with the lowest loss on the choosing text counts. `cached` heals from the teacher's
opinion on disk instead, sampled and top, beside the teacher in memory. `variants` heals plainly, then with hidden
states, relations, or the student's own words besides, one at a time. Everything finished or half trained is kept in
pocketlm's cache: the same command goes on where it was stopped. Writes a page (Markdown) and the same as JSON.
"""

import argparse
import datetime
import platform
import shutil
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch
from common import command_line, write_results
from torch import Tensor

from pocketlm.cli.terminal import Screen
from pocketlm.export.gguf import write_gguf
from pocketlm.interval import Interval
from pocketlm.measure.device import machine, versions
from pocketlm.measure.quality import LEVEL, RESAMPLES, Comparison, compare
from pocketlm.model.judge import judge
from pocketlm.model.language_model import LanguageModel, save
from pocketlm.model.learning import Lessons
from pocketlm.model.source import load
from pocketlm.model.targets import Sampling, fitting, open_targets, predicted_bytes, write_targets
from pocketlm.model.text import Tokens, as_tokens, pack_windows, read_corpus
from pocketlm.pipeline.cache import Finished, stage, unfinished
from pocketlm.plan.pace import tokens_in
from pocketlm.plan.sensitivity import depth_damage
from pocketlm.run.engine import Engine
from pocketlm.steps.distil import Distil, distil
from pocketlm.steps.prune_depth import PruneDepth, prune_depth
from pocketlm.steps.prune_width import PruneWidth, prune_width

LENGTH = 512
SOLVING, CHOOSING = 64, 16  # windows that the cut is solved on by default, and that choose blocks and checkpoints


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    for mode, what in (
        ("heal", "a cut model healed with KL, beside cross-entropy"),
        ("cached", "healed from targets on disk, beside the teacher in memory"),
        ("variants", "healed with more than the teacher's probabilities on text, one thing at a time"),
    ):
        heal = modes.add_parser(mode, help=what)
        heal.add_argument("model")
        heal.add_argument("--text", type=Path, nargs="+", required=True, help="to learn from")
        heal.add_argument("--held-out", type=Path, nargs="+", required=True, help="to measure on")
        heal.add_argument("--depth", type=int, default=24)
        heal.add_argument("--ffn", type=int, default=1152)
        heal.add_argument("--drop", type=int, nargs="+", help="blocks that go; found by trying where not given")
        heal.add_argument("--solving", type=int, default=SOLVING, help="windows that the cut is solved on")
        heal.add_argument("--minutes", type=float, default=30, help="of healing, turned into tokens by timing")
        heal.add_argument("--tokens", type=int, help="instead of --minutes")
        heal.add_argument("--learning-rate", type=float, nargs="+", default=[3e-4], help="of distillation")
        heal.add_argument(
            "--cross-entropy", type=float, default=0.0, help="weight of the text's own next tokens beside the teacher's"
        )
        heal.add_argument("--control-rate", type=float, nargs="+", help="of the control, if not the same")
        heal.add_argument("--windows-per-step", type=int, default=4)
        heal.add_argument("--evaluations", type=int, default=8)
        heal.add_argument("--windows", type=int, default=24, help=f"of {LENGTH} tokens per text, to measure on")
        heal.add_argument("--seed", type=int, default=0)
        if mode == "variants":
            heal.add_argument("--hidden-states", type=float, default=0.5, help="weight of hidden states")
            heal.add_argument("--relations", type=float, default=0.5, help="weight of relations")
            heal.add_argument(
                "--on-policy", type=float, default=0.25, help="share of windows in the student's own words"
            )
        name = "distill" if mode == "heal" else f"distill-{mode}"
        heal.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{today}-{name}.md")
    return parser.parse_args()


def split(args: argparse.Namespace, teacher: LanguageModel) -> dict[str, Tokens]:
    """Return what teaches, what chooses and what is held out of the text to learn from."""
    corpus = read_corpus(args.text)
    limits = {"calibration": 10**6, "validation": CHOOSING, "test": args.windows}
    return {part: corpus.tokens(part, teacher.tokenizer, limit, LENGTH) for part, limit in limits.items()}


def cut(args: argparse.Namespace, teacher: LanguageModel, texts: dict[str, Tokens], screen: Screen) -> Finished:
    """Return the model with fewer blocks and narrower FFNs, as pocketlm prunes it."""

    def produce(folder: Path) -> dict:
        model, solving = load(args.model), texts["calibration"].first(args.solving)
        gone = model.network.config.num_hidden_layers - args.depth
        trying = texts["validation"].first(CHOOSING // 2)
        blocks = args.drop
        if not blocks:
            damage = depth_damage(model.network, trying, judge(model.network, trying), gone, screen.progress)
            blocks = [block for block, _ in damage]
        model, depth = prune_depth(
            model,
            PruneDepth(drop=tuple(sorted(blocks)), repair=True),
            solving,
            lambda i, n: screen.progress("repairing blocks", i, n),
        )
        narrow = PruneWidth(ffn=args.ffn)
        model, width = prune_width(model, narrow, solving, lambda i, n: screen.progress("narrowing blocks", i, n))
        save(model, folder / "hf")
        return {"cut": [depth.summary, width.summary], "parameters": model.network.num_parameters()}

    hashes = {name: texts[name].sha256 for name in ("calibration", "validation")}
    shape = {"shape": [args.depth, args.ffn], "drop": args.drop, "solving": args.solving}
    return stage("benchmark-cut", {"model": teacher.origin.key, **shape, **hashes}, produce)


def trained(
    teacher: LanguageModel,
    before: Finished,
    step: Distil,
    texts: dict[str, Tokens],
    screen: Screen,
    kept: Finished | None = None,
) -> Finished:
    """Return the cut model trained, by the teacher or by what is kept of its opinion."""
    name = "cross-entropy" if step.cross_entropy == 1 else step.loss
    name += f" with {step.cross_entropy:g} of cross-entropy" if 0 < step.cross_entropy < 1 else ""
    more = {"hidden states": step.hidden_states, "relations": step.relations, "on-policy": step.on_policy}
    name += "".join(f", {what} {value:g}" for what, value in more.items() if value)
    windows = texts["calibration"].windows
    if kept:
        targets = open_targets(kept.folder)
        windows = Lessons(windows[: len(targets)], targets=targets)
        name = f"{kept.facts['sampling']['kind']} targets"

    def produce(folder: Path) -> dict:
        model, report = distil(
            teacher,
            load(str(before.folder / "hf")),
            step,
            windows,
            texts["validation"].windows,
            lambda i, n, pace: screen.progress(f"{name} at {step.learning_rate:g} ({pace})", i, n),
            unfinished(folder),
        )
        save(model, folder / "hf")
        return {"step": asdict(step), "summary": report.summary, **report.details}

    inputs = {"before": before.key, "step": asdict(step), "text": texts["calibration"].sha256}
    inputs |= {"targets": kept.key} if kept else {}
    return stage("benchmark-train", inputs, produce)


def tokens_for(args: argparse.Namespace, teacher: LanguageModel, before: Finished, texts: dict[str, Tokens]) -> int:
    """Return how many tokens to train on; a time is turned into tokens once, so that a resumed run does the same."""
    if args.tokens:
        return args.tokens
    student = load(str(before.folder / "hf"))
    inputs = {"before": before.key, "minutes": args.minutes, "threads": torch.get_num_threads()}
    timed = stage(
        "benchmark-tokens",
        inputs,
        lambda _: {"tokens": tokens_in(teacher, texts["calibration"], 60 * args.minutes, student)},
    )
    return timed.facts["tokens"]


def measure(models: dict[str, Path | str], texts: dict[str, Tensor], screen: Screen) -> dict[str, Comparison]:
    """Measure folders' F16 files in llama.cpp on the windows of each text; the first is the reference."""
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        engines = {}
        for name, folder in models.items():
            path = Path(temporary) / f"{name}.gguf"
            write_gguf(load(str(folder)), {}, path, plain="F16")
            engines[name] = stack.enter_context(Engine(path, context=LENGTH)).logits
        return {
            text: compare(engines, windows, lambda i, n, t=text: screen.progress(f"measuring on {t}", i, n))
            for text, windows in texts.items()
        }


def recovered(losses: dict[str, Tensor], name: str) -> Interval:
    """Return the share of the log-perplexity lost by the cut that a training won back, with its paired interval."""
    generator = torch.Generator().manual_seed(0)
    count = len(losses["cut"])
    draws = torch.randint(count, (RESAMPLES, count), generator=generator)
    lost, won = losses["cut"] - losses["original"], losses["cut"] - losses[name]
    shares = won[draws].mean(1) / lost[draws].mean(1)
    low, high = shares.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)).tolist()
    return Interval((won.mean() / lost.mean()).item(), low, high)


def opinion_on_disk(teacher: LanguageModel, windows: Tensor, sampling: Sampling, seed: int, screen: Screen) -> Finished:
    """Return the teacher's opinion on windows, written once."""

    def produce(folder: Path) -> dict:
        began, predicted = time.monotonic(), predicted_bytes(teacher, windows, sampling)
        write_targets(
            teacher,
            windows,
            unfinished(folder),
            sampling,
            seed,
            lambda i, n: screen.progress(f"keeping the teacher's opinion, {sampling.kind}", i, n),
        )
        shutil.copytree(unfinished(folder), folder, dirs_exist_ok=True)
        size = sum(path.stat().st_size for path in folder.iterdir()) / windows.numel()
        facts = {"sampling": asdict(sampling), "predicted": predicted, "bytes": size}
        return facts | {"write_seconds": time.monotonic() - began}

    inputs = {"model": teacher.origin.key, "text": as_tokens("", windows).sha256, "seed": seed}
    return stage("benchmark-targets", inputs | asdict(sampling), produce)


def settings(args: argparse.Namespace, tokens: int) -> Distil:
    """Return how a model is healed, as the command line says."""
    return Distil(
        tokens=tokens,
        learning_rate=args.learning_rate[0],
        evaluations=args.evaluations,
        windows_per_step=args.windows_per_step,
        warm_up=0.05,
        cross_entropy=args.cross_entropy,
        seed=args.seed,
    )


def cached(args: argparse.Namespace) -> None:
    """Heal a cut model by the teacher in memory and by its opinion on disk, measure, write."""
    teacher = load(args.model)
    texts = split(args, teacher)
    vocabulary = len(teacher.network.lm_head.weight)
    with Screen() as screen:
        start = cut(args, teacher, texts, screen)
        tokens = tokens_for(args, teacher, start, texts)
        step = settings(args, tokens)
        texts["calibration"] = as_tokens("", texts["calibration"].first(-(-tokens // LENGTH)))
        runs = {"in memory": trained(teacher, start, step, texts, screen)}
        kept = {}
        for sampling in (fitting(vocabulary, "sampled"), fitting(vocabulary, "top")):
            kept[sampling.kind] = opinion_on_disk(teacher, texts["calibration"].windows, sampling, args.seed, screen)
            runs[sampling.kind] = trained(teacher, start, step, texts, screen, kept[sampling.kind])
        models = {"original": args.model, "cut": start.folder / "hf"}
        models |= {name: run.folder / "hf" for name, run in runs.items()}
        found = measure(models, measured_texts(args, teacher, texts), screen)
    rows = [_row(text, name, comparison) for text, comparison in found.items() for name in models]
    facts = {name: run.facts | {"seconds": run.seconds} for name, run in runs.items()}
    lines = [
        "# Healing from targets on disk",
        "",
        *setting(args, start, tokens),
        "",
        *quality_table(rows),
        "",
        "| teacher | bytes per token | predicted | KL on the choosing text | over that in memory | tokens/s |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        size = [f"{kept[name].facts[what]:.1f}" for what in ("bytes", "predicted")] if name in kept else ["", ""]
        ratio = lowest(run) / lowest(runs["in memory"])
        cells = [name, *size, f"{lowest(run):.4f}", f"{ratio:.3f}", f"{run.facts['tokens_per_second']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    write_results(args.out, lines, {"rows": rows, "runs": facts, "kept": {k: v.facts for k, v in kept.items()}})
    print("\n".join(lines))


def measured_texts(args: argparse.Namespace, teacher: LanguageModel, texts: dict[str, Tokens]) -> dict[str, Tensor]:
    """Return the windows to measure on, by text."""
    windows = {"the rest of the text": texts["test"].windows}
    for path in args.held_out:
        windows[path.stem] = pack_windows(read_corpus([path]).documents, teacher.tokenizer, args.windows, LENGTH)
    return windows


def heal(args: argparse.Namespace) -> None:
    """Cut, heal both ways, measure, write."""
    teacher = load(args.model)
    texts = split(args, teacher)
    with Screen() as screen:
        start = cut(args, teacher, texts, screen)
        tokens = tokens_for(args, teacher, start, texts)
        runs: dict[str, list[Finished]] = {}
        for name, weight, rates in (
            ("healed", args.cross_entropy, args.learning_rate),
            ("control", 1.0, args.control_rate or args.learning_rate),
        ):
            settings = {"tokens": tokens, "cross_entropy": weight, "evaluations": args.evaluations, "seed": args.seed}
            settings |= {"windows_per_step": args.windows_per_step, "warm_up": 0.05}
            steps = [Distil(learning_rate=rate, **settings) for rate in rates]
            runs[name] = [trained(teacher, start, step, texts, screen) for step in steps]
        best = {name: min(each, key=lowest) for name, each in runs.items()}
        models = {"original": args.model, "cut": start.folder / "hf"}
        models |= {name: run.folder / "hf" for name, run in best.items()}
        found = measure(models, measured_texts(args, teacher, texts), screen)
    rows = [_row(text, name, comparison) for text, comparison in found.items() for name in models]
    lines = page(args, start, tokens, runs, best, rows, found)
    facts = {name: [run.facts | {"seconds": run.seconds} for run in each] for name, each in runs.items()}
    write_results(args.out, lines, {"rows": rows, "runs": facts, "cut": start.facts})
    print("\n".join(lines))


def variants(args: argparse.Namespace) -> None:
    """Heal a cut model plainly and with each thing more, measure, write."""
    teacher = load(args.model)
    texts = split(args, teacher)
    asked = {
        "plain": {},
        f"hidden states {args.hidden_states:g}": {"hidden_states": args.hidden_states},
        f"relations {args.relations:g}": {"relations": args.relations},
        f"on-policy {args.on_policy:g}": {"on_policy": args.on_policy},
    }
    with Screen() as screen:
        start = cut(args, teacher, texts, screen)
        tokens = tokens_for(args, teacher, start, texts)
        plain = settings(args, tokens)
        runs = {name: trained(teacher, start, replace(plain, **more), texts, screen) for name, more in asked.items()}
        models = {"original": args.model, "cut": start.folder / "hf"}
        models |= {name: run.folder / "hf" for name, run in runs.items()}
        found = measure(models, measured_texts(args, teacher, texts), screen)
    rows = [_row(text, name, comparison) for text, comparison in found.items() for name in models]
    lines = ["# What to learn besides the teacher's probabilities", "", *setting(args, start, tokens)]
    lines += [f"Share of the text's own next tokens: {args.cross_entropy:g}.", "", *quality_table(rows)]
    lines += ["", "Perplexity over that of plain healing, paired:", ""]
    for text, comparison in found.items():
        ratios = [f"{name} {_cell(vars(comparison.ratio(name, 'plain')), 3)}" for name in list(asked)[1:]]
        lines.append(f"- {text}: {'; '.join(ratios)}")
    lines += ["", "| training | KL on the choosing text | tokens/s | seconds |", "|---|---|---|---|"]
    for name, run in runs.items():
        curve = " -> ".join(f"{value:.3f}" for _, value in run.facts["held_out_kl"])
        lines.append(f"| {name} | {curve} | {run.facts['tokens_per_second']:.0f} | {run.seconds:.0f} |")
    facts = {name: run.facts | {"seconds": run.seconds} for name, run in runs.items()}
    write_results(args.out, lines, {"rows": rows, "runs": facts, "cut": start.facts})
    print("\n".join(lines))


def lowest(run: Finished) -> float:
    """Return the lowest loss of a training on the text that chooses."""
    return min(value for _, value in run.facts["held_out_kl"])


def _row(text: str, name: str, comparison: Comparison) -> dict:
    quality = comparison.qualities[name]
    row = {"text": text, "model": name, "perplexity": vars(quality.perplexity)}
    row |= {"kl": quality.kl and vars(quality.kl), "agreement": quality.agreement and vars(quality.agreement)}
    if name not in ("original", "cut"):
        row["recovered"] = vars(recovered(comparison.losses, name))
    return row


def page(
    args: argparse.Namespace,
    start: Finished,
    tokens: int,
    runs: dict[str, list[Finished]],
    best: dict[str, Finished],
    rows: list[dict],
    found: dict[str, Comparison],
) -> list[str]:
    """Return the lines of the page."""
    lines = ["# Healing a cut model", "", *setting(args, start, tokens), "", *quality_table(rows)]
    lines += ["", "Perplexity of the healed over that of the control:", ""]
    for text, comparison in found.items():
        lines.append(f"- {text}: {_cell(vars(comparison.ratio('healed', 'control')), 3)}")
    lines += [
        "",
        "| training | learning rate | loss on the choosing text | tokens/s | seconds |",
        "|---|---|---|---|---|",
    ]
    for name, each in runs.items():
        for run in each:
            rate = f"{run.facts['step']['learning_rate']:g}" + (" (best)" if run is best[name] else "")
            curve = run.facts["held_out_kl"]
            cells = [name, rate, f"{curve[0][1]:.3f} -> {lowest(run):.3f}", f"{run.facts['tokens_per_second']:.0f}"]
            lines.append("| " + " | ".join([*cells, f"{run.seconds:.0f}"]) + " |")
    return lines


def setting(args: argparse.Namespace, start: Finished, tokens: int) -> list[str]:
    """Say what was done, where and with what."""
    here = machine(args.out.parent)
    packages = ", ".join(f"{name} {which}" for name, which in versions().items())
    return [
        f"`{command_line()}`",
        "",
        f"{here.cpu}, {torch.get_num_threads()} threads; {platform.system()}; {packages}.",
        f"Cut: {'; '.join(start.facts['cut'])}.",
        f"All trainings: {tokens:,} tokens, the same batches, schedule and start. {args.windows} windows of {LENGTH}",
        "tokens per text measure, F16 files read in llama.cpp; in brackets 95 % intervals (bootstrap over windows,",
        "paired). `recovered` is the share of the log-perplexity that the cut lost.",
    ]


def quality_table(rows: list[dict]) -> list[str]:
    """Lay the quality of models on texts out as Markdown."""
    lines = ["| text | model | perplexity | KL | first choice kept | recovered |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["text"], row["model"], _cell(row["perplexity"], 1), _cell(row["kl"], 3)]
        cells += [_cell(row["agreement"], 3), _cell(row.get("recovered"), 2)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(interval: dict | None, digits: int) -> str:
    if interval is None:
        return ""
    value, low, high = (f"{interval[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def main() -> None:
    """Run the mode asked for."""
    args = arguments()
    {"heal": heal, "cached": cached, "variants": variants}[args.mode](args)


if __name__ == "__main__":
    main()
