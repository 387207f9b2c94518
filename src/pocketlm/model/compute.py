"""Where and in which precision forward passes run."""

import copy
import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.overrides import TorchFunctionMode

from pocketlm.errors import OutOfResourcesError

# For `mallopt` of glibc (malloc.h): never trim the heap, grow it by 64 MB, take no mappings; and the defaults.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
REUSING = ((TRIM_THRESHOLD, -1), (TOP_PAD, 1 << 26), (MMAP_MAX, 0))
DEFAULTS = ((TRIM_THRESHOLD, 1 << 17), (TOP_PAD, 1 << 17), (MMAP_MAX, 1 << 16))
# What training takes on a GPU: per parameter of teacher and student, in float32, gradients, moments and the best
# checkpoint spread over both; and for activations and logits.
TRAINING_BYTES, ACTIVATION_BYTES = 14, 3 << 30
NARROW = (torch.bfloat16, torch.float16)
PRODUCTS = (nn.functional.linear, torch.addmm)  # what the linears of all families call


@cache
def forward_dtype(device_type: str) -> torch.dtype:
    """Return bfloat16 where the hardware multiplies it natively, else float32."""
    if device_type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = device_type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def fast_forward(device: torch.device) -> AbstractContextManager:
    """Return the context of forward passes, in which products have their dtype: weights keep the one they have."""
    dtype = forward_dtype(device.type)
    return torch.autocast(device.type, dtype=dtype) if dtype is not torch.float32 else _Widening()


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """While open, factors of float32 products may be rounded as those of forward passes are; sums stay in float32.

    On a CPU with torch 2.9 or newer; elsewhere nothing changes.
    """
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if settings is None or device.type != "cpu" or forward_dtype("cpu") is torch.float32:
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


class _Widening(TorchFunctionMode):
    """While open, weights that are kept in 16 bits to save memory are multiplied in float32.

    Where the hardware cannot multiply bfloat16, a product in it takes 7 times as long, and one that leads back through
    a linear 200 times; to widen a matrix first takes a few percent.
    """

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        if func in PRODUCTS:
            args = tuple(arg.float() if isinstance(arg, Tensor) and arg.dtype in NARROW else arg for arg in args)
        return func(*args, **(kwargs or {}))


def as_forward(tensor: Tensor) -> Tensor:
    """Return a tensor in the precision of forward passes."""
    return tensor.to(forward_dtype(tensor.device.type))


def fast_copy(network: nn.Module) -> nn.Module:
    """Return a copy for forward passes only, which computes the same faster: its linears need no conversion each time.

    What `fast_forward` would round for every pass is stored rounded; embeddings and norms keep their precision. Where
    nothing is rounded it is the network itself, as a copy would only take memory.
    """
    if all(parameter.dtype is forward_dtype(parameter.device.type) for parameter in network.parameters()):
        return network
    copied = copy.deepcopy(network).requires_grad_(False)
    tied = {id(copied.get_input_embeddings().weight)}
    for module in copied.modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding) and id(weight) not in tied:
            weight.data = as_forward(weight.data)
    return copied


@contextmanager
def moved_to(device: torch.device, *networks: nn.Module) -> Iterator[None]:
    """While open, networks are on a device; behind it they are on the CPU.

    Raises:
        OutOfResourcesError: The device's memory did not suffice after all.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        for network in networks:
            network.to(device)
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfResourcesError(
            "The GPU has too little memory to train on. Close what else uses it, or train on the CPU by setting "
            "CUDA_VISIBLE_DEVICES to nothing"
        ) from error
    finally:
        for network in networks:
            network.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()  # else the next training finds this one's memory taken


def training_devices(windows: int, *networks: nn.Module) -> tuple[torch.device, ...]:
    """Return where networks learn fastest: GPUs that CUDA reaches and that have the memory, else the CPU.

    Args:
        windows: In a batch, which must come out even when they are shared out.
        networks: Teacher and student, a copy of each for every device.
    """
    parameters = sum(parameter.numel() for network in networks for parameter in network.parameters())
    needed = TRAINING_BYTES * parameters + ACTIVATION_BYTES
    found = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    fit = [index for index in found if torch.cuda.mem_get_info(index)[0] >= needed]
    most = len(fit) if distributed.is_nccl_available() else min(len(fit), 1)
    even = max((count for count in range(1, most + 1) if windows % count == 0), default=0)
    return tuple(torch.device("cuda", index) for index in fit[:even]) or (torch.device("cpu"),)


@contextmanager
def reusing_memory() -> Iterator[None]:
    """While open, what is freed stays in the process, for the next tensor of a training step.

    glibc gives every large tensor pages of its own and hands them back at once; that they are zeroed again each time
    took about 40 % of a training step. Elsewhere nothing is changed.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    known = libc is not None and hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")
    for name, value in REUSING if known else ():
        libc.mallopt(name, value)
    try:
        yield
    finally:
        for name, value in DEFAULTS if known else ():
            libc.mallopt(name, value)
        if known:
            libc.malloc_trim(0)
