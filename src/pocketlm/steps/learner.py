"""A quantized matrix that learns: gradients of its weights become gradients of the numbers that are stored."""

from typing import Any

import torch
from torch import Tensor, nn

from pocketlm.model.anatomy import is_transposed, overwrite_weight, read_weight
from pocketlm.tensors.elimination import coefficients
from pocketlm.tensors.formats import Quantized, effective, ratios

ROUNDING_SLACK = 0.9  # of the way from a level to the border of its cell: how far off a latent weight may start


class Learner:
    """One quantized matrix while it learns: stored numbers in, weights out, gradients back to the stored numbers.

    The stored numbers stay on the CPU, wherever the network is: next to its passes they are little work.
    """

    def __init__(self, module: nn.Module, start: Quantized, codes_too: bool) -> None:
        self.module, self.start = module, start
        self.gap = (start.format.levels[-1] - start.format.levels[0]) / (len(start.format.levels) - 1)
        # Scales are trained as factors, so that one learning rate suits all of them.
        self.factor = nn.Parameter(torch.ones_like(start.scales))
        # A codebook's codes stay: to find the nearest of its vectors anew takes ten times as long as all the rest.
        self.latent = nn.Parameter(self._latent()) if codes_too and start.format.vector == 1 else None

    @torch.no_grad()
    def _latent(self) -> Tensor:
        """Return the weights in gaps between levels, moved inside the cell of the code they have."""
        levels, codes = self.start.format.table(), self.start.codes.long()
        half = levels.diff() / 2
        below, above = torch.cat([half[:1], half]), torch.cat([half, half[-1:]])
        away = self._ratios(read_weight(self.module).cpu().float()) - levels[codes]
        away = away.clamp(-ROUNDING_SLACK * below[codes], ROUNDING_SLACK * above[codes])
        return (levels[codes] + away) / self.gap

    def _ratios(self, weight: Tensor) -> Tensor:
        form = self.start.format
        a, b = effective(form, self.start.scales, self.start.steps)
        grouped = weight.unflatten(1, (-1, form.group))
        return ratios(grouped, a[..., None], None if b is None else b[..., None]).flatten(1)

    @torch.no_grad()
    def quantized(self) -> Quantized:
        """Return what would be stored now."""
        form = self.start.format
        scales = form.storable(self.start.scales * self.factor)[0]
        codes = self.start.codes if self.latent is None else form.nearest(self.latent * self.gap)
        return Quantized(form, codes, scales, self.start.steps)

    @torch.no_grad()
    def show(self) -> Quantized:
        """Give the network the weights that would be stored now, and return them."""
        now = self.quantized()
        overwrite_weight(self.module, now.decode())
        return now

    @torch.no_grad()
    def take_gradient(self) -> None:
        """Turn the weight's gradient into those of the stored numbers; rounding passes it straight through."""
        form, now = self.start.format, self.quantized()
        slope = read_gradient(self.module).cpu().float()
        per_scale = (slope[..., None] * coefficients(now)).unflatten(1, (-1, form.span)).sum(2)
        self.factor.grad = per_scale * self.start.scales
        if self.latent is not None:
            a, _ = effective(form, now.scales, now.steps)
            self.latent.grad = slope * a.repeat_interleave(form.group, 1) * self.gap
        self.module.weight.grad = None


def learning_groups(learners: list[Learner], scale_rate: float, code_rate: float) -> list[dict[str, Any]]:
    """Return what the learners train and how fast, as torch's optimizers take it."""
    latents = [learner.latent for learner in learners if learner.latent is not None]
    scales = {"params": [learner.factor for learner in learners], "lr": scale_rate}
    return [scales, {"params": latents, "lr": code_rate}] if latents else [scales]


def read_gradient(module: nn.Module) -> Tensor:
    """Return the gradient of a linear's weight as (out, in)."""
    gradient = module.weight.grad
    return gradient.T.contiguous() if is_transposed(module) else gradient
