"""Where and in which precision forward passes run."""

from contextlib import AbstractContextManager
from functools import cache

import torch


@cache
def forward_dtype(device_type: str) -> torch.dtype:
    """Return bfloat16 where the hardware multiplies it natively, else float32."""
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def fast_forward(device: torch.device) -> AbstractContextManager:
    """Return the autocast context of forward passes: weights keep the precision they are stored in."""
    dtype = forward_dtype(device.type)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)
