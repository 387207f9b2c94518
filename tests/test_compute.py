"""The precision of forward passes, on hardware without bfloat16."""

import pytest
import torch
from tests.conftest import Tiny
from tests.tiny import FAMILIES
from torch.utils._python_dispatch import TorchDispatchMode

from pocketlm.model.compute import fast_products
from pocketlm.model.importance import token_importance
from pocketlm.model.source import load
from pocketlm.model.sweep import final_hidden, sweep

WINDOWS = torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(0))
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.linear)


class Products(TorchDispatchMode):
    """Notes the precision of every matrix product, backward passes included."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in PRODUCTS:
            self.dtypes |= {arg.dtype for arg in args if isinstance(arg, torch.Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.usefixtures("exact")
def test_weights_kept_in_16_bits_are_multiplied_in_float32(
    tiny_model: Tiny, family: str, recomputes: bool, monkeypatch: pytest.MonkeyPatch
):
    """On CPUs without it, a product in bfloat16 takes up to 200 times as long: a 1B model would seem to hang."""
    if recomputes:  # as large models do
        monkeypatch.setattr("pocketlm.model.learning.CHECKPOINT_PARAMETERS", 0)
    source = tiny_model(family).origin.source
    narrow, wide = load(source, torch.bfloat16).network, load(source, torch.bfloat16).network.float()
    with Products() as seen:
        found = token_importance(narrow, WINDOWS, 0)
        moments = [layer.gram for layer in sweep(narrow, WINDOWS, head=True, original=True)]
        hidden = final_hidden(narrow, WINDOWS)
    assert seen.dtypes == {torch.float32}
    assert {parameter.dtype for parameter in narrow.parameters() if parameter.dim() == 2} == {torch.bfloat16}
    for place, values in token_importance(wide, WINDOWS, 0).items():
        assert torch.allclose(found[place], values, rtol=0.2, atol=0.05)
    for layer, gram in zip(sweep(wide, WINDOWS, head=True, original=True), moments, strict=True):
        for space, values in layer.gram.items():
            assert (gram[space] - values).norm() < 0.02 * values.norm()
    assert (hidden - final_hidden(wide, WINDOWS)).norm() < 0.02 * hidden.norm()


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="torch before 2.9 has no such setting")
def test_products_are_rounded_only_while_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pocketlm.model.compute.forward_dtype", lambda device_type: torch.bfloat16)
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    with pytest.raises(ZeroDivisionError), fast_products(torch.device("cpu")):
        1 / (settings.fp32_precision != "bf16")
    assert settings.fp32_precision == before
