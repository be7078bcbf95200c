"""Stacked networks: K networks of one shape, parameters [K, in, out], applied with batched matrix products.

Memory is slower than arithmetic, so a large input is taken through all layers tile by tile: a few networks with all
their rows, or one network with some of them, whose activations stay in the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

TILE_NUMBERS = 1 << 17
"""Most activations of one layer in a tile."""

Tile = tuple[slice, slice]
"""Which networks, which of their rows."""

_leaky_relu_backward = torch.ops.aten.leaky_relu_backward


class StackedMLP(nn.Module):
    """K multilayer perceptrons of widths `widths`, a leaky ReLU between layers.

    slope: of the leaky ReLU below zero; 0 is the ReLU.   activate_output: whether it follows the last layer too.
    identity_slots: with S > 1 the first layer has one bias per slot, [K, S, out]: the same network as one that sees
        the agent's number one-hot beside its observation. Rows must then be ordered [B, S].
    Inputs of all methods: one or more [K, R, in_j], which the first layer sees side by side. Products are bfloat16
    under autocast, and then outputs are too; gradients of parameters are float32.
    """

    def __init__(
        self,
        networks: int,
        widths: Sequence[int],
        generator: torch.Generator,
        slope: float = 0.0,
        activate_output: bool = False,
        identity_slots: int = 1,
    ) -> None:
        super().__init__()
        self.slope, self.activate_output = slope, activate_output
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for layer, (width_in, width_out) in enumerate(pairwise(widths)):
            slots = identity_slots if layer == 0 else 1
            self.weights.append(uniform((networks, width_in, width_out), width_in, generator))
            self.biases.append(uniform((networks, slots, width_out), width_in, generator))
        self._layers = _Layers(tuple(self.weights), tuple(self.biases), slope, activate_output)
        self._tile_rows = self._layers.tile_rows()

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Output [K, R, out], differentiable once."""
        if len(inputs) == 1 and self._fits_one_tile(inputs[0]) and not torch.is_grad_enabled():
            return self._layers.infer(inputs[0])
        prepared, layers = self._prepared(inputs)
        return _Apply.apply(self.slope, self.activate_output, len(prepared), *prepared, *layers.weights, *layers.biases)

    @torch.no_grad()
    def outputs(self, *inputs: torch.Tensor) -> Iterator[tuple[Tile, torch.Tensor]]:
        """The output tile by tile, [k, r, out]; each one is overwritten by the next."""
        prepared, layers = self._prepared(inputs)
        buffers = layers.buffers(prepared[0])
        for tile in layers.tiles(prepared[0]):
            activations = [_like(buffer, prepared[0][tile]) for buffer in buffers]
            layers.forward(tile, prepared, activations)
            yield tile, activations[-1]

    @torch.no_grad()
    def backpropagate(
        self, inputs: Sequence[torch.Tensor], gradient: Callable[[Tile, torch.Tensor], torch.Tensor], to_inputs: bool
    ) -> list[torch.Tensor]:
        """Forward and back in one: `gradient` gets each tile's output and answers the loss's gradient with respect
        to it. Adds to the parameters' `grad`. Returns the gradients of the inputs, or [] unless `to_inputs`.
        """
        prepared, layers = self._prepared(inputs)
        d_inputs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in prepared] if to_inputs else []
        add = self.weights[0].grad is not None
        for parameter in () if add else self.parameters():
            parameter.grad = torch.empty_like(parameter)
        gradients = [(w.grad, b.grad) for w, b in zip(self.weights, self.biases, strict=True)]
        buffers, spare_buffers = layers.buffers(prepared[0]), layers.buffers(prepared[0])
        for tile in layers.tiles(prepared[0]):
            activations = [_like(buffer, prepared[0][tile]) for buffer in buffers]
            spare = [_like(buffer, prepared[0][tile]) for buffer in spare_buffers]
            layers.forward(tile, prepared, activations)
            d = gradient(tile, activations[-1]).to(activations[-1].dtype)
            layers.backward(tile, prepared, activations, d, spare, gradients, d_inputs, add)
        return d_inputs

    def _fits_one_tile(self, x: torch.Tensor) -> bool:
        return x.shape[0] * x.shape[1] <= self._tile_rows and not torch.is_autocast_enabled(x.device.type)

    def _prepared(self, inputs: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], _Layers]:
        """Inputs and layers in the arithmetic of the products."""
        device = inputs[0].device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weights[0].dtype
        weights, biases = ([p.to(dtype) for p in parameters] for parameters in (self.weights, self.biases))
        return [x.to(dtype) for x in inputs], _Layers(weights, biases, self.slope, self.activate_output)


