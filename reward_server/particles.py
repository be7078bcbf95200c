"""The reward model: L particles of every agent's discriminator, moved by SVGD (Eq. 5), and the reward of Eq. 9."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional

from protocol.errors import InputError, NumericalError, ProtocolError
from protocol.layout import JointRows, Layout
from protocol.messages import Arrays
from protocol.trajectories import ArrayTable
from reward_server.discriminator import Architecture, backward, forward
from reward_server.health import Health
from reward_server.settings import RewardSettings
from reward_server.svgd import network_direction, svgd_direction
from reward_server.window import Window

TILE_ACTIVATIONS = 1_500_000
"""Hidden activations computed at a time: what the cache next to a core holds, and what bounds the memory."""
QUERY_ROWS = 2_048
"""Rows per group of a query computed at a time."""

Answer = tuple[list[torch.Tensor], list[torch.Tensor] | None]
"""Rewards, and their standard deviations over the particles if asked for: [B, N_b] float32 per block."""


class Model(Protocol):
    """What a reward service answers from."""

    version: int

    def observe(self, rows: JointRows) -> None:
        """Take in fresh rows of the agents."""

    def update(self, progress: float) -> dict[str, float]:
        """Learn from what was observed; `progress` is the part of the run that is done, 0..1."""

    def query(self, rows: JointRows, deviation: bool = False, true_rewards: list[torch.Tensor] | None = None) -> Answer:
        """Rewards of joint rows."""

    def state(self) -> Arrays:
        """Everything that a restart needs, copied."""

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continue from a `state`."""


class TrueRewards:
    """Answers the environment's rewards as they came: trains experts, and checks everything around the rewards."""

    def __init__(self) -> None:
        self.version = 0

    def observe(self, rows: JointRows) -> None:
        pass

    def update(self, progress: float) -> dict[str, float]:
        self.version += 1
        return {}

    def query(self, rows: JointRows, deviation: bool = False, true_rewards: list[torch.Tensor] | None = None) -> Answer:
        if true_rewards is None:
            raise ProtocolError("body", "rewards of source 'environment' were asked for without the true rewards")
        rewards = [r * active for r, active in zip(true_rewards, rows.active, strict=True)]
        _check_rewards(rewards)
        return rewards, [torch.zeros_like(r) for r in rewards] if deviation else None

    def state(self) -> Arrays:
        return {"counters": np.array([self.version], np.int64)}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.version = int(arrays["counters"][0])


