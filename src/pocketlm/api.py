"""The commands as Python functions, under the same names.

from pocketlm.api import Fit, fit

report = fit(Fit(model="demo", size="70MB", out=Path("p70")))
print(report.product.perplexity_ratio)
"""

from pocketlm.distillation import Distillation, distill
from pocketlm.fit import fit, plan
from pocketlm.inspection import bench, doctor, evaluate, evaluate_harness, evaluate_tasks, inspect
from pocketlm.integers import quantize_integers
from pocketlm.model.language_model import LanguageModel, save
from pocketlm.model.source import load
from pocketlm.planning import Fit
from pocketlm.pruning import Prune, prune
from pocketlm.run.chat import chat_loop as chat
from pocketlm.steps.distil import Distil
from pocketlm.sweep import sweep

__all__ = [
    "Distil",
    "Distillation",
    "Fit",
    "LanguageModel",
    "Prune",
    "bench",
    "chat",
    "distill",
    "doctor",
    "evaluate",
    "evaluate_harness",
    "evaluate_tasks",
    "fit",
    "inspect",
    "load",
    "plan",
    "prune",
    "quantize_integers",
    "save",
    "sweep",
]
