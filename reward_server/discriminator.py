"""Stacked discriminators D(s, a; φ) of one block: L particles for each of G groups, applied in batched products.

They work on logits z, D = sigmoid(z), the probability that an *agent* (label 1) and not the expert (label 0) acted:
log D = −softplus(−z) and log(1 − D) = −softplus(z).

Rows are the last axis of activations, [G·L, width, R]: the input is the same for all particles of a group, so the first
layer is one product with L·H outputs per group, and its result is the stack of the second layer as it lies in memory.
The gradient is written out by hand: SVGD needs it for given cotangents, in place, without a graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from protocol.layout import Block

Activation = Literal["relu", "sigmoid"]

_aten = torch.ops.aten


@dataclass(frozen=True)
class Architecture:
    """Shapes of the discriminators of a block.

    A layer is one tensor [G, L, out, in + biases], weights and biases side by side. The first layer has one bias
    per slot if `agent_identity` (the same network as one that sees the slot's number one-hot), else one.
    """

    block: Block
    particles: int
    hidden: tuple[int, ...]
    activation: Activation
    agent_identity: bool

    @property
    def biases(self) -> int:
        """Bias columns of the first layer."""
        return self.block.slots if self.agent_identity else 1

    @property
    def inputs(self) -> int:
        """Width of the input without the bias columns."""
        return self.block.observation_dim + self.block.action_dim

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the layers."""
        widths = [self.inputs, *self.hidden, 1]
        biases = [self.biases] + [1] * len(self.hidden)
        return [
            (self.block.groups, self.particles, wide, narrow + bias)
            for narrow, wide, bias in zip(widths[:-1], widths[1:], biases, strict=True)
        ]

    def split(self, layer: int) -> int:
        """The column of a layer where its biases begin."""
        return self.shapes[layer][-1] - (self.biases if layer == 0 else 1)

    def tensors(self, layers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The weights and the biases of layers (or of gradients) apart, [G, L, d] each."""
        columns = [(layer, self.split(k)) for k, layer in enumerate(layers)]
        return [t.flatten(2) for layer, k in columns for t in (layer[..., :k], layer[..., k:])]

    def join(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The inverse of `tensors`."""
        pairs = zip(tensors[::2], tensors[1::2], self.shapes, strict=True)
        return [torch.cat([t.unflatten(2, (shape[2], -1)) for t in pair], dim=-1) for *pair, shape in pairs]

    def initial(self, generator: torch.Generator) -> list[torch.Tensor]:
        """Layers drawn from U(±1/√fan_in)."""
        layers = []
        for layer, shape in enumerate(self.shapes):
            bound = 1 / math.sqrt(self.split(layer))
            layers.append(torch.empty(shape).uniform_(-bound, bound, generator=generator))
        return layers

    def encode(self, observations: torch.Tensor, actions: torch.Tensor, out: torch.Tensor) -> None:
        """Write the input of the first layer.

        observations [G, B, S, O] and actions [G, B, S] or [G, B, S, A] → out [G, B, S, O + A + biases].
        """
        width, end = self.block.observation_dim, self.inputs
        out[..., :width] = observations
        if self.block.discrete:
            out[..., width:end].zero_().scatter_(-1, actions.unsqueeze(-1), 1)
        else:
            out[..., width:end] = actions
        out[..., end:] = torch.eye(self.block.slots, device=out.device) if self.agent_identity else 1


def forward(
    layers: Sequence[torch.Tensor], x: torch.Tensor, activation: Activation
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of R rows, and the hidden activations that `backward` needs.

    layers: [G, L, out, in + biases] each; x [G, R, in + biases], bias columns included → [G, L, R].
    """
    groups, particles, width, _ = layers[0].shape
    rows = x.shape[1]
    h = torch.bmm(layers[0].flatten(1, 2), x.mT).view(groups * particles, width, rows)
    activations = []
    for layer in layers[1:]:
        activations.append(_ACTIVATE[activation](h))
        stacked = layer.flatten(0, 1)
        h = torch.baddbmm(stacked[..., -1:], stacked[..., :-1], h)
    return h.view(groups, particles, rows), activations


def backward(
    layers: Sequence[torch.Tensor],
    x: torch.Tensor,
    activations: Sequence[torch.Tensor],
    cotangent: torch.Tensor,
    activation: Activation,
) -> list[torch.Tensor]:
    """The gradients of Σ cotangent · logits with respect to the layers; cotangent [G, L, R]."""
    groups, particles, _, inputs = layers[0].shape
    grad = cotangent.flatten(0, 1).unsqueeze(1)
    gradients: list[torch.Tensor] = []
    for layer, h in zip(reversed(layers[1:]), reversed(activations), strict=True):
        by_layer = torch.cat([torch.bmm(grad, h.mT), grad.sum(dim=-1, keepdim=True)], dim=-1)
        gradients.append(by_layer.view(layer.shape))
        grad = torch.bmm(layer.flatten(0, 1)[..., :-1].mT, grad)
        _DIFFERENTIATE[activation](grad, h)
    first = torch.bmm(grad.view(groups, -1, grad.shape[-1]), x)
    gradients.append(first.view(groups, particles, -1, inputs))
    return gradients[::-1]


def _relu_backward(grad: torch.Tensor, h: torch.Tensor) -> None:
    _aten.threshold_backward.grad_input(grad, h, 0, grad_input=grad)


def _sigmoid_backward(grad: torch.Tensor, h: torch.Tensor) -> None:
    _aten.sigmoid_backward.grad_input(grad, h, grad_input=grad)


_ACTIVATE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": torch.relu_, "sigmoid": torch.sigmoid_}
_DIFFERENTIATE: dict[str, Callable[[torch.Tensor, torch.Tensor], None]] = {
    "relu": _relu_backward,
    "sigmoid": _sigmoid_backward,
}
