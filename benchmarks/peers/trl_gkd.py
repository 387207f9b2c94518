"""Distil with trl's GKD trainer: forward KL at temperature 1 on given text, nothing sampled by the student.

Run it with the Python of an environment that has trl (see README.md):

    python trl_gkd.py --teacher HF_FOLDER --model STUDENT_FOLDER --windows ROWS.safetensors --out OUT \
        [--batch 4] [--steps 6] [--learning-rate 3e-4]

ROWS.safetensors has `windows`, (N, length) token ids, `labels`, the same with -100 where nothing is learnt, and
`lengths`, (N,), what of each row is no padding.

AdamW (fused), bfloat16 autocast with float32 weights of the student and the teacher in bfloat16 where the CPU
multiplies it, else float32; no gradient checkpointing: what is fastest on a CPU. OUT/results.json has the median step's
seconds without the first step (by the clock, and of the processor's work), each step's loss, and the largest resident
size of the process.
"""

import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import arguments, measured, write_results
from safetensors.torch import load_file
from torch import Tensor


def collated(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return a batch as the trainer wants it, as wide as its longest row."""
    longest = max(row["length"] for row in rows)
    ids, labels = (torch.tensor([row[name] for row in rows])[:, :longest] for name in ("input_ids", "labels"))
    mask = (torch.arange(longest) < torch.tensor([[row["length"]] for row in rows])).long()
    prompts = {"prompts": ids[:, :1], "prompt_attention_mask": mask[:, :1]}
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **prompts}


def main() -> None:
    """Train and report."""
    parser = arguments(__doc__)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    args = parser.parse_args()
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    ends: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            ends.append((time.perf_counter(), time.process_time()))

    data = {name: values.tolist() for name, values in load_file(args.windows).items()}
    short = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    student = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.bfloat16 if short else torch.float32)
    config = GKDConfig(
        output_dir=str(args.out / "trainer"),
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        per_device_train_batch_size=args.batch,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        optim="adamw_torch_fused",
        bf16=short,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        data_collator=collated,
        train_dataset=Dataset.from_dict(
            {"input_ids": data["windows"], "labels": data["labels"], "length": data["lengths"]}
        ),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        callbacks=[Clock()],
    )
    _, figures = measured(lambda: trainer.train() and student)
    seconds, work = ([later[i] - earlier[i] for earlier, later in pairwise(ends)] for i in (0, 1))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    settings = {"batch": args.batch, "losses": losses, "step_seconds": statistics.median(seconds)}
    settings["step_cpu_seconds"] = statistics.median(work)
    write_results(args.out, "trl", figures, settings)


if __name__ == "__main__":
    main()
