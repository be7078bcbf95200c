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

from bm3il.protocol.networks.grid import ObservationGrid
from bm3il.protocol.networks.tiles import ALL, Tile, slots_and_steps, tiles

TILE_NUMBERS = 1 << 19
"""Most activations of one layer in a tile: two megabytes, which stay in some cache from one layer to the next. Tiles of
a quarter of that would stay in the nearest one, and take a tenth longer: in Python, for there are more of them."""
COLUMNS_AT_ONCE = 16
"""A CPU multiplies so many columns at once, and few of them, or what is left over, as slowly as all; the transposed
product, which has the rows as columns, takes half as long with 5 (as many as Rover Tower has actions)."""
WASTED_ROWS, WASTED_ROWS_ON_GPU = 128, 1 << 14
"""Most rows without agents in a tile: multiplied in vain, for the sake of fewer calls. A CPU multiplies about a hundred
rows of 128 numbers in the time of a call; a GPU, reckoned from launches and products, many thousands."""
NARROW = 48
"""Below so many columns that is worth it forward, too, where the transposed product must be copied."""

_Constants = tuple[float, bool, tuple[int, ...]]
"""Slope, whether it follows the last layer, agents of each network."""
Input = torch.Tensor | ObservationGrid
"""What first layers see: numbers [K, R, in], or observations that are expanded no further than products want them."""

_leaky_relu_backward = torch.ops.aten.leaky_relu_backward


