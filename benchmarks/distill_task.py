"""A narrow task: a student of few blocks taught by a bigger model, beside plain fine-tuning of the same student.

    python benchmarks/distill_task.py MODEL --train FILE --test FILE [--student depth=12,ffn=768] [--epochs 4] \
        [--teach N] [--limit N]

MODEL is a Hugging Face folder. Files are .jsonl of `prompt` and `answer`; clinc150's `data_full.json` is read as it is,
for both. First MODEL itself is fine-tuned on the task and becomes the teacher; then the student cut from it learns from
teacher and answers, and the control, the same student on the same batches, from answers alone. Accuracy is the share of
test prompts whose greedy answer is exactly right; the student is also stored at 4 to 5 bits and answers in llama.cpp.
Of many examples --teach and --limit draw some, by the seed.
The untrained MODEL is told all answers there are, without examples and with some, and the likeliest of them counts.
Everything finished or half trained is kept in pocketlm's cache. Writes a page (Markdown) and the same as JSON.
"""

import argparse
import datetime
import json
import random
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from common import command_line, write_results
from torch import Tensor

from pocketlm.cli.terminal import Screen
from pocketlm.commands.distillation import Distillation, distill
from pocketlm.export.gguf import write_gguf
from pocketlm.interval import wilson
from pocketlm.measure.device import machine, versions
from pocketlm.model.compute import fast_forward
from pocketlm.model.examples import Example, encode_prompt, pack_examples, read_examples
from pocketlm.model.files import file_sha256
from pocketlm.model.importance import token_importance
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.source import load
from pocketlm.pipeline.cache import stage
from pocketlm.run.engine import Engine
from pocketlm.steps.distil import Distil
from pocketlm.steps.quantize import Quantize, quantize

BATCH = 32
ANSWER_TOKENS = 16
LENGTH = 512


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="text for the statistics of the cut")
    parser.add_argument("--student", default="depth=12,ffn=768")
    parser.add_argument("--epochs", type=float, default=4.0, help="over the examples, for teacher and students alike")
    parser.add_argument("--teacher-rate", type=float, default=1e-4)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--control-rate", type=float, nargs="+", help="of the control; the best on held-out counts")
    parser.add_argument(
        "--cross-entropy", type=float, default=0.5, help="share of the answers in what the student learns"
    )
    parser.add_argument("--format", default="IQ4_NL", help="the student is stored in")
    parser.add_argument("--teach", type=int, help="examples to teach at most, drawn at random")
    parser.add_argument("--limit", type=int, help="test examples at most, drawn at random")
    parser.add_argument("--prompted", type=int, default=300, help="of them are asked of the untrained model")
    parser.add_argument("--shots", type=int, default=10, help="examples that the untrained model is shown")
    parser.add_argument("--seed", type=int, default=0)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{today}-distill-task.md")
    return parser.parse_args()


def examples_of(path: Path, part: str) -> list[Example]:
    """Read examples, of clinc150 those of one part."""
    if path.name != "data_full.json":
        return read_examples(path)
    return [
        Example(f"What is the intent of this request?\n{text}", label.replace("_", " "))
        for text, label in json.loads(path.read_text())[part]
    ]


def drawn(examples: list[Example], most: int | None, seed: int) -> list[Example]:
    """Return some of the examples, or all where no number is given."""
    return random.Random(seed).sample(examples, min(most or len(examples), len(examples)))


