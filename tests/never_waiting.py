"""How tests see that nothing waits for a GPU which need not be there."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2")


class NeverWaiting(TorchDispatchMode):
    """Refuses what makes a program wait for its GPU: reading a number, shapes that depend on values, copies that are
    not left to the device."""

    def __init__(self, gpu: torch.device) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, first = func.overloadpacket.__name__, args[0] if args else None
        if isinstance(first, torch.Tensor):
            there = first.device == self._gpu
            assert not (there and name in WAITS), f"{name} waits for the device"
            if name == "index" and there:
                assert all(i is None or i.dtype != torch.bool for i in args[1]), "a mask as an index is waited for"
            if name == "_to_copy" and kwargs.get("device", first.device) != first.device:
                assert kwargs["device"] == self._gpu, "a tensor comes back from the device"
                assert kwargs.get("non_blocking"), "a copy to the device is waited for"
            if name == "copy_":
                assert first.device == args[1].device, "a copy to the device is waited for"
        return func(*args, **kwargs)