def uniform(shape: tuple[int, ...], fan_in: int, generator: torch.Generator) -> nn.Parameter:
    """A parameter drawn from U(±1/√fan_in), the customary start of a linear layer."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound, generator=generator))


@dataclass(frozen=True)
class _Layers:
    """Parameters (or their gradients), and what can be done with one tile."""

    weights: Sequence[torch.Tensor]
    biases: Sequence[torch.Tensor]
    slope: float
    activate_output: bool

    def infer(self, x: torch.Tensor) -> torch.Tensor:
        """Output [K, R, out] of an input that fits one tile: the way of an actor, which pays for each call."""
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.bmm(x, weight)
            y = x if bias.shape[1] == 1 else x.view(x.shape[0], -1, *bias.shape[1:])
            y += bias if bias.shape[1] == 1 else bias.unsqueeze(1)
            if self._activates(layer):
                functional.leaky_relu_(x, self.slope)
        return x

    def tile_rows(self) -> int:
        """Rows of all networks together whose widest activations fill a tile on the CPU."""
        return TILE_NUMBERS // max(max(weight.shape[1:]) for weight in self.weights)

    def tiles(self, x: torch.Tensor) -> Iterator[Tile]:
        """Tiles of an input [K, R, …]; such a tile of a contiguous tensor is contiguous."""
        networks, rows = x.shape[:2]
        wanted = networks * rows
        if x.device.type == "cpu":
            wanted = self.tile_rows()
        step = max(1, min(networks, wanted // max(1, rows)))
        height = rows if step > 1 else math.ceil(rows / max(1, round(rows / wanted)))
        slots = self.biases[0].shape[1]
        height = math.ceil(height / slots) * slots  # biases per slot repeat in whole rows [B, S]
        for first in range(0, networks, step):
            for row in range(0, rows, height):
                yield slice(first, first + step), slice(row, row + height)

    def buffers(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Room for the activations of one tile after the other."""
        tile = x[next(self.tiles(x))]
        return [self._empty(tile, weight) for weight in self.weights]

    def room(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Room for all activations."""
        return [self._empty(x, weight) for weight in self.weights]

    def forward(self, tile: Tile, inputs: Sequence[torch.Tensor], activations: Sequence[torch.Tensor]) -> None:
        """Fill the activations [k, r, width] of one tile of the inputs."""
        h = [x[tile] for x in inputs]
        for layer, (weight, bias, y) in enumerate(zip(self.weights, self.biases, activations, strict=True)):
            columns = _by_input(weight[tile[0]], h)
            torch.bmm(h[0], columns[0], out=y)
            for x, part in zip(h[1:], columns[1:], strict=True):
                torch.baddbmm(y, x, part, out=y)
            y.unflatten(1, (-1, bias.shape[1])).add_(bias[tile[0]].unsqueeze(1))
            if self._activates(layer):
                functional.leaky_relu_(y, self.slope)
            h = [y]

    def backward(
        self,
        tile: Tile,
        inputs: Sequence[torch.Tensor],
        activations: Sequence[torch.Tensor],
        d: torch.Tensor,
        spare: Sequence[torch.Tensor],
        gradients: Sequence[tuple[torch.Tensor, torch.Tensor]],
        d_inputs: Sequence[torch.Tensor],
        add: bool,
    ) -> None:
        """Take d, the gradient of one tile's output, back. Gradients are added to if `add`, else written.

        spare: room like that of the activations.
        """
        add = add or tile[1].start > 0
        for layer in reversed(range(len(self.weights))):
            if self._activates(layer):
                d = _leaky_relu_backward(d, activations[layer], self.slope, True, grad_input=spare[layer])
            d_weights, d_bias = (gradient[tile[0]] for gradient in gradients[layer])
            _put(d_bias, d.unflatten(1, (-1, d_bias.shape[1])).sum(1), add)
            h = [activations[layer - 1]] if layer else [x[tile] for x in inputs]
            for x, d_weight in zip(h, _by_input(d_weights, h), strict=True):
                _put_product(d_weight, x.mT, d, add)
            if layer:
                d = torch.bmm(d, self.weights[layer][tile[0]].mT, out=spare[layer - 1])
        for d_input, weight in zip(d_inputs, _by_input(self.weights[0][tile[0]], inputs), strict=False):
            torch.bmm(d, weight.mT, out=d_input[tile])

    def _activates(self, layer: int) -> bool:
        return self.activate_output or layer < len(self.weights) - 1

    def _empty(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight.new_empty(*x.shape[:2], weight.shape[2])


class _Apply(torch.autograd.Function):
    """The layers as a function that autograd knows. Tensors: inputs, weights, biases."""

    @staticmethod
    def forward(ctx: Any, slope: float, activate_output: bool, count: int, *tensors: torch.Tensor) -> torch.Tensor:
        arguments = count, slope, activate_output
        inputs, layers = _split(tensors, *arguments)
        keep = any(ctx.needs_input_grad)
        activations = layers.room(inputs[0]) if keep else layers.buffers(inputs[0])
        if not keep:
            activations[-1] = layers.room(inputs[0])[-1]
        for tile in layers.tiles(inputs[0]):
            tiled = [a[tile] if keep else _like(a, inputs[0][tile]) for a in activations[:-1]]
            layers.forward(tile, inputs, [*tiled, activations[-1][tile]])
        if keep:
            ctx.save_for_backward(*tensors, *activations)
            ctx.arguments = arguments
        return activations[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        count = ctx.arguments[0]
        given = len(ctx.needs_input_grad) - 3
        inputs, layers = _split(ctx.saved_tensors[:given], *ctx.arguments)
        activations = ctx.saved_tensors[given:]
        weights, biases = ([_sums_of(p) for p in part] for part in (layers.weights, layers.biases))
        gradients = list(zip(weights, biases, strict=True))
        wanted = any(ctx.needs_input_grad[3 : 3 + count])
        d_inputs = [gradient.new_empty(x.shape) for x in inputs] if wanted else []
        buffers = layers.buffers(gradient)
        for tile in layers.tiles(inputs[0]):
            tiled = [a[tile] for a in activations]
            spare = [_like(buffer, gradient[tile]) for buffer in buffers]
            layers.backward(tile, inputs, tiled, gradient[tile], spare, gradients, d_inputs, False)
        unwanted: list[torch.Tensor | None] = [None] * count
        return None, None, None, *(d_inputs or unwanted), *weights, *biases


def _split(
    tensors: Sequence[torch.Tensor], count: int, slope: float, activate_output: bool
) -> tuple[Sequence[torch.Tensor], _Layers]:
    layers = (len(tensors) - count) // 2
    weights, biases = tensors[count : count + layers], tensors[count + layers :]
    return tensors[:count], _Layers(weights, biases, slope, activate_output)


def _sums_of(parameter: torch.Tensor) -> torch.Tensor:
    """Room for a gradient, to which many tiles may add: at least float32."""
    return torch.empty_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))


def _like(buffer: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
    return buffer[: tile.shape[0], : tile.shape[1]]


def _by_input(weight: torch.Tensor, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The rows of a weight [k, Σ in_j, out] that belong to each input."""
    return weight.split([x.shape[2] for x in inputs], dim=1) if len(inputs) > 1 else (weight,)


def _put(target: torch.Tensor, value: torch.Tensor, add: bool) -> None:
    if add:
        target.add_(value)
    else:
        target.copy_(value)


def _put_product(target: torch.Tensor, left: torch.Tensor, right: torch.Tensor, add: bool) -> None:
    if target.dtype == right.dtype:
        torch.baddbmm(target, left, right, beta=int(add), out=target)
    else:
        _put(target, torch.bmm(left, right), add)
