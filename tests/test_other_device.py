"""Training runs on the device that it was moved to, and nothing stays behind.

No GPU is needed: torch's `meta` device stands in for one, whose tensors have shapes but no numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.fx.experimental._config as symbolic
from tests.conftest import Tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pocketlm.errors import OutOfResourcesError
from pocketlm.model.compute import moved_to, training_devices
from pocketlm.model.learning import Lessons
from pocketlm.model.respelling import Respeller
from pocketlm.model.targets import Sampling, write_targets
from pocketlm.steps.distil import Distil, distil
from pocketlm.steps.quantize import Quantize, quantize
from pocketlm.steps.tune import Tune, tune

WINDOWS, HELD_OUT = (torch.randint(3, 300, (rows, 32), generator=torch.Generator().manual_seed(0)) for rows in (6, 2))
GROUPS = ("embedding", "query_key", "value", "attention_out", "ffn_in", "ffn_out")


class OneDevice(TorchDispatchMode):
    """Refuses what a GPU refuses: operations on tensors of several devices, copies and single numbers apart."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor) and each.dim()]
        assert "copy" in func.name() or len({each.device.type for each in tensors}) < 2, func.name()
        return func(*args, **(kwargs or {}))


@contextmanager
def moved_for_good(device: torch.device, *networks: nn.Module) -> Iterator[None]:
    for network in networks:
        network.to(device)
    with OneDevice():
        yield


@pytest.fixture
def other_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Train on `meta`; where a program asks one of its tensors for a number, it gets zeros."""
    adam = torch.optim.AdamW
    for step in ("distil", "tune"):
        monkeypatch.setattr(f"pocketlm.steps.{step}.training_devices", lambda *sizes: (torch.device("meta"),))
        monkeypatch.setattr(f"pocketlm.steps.{step}.moved_to", moved_for_good)
    for name, of in (("cpu", lambda zeros: zeros), ("item", Tensor.item), ("tolist", Tensor.tolist)):
        plain = getattr(Tensor, name)
        monkeypatch.setattr(
            Tensor, name, lambda self, of=of, plain=plain: of(_zeros(self)) if self.is_meta else plain(self)
        )
    monkeypatch.setattr(Tensor, "__bool__", lambda self: self.is_meta or bool(self.item()))
    monkeypatch.setattr(torch, "equal", lambda a, b: False)
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, **settings: adam(*args, **settings | {"fused": False}))
    with symbolic.patch(meta_nonzero_assume_all_nonzero=True):
        yield


def _zeros(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"loss": "jensen_shannon", "cross_entropy": 0.3}, {"hidden_states": 1.0, "relations": 1.0}, {"adapters": 2}],
    ids=str,
)
@pytest.mark.usefixtures("other_device")
def test_distillation_leaves_nothing_behind(tiny_model: Tiny, family: str, settings: dict):
    config = Distil(tokens=256, windows_per_step=2, evaluations=1, **settings)
    student, report = distil(tiny_model(family), tiny_model(family), config, WINDOWS, HELD_OUT)
    assert {parameter.device.type for parameter in student.network.parameters()} == {"meta"}
    assert len(report.details["losses"]) == 4


@pytest.mark.parametrize("kind", ["sampled", "top"])
def test_targets_on_disk_come_along(
    tiny_model: Tiny, tmp_path: Path, kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    kept = write_targets(tiny_model("llama"), WINDOWS, tmp_path, Sampling(kind=kind, count=5))
    request.getfixturevalue("other_device")
    lessons = Lessons(WINDOWS, torch.arange(32).expand(6, 32).contiguous(), WINDOWS > 100, targets=kept)
    # How often to repeat a number is asked of the device, which has none.
    monkeypatch.setattr(Tensor, "repeat_interleave", lambda self, counts: self.new_zeros(int(5 * len(self))))
    config = Distil(tokens=256, windows_per_step=2, evaluations=1)
    _, report = distil(tiny_model("llama"), tiny_model("llama"), config, lessons, Lessons(HELD_OUT))
    assert len(report.details["losses"]) == 4


@pytest.mark.parametrize("train", ["scales", "weights"])
@pytest.mark.parametrize("respells", [False, True])
def test_tuning_leaves_nothing_behind(tiny_model: Tiny, train: str, respells: bool, request: pytest.FixtureRequest):
    teacher, student = tiny_model("llama"), tiny_model("llama")
    rows = quantize(tiny_model("llama"), Quantize(formats=dict.fromkeys(GROUPS, "Q4_0"), method="rtn"), WINDOWS)[1]
    spelling = [(index,) for index in range(teacher.network.config.vocab_size)]
    request.getfixturevalue("other_device")
    config = Tune(tokens=256, windows_per_step=2, evaluations=1, train=train)
    asked = Respeller(teacher, spelling) if respells else teacher
    made, stored, _ = tune(asked, student, rows, config, (WINDOWS, HELD_OUT))
    assert {parameter.device.type for parameter in made.network.parameters()} == {"meta"}
    assert {packed.rows.device.type for packed in stored.values()} == {"cpu"}


# ---- where to ----


def test_networks_come_back(tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch):
    network, seen = tiny_model("llama").network, []
    monkeypatch.setattr(type(network), "to", lambda self, device: seen.append(torch.device(device)))
    gpus(monkeypatch, 8)
    with moved_to(torch.device("cuda"), network):
        assert [device.type for device in seen] == ["cuda"]
    assert [device.type for device in seen] == ["cuda", "cpu"]


def gpus(monkeypatch: pytest.MonkeyPatch, *gigabytes: int) -> None:
    free = [(size << 30, size << 30) for size in gigabytes]
    monkeypatch.setattr(
        torch,
        "cuda",
        SimpleNamespace(
            is_available=lambda: True,
            device_count=lambda: len(free),
            mem_get_info=free.__getitem__,
            set_device=lambda device: None,
            empty_cache=lambda: None,
        ),
    )
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)


def test_a_gpu_that_is_too_small_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    gpus(monkeypatch, 8)
    small, large = nn.Linear(27_000, 10_000, device="meta"), nn.Linear(200_000, 10_000, device="meta")
    assert training_devices(4, small) == (torch.device("cuda", 0),)
    assert training_devices(4, large, small) == (torch.device("cpu"),)


def test_as_many_gpus_train_as_share_a_batch_evenly(monkeypatch: pytest.MonkeyPatch):
    gpus(monkeypatch, 80, 2, 80, 80, 80)
    assert training_devices(4, nn.Linear(2, 2)) == tuple(torch.device("cuda", index) for index in (0, 2, 3, 4))
    assert training_devices(6, nn.Linear(2, 2)) == tuple(torch.device("cuda", index) for index in (0, 2, 3))
    assert training_devices(1, nn.Linear(2, 2)) == (torch.device("cuda", 0),)


def test_running_out_of_its_memory_says_how_to_go_on(tiny_model: Tiny):
    with (
        pytest.raises(OutOfResourcesError, match="CUDA_VISIBLE_DEVICES"),
        moved_to(torch.device("cpu"), tiny_model("llama").network),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
