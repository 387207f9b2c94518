"""Activation-aware scaling: important columns are made larger before rounding, and smaller again afterwards."""

import torch
from torch import Tensor

from pocketlm.tensors.elimination import output_errors
from pocketlm.tensors.formats import Format, round_to_nearest

POWERS = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75)  # of the activations' size that are tried
SAMPLED_ROWS = 512  # of all readers together, on which the powers are compared


@torch.no_grad()
def activation_scale(weights: list[Tensor], gram: Tensor, form: Format) -> Tensor:
    """Return the scale of columns with which rounding makes the smallest output error.

    AWQ (https://arxiv.org/abs/2306.00978): s = size^ρ, sizes from the second moments of the inputs, normalised so that
    its largest and smallest entries are inverse; ρ by search, 0 (all ones) included.

    Args:
        weights: The linears that read the space, (rows, columns) each.
        gram: (columns, columns) float32, the sum of x xᵀ over calibration tokens.
        form: What the weights will be stored in.

    Returns:
        (columns,) float32, positive.
    """
    weight = torch.cat([part[:: max(1, len(part) * len(weights) // SAMPLED_ROWS)] for part in weights]).float()
    sizes = gram.diagonal().clamp_min(gram.diagonal().mean() * 1e-8).sqrt()
    best_error, best = None, None
    for power in POWERS:
        scale = sizes**power
        scale = scale / (scale.max() * scale.min()).sqrt()
        rounded = round_to_nearest(weight * scale, form, gram.diagonal() / scale**2).decode() / scale
        error = output_errors(weight, rounded, gram).sum()
        if best_error is None or error < best_error:
            best_error, best = error, scale
    return best
