"""The reward model: L particles of every agent's discriminator, moved by SVGD (Eq. 5), and the reward of Eq. 9."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from operator import itemgetter
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch.nn import functional

from bm3il.protocol.allocator import keep_freed_memory
from bm3il.protocol.device import choose_precision, numbers_at_once, rounding
from bm3il.protocol.errors import InputError, NumericalError, ProtocolError
from bm3il.protocol.layout import JointRows, Layout, widened
from bm3il.protocol.messages import Arrays
from bm3il.protocol.networks.adam import Adam
from bm3il.protocol.networks.tiles import together
from bm3il.protocol.seeds import derive_seed
from bm3il.protocol.specs import ArrayTable
from bm3il.reward_server.discriminator import Architecture, Source, Workspace, backward, forward
from bm3il.reward_server.health import Health
from bm3il.reward_server.inference import Inference
from bm3il.reward_server.memory import Memory
from bm3il.reward_server.model import Answer, check_rewards
from bm3il.reward_server.sees import check_imagined, columns_seen
from bm3il.reward_server.settings import RewardSettings
from bm3il.reward_server.svgd import svgd_forces, svgd_forces_of

TILE_ACTIVATIONS = 1_500_000
"""Hidden activations computed at a time on a CPU: what the cache next to a core holds, and what bounds the memory."""
WASTED_ACTIVATIONS = 20_000
"""Of agents that are not there, in one of these: to begin another takes a CPU as long."""
TILE_PARAMETERS = 1_000_000
"""Parameters that a kernel is applied to at a time on a CPU."""
QUERY_ROWS = 2_048
"""Rows per group of a query computed at a time on a CPU."""
MEMORY = "memory."
"""How the names of a state's arrays begin or end."""

T = TypeVar("T")


class _Batch(NamedTuple):
    """What a step learns from: the agents' joint rows, then the expert's.

    sources: of their observations; later ones overwrite earlier ones.   actions, active (0. or 1.): grids
    [G, S, 2B, …].
    """

    sources: list[Source]
    actions: torch.Tensor
    active: torch.Tensor


