"""The command line: parse, call, print."""

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from pocketlm.cli import measuring, serving
from pocketlm.cli.exits import run
from pocketlm.cli.options import Data, Debug, Json, Model, Seed, Threads, fixed_formats, read_format
from pocketlm.cli.options import gguf_file as _gguf
from pocketlm.cli.options import print_result as _print
from pocketlm.errors import BadInputError

app = typer.Typer(
    help="Make a small language model fit a device, and prove what that cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def fit(
    model: Model,
    size: Annotated[str | None, typer.Option(help="Budget of the file: 70MB, 0.5GiB, or 40% of the original.")] = None,
    ram: Annotated[
        str | None, typer.Option(help="Budget of memory that the model adds while it runs, such as 200MB.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of context that --ram is for, 2048 if not given.", min=64)
    ] = None,
    speed: Annotated[
        str | None, typer.Option(help="Tokens it must write per second on this machine, such as 30tok/s.")
    ] = None,
    quality: Annotated[
        str | None,
        typer.Option(help="Floor of exp(-KL) to the original, such as 0.95: the smallest file that keeps it."),
    ] = None,
    accuracy: Annotated[
        str | None, typer.Option(help="Floor of accuracy on the --task, such as 0.9: the smallest file that keeps it.")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")] = Path("pocketlm-out"),
    recipe: Annotated[Path | None, typer.Option(help="Run this recipe instead of deciding one.")] = None,
    data: Data = None,
    task: Annotated[
        list[Path] | None, typer.Option(help="A .jsonl to score the file on beside the original; repeatable.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="How much is tried: fast (one plan), balanced (up to 3, if not given), best (up to 6)."),
    ] = None,
    time: Annotated[
        str | None,
        typer.Option(
            help="Time for the whole run, such as 30m, with --preset balanced or best: it ends with the best so far."
        ),
    ] = None,
    heal: Annotated[
        str | None, typer.Option(help="Time to learn, after pruning or by tuning, such as 5m; 0 switches it off.")
    ] = None,
    seed: Seed = 0,
    sweep: Annotated[
        str | None, typer.Option(help="Several sizes in one run: 40MB,60MB,80MB; the frontier of size and quality.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its bytes, and stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")] = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Make a model fit a budget: prune, distil, quantize, export, verify, measure, report.

    Example: pocketlm fit demo --size 70MB -o p70
    """
    from pocketlm import api
    from pocketlm.plan.budget import parse_time

    if sweep and (size or recipe or dry_run):
        raise BadInputError("--sweep has its own sizes and plans: leave out --size, --recipe and --dry-run")
    job = api.Fit(
        model=model,
        size=size,
        ram=ram,
        context=context,
        speed=speed,
        quality=quality,
        accuracy=accuracy,
        recipe=recipe,
        out=out,
        data=tuple(data or ()),
        tasks=tuple(task or ()),
        preset=preset,
        time=None if time is None else parse_time(time),
        heal=None if heal is None else parse_time(heal),
        seed=seed,
        force=force,
        command=shlex.join(["pocketlm", *sys.argv[1:]]),
    )
    if sweep:
        _sweep(job, tuple(part.strip() for part in sweep.split(",") if part.strip()), json_output)
    else:
        _run(job, dry_run, json_output)


@app.command()
def quantize(
    model: Model,
    size: Annotated[str | None, typer.Option(help="Budget of the file: 60MB, or 30% of the original.")] = None,
    bits: Annotated[float | None, typer.Option(help="Budget as bits per weight on average, such as 4.25.")] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="One format for every matrix, such as q4_0; int4-g32 and the like for transformers and vLLM."
        ),
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")] = Path("pocketlm-out"),
    tensor: Annotated[
        list[str] | None, typer.Option(help="GROUP=FORMAT or PATTERN=FORMAT that is not up for choice; repeatable.")
    ] = None,
    method: Annotated[str, typer.Option(help="descent, gptaq, gptq, or rtn (rounding, scales searched).")] = "descent",
    tune: Annotated[
        str, typer.Option(help="Time to tune scales and norms, in a long one codes too, by the original, such as 10m.")
    ] = "0",
    data: Data = None,
    seed: Seed = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, tensor by tensor, and stop.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")] = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Store a model's matrices in fewer bits: the mix of formats that measured damage says is best for the bytes.

    Example: pocketlm quantize demo --size 62MB --tune 10m
    """
    from pocketlm import api
    from pocketlm.plan.budget import parse_time

    if sum(option is not None for option in (size, bits, format)) != 1:
        raise BadInputError("Give one of --size (such as 60MB), --bits (such as 4.25) and --format (such as q4_0)")
    job = api.Fit(
        model=model,
        size=size,
        bits=bits,
        format=None if format is None else read_format(format),
        out=out,
        fixed=fixed_formats(tensor or []),
        method=method,
        tune=parse_time(tune),
        prune=False,
        data=tuple(data or ()),
        seed=seed,
        force=force,
        command=shlex.join(["pocketlm", *sys.argv[1:]]),
    )
    _run(job, dry_run, json_output)


@app.command()
def prune(
    model: Model,
    depth: Annotated[
        int | None, typer.Option(help="Blocks to keep; those go that measured damage misses least.")
    ] = None,
    ffn: Annotated[int | None, typer.Option(help="Channels of every FFN to keep, a multiple of 32.")] = None,
    kv_groups: Annotated[
        int | None, typer.Option(help="Heads of keys and values to keep in every block, with their query heads.")
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="Query heads to keep in every block, as many of each KV group.")
    ] = None,
    hidden: Annotated[int | None, typer.Option(help="Width of the residual stream to keep, a multiple of 32.")] = None,
    vocab: Annotated[int | None, typer.Option(help="Tokens to keep: those that the text of --data needs most.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of connections to cut, such as 0.5.")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="Cut in a pattern: 2:4 keeps 2 connections of every 4 neighbours.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="How connections are chosen: sparsegpt, wanda_absorbed, wanda or magnitude.")
    ] = None,
    heal: Annotated[str, typer.Option(help="Time for distillation afterwards, such as 10m.")] = "0",
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")] = Path("pocketlm-out"),
    data: Data = None,
    seed: Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")] = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Remove tokens, blocks, channels, heads, directions or connections of a model; what stays is solved to take over.

    Example: pocketlm prune demo --depth 27 --ffn 1280 -o smaller
    """
    from pocketlm import api
    from pocketlm.cli.terminal import Screen, pruned_lines
    from pocketlm.plan.budget import parse_time

    job = api.Prune(
        model=model,
        depth=depth,
        ffn=ffn,
        kv_groups=kv_groups,
        heads=heads,
        hidden=hidden,
        vocab=vocab,
        sparsity=sparsity,
        pattern=pattern,
        method=method,
        heal=parse_time(heal),
        out=out,
        data=tuple(data or ()),
        seed=seed,
        force=force,
    )
    with Screen() as screen:
        made = api.prune(job, screen.progress)
    _print(pruned_lines(made, out), asdict(made), json_output)


@app.command()
def distill(
    teacher: Annotated[str, typer.Argument(help="Who teaches: a folder, a hub id, a GGUF file, or `demo`.")],
    student: Annotated[
        str, typer.Option(help="A shape cut from the teacher (depth=12,ffn=768), or a model with its tokenizer.")
    ],
    tokens: Annotated[int | None, typer.Option(help="To train on; short text is repeated.", min=1)] = None,
    time: Annotated[str, typer.Option(help="Of training, such as 30m, where no --tokens are given.")] = "10m",
    loss: Annotated[str, typer.Option(help="forward_kl, reverse_kl, jensen_shannon or skewed_kl.")] = "forward_kl",
    temperature: Annotated[float, typer.Option(help="Of both models' probabilities.")] = 1.0,
    cross_entropy: Annotated[
        float, typer.Option(help="Weight of the text's own next tokens, 0 to 1; 1 is without a teacher.")
    ] = 0.0,
    hidden_states: Annotated[
        float, typer.Option(help="Weight of their distance, each of the student's through a learned map, such as 0.5.")
    ] = 0.0,
    relations: Annotated[
        float, typer.Option(help="Weight of how alike the last block's queries, keys and values are to each other.")
    ] = 0.0,
    on_policy: Annotated[
        float, typer.Option(help="Share of windows that the student goes on by itself, for the teacher to judge.")
    ] = 0.0,
    learning_rate: Annotated[
        float | None, typer.Option(help="3e-4 for a cut student or adapters, 1e-4 for a model of its own.")
    ] = None,
    adapters: Annotated[int, typer.Option(help="Train adapters (LoRA) of this rank, not the weights.", min=0)] = 0,
    targets: Annotated[str, typer.Option(help="live, or from disk: sampled or top, under 64 bytes a token.")] = "live",
    task: Annotated[Path | None, typer.Option(help="Learn this .jsonl of `prompt` and `answer`, not text.")] = None,
    remote: Annotated[
        str | None,
        typer.Option(help="Learn a server's answers: http://localhost:8080/v1. Its key: POCKETLM_REMOTE_KEY."),
    ] = None,
    gguf: Annotated[bool, typer.Option("--gguf", help="Write model.gguf in F16 too.")] = False,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")] = Path("pocketlm-out"),
    data: Data = None,
    seed: Seed = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")] = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Train a student on what a teacher says; a run that is stopped goes on where it was.

    Example: pocketlm distill demo --student depth=24,ffn=1152 --time 30m -o smaller
    """
    from pocketlm import api
    from pocketlm.cli.terminal import Screen, distilled_lines
    from pocketlm.plan.budget import parse_time

    _one_of("--loss", loss, ("forward_kl", "reverse_kl", "jensen_shannon", "skewed_kl"))
    _one_of("--targets", targets, ("live", "sampled", "top"))
    how = api.distil_settings(
        student,
        tokens=tokens or 0,
        learning_rate=learning_rate,
        loss=loss,
        temperature=temperature,
        cross_entropy=cross_entropy,
        hidden_states=hidden_states,
        relations=relations,
        on_policy=on_policy,
        adapters=adapters,
        seed=seed,
    )
    job = api.Distillation(
        teacher=teacher,
        student=student,
        how=how,
        seconds=None if tokens else parse_time(time),
        targets=targets,
        task=task,
        remote=remote,
        gguf=gguf,
        out=out,
        data=tuple(data or ()),
        force=force,
    )
    with Screen() as screen:
        made = api.distill(job, screen.progress)
    _print(distilled_lines(made, out), asdict(made), json_output)


@app.command()
def chat(
    file: Annotated[Path, typer.Argument(help="A folder made by `fit`, a GGUF file, or `demo`.")],
    system: Annotated[str | None, typer.Option(help="The first message, about how to answer.")] = None,
    threads: Threads = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the likeliest word.")] = False,
    seed: Annotated[int | None, typer.Option(help="Of the draws.")] = None,
    debug: Debug = False,
) -> None:
    """Hold a conversation with a model in the terminal."""
    from pocketlm import api

    api.chat(_gguf(str(file)), system, threads=threads, greedy=greedy, seed=seed)


@app.command()
def clean(
    yes: Annotated[bool, typer.Option("--yes", help="Empty the cache; without it, only show it.")] = False,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Show the cache of finished stages, and empty it."""
    from pocketlm.cli.terminal import cache_lines
    from pocketlm.pipeline import cache

    kept = cache.kept()
    if yes:
        cache.empty()
    folder = str(cache.cache_folder())
    data = {"folder": folder, "emptied": yes, "stages": [{"name": n, "bytes": size} for n, size in kept]}
    _print(cache_lines(folder, kept, yes), data, json_output)


for command in (
    measuring.inspect,
    measuring.evaluate,
    measuring.diff,
    measuring.bench,
    measuring.doctor,
    serving.serve,
    serving.calibrate,
):
    app.command()(command)


def _run(job: Any, dry_run: bool, json_output: bool) -> None:
    """Plan a job, and unless told not to, do it."""
    from pocketlm import api
    from pocketlm.cli.terminal import Screen, integer_lines, plan_lines, result_lines
    from pocketlm.report.content import to_dict
    from pocketlm.report.verdict import check_budgets_met
    from pocketlm.tensors.formats.integer import NAMES

    integers, report = job.format in NAMES, None
    with Screen() as screen:
        if dry_run:
            planned = api.plan_integers(job) if integers else api.plan(job, screen.progress)
            lines, data = plan_lines(planned), planned.as_data()
        elif integers:
            made = api.quantize_integers(job, screen.progress)
            lines, data = integer_lines(made, job.out), asdict(made)
        else:
            report = api.fit(job, screen.progress, lambda planned: screen.say(plan_lines(planned)))
            lines, data = result_lines(report, job.out), to_dict(report)
    _print(lines, data, json_output)
    if report:
        check_budgets_met({str(job.out): report})


def _sweep(job: Any, sizes: tuple[str, ...], json_output: bool) -> None:
    """Fit several sizes and print the frontier."""
    from pocketlm import api
    from pocketlm.cli.terminal import Screen, plan_lines
    from pocketlm.report.frontier import frontier_data, frontier_lines
    from pocketlm.report.verdict import check_budgets_met

    with Screen() as screen:
        made = api.sweep(job, sizes, screen.progress, lambda planned: screen.say(plan_lines(planned)))
    lines = [*frontier_lines(made.reports, made.refused), f"wrote {job.out}: open {job.out / 'frontier.html'}"]
    _print(lines, frontier_data(made.reports) | {"refused": made.refused}, json_output)
    check_budgets_met(made.reports)


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise BadInputError(f"Unknown {option} `{value}`. Known: {', '.join(known)}")


def main() -> None:
    """Run the command line; errors become one message and an exit code."""
    run(app)
