from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from bm3il.protocol.networks.adam import Adam


def two() -> list[nn.Parameter]:
    return [nn.Parameter(torch.arange(5.0)), nn.Parameter(torch.full((2, 3), 0.5))]


def push(parameters: list[nn.Parameter], step: int) -> None:
    for parameter in parameters:
        parameter.grad = parameter.detach() ** 2 + 1
    if step == 1:  # a step without the second
        parameters[1].grad = None


@pytest.mark.parametrize("decay", [0.0, 0.02])
@pytest.mark.parametrize("ascend", [False, True])
def test_the_bits_are_those_of_pytorch(decay: float, ascend: bool) -> None:
    ours, theirs = two(), two()
    kind = torch.optim.AdamW if decay else torch.optim.Adam
    reference = kind(theirs, 0.1, weight_decay=decay, maximize=ascend, fused=True)
    optimiser = Adam(ours, 0.1, decay, ascend)
    for step in range(4):
        push(ours, step)
        push(theirs, step)
        if step == 2:
            optimiser.set_rate(0.03)
            reference.param_groups[0]["lr"] = 0.03
        optimiser.step()
        reference.step()
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    optimiser.zero_grad()
    assert all(parameter.grad is None for parameter in ours)


def test_it_goes_on_bit_by_bit_from_its_arrays() -> None:
    parameters = two()
    optimiser = Adam(parameters, 0.1)
    for step in range(3):
        push(parameters, step)
        optimiser.step()
    copied = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    other = Adam(copied, 0.1)
    arrays = {name: np.atleast_1d(array).copy() for name, array in optimiser.arrays()}  # as a file gives them back
    assert [int(arrays[f"{k}/step"][0]) for k in (0, 1)] == [3, 2]
    other.load_arrays(arrays)
    for step in range(3):
        for these, one in ((parameters, optimiser), (copied, other)):
            push(these, step)
            one.step()
    assert all(torch.equal(one, other) for one, other in zip(parameters, copied, strict=True))


def test_arrays_that_do_not_fit_are_refused() -> None:
    optimiser = Adam(two())
    arrays = dict(optimiser.arrays())
    with pytest.raises(KeyError, match="1/exp_avg"):
        optimiser.load_arrays({name: array for name, array in arrays.items() if name != "1/exp_avg"})
    with pytest.raises(RuntimeError, match="size"):
        optimiser.load_arrays(arrays | {"0/exp_avg": np.zeros(7, np.float32)})


def test_who_learns_does_not_import_the_compiler() -> None:
    code = """import sys, torch
from bm3il.protocol.networks.adam import Adam
p = torch.nn.Parameter(torch.zeros(2)); p.grad = torch.ones(2); Adam([p]).step()
print("torch._dynamo" in sys.modules)"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["False"]
