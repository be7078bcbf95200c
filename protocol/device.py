"""Where a role computes: on the CPU, or on a GPU."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch

from bm3il.protocol.errors import InputError
from bm3il.protocol.settings import Device, Precision
from bm3il.protocol.specs import ArrayTable

CPU = torch.device("cpu")
CPU_FEATURES = Path("/proc/cpuinfo")

PARTS_OF_MEMORY = 16
"""On a GPU, arrays of one kind take up to this part of its memory at a time: there may be several of them, of several
roles. Of its whole memory and not of what is free, so that the same card computes in the same parts."""

log = logging.getLogger(__name__)


def choose_device(name: Device) -> torch.device:
    """`auto` takes the GPU if there is one. Raises InputError for a GPU that this machine, or its torch, lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "there is no GPU that this PyTorch can use; leave out cuda (--device, --learner.device, --reward.device), "
            "or install another build"
        )
    return torch.device(name)


def use_threads(count: int) -> None:
    """For the arithmetic of this process; 0, which nobody has filled in, is one."""
    torch.set_num_threads(max(1, count))


def choose_precision(wanted: Precision, device: torch.device) -> Precision:
    """TF32 and bfloat16 only where the device computes in them; a CPU that must pretend takes ten times as long as in
    float32.

    Says so where float32 is taken instead.
    """
    has = {"tf32": _has_tf32, "bfloat16": _has_bfloat16}
    if wanted != "float32" and not has[wanted](device):
        log.warning("this %s has no instructions for %s: computing in float32", device.type.upper(), wanted)
        return "float32"
    return wanted


@contextmanager
def rounding(precision: Precision) -> Iterator[None]:
    """With `tf32` a GPU's products of float32 are rounded to TF32 while this lasts, forward and back."""
    before = torch.get_float32_matmul_precision()
    if precision == "tf32":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:  # another role of this process may want all the digits
        torch.set_float32_matmul_precision(before)


def _has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere and later


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:  # avx512_bf16 or amx_bf16 of x86, bf16 of Arm
        return "bf16" in CPU_FEATURES.read_text(encoding="utf-8")
    except OSError:  # not Linux: nobody says
        return False


def numbers_at_once(device: torch.device) -> int:
    """How many float32 numbers of one kind to compute at a time on a GPU, which wants few and large products."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 2**40
    return memory // (4 * PARTS_OF_MEMORY)


def check_room(table: ArrayTable, device: torch.device, setting: str, steps: int) -> None:
    """Raise InputError if arrays of these dtypes and shapes cannot all be in the device's memory at once.

    setting: what makes them as large as they are, and its value `steps`: memory is taken when it is written to, so that
    the run would otherwise end when the window is full.
    """
    needed = sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in table.values())
    held = psutil.virtual_memory().total
    if device.type == "cuda":
        held = torch.cuda.get_device_properties(device).total_memory
    if needed > held:
        fits = int(steps * 0.5 * held / needed)
        raise InputError(
            f"--{setting} {steps} would take {needed / 1e9:.1f} GB, and this {device.type.upper()} has "
            f"{held / 1e9:.1f} GB; half of that holds {fits}"
        )


def moved(tensors: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """On another device, without waiting for it: what runs there comes after the copies."""
    return [tensor.to(device, non_blocking=True) for tensor in tensors]