class RewardModel:
    """Particles, optimiser, the window of agent rows and the expert's rows.

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
        device: str = "cpu",
        agent_identity: bool = False,
    ) -> None:
        if not len(demonstrations):
            raise InputError("the demonstrations hold no rows; imitation needs at least one episode")
        self.layout, self.settings, self.version = layout, settings, 0
        self._expert = demonstrations
        self._window = Window(layout, settings.window_steps)
        self._generator = torch.Generator().manual_seed(seed)
        self._architectures = architectures(layout, settings, agent_identity)
        self._device = torch.device(device)
        self._layers = [
            [torch.nn.Parameter(layer.to(self._device)) for layer in architecture.initial(self._generator)]
            for architecture in self._architectures
        ]
        parameters = [layer for layers in self._layers for layer in layers]
        # SVGD gives a direction to ascend in.
        self._adam = torch.optim.Adam(parameters, lr=settings.learning_rate, maximize=True, fused=True)
        for layer in parameters:
            layer.grad = torch.zeros_like(layer)
            moments = {name: torch.zeros_like(layer) for name in ("exp_avg", "exp_avg_sq")}
            self._adam.state[layer] = {"step": torch.zeros((), device=self._device), **moments}

    def observe(self, rows: JointRows) -> None:
        """Push fresh joint rows into the window."""
        self._window.push(rows)

    def update(self, progress: float) -> dict[str, float]:
        """`settings.updates` SVGD steps.

        Answers the figures of `Health` for the last batch, before its step.
        Raises NumericalError if a parameter is no longer finite, InputError if nothing was observed yet.
        """
        if not self._window.filled:
            raise InputError("the particles cannot be updated before rows were observed")
        rate = self.settings.learning_rate * (1 + (self.settings.final_learning_rate - 1) * progress)
        for group in self._adam.param_groups:
            group["lr"] = rate
        health = Health()
        for step in range(self.settings.updates):
            self._step(health if step == self.settings.updates - 1 else None)
        for b, layers in enumerate(self._layers):
            if not all(bool(torch.isfinite(layer.sum())) for layer in layers):
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
        answers = [self._query_block(b, rows, deviation) for b in range(len(self._layers))]
        rewards = [answer[0] for answer in answers]
        _check_rewards(rewards)
        return rewards, [answer[1] for answer in answers] if deviation else None

    def state(self) -> Arrays:
        """Everything that a restart needs, copied; `state_table` gives names and shapes."""
        counters = np.array([self.version, self._adam_step(), self._window.cursor, self._window.filled], np.int64)
        arrays: Arrays = {"counters": counters, "generator": self._generator.get_state().numpy()}
        arrays |= {f"window.{name}": array.copy() for name, array in self._window.rows.to_arrays().items()}
        return arrays | {name: tensor.detach().cpu().numpy().copy() for name, tensor in self._tensors().items()}

    @torch.no_grad()
    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continue from a `state`, whose shapes and dtypes were checked against `state_table`.

        Raises ProtocolError (cause `bad_value`) if its values cannot be a state.
        """
        version, steps, cursor, filled = (int(value) for value in arrays["counters"])
        capacity = self._window.capacity
        if min(version, steps) < 0 or not (0 <= cursor < capacity and 0 <= filled <= capacity):
            raise ProtocolError("bad_value", f"the counters of a reward state are out of range: {arrays['counters']}")
        for name, tensor in self._tensors().items():
            if not np.isfinite(arrays[name]).all():
                raise ProtocolError("bad_value", f"array '{name}' of a reward state is not finite")
            tensor.copy_(torch.tensor(arrays[name]))
        window = {name.removeprefix("window."): array for name, array in arrays.items() if name.startswith("window.")}
        JointRows.from_arrays(window, self.layout)  # checks the values
        self._window.load(window, cursor, filled)
        self._generator.set_state(torch.tensor(arrays["generator"]))
        for state in self._adam.state.values():
            state["step"].fill_(steps)
        self.version = version

    @torch.no_grad()
    def _step(self, health: Health | None) -> None:
        agent = self._window.sample(self.settings.batch_size, self._generator)
        index = torch.randint(len(self._expert), (self.settings.batch_size,), generator=self._generator)
        expert = self._expert.select(index)
        for b, layers in enumerate(self._layers):
            self._differentiate(b, agent, expert, health)
            if health:
                health.add_layers(layers)
        self._adam.step()

    def _differentiate(self, b: int, agent: JointRows, expert: JointRows, health: Health | None) -> None:
        """Write the SVGD direction of a block into the gradients of its layers."""
        architecture = self._architectures[b]
        batches = [self._grids(b, rows) for rows in (agent, expert)]
        half = batches[0][1].shape[1] * batches[0][1].shape[2]
        labels = torch.empty(1, 1, 2 * half, device=self._device)
        labels[..., :half] = 1 - self.settings.label_smoothing
        labels[..., half:] = self.settings.label_smoothing
        for tile in self._tiles(b, 2 * half):
            layers = [layer[tile] for layer in self._layers[b]]
            x = self._encode(architecture, [(o[tile], a[tile]) for o, a, _ in batches])
            active = torch.cat([active[tile].flatten(1) for _, _, active in batches], dim=1).unsqueeze(1).to(x.dtype)
            logits, activations = forward(layers, x, architecture.activation)
            if health:
                health.add_logits(logits, labels, active, half)
            score = (labels - torch.sigmoid(logits)) * self._row_weights(active)
            if self.settings.kernel_scope == "function":
                score = svgd_direction(logits * active, score)
            gradients = backward(layers, x, activations, score, architecture.activation)
            for layer, direction in zip(
                self._layers[b], self._directions(architecture, layers, gradients), strict=True
            ):
                assert layer.grad is not None
                layer.grad[tile] = direction

    def _row_weights(self, active: torch.Tensor) -> torch.Tensor:
        """How much each row counts in the likelihood; active [g, 1, R], the agents' rows first, then the expert's."""
        if not self.settings.likelihood_scale:
            return active
        halves = active.unflatten(2, (2, -1))
        return (self.settings.likelihood_scale * halves / halves.sum(-1, keepdim=True).clamp_min(1)).flatten(2)

    def _directions(
        self, architecture: Architecture, layers: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor]:
        """From gradients of the likelihood to directions: adds the prior, and applies a kernel on parameters."""
        scope, stddev = self.settings.kernel_scope, self.settings.prior_stddev
        if stddev:
            for gradient, layer in zip(gradients, layers, strict=True):
                gradient.sub_(layer, alpha=stddev**-2)
        if scope in ("function", "none") or architecture.particles == 1:
            return gradients
        particles, scores = architecture.tensors(layers), architecture.tensors(gradients)
        if scope == "network":
            return architecture.join(network_direction(particles, scores))
        return architecture.join([svgd_direction(*pair) for pair in zip(particles, scores, strict=True)])

    def _query_block(self, b: int, rows: JointRows, deviation: bool) -> list[torch.Tensor]:
        """Rewards and deviations of a block."""
        architecture, block = self._architectures[b], self.layout.blocks[b]
        observations, actions, _ = self._grids(b, rows)
        shape = (1 + deviation, block.groups, len(rows), block.slots)
        answer = torch.empty(shape, dtype=self._layers[b][0].dtype, device=self._device)
        step = max(1, QUERY_ROWS // block.slots)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            for tile in self._tiles(b, step * block.slots):
                x = self._encode(architecture, [(observations[tile, part], actions[tile, part])])
                logits, _ = forward([layer[tile] for layer in self._layers[b]], x, architecture.activation)
                rewards = functional.softplus(-logits)
                target = answer[:, tile, part]
                target[0] = rewards.mean(dim=1).view(target[0].shape)
                if deviation:
                    target[1] = rewards.std(dim=1, correction=0).view(target[1].shape)
        return [(block.rows(grid) * rows.active[b].to(self._device)).cpu() for grid in answer]

    def _grids(self, b: int, rows: JointRows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        block = self.layout.blocks[b]
        observations, actions, active = (
            block.grid(part[b].to(self._device)) for part in (rows.observations, rows.actions, rows.active)
        )
        return observations, actions, active

    def _encode(self, architecture: Architecture, parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """The inputs of some batches of rows, one after the other: [g, R, in + biases]."""
        groups, _, slots = parts[0][1].shape[:3]
        counts = [actions.shape[1] for _, actions in parts]
        width = architecture.inputs + architecture.biases
        x = torch.empty(groups, sum(counts), slots, width, dtype=parts[0][0].dtype, device=self._device)
        for (observations, actions), out in zip(parts, x.split(counts, dim=1), strict=True):
            architecture.encode(observations, actions, out)
        return x.flatten(1, 2)

    def _tiles(self, b: int, rows: int) -> Iterator[slice]:
        """Slices of a block's groups whose activations for `rows` rows stay in the cache."""
        groups, settings = self.layout.blocks[b].groups, self.settings
        step = max(1, TILE_ACTIVATIONS // (settings.particles * rows * max(1, sum(settings.hidden))))
        return (slice(start, min(start + step, groups)) for start in range(0, groups, step))

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and Adam's moments by their names in a state."""
        tensors: dict[str, torch.Tensor] = {}
        for b, layers in enumerate(self._layers):
            for k, layer in enumerate(layers):
                tensors[f"{b}.{k}.parameter"] = layer
                for moment in ("exp_avg", "exp_avg_sq"):
                    tensors[f"{b}.{k}.{moment}"] = self._adam.state[layer][moment]
        return tensors

    def _adam_step(self) -> int:
        return int(next(iter(self._adam.state.values()))["step"])


def architectures(layout: Layout, settings: RewardSettings, agent_identity: bool) -> list[Architecture]:
    """The discriminators of every block."""
    return [
        Architecture(block, settings.particles, settings.hidden, settings.activation, agent_identity)
        for block in layout.blocks
    ]


def state_table(layout: Layout, settings: RewardSettings, agent_identity: bool = False) -> ArrayTable:
    """Name → (dtype, shape) of `Model.state`: the schema of a restored session."""
    if settings.source == "environment":
        return {"counters": ("int64", (1,))}
    table: ArrayTable = {"counters": ("int64", (4,)), "generator": ("uint8", (len(torch.Generator().get_state()),))}
    table |= {f"window.{name}": entry for name, entry in JointRows.array_table(layout, settings.window_steps).items()}
    for b, architecture in enumerate(architectures(layout, settings, agent_identity)):
        for k, shape in enumerate(architecture.shapes):
            table |= {f"{b}.{k}.{part}": ("float32", shape) for part in ("parameter", "exp_avg", "exp_avg_sq")}
    return table


def _check_rewards(rewards: Sequence[torch.Tensor]) -> None:
    for b, values in enumerate(rewards):
        if not bool(torch.isfinite(values).all()):
            raise NumericalError(f"a reward of block {b} is not finite")
