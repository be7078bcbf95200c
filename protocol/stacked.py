"""Stacked networks: K networks of one shape, parameters [K, in, out], applied with one batched matrix product."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import nn


def stacked_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """K linear maps at once.

    x [K, R, in], weight [K, in, out], bias [K, 1, out] → [K, R, out].
    """
    return torch.baddbmm(bias, x, weight)


class StackedMLP(nn.Module):
    """K multilayer perceptrons of widths `widths`, the activation between layers, none after the last.

    identity_slots: with S > 1 the first layer has one bias per slot, [K, S, out]: the same network as one that sees
        the agent's number one-hot beside its observation. Rows must then be ordered [B, S].
    """

    def __init__(
        self,
        networks: int,
        widths: Sequence[int],
        generator: torch.Generator,
        activation: Callable[[torch.Tensor], torch.Tensor] = torch.relu,
        identity_slots: int = 1,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.slots = identity_slots
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for layer, (width_in, width_out) in enumerate(pairwise(widths)):
            slots = identity_slots if layer == 0 else 1
            self.weights.append(uniform((networks, width_in, width_out), width_in, generator))
            self.biases.append(uniform((networks, slots, width_out), width_in, generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [K, R, in] → [K, R, out]."""
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if bias.shape[1] > 1:
                bias = bias.repeat(1, x.shape[1] // self.slots, 1)
            x = stacked_linear(x, weight, bias)
            if layer < len(self.weights) - 1:
                x = self.activation(x)
        return x


def uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> nn.Parameter:
    """A parameter drawn from U(±1/√fan_in), the customary start of a linear layer."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))