@torch.no_grad()
def answers(model: LanguageModel, examples: list[Example]) -> list[str]:
    """Return a model's greedy answers."""
    tokenizer, said = model.tokenizer, []
    end = tokenizer.eos_token_id
    for start in range(0, len(examples), BATCH):
        prompts = [encode_prompt(tokenizer, example.prompt) for example in examples[start : start + BATCH]]
        longest = max(map(len, prompts))
        ids = torch.tensor([[end] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        made = model.network.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=end
        )
        said += [_text(tokenizer, row) for row in made[:, longest:]]
    return said


@torch.no_grad()
def prompted(model: LanguageModel, examples: list[Example], labels: list[str], shown: list[Example]) -> list[str]:
    """Return the label that an untrained model finds likeliest for each example, by mean log-probability of its tokens.

    All labels are read at once behind one prompt: each sees the prompt and itself, and no other.
    """
    tokenizer, network = model.tokenizer, model.network
    told = f"Classify requests by their intent. The intents are: {', '.join(labels)}.\n\n"
    told += "".join(f"{each.prompt}\n{each.answer}\n\n" for each in shown)
    ends = [tokenizer(label, add_special_tokens=False).input_ids for label in labels]
    flat = [token for end in ends for token in end]
    owner = torch.tensor([place for place, end in enumerate(ends) for _ in end])
    depth = torch.tensor([place for end in ends for place in range(len(end))])
    within = (owner[:, None] == owner) & (depth[:, None] >= depth)
    said = []
    for example in examples:
        prompt = encode_prompt(tokenizer, told + example.prompt)
        count, total = len(prompt), len(prompt) + len(flat)
        sees = torch.ones(total, total).tril().bool()
        sees[count:, count:] = within
        places = torch.cat([torch.arange(count), count + depth])
        mask = torch.zeros(1, 1, total, total, dtype=network.dtype).masked_fill(~sees, torch.finfo(network.dtype).min)
        with fast_forward(places.device):
            logits = network(
                input_ids=torch.tensor([prompt + flat]), attention_mask=mask, position_ids=places[None], use_cache=False
            ).logits[0, count - 1 :]
        chances = logits.float().log_softmax(-1)
        # A label's first token follows the prompt's last, the others the token before them.
        before = torch.where(depth == 0, 0, torch.arange(len(flat)))
        each = chances[before, torch.tensor(flat)]
        sums = torch.zeros(len(labels)).index_add_(0, owner, each)
        said.append(labels[int((sums / torch.tensor([len(end) for end in ends])).argmax())])
    return said


def prompted_rows(model: LanguageModel, learnt: list[Example], test: list[Example], most: int) -> list[dict]:
    """Return the accuracy of an untrained model that is told the labels, without examples and with `most`."""
    rows, labels = [], sorted({example.answer for example in learnt})
    for shots in (0, most):
        shown = learnt[:: max(1, len(learnt) // max(1, shots))][:shots]
        found = accuracy(prompted(model, test, labels, shown), test)
        name = f"original, told the {len(labels)} answers, {shots} examples shown; {len(test)} asked"
        rows.append({"model": name, "parameters": model.network.num_parameters(), "bytes": None, "accuracy": found})
        print(rows[-1], flush=True)
    return rows


def _text(tokenizer: object, row: Tensor) -> str:
    return tokenizer.decode(row, skip_special_tokens=True).strip()


def answers_in_engine(path: Path, tokenizer: object, examples: list[Example]) -> list[str]:
    """Return the greedy answers of a GGUF file in llama.cpp."""
    said = []
    with Engine(path, context=LENGTH) as engine:
        for example in examples:
            ids = encode_prompt(tokenizer, example.prompt)
            asked = len(ids)
            while len(ids) < asked + ANSWER_TOKENS:
                ids.append(int(engine.logits(ids)[-1].argmax()))
                if ids[-1] == tokenizer.eos_token_id:
                    break
            said.append(_text(tokenizer, torch.tensor(ids[asked:])))
    return said


def accuracy(said: list[str], examples: list[Example]) -> dict[str, float]:
    """Return the share of right answers with its 95 % interval (Wilson)."""
    right = sum(text == example.answer for text, example in zip(said, examples, strict=True))
    return asdict(wilson(right, len(examples)))


def trained(args: argparse.Namespace, teacher: str, student: str, how: Distil, task: Path, screen: Screen) -> Path:
    """Return the folder of a student taught the task."""
    inputs = {"teacher": _key(teacher), "student": student if "=" in student else _key(student), "how": asdict(how)}
    inputs |= {"task": file_sha256(task), "data": [file_sha256(path) for path in args.data]}

    def produce(folder: Path) -> dict:
        job = Distillation(
            teacher=teacher, student=student, how=how, task=task, data=tuple(args.data), out=folder / "made"
        )
        made = distill(job, screen.progress)
        shutil.copytree(folder / "made" / "hf", folder / "hf")
        return {"summaries": made.summaries, "details": made.details, "parameters": made.parameters}

    return stage("benchmark-task", inputs, produce).folder


def _key(folder: str) -> str:
    return load(folder).origin.key


def stored(folder: Path, form: str, text: Tensor) -> Path:
    """Return the student's GGUF file at 4 to 5 bits."""
    model = load(str(folder / "hf"))
    importance = token_importance(model.network, text)
    model, packed, _ = quantize(model, Quantize(formats={"*": form}), text, importance=importance)
    path = folder / f"student-{form}.gguf"
    write_gguf(model, packed, path)
    return path


def main() -> None:
    """Teach, measure, write."""
    args = arguments()
    learnt = drawn(examples_of(args.train, "train"), args.teach, args.seed)
    test = drawn(examples_of(args.test, "test"), args.limit, args.seed)
    base = load(args.model)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    task = args.out.with_suffix(".train.jsonl")
    task.write_text("\n".join(json.dumps(asdict(example)) for example in learnt))
    tokens = int(args.epochs * pack_examples(learnt, base.tokenizer, LENGTH).numel())
    common = {"tokens": tokens, "warm_up": 0.05, "evaluations": 8, "seed": args.seed}
    rows = []

    def measured(name: str, folder: str, said: list[str] | None = None, size: int | None = None) -> None:
        model = load(folder)
        row = {"model": name, "parameters": sum(each.numel() for each in model.network.parameters()), "bytes": size}
        rows.append(row | {"accuracy": accuracy(said or answers(model, test), test)})
        print(rows[-1], flush=True)

    with Screen() as screen:
        rows += prompted_rows(base, learnt, test[: args.prompted], args.shots)
        measured("original, asked as it is", args.model)
        how = Distil(learning_rate=args.teacher_rate, cross_entropy=1.0, **common)
        teacher = trained(args, args.model, args.model, how, task, screen) / "hf"
        measured("original, fine-tuned: the teacher", str(teacher))
        how = Distil(learning_rate=args.learning_rate, cross_entropy=args.cross_entropy, **common)
        student = trained(args, str(teacher), args.student, how, task, screen)
        measured(f"student {args.student}, distilled", str(student / "hf"))
        for rate in args.control_rate or [args.learning_rate]:
            how = Distil(learning_rate=rate, cross_entropy=1.0, **common)
            control = trained(args, str(teacher), args.student, how, task, screen) / "hf"
            measured(f"student {args.student}, control at {rate:g}", str(control))
        path = stored(student, args.format, pack_examples(learnt, base.tokenizer, LENGTH).ids[:32])
        said = answers_in_engine(path, base.tokenizer, test)
        measured(f"student distilled, {args.format}, in llama.cpp", str(student / "hf"), said, path.stat().st_size)
    task.unlink()
    here = machine(args.out.parent)
    lines = [
        "# A narrow task",
        "",
        f"`{command_line()}`",
        "",
        f"{here.cpu}, {torch.get_num_threads()} threads; "
        + ", ".join(f"{name} {which}" for name, which in versions().items())
        + ".",
        f"{len(learnt):,} examples teach, {args.epochs:g} times ({tokens:,} tokens, padding included), the same for",
        f"all trainings; {len(test):,} others are asked; an answer counts if it is exactly right; in brackets 95 %",
        "intervals (Wilson).",
        "",
        "| model | parameters | bytes | accuracy |",
        "|---|---|---|---|",
    ]
    for row in rows:
        share = row["accuracy"]
        cell = f"{share['value']:.3f} [{share['low']:.3f}, {share['high']:.3f}]"
        size = f"{row['bytes']:,}" if row["bytes"] else ""
        lines.append(f"| {row['model']} | {row['parameters']:,} | {size} | {cell} |")
    write_results(args.out, lines, rows)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