class StackedMLP(nn.Module):
    """K multilayer perceptrons of widths `widths`, a leaky ReLU between layers.

    slope: of the leaky ReLU below zero; 0 is the ReLU.   activate_output: whether it follows the last layer too.
    identity_slots: with S > 1 the first layer has one bias per slot, [K, S, out]: the same network as one that sees
        the agent's number one-hot beside its observation.
    agents: of each network, at most S; without it one. Rows are those of S slots, B joint steps each, [S·B]; a
        network's agents are in its first slots. What empty ones put out is finite and means nothing.
    Inputs of all methods: one or more `Input`s, which the first layer sees side by side. Products are bfloat16
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
        agents: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.slope, self.activate_output = slope, activate_output
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for layer, (width_in, width_out) in enumerate(pairwise(widths)):
            slots = identity_slots if layer == 0 else 1
            self.weights.append(uniform((networks, width_in, width_out), width_in, generator))
            self.biases.append(uniform((networks, slots, width_out), width_in, generator))
        self._agents = tuple(agents or (1,) * networks)
        self._layers = _Layers(tuple(self.weights), tuple(self.biases), slope, activate_output, self._agents)
        self._tile_rows = self._layers.tile_rows()

    def forward(self, *inputs: Input) -> torch.Tensor:
        """Output [K, R, out], differentiable once."""
        if len(inputs) == 1 and self._fits_one_tile(inputs[0]) and not torch.is_grad_enabled():
            return self._layers.infer(inputs[0])
        prepared, layers = self._prepared(inputs)
        constants = self.slope, self.activate_output, self._agents
        return _Apply.apply(constants, len(prepared), *prepared, *layers.weights, *layers.biases)

    @torch.no_grad()
    def outputs(self, *inputs: Input) -> Iterator[tuple[Tile, torch.Tensor]]:
        """The output tile by tile, [k, r, out]; each one is overwritten by the next. Rows of empty slots
        may be in none."""
        prepared, layers = self._prepared(inputs)
        buffers = layers.buffers(prepared[0])
        for tile, part in layers.tiles(prepared[0]):
            activations = _room(buffers, tile)
            part.forward(tile, prepared, activations)
            yield tile, activations[-1]

    @torch.no_grad()
    def backpropagate(
        self, inputs: Sequence[Input], gradient: Callable[[Tile, torch.Tensor], torch.Tensor], to_inputs: bool
    ) -> list[torch.Tensor]:
        """Forward and back in one: `gradient` gets each tile's output and answers the loss's gradient with respect
        to it. Adds to the parameters' `grad`. Returns the gradients of the inputs, all of numbers, or [] unless
        `to_inputs`.
        """
        prepared, layers = self._prepared(inputs)
        d_inputs = [layers.like_input(x) for x in prepared] if to_inputs else []
        add = self.weights[0].grad is not None
        if not add:
            for parameters, sums in zip((self.weights, self.biases), layers.sums(), strict=True):
                for parameter, total in zip(parameters, sums, strict=True):
                    parameter.grad = total
        gradients = layers.like([w.grad for w in self.weights], [b.grad for b in self.biases])
        buffers, spare = layers.buffers(prepared[0]), layers.buffers(prepared[0])
        for (tile, part), (_, d_part) in zip(layers.tiles(prepared[0]), gradients.tiles(prepared[0]), strict=True):
            activations = _room(buffers, tile)
            part.forward(tile, prepared, activations)
            d = gradient(tile, activations[-1]).to(activations[-1].dtype)
            part.backward(tile, prepared, activations, d, _room(spare, tile), d_part, d_inputs, add)
        return d_inputs

    def _fits_one_tile(self, x: Input) -> bool:
        return x.shape[0] * x.shape[1] <= self._tile_rows and not torch.is_autocast_enabled(x.device.type)

    def _prepared(self, inputs: Sequence[Input]) -> tuple[list[Input], _Layers]:
        """Inputs and layers in the arithmetic of the products."""
        device = inputs[0].device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weights[0].dtype
        weights, biases = ([p.to(dtype) for p in parameters] for parameters in (self.weights, self.biases))
        numbers = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in inputs]
        return numbers, _Layers(weights, biases, self.slope, self.activate_output, self._agents)


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
    agents: tuple[int, ...]

    def infer(self, seen: Input) -> torch.Tensor:
        """Output [K, R, out] of an input that fits one tile: the way of an actor, which pays for each call."""
        x = self._empty(seen, self.weights[0])
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if layer:
                x = _times(x, weight)
            elif isinstance(seen, torch.Tensor):
                torch.bmm(seen, weight, out=x)
            else:
                seen.times(ALL, weight, 0, x)
            add_bias(x, bias)
            if self._activates(layer):
                functional.leaky_relu_(x, self.slope)
        return x

    def tile_rows(self) -> int:
        """Rows of all networks together whose widest activations fill a tile on the CPU."""
        return TILE_NUMBERS // max(max(weight.shape[1:]) for weight in self.weights)

    def like(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> _Layers:
        """Other numbers of the same layers."""
        return _Layers(weights, biases, self.slope, self.activate_output, self.agents)

    def tiles(self, x: Input) -> Iterator[tuple[Tile, _Layers]]:
        """Tiles of an input [K, R, …], and the layers of their networks. Such a tile of a contiguous tensor is
        contiguous."""
        cut = self._cut(x)
        sizes = [rows[0][0].stop - rows[0][0].start for rows in cut]
        # Cut at once: to name a part of a tensor in Python costs as much as to add a thousand numbers.
        weights = zip(*(weight.split(sizes) for weight in self.weights), strict=True)
        biases = zip(*(bias.split(sizes) for bias in self.biases), strict=True)
        for of_run, w, (first, *others) in zip(cut, weights, biases, strict=True):
            for tile in of_run:
                bias = first
                if bias.shape[1] > 1:
                    bias = bias[:, slots_and_steps(tile[1], x.shape[1], x.shape[1] // max(self.agents))[0]]
                yield tile, self.like(w, (bias, *others))

    def _cut(self, x: Input) -> list[list[Tile]]:
        rows, on_cpu = x.shape[1], x.device.type == "cpu"
        wanted = self.tile_rows() if on_cpu else max(1, x.shape[0] * rows)
        wasted = WASTED_ROWS if on_cpu else WASTED_ROWS_ON_GPU
        return tiles(self.agents, rows // max(self.agents), wanted, wasted)

    @property
    def is_full(self) -> bool:
        """Whether every slot has an agent."""
        return len(set(self.agents)) == 1

    def sums(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Room for gradients of weights and biases, to which many tiles may add: at least float32."""
        weights, biases = ([_sums_of(p) for p in part] for part in (self.weights, self.biases))
        if biases[0].shape[1] > 1:
            biases[0].zero_()
        return weights, biases

    def buffers(self, x: Input) -> list[torch.Tensor]:
        """Room for the activations of one tile after the other, [rows, width]."""
        rows = max(math.prod(part.stop - part.start for part in tile) for run in self._cut(x) for tile in run)
        return [weight.new_empty(rows, weight.shape[2]) for weight in self.weights]

    def room(self, x: Input) -> list[torch.Tensor]:
        """Room for all activations."""
        return [self._empty(x, weight) for weight in self.weights]

    def outputs(self, x: Input) -> torch.Tensor:
        """Room for those of the last layer; zeros where slots may be empty."""
        y = self._empty(x, self.weights[-1])
        return y if self.is_full else y.zero_()

    def like_input(self, x: Input) -> torch.Tensor:
        """Room for the gradient of an input of numbers; zeros where slots may be empty."""
        assert isinstance(x, torch.Tensor)
        return torch.empty_like(x, memory_format=torch.contiguous_format) if self.is_full else x.new_zeros(x.shape)

    def forward(self, tile: Tile, inputs: Sequence[Input], activations: Sequence[torch.Tensor]) -> None:
        """Fill the activations [k, r, width] of one tile of the inputs, whose networks these are."""
        for layer, (weight, bias, y) in enumerate(zip(self.weights, self.biases, activations, strict=True)):
            if layer:
                _times(activations[layer - 1], weight, out=y)
            else:
                self._first(tile, inputs, y)
            add_bias(y, bias)
            if self._activates(layer):
                functional.leaky_relu_(y, self.slope)

    def backward(
        self,
        tile: Tile,
        inputs: Sequence[Input],
        activations: Sequence[torch.Tensor],
        d: torch.Tensor,
        spare: Sequence[torch.Tensor],
        gradients: _Layers,
        d_inputs: Sequence[torch.Tensor | None],
        add: bool,
    ) -> None:
        """Take d, the gradient of one tile's output, back. Gradients are added to if `add`, else written.

        spare: room like that of the activations.   gradients: of these layers.
        """
        # A later tile of the same networks adds to what the first one has written.
        add = add or tile[1].start > 0
        # Of biases per slot each tile has others, some slots none: those are zeros at first, and always added to.
        to_slots = add or gradients.biases[0].shape[1] > 1
        for layer in reversed(range(len(self.weights))):
            if self._activates(layer):
                # From results (True), which were written over what went in: they are above zero where that was.
                d = _leaky_relu_backward(d, activations[layer], self.slope, True, grad_input=spare[layer])
            gradient = gradients.weights[layer]
            _put_bias(gradients.biases[layer], d, add if layer else to_slots)
            if layer:
                _put_product(gradient, activations[layer - 1].mT, d, add)
                d = torch.bmm(d, self.weights[layer].mT, out=spare[layer - 1])
                continue
            for x, first in _placed(inputs):
                if isinstance(x, torch.Tensor):
                    _put_product(gradient[:, first : first + x.shape[2]], x[tile].mT, d, add)
                else:
                    x.gradient(tile, d, gradient, first, add)
        for d_input, (x, first) in zip(d_inputs, _placed(inputs), strict=False):
            if d_input is not None:
                torch.bmm(d, self.weights[0][:, first : first + x.shape[2]].mT, out=d_input[tile])

    def _first(self, tile: Tile, inputs: Sequence[Input], y: torch.Tensor) -> None:
        """The products of the first layer."""
        for x, first in _placed(inputs):
            if isinstance(x, torch.Tensor):
                weight = self.weights[0][:, first : first + x.shape[2]]
                torch.baddbmm(y, x[tile], weight, beta=int(first > 0), out=y)
            else:
                assert first == 0  # nothing to add to
                x.times(tile, self.weights[0], first, y)

    def _activates(self, layer: int) -> bool:
        return self.activate_output or layer < len(self.weights) - 1

    def _empty(self, x: Input, weight: torch.Tensor) -> torch.Tensor:
        return weight.new_empty(*x.shape[:2], weight.shape[2])


