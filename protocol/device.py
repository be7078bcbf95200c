"""Where a role computes: on the CPU, or on a GPU."""

from __future__ import annotations

import torch

from protocol.errors import InputError

PARTS_OF_MEMORY = 16
"""On a GPU, arrays of one kind take up to this part of its memory at a time: there may be several of them, of several
roles. Of its whole memory and not of what is free, so that the same card computes in the same parts."""


def choose_device(name: str) -> torch.device:
    """`auto` takes the GPU if there is one. Raises InputError for a GPU that this machine, or its torch, lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no GPU that this PyTorch can use; leave out --device cuda, or install another build")
    return torch.device(name)


def numbers_at_once(device: torch.device) -> int:
    """How many float32 numbers of one kind to compute at a time on a GPU, which wants few and large products."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 2**40
    return memory // (4 * PARTS_OF_MEMORY)


def moved(tensors: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """On another device, without waiting for it: what runs there comes after the copies."""
    return [tensor.to(device, non_blocking=True) for tensor in tensors]
