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
from functools import partial
from typing import Literal, NamedTuple

import torch

from bm3il.protocol.layout import Block
from bm3il.protocol.networks.grid import ObservationGrid
from bm3il.reward_server.sees import Seen

Activation = Literal["relu", "sigmoid"]

LINE = 16
"""Numbers of float32 in a cache line."""

_aten = torch.ops.aten


class Workspace:
    """Buffers that are used again and again: fresh memory costs more than the arithmetic on it.

    What a function wrote to its workspace is overwritten by the next call.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self._dtype, self._device = dtype, device
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """An uninitialised tensor whose rows (last dimension) lie an odd number of cache lines apart.

        Rows a power of two apart would fall on the same few places of the cache, and products be a quarter slower.
        """
        *batch, width = shape
        stride = (-(-width // LINE) | 1) * LINE
        size = math.prod(batch) * stride
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=self._dtype, device=self._device)
        return self._buffers[name][:size].view(*batch, stride)[..., :width]


class Source(NamedTuple):
    """Where some joint rows of an input get some columns of the observation from.

    target: the joint rows of the input.   first, end: columns of the observation.
    """

    grid: ObservationGrid
    target: slice
    first: int
    end: int


@dataclass(frozen=True)
class Architecture:
    """Shapes of the discriminators of a block.

    A layer is one tensor [G, L, out, in + biases], weights and biases side by side. The first layer has one bias
    for each of the block's identity slots (the same network as one that sees the slot's number one-hot).
    """

    block: Block
    particles: int
    hidden: tuple[int, ...]
    activation: Activation
    seen: Seen

    @property
    def biases(self) -> int:
        """Bias columns of the first layer."""
        return self.block.identity_slots

    @property
    def inputs(self) -> int:
        """Width of the input without the bias columns."""
        return self.seen.width + (self.block.action_dim if self.seen.action else 0)

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
        """Views of the weights and the biases of layers (or of gradients) apart, [G, L, out, columns] each."""
        columns = [(layer, self.split(k)) for k, layer in enumerate(layers)]
        return [part for layer, k in columns for part in (layer[..., :k], layer[..., k:])]

    def initial(self, generator: torch.Generator) -> list[torch.Tensor]:
        """Layers drawn from U(±1/√fan_in)."""
        layers = []
        for layer, shape in enumerate(self.shapes):
            # The customary start of a linear layer; the columns of biases, one of which is 1 at a time, are no fan-in.
            bound = 1 / math.sqrt(self.split(layer))
            layers.append(torch.empty(shape).uniform_(-bound, bound, generator=generator))
        return layers

    def encode(self, sources: Sequence[Source], actions: torch.Tensor, groups: slice, x: torch.Tensor) -> None:
        """Write the first layer's input x [g, s, B, in + biases] of some groups, their first s slots.

        sources: where the rows of x come from.   actions: grid of these groups, [g, s, B] (or [g, s, B, A] if
        continuous).
        """
        width, end = 0, self.inputs
        for first, last in self.seen.runs:
            for source in sources:
                start, stop = max(first, source.first), min(last, source.end)
                if start < stop:
                    columns = slice(width + start - first, width + stop - first)
                    rows = slice(0, x.shape[1] * source.grid.steps)
                    source.grid.expand(start, stop, (groups, rows), x[:, :, source.target, columns])
            width += last - first
        if self.seen.action and self.block.discrete:
            x[..., width:end].zero_().scatter_(-1, actions.to(x.device).unsqueeze(-1), 1)
        elif self.seen.action:
            x[..., width:end] = actions
        # Biases are columns of the layer, so that one product adds them and, going back, gives their gradients, too.
        x[..., end:] = torch.eye(self.biases, device=x.device)[: x.shape[1], None]


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
    h, activations = deeper(layers[1:], h.view(groups * particles, width, rows), activation, work)
    return h.view(groups, particles, rows), activations


def deeper(
    layers: Sequence[torch.Tensor], h: torch.Tensor, activation: Activation, work: Workspace
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The layers behind the first, whose products are h [G·L, H, R], which is overwritten → logits [G·L, R], and hidden
    activations."""
    activations = []
    for number, layer in enumerate(layers, start=1):
        activations.append(_ACTIVATE[activation](h))
        stacked = layer.flatten(0, 1)
        out = work.take(f"h{number}", len(h), layer.shape[2], h.shape[2])
        # The bias goes over the hot product: `baddbmm` would spread it over cold memory first.
        h = torch.bmm(stacked[..., :-1], h, out=out).add_(stacked[..., -1:])
    return h.squeeze(1), activations


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

    gradients: contiguous, of the layers' shapes; of float32 where layers are bfloat16.
    """
    grad = cotangent.flatten(0, 1).unsqueeze(1)
    for number, h in reversed(list(enumerate(activations, start=1))):
        gradient, weight = gradients[number].flatten(0, 1), layers[number].flatten(0, 1)[..., :-1].mT
        out = work.take(f"grad{number}", *h.shape)
        torch.sum(grad, dim=-1, out=gradient[..., -1])
        if grad.shape[1] == 1:  # an outer product, for which a matrix product is the slow way
            gradient[..., :-1] = torch.bmm(grad, h.mT)
            grad = torch.mul(weight, grad, out=out)
        else:  # the wide factor in front: faster than the transposed product
            gradient[..., :-1] = torch.bmm(h, grad.mT).mT
            grad = torch.bmm(weight, grad, out=out)
        _DIFFERENTIATE[activation](grad, h, grad_input=grad)
    first = gradients[0].flatten(1, 2)
    grad = grad.view(len(first), -1, grad.shape[-1])
    if first.dtype == grad.dtype:
        torch.bmm(grad, x, out=first)
    else:
        # Products cannot be written to another dtype; gradients of bfloat16 layers are summed up in float32.
        first.copy_(torch.bmm(grad, x))


_ACTIVATE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"relu": torch.relu_, "sigmoid": torch.sigmoid_}
# From outputs, since activations overwrite their inputs: ReLU's is 0 where its slope is, and σ′ = σ (1 − σ).
_DIFFERENTIATE: dict[str, Callable[..., torch.Tensor]] = {
    "relu": partial(_aten.threshold_backward.grad_input, threshold=0),
    "sigmoid": _aten.sigmoid_backward.grad_input,
}