class _Apply(torch.autograd.Function):
    """The layers as a function that autograd knows. Arguments: inputs, weights, biases."""

    @staticmethod
    def forward(ctx: Any, constants: _Constants, count: int, *arguments: Any) -> torch.Tensor:
        inputs = arguments[:count]
        layers = _layers(arguments[count:], constants)
        keep = any(ctx.needs_input_grad)
        activations = layers.room(inputs[0]) if keep else layers.buffers(inputs[0])
        activations[-1] = layers.outputs(inputs[0])
        for tile, part in layers.tiles(inputs[0]):
            tiled = [a[tile] for a in activations[:-1]] if keep else _room(activations[:-1], tile)
            part.forward(tile, inputs, [*tiled, activations[-1][tile]])
        if keep:
            ctx.grids = [None if isinstance(x, torch.Tensor) else x for x in inputs]
            numbers = [x for x in inputs if isinstance(x, torch.Tensor)]
            ctx.save_for_backward(*numbers, *arguments[count:], *activations)
            ctx.constants = constants
        return activations[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        count, saved = len(ctx.grids), iter(ctx.saved_tensors)
        inputs = [next(saved) if given is None else given for given in ctx.grids]
        parameters = len(ctx.needs_input_grad) - 2 - count
        layers = _layers([next(saved) for _ in range(parameters)], ctx.constants)
        activations = list(saved)
        weights, biases = layers.sums()
        gradients = layers.like(weights, biases)
        wanted = ctx.needs_input_grad[2 : 2 + count]
        d_inputs = [layers.like_input(x) if want else None for x, want in zip(inputs, wanted, strict=True)]
        buffers = layers.buffers(inputs[0])
        for (tile, part), (_, d_part) in zip(layers.tiles(inputs[0]), gradients.tiles(inputs[0]), strict=True):
            tiled = [a[tile] for a in activations]
            part.backward(tile, inputs, tiled, gradient[tile], _room(buffers, tile), d_part, d_inputs, False)
        return None, None, *d_inputs, *weights, *biases


def _layers(parameters: Sequence[torch.Tensor], constants: _Constants) -> _Layers:
    """Of all weights, and then all biases."""
    half = len(parameters) // 2
    return _Layers(parameters[:half], parameters[half:], *constants)


def _sums_of(parameter: torch.Tensor) -> torch.Tensor:
    """Room for a gradient, to which many tiles may add: at least float32."""
    return torch.empty_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))


