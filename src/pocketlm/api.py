"""What makes and measures models, as Python functions; `quantize` is `fit(Fit(..., prune=False))`.

from pathlib import Path

from pocketlm.api import Fit, fit

report = fit(Fit(model="demo", size="70MB", out=Path("p70")))
print(report.product.perplexity_ratio)
"""

from pocketlm.commands.distillation import Distillation, distil_settings, distill
from pocketlm.commands.inspection import bench, doctor, evaluate, evaluate_harness, evaluate_tasks, inspect
from pocketlm.commands.integers import plan_integers, quantize_integers
from pocketlm.commands.pruning import Prune, prune
from pocketlm.commands.sweep import sweep
from pocketlm.fit import fit, plan
from pocketlm.model.language_model import LanguageModel, save
from pocketlm.model.source import load
from pocketlm.pipeline.planning import Fit
from pocketlm.run.chat import chat_loop as chat
from pocketlm.steps.distil import Distil

__all__ = [
    "Distil",
    "Distillation",
    "Fit",
    "LanguageModel",
    "Prune",
    "bench",
    "chat",
    "distil_settings",
    "distill",
    "doctor",
    "evaluate",
    "evaluate_harness",
    "evaluate_tasks",
    "fit",
    "inspect",
    "load",
    "plan",
    "plan_integers",
    "prune",
    "quantize_integers",
    "save",
    "sweep",
]
