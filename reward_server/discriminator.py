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

from protocol.layout import Block, JointRows

Activation = Literal["relu", "sigmoid"]

_aten = torch.ops.aten


class Workspace:
    """Buffers that are used again and again: fresh memory costs more than the arithmetic on it.

    What a function wrote to its workspace is overwritten by the next call.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self._dtype, self._device = dtype, device
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """An uninitialised tensor."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=self._dtype, device=self._device)
        return self._buffers[name][:size].view(shape)


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

    @property
    def activations(self) -> int:
        """Hidden activations of one row of a group."""
        return self.particles * sum(self.hidden)

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

    def encode(
        self, rows: JointRows, b: int, index: torch.Tensor, groups: slice, x: torch.Tensor, work: Workspace
    ) -> torch.Tensor:
        """Write the first layer's input for the joint rows `index` [B], of which this is block b.

        x: [g, B, S, in + biases], to write to. Returns which of its rows are active agents, [g, B, S] bool.
        """
        agents = self.block.agent_of_slot.view(-1, self.block.slots)[groups].unsqueeze(1)
        place = (index[:, None] * self.block.num_agents + agents.clamp_min(0)).flatten()
        shape = x.shape[:3]

        def gathered(part: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
            found = torch.index_select(part.flatten(0, 1), 0, place, out=out)
            return found.view(*shape, *found.shape[1:]).to(x.device)

        width, end = self.block.observation_dim, self.inputs
        x[..., :width] = gathered(rows.observations[b], work.take("observations", len(place), width))
        actions = gathered(rows.actions[b])
        if self.block.discrete:
            x[..., width:end].zero_().scatter_(-1, actions.unsqueeze(-1), 1)
        else:
            x[..., width:end] = actions
        x[..., end:] = torch.eye(self.block.slots, device=x.device) if self.agent_identity else 1
        return gathered(rows.active[b]) & (agents >= 0).to(x.device)


def forward(
    layers: Sequence[torch.Tensor], x: torch.Tensor, activation: Activation, work: Workspace
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of R rows, and the hidden activations that `backward` needs.

    layers: [G, L, out, in + biases] each; x [G, R, in + biases], bias columns included → [G, L, R].
    """
    groups, particles, width, _ = layers[0].shape
    rows = x.shape[1]
    h = work.take("h0", groups, particles * width, rows)
    torch.bmm(layers[0].flatten(1, 2), x.mT, out=h)
    h = h.view(groups * particles, width, rows)
    activations = []
    for number, layer in enumerate(layers[1:], start=1):
        activations.append(_ACTIVATE[activation](h))
        stacked = layer.flatten(0, 1)
        out = work.take(f"h{number}", groups * particles, layer.shape[2], rows)
        h = torch.baddbmm(stacked[..., -1:], stacked[..., :-1], h, out=out)
    return h.view(groups, particles, rows), activations


def backward(
    layers: Sequence[torch.Tensor],
    x: torch.Tensor,
    activations: Sequence[torch.Tensor],
    cotangent: torch.Tensor,
    activation: Activation,
    work: Workspace,
    gradients: Sequence[torch.Tensor],
) -> None:
    """Write the gradients of Σ cotangent · logits with respect to the layers; cotangent [G, L, R].

    gradients: contiguous, of the layers' shapes.
    """
    grad = cotangent.flatten(0, 1).unsqueeze(1)
    for number, h in reversed(list(enumerate(activations, start=1))):
        layer, gradient = layers[number], gradients[number].flatten(0, 1)
        gradient[..., :-1] = torch.bmm(grad, h.mT)
        torch.sum(grad, dim=-1, out=gradient[..., -1])
        out = work.take(f"grad{number}", *h.shape)
        weight = layer.flatten(0, 1)[..., :-1].mT
        # With one output the product is an outer one, for which a matrix product is the slow way.
        grad = torch.mul(weight, grad, out=out) if layer.shape[2] == 1 else torch.bmm(weight, grad, out=out)
        _DIFFERENTIATE[activation](grad, h)
    first = gradients[0].flatten(1, 2)
    torch.bmm(grad.view(len(first), -1, grad.shape[-1]), x, out=first)


def _relu_backward(grad: torch.Tensor, h: torch.Tensor) -> None:
    _aten.threshold_backward.grad_input(grad, h, 0, grad_input=grad)


def _sigmoid_backward(grad: torch.Tensor, h: torch.Tensor) -> None:
    _aten.sigmoid_backward.grad_input(grad, h, grad_input=grad)


_ACTIVATE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": torch.relu_, "sigmoid": torch.sigmoid_}
_DIFFERENTIATE: dict[str, Callable[[torch.Tensor, torch.Tensor], None]] = {
    "relu": _relu_backward,
    "sigmoid": _sigmoid_backward,
}