class RewardModel:
    """Particles, optimiser, the memory of agent rows and the expert's rows.

    The log posterior of a particle is Eq. 3 (rows of the agents labelled 1, of the expert 0) plus a Gaussian prior.
    Deterministic: the seed and the calls decide every bit.

    Raises InputError if `demonstrations` has no rows.
    """

    def __init__(
        self,
        layout: Layout,
        demonstrations: JointRows,
        settings: RewardSettings,
        seed: int,
        device: str | torch.device = "cpu",
    ) -> None:
        if not len(demonstrations):
            raise InputError("the demonstrations hold no rows; imitation needs at least one episode")
        self.layout, self.settings, self.version = layout, settings, 0
        self._device = torch.device(device)
        self._expert = demonstrations.without_masks().to(self._device)
        memory_seed = derive_seed(seed, "memory")
        self._memory = Memory(layout, settings.window_steps, settings.memory, memory_seed, self._device)
        self._generator = torch.Generator().manual_seed(seed)
        self._architectures = architectures(layout, settings)
        precision = choose_precision(settings.precision, self._device)
        self._dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        self._rounding = partial(rounding, precision)  # of forward and backward passes, and not of kernels
        self._work = Workspace(self._dtype, self._device)
        self._inferences: dict[int, Inference] = {}
        if self._device.type == "cpu":
            keep_freed_memory()
        self._layers = [
            [torch.nn.Parameter(layer.to(self._device)) for layer in architecture.initial(self._generator)]
            for architecture in self._architectures
        ]
        parameters = [layer for layers in self._layers for layer in layers]
        # SVGD gives a direction to ascend in.
        self._adam = Adam(parameters, ascend=True)
        for layer in parameters:
            # Made once: `backward` writes into parts of them, where the optimiser reads them.
            layer.grad = torch.zeros_like(layer)

    @property
    def discriminators(self) -> list[tuple[Architecture, list[torch.Tensor]]]:
        """Of each block, what its discriminators are, and their layers as they are now, [G, L, out, in + biases]."""
        layers = ([layer.detach() for layer in layers] for layers in self._layers)
        return list(zip(self._architectures, layers, strict=True))

    def observe(self, rows: JointRows) -> None:
        """Push fresh joint rows into the memory."""
        self._memory.push(rows)

    def update(self, progress: float) -> dict[str, float]:
        """`settings.updates` SVGD steps.

        Answers the figures of `Health` for the last batch, before its step.
        Raises NumericalError if a parameter is no longer finite, InputError if nothing was observed yet.
        """
        if not self._memory.filled:
            raise InputError("the particles cannot be updated before rows were observed")
        rate = self.settings.learning_rate * (1 + (self.settings.final_learning_rate - 1) * progress)
        self._adam.set_rate(rate)
        health = Health()
        # They copy the first layer and look at the deeper ones: a stale one would meet what has moved.
        self._inferences.clear()
        for step in range(self.settings.updates):
            self._step(health if step == self.settings.updates - 1 else None)
        # Whatever is not finite makes its sum so: one number per block, and one wait for the GPU, tell of all.
        sums = torch.stack([torch.stack([layer.detach().sum() for layer in layers]).sum() for layers in self._layers])
        for b, total in enumerate(sums.tolist()):
            if not math.isfinite(total):
                raise NumericalError(
                    f"a discriminator parameter of block {b} is not finite after {self.version} updates"
                )
        self.version += 1
        return health.figures()

    @torch.no_grad()
    def query(self, rows: JointRows, deviation: bool = False, true_rewards: list[torch.Tensor] | None = None) -> Answer:
        """Rewards (Eq. 9) r^i = (1/L) Σ_l softplus(−z_l) ≥ 0, and 0 for inactive agents; never reads `true_rewards`.

        Raises NumericalError if a reward is not finite.
        """
        rows = rows.without_masks().to(self._device).widened()
        answers = [self._query_block(b, rows, deviation) for b in range(len(self._layers))]
        rewards = [answer[0] for answer in answers]
        check_rewards(rewards)
        return rewards, [answer[1] for answer in answers] if deviation else None

    def state(self) -> Arrays:
        """Everything that a restart needs, copied; `state_table` gives names and shapes."""
        # All parameters step together, so one count stands for all.
        counters = np.array([self.version, int(self._adam.steps[0])], np.int64)
        arrays: Arrays = {"counters": counters, "generator": self._generator.get_state().numpy()}
        arrays |= {MEMORY + name: array for name, array in self._memory.state().items()}
        return arrays | {name: tensor.detach().cpu().numpy().copy() for name, tensor in self._tensors().items()}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continue from a `state`, whose shapes and dtypes were checked against `state_table`.

        Raises ProtocolError (cause `bad_value`) if its values cannot be a state.
        """
        self.load_particles(arrays)
        self._memory.load_state(_part(arrays, MEMORY))
        self._generator.set_state(torch.tensor(arrays["generator"]))
        self.version = int(arrays["counters"][0])

    @torch.no_grad()
    def load_particles(self, arrays: Mapping[str, np.ndarray]) -> None:
        """The particles of a `state`, and their optimiser's; all that queries need."""
        self._inferences.clear()
        version, steps = (int(value) for value in arrays["counters"])
        if min(version, steps) < 0:
            raise ProtocolError("bad_value", f"the counters of a reward state are out of range: {version}, {steps}")
        for name, tensor in self._tensors().items():
            if not np.isfinite(arrays[name]).all():
                raise ProtocolError("bad_value", f"array '{name}' of a reward state is not finite")
            tensor.copy_(torch.tensor(arrays[name]))
        for count in self._adam.steps:
            count.fill_(steps)

    @torch.no_grad()
    def _step(self, health: Health | None) -> None:
        batch = self.settings.batch_size
        # All blocks learn from the same joint steps. The order of draws is part of what a seed means.
        agent = self._draw(self._memory.filled, batch)
        expert = self._draw(len(self._expert), batch)
        for b, layers in enumerate(self._layers):
            self._direct(b, self._differentiate(b, self._batch(b, agent, expert), health), health)
            if health:
                health.add_layers(layers)
        self._adam.step()

    def _draw(self, end: int, *shape: int) -> torch.Tensor:
        """Numbers below `end`; drawn on the CPU, so that every device gets the same."""
        return torch.randint(end, shape, generator=self._generator).to(self._device, non_blocking=True)

    def _batch(self, b: int, agent: torch.Tensor, expert: torch.Tensor) -> _Batch:
        """The rows of memory and expert of a block, the agents' first."""
        block, size = self.layout.blocks[b], len(agent)
        parts = (self._memory.rows, agent), (self._expert, expert)
        grids = [block.see(rows.observations[b].select(index)) for rows, index in parts]
        rows = slice(0, size), slice(size, 2 * size)
        sources = [Source(g, part, 0, block.observation_dim) for g, part in zip(grids, rows, strict=True)]
        actions = torch.cat([widened(rows.actions[b][index]) for rows, index in parts])
        active = torch.cat([rows.active[b][index] for rows, index in parts])
        # They take the place of agents' rows: labels and `_row_weights` count on two halves of one size.
        if count := round(self.settings.imagined * size):
            sources += self._imagine(b, actions[:count], active[:count])
        return _Batch(sources, block.grid(actions).contiguous(), block.grid(active).to(torch.float32).contiguous())

    def _imagine(self, b: int, actions: torch.Tensor, active: torch.Tensor) -> list[Source]:
        """The first joint rows of a block as nobody played them: each named part, and the action, as the same agent of
        the expert had it at another moment. What never changes for an agent, as its home, stays right.

        Against these a discriminator learns which parts go together: log p(parts) − Σ log p(part).
        Overwrites actions and active; the columns of each part are what is returned.
        """
        block, count = self.layout.blocks[b], len(active)
        parts = self.layout.spec.types[block.types[0]].parts
        moments = self._draw(len(self._expert), len(parts) + 1, count)
        sources, first = [], 0
        active.fill_(True)
        for part, moment in zip(parts, moments, strict=False):
            grid = block.see(self._expert.observations[b].select(moment))
            sources.append(Source(grid, slice(0, count), first, first + part.width))
            # A part of an agent that was not there means nothing: such a row must not count.
            active &= self._expert.active[b][moment]
            first += part.width
        actions.copy_(self._expert.actions[b][moments[-1]])
        active &= self._expert.active[b][moments[-1]]
        return sources

    def _differentiate(self, b: int, batch: _Batch, health: Health | None) -> torch.Tensor:
        """Write the likelihood's gradients, for these rows of memory and expert, into a block's layers.

        With the kernel in function space the logits move in their SVGD direction instead, and the layers with them.
        Returns how much of a particle's own score there is in what was written, [G, L]: 1 but for that kernel.
        """
        architecture, block = self._architectures[b], self.layout.blocks[b]
        rows, smoothing = batch.active.shape[2], self.settings.label_smoothing
        mass = torch.ones(block.groups, architecture.particles, device=self._device)
        is_agent = torch.arange(rows, device=self._device) < rows // 2
        for tile, slots in self._together(b, architecture.activations * rows):
            layers = [layer[tile].to(self._dtype) for layer in self._layers[b]]
            active, of_agent = batch.active[tile, :slots], is_agent.repeat(slots)
            labels = torch.where(of_agent, 1 - smoothing, smoothing)
            x = self._work.take("input", *active.shape, layers[0].shape[-1])
            architecture.encode(batch.sources, batch.actions[tile, :slots], tile, x)
            weights = self._row_weights(active).flatten(1).unsqueeze(1)
            x, active = x.flatten(1, 2), active.flatten(1).unsqueeze(1)
            with self._rounding():
                outputs, activations = forward(layers, x, architecture.activation, self._work)
            logits = outputs.float()
            if health:
                health.add_logits(logits, labels, active, of_agent)
            # Eq. 3: the slope of label · log D + (1 − label) · log(1 − D) in z is label − D, smoothed labels included.
            score = (labels - torch.sigmoid(logits)) * weights
            if self.settings.kernel_scope == "function" and architecture.particles > 1:
                # Rows of agents that are not there shall not keep particles apart: equal logits add no distance.
                forces = svgd_forces(logits * active, score)
                mass[tile] = forces.mass
                if health:
                    health.add_forces([forces])
                score = forces.attraction.add_(forces.repulsion)
            gradients = [_gradient(layer)[tile] for layer in self._layers[b]]
            with self._rounding():
                backward(layers, x, activations, score.to(self._dtype), architecture.activation, self._work, gradients)
        return mass

    def _row_weights(self, active: torch.Tensor) -> torch.Tensor:
        """How much each row counts in the likelihood; active [g, s, 2B], of each slot the agents' rows
        first, then the expert's.

        log p(rows | φ) = steps · (mean of the agents' log D + mean of the expert's log(1 − D)): Eq. 3, the expected sum
        over the steps of `likelihood_episodes` episodes, of which a batch of any size is a sample.
        """
        steps = self.settings.likelihood_episodes * self.layout.spec.episode_length
        halves = active.unflatten(2, (2, -1))
        return (steps * halves / halves.sum((1, 3), keepdim=True).clamp_min(1)).flatten(2)

    def _direct(self, b: int, mass: torch.Tensor, health: Health | None) -> None:
        """Turn what `_differentiate` wrote into directions: add the prior, and apply a kernel on parameters.

        Prior and likelihood keep the proportion that they have in ∇ log p, whatever the kernel. A kernel on parameters
        weighs both, being parts of one score. In function space the direction of f_l holds the likelihood's scores of
        all particles with the weights k(f_j, f_l) / L; the prior is known by parameters and not by f, so particle l
        gets its own with the sum of these weights, `mass`: what Eq. 5 gives if others' priors were like its own.
        """
        scope, architecture, layers = self.settings.kernel_scope, self._architectures[b], self._layers[b]
        gradients = [_gradient(layer) for layer in layers]
        prior = self.settings.prior_stddev**-2 if self.settings.prior_stddev else 0.0
        if scope in ("function", "none") or architecture.particles == 1:
            for gradient, layer in zip(gradients, layers, strict=True):
                gradient.addcmul_(layer, mass[..., None, None], value=-prior)
            return
        size = sum(layer[0].numel() for layer in layers)
        for tile in self._tiles(self.layout.blocks[b].groups, size, TILE_PARAMETERS):
            particles, targets = (architecture.tensors([t[tile] for t in part]) for part in (layers, gradients))
            scores = [torch.sub(*pair, alpha=prior) for pair in zip(targets, particles, strict=True)]
            forces = svgd_forces_of(particles, scores, one_kernel=scope == "network")
            if health:
                health.add_forces(forces)
            for target, (attraction, repulsion, _) in zip(targets, forces, strict=True):
                torch.add(attraction, repulsion, out=target)

    def _query_block(self, b: int, rows: JointRows, deviation: bool) -> list[torch.Tensor]:
        """Rewards and deviations of a block."""
        architecture, block = self._architectures[b], self.layout.blocks[b]
        answer = torch.zeros(1 + deviation, block.groups, block.slots, len(rows), device=self._device)
        inference = self._inference(b)
        # On a CPU `_together` bounds the groups of a part, and this its rows; a GPU takes all groups at once.
        row = block.slots if self._device.type == "cpu" else block.slots * architecture.activations * block.groups
        for part in self._tiles(len(rows), row, QUERY_ROWS):
            grid = inference.see(rows.observations[b].map(itemgetter(part)), rows.actions[b][part])
            for groups, slots in self._together(b, architecture.activations * grid.steps):
                with self._rounding():
                    logits = inference.logits(groups, slots, grid, self._work)
                rewards = functional.softplus(logits.float().neg_()).unflatten(2, (slots, grid.steps))
                answer[0, groups, :slots, part] = rewards.mean(dim=1)
                if deviation:
                    # Without Bessel's correction, as in `Health`: of one particle the deviation is 0, and not NaN.
                    answer[1, groups, :slots, part] = rewards.std(dim=1, correction=0)
        return [(block.rows(grid) * rows.active[b]).cpu() for grid in answer]

    def _inference(self, b: int) -> Inference:
        """Of the particles as they are."""
        known = self._inferences.get(b)
        if known is None:
            layers = [layer.detach().to(self._dtype) for layer in self._layers[b]]
            known = self._inferences[b] = Inference(self._architectures[b], layers)
        return known

    def _together(self, b: int, size: int) -> list[tuple[slice, int]]:
        """Groups of a block that are computed at once, and the most agents among them, of `size` activations each."""
        agents = self.layout.blocks[b].agents
        if self._device.type == "cpu":
            return together(agents, TILE_ACTIVATIONS // max(1, size), WASTED_ACTIVATIONS // max(1, size))
        return together(agents, numbers_at_once(self._device) // max(1, size), sum(agents))

    def _tiles(self, count: int, size: int, on_cpu: int) -> Iterator[slice]:
        """Slices of `count` groups (or rows) of `size` numbers each: at most `on_cpu` numbers on a CPU, what its memory
        allows on a GPU, or one group."""
        limit = on_cpu if self._device.type == "cpu" else numbers_at_once(self._device)
        step = max(1, limit // max(1, size))
        return (slice(start, min(start + step, count)) for start in range(0, count, step))

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and Adam's moments by their names in a state."""
        tensors: dict[str, torch.Tensor] = {}
        moments = zip(self._adam.first_moments, self._adam.second_moments, strict=True)
        for b, layers in enumerate(self._layers):
            for k, layer in enumerate(layers):
                tensors[f"{b}.{k}.parameter"] = layer
                tensors[f"{b}.{k}.exp_avg"], tensors[f"{b}.{k}.exp_avg_sq"] = next(moments)
        return tensors


def architectures(layout: Layout, settings: RewardSettings) -> list[Architecture]:
    """The discriminators of every block. Raises InputError if they cannot see what `settings.sees` names."""
    seen = columns_seen(layout.spec, settings.sees)
    check_imagined(layout.spec, settings.imagined)
    # The types of a block have equal parts, so what is seen of one is seen of all.
    return [
        Architecture(block, settings.particles, settings.hidden, settings.activation, seen[block.types[0]])
        for block in layout.blocks
    ]


def state_table(layout: Layout, settings: RewardSettings) -> ArrayTable:
    """Name → (dtype, shape) of `Model.state`: the schema of a restored session."""
    if settings.source == "environment":
        return {"counters": ("int64", (1,))}
    table: ArrayTable = {"counters": ("int64", (2,)), "generator": ("uint8", (len(torch.Generator().get_state()),))}
    table |= {MEMORY + name: entry for name, entry in Memory.state_table(layout, settings.window_steps).items()}
    for b, architecture in enumerate(architectures(layout, settings)):
        for k, shape in enumerate(architecture.shapes):
            table |= {f"{b}.{k}.{part}": ("float32", shape) for part in ("parameter", "exp_avg", "exp_avg_sq")}
    return table


def _part(named: Mapping[str, T], prefix: str) -> dict[str, T]:
    """What is named under a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def _gradient(layer: torch.Tensor) -> torch.Tensor:
    assert layer.grad is not None
    return layer.grad