def _room(buffers: Sequence[torch.Tensor], tile: Tile) -> list[torch.Tensor]:
    """Of the buffers [rows, width], as much as a tile [k, r] needs, which may be less than others did."""
    networks, rows = (part.stop - part.start for part in tile)
    return [buffer[: networks * rows].view(networks, rows, buffer.shape[1]) for buffer in buffers]


def _placed(inputs: Sequence[Input]) -> list[tuple[Input, int]]:
    """Inputs, and the row of the first weights [k, Σ in_j, out] where each begins."""
    widths = [x.shape[2] for x in inputs]
    return [(x, sum(widths[:k])) for k, x in enumerate(inputs)]


def add_bias(y: torch.Tensor, bias: torch.Tensor) -> None:
    """Add [K, S, H] to [K, S·B, H]."""
    if bias.shape[1] == 1:
        y.add_(bias)
    else:
        _by_slot(y, bias).add_(bias.unsqueeze(2))


def _by_slot(y: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """[K, S·B, H] → [K, S, B, H]."""
    return y.unflatten(1, (bias.shape[1], y.shape[1] // bias.shape[1]))


def _put_bias(target: torch.Tensor, d: torch.Tensor, add: bool) -> None:
    """Write (or add) the gradient of a bias [K, S, H], from d [K, S·B, H]."""
    if target.shape[1] > 1:
        _put(target, _by_slot(d, target).sum(2), add)
    else:
        _put(target, d.sum(1, keepdim=True), add)


def _put(target: torch.Tensor, value: torch.Tensor, add: bool) -> None:
    if add:
        target.add_(value)
    else:
        target.copy_(value)


def _times(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """left @ right, which may have few columns."""
    if not _is_uneven(right) or right.shape[2] >= NARROW:
        return torch.bmm(left, right, out=out)
    product = torch.bmm(right.mT, left.mT).mT
    return product if out is None else out.copy_(product)


def _is_uneven(right: torch.Tensor) -> bool:
    return right.device.type == "cpu" and right.shape[2] % COLUMNS_AT_ONCE != 0


def _put_product(target: torch.Tensor, left: torch.Tensor, right: torch.Tensor, add: bool) -> None:
    if _is_uneven(right):
        _put(target, torch.bmm(right.mT, left.mT).mT, add)
    elif target.dtype == right.dtype:
        torch.baddbmm(target, left, right, beta=int(add), out=target)
    else:
        _put(target, torch.bmm(left, right), add)
