"""What many tests start from: tiny models, loaded anew for each test, and forward passes without rounding."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from tests.tiny import tiny_folder

from pocketlm.model.language_model import LanguageModel
from pocketlm.model.source import load

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # bits of two runs are compared: both train on the CPU
torch.set_num_threads(1)  # the tensors are tiny: a second thread only waits

# How long an example takes says nothing on a busy machine.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

Tiny = Callable[..., LanguageModel]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Return `tiny_model(family, **changes of the config)`, each call a new copy in float32."""

    @cache
    def folder(family: str, changes: frozenset[tuple]) -> Path:
        return tiny_folder(family, tmp_path_factory.mktemp(family), **dict(changes))

    return lambda family, **changes: load(str(folder(family, frozenset(changes.items()))))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run forward passes in the precision of the weights, where the hardware would take bfloat16."""
    monkeypatch.setattr("pocketlm.model.compute.forward_dtype", lambda device_type: torch.float32)
