"""Mean-field multi-agent soft actor-critic (Eq. 8, 10, 13): one gradient step for every critic and policy."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from bm3il.actors.policy import Policy, draw
from bm3il.learner import losses
from bm3il.learner.cloning import Cloning
from bm3il.learner.critics import Critic
from bm3il.learner.optimisation import NetworkClip, part
from bm3il.learner.recorded import Recorded
from bm3il.learner.replay import Batch
from bm3il.learner.settings import LearnerSettings
from bm3il.protocol.allocator import keep_freed_memory
from bm3il.protocol.device import moved, numbers_at_once, rounding
from bm3il.protocol.layout import Block, JointRows, Layout
from bm3il.protocol.networks.adam import Adam
from bm3il.protocol.networks.grid import ObservationGrid, Tile
from bm3il.protocol.networks.options import Options, log_softmax
from bm3il.protocol.networks.stacked import StackedMLP
from bm3il.protocol.observations import Observations

CHUNK_ROWS = 65_536
"""Rows of all agents in one forward and backward pass on a CPU."""
NUMBERS_PER_ROW = 1_024
"""About what is computed of each, besides how it attends to each of the others (or of their types)."""

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Schedule:
    """What changes over a run, at a part `progress` in 0..1 of it."""

    temperature: float
    learning_rate: float

    @classmethod
    def at(cls, progress: float, settings: LearnerSettings) -> Schedule:
        """Temperature falls geometrically until `temperature_anneal`; the learning rate (a factor) linearly."""
        annealed = min(1.0, progress / settings.temperature_anneal)
        ratio = settings.final_temperature / settings.temperature
        return cls(settings.temperature * ratio**annealed, 1 + (settings.final_learning_rate - 1) * progress)


class ActorCritic:
    """Policies, critics, their targets and optimisers.

    Both losses share one forward pass of the critics: the baseline and the advantage of Eq. 13 are read off the Q of
    all own actions, with the others' actions as they were taken. Expectations over an agent's own action (in the
    baseline, the policy's gradient and the value of the next state) are sums over A, not samples.
    """

    _draws_before = True
    """Whether all random numbers of an update are drawn before it, so that it can be recorded."""

    def __init__(
        self, policy: Policy, critic: Critic, settings: LearnerSettings, device: torch.device, seed: int
    ) -> None:
        self.settings, self.device = settings, device
        self.layout: Layout = policy.layout
        self.num_groups = sum(block.groups for block in self.layout.blocks)
        self.policy, self.critic = policy.to(device), critic.to(device)
        self.target_policy, self.target_critic = _frozen(policy), _frozen(critic)
        self._optimisers = {"policy": Adam(policy.parameters()), "critic": Adam(critic.parameters())}
        self._temperature: float | torch.Tensor = settings.temperature
        if device.type == "cuda":  # a recorded graph reads it anew each time
            self._temperature = torch.full((), settings.temperature, device=device)
        self._recorded = Recorded(self._learn)
        # Found once, and not in every update: to walk through modules takes Python time.
        self._parameters: list[torch.Tensor] = [*policy.parameters(), *critic.parameters()]
        self._target_parameters: list[torch.Tensor] = [
            *self.target_policy.parameters(),
            *self.target_critic.parameters(),
        ]
        self._clips = (
            NetworkClip(policy, settings.policy_gradient_norm),
            NetworkClip(critic, settings.critic_gradient_norm),
        )
        self._generator = torch.Generator().manual_seed(seed)
        if device.type == "cpu":
            keep_freed_memory()

    def start_from(self, policy: Policy) -> None:
        """The policy was set from outside: the target is the same."""
        self.target_policy.load_state_dict(policy.state_dict())

    def update(
        self, batch: Batch, rewards: list[torch.Tensor], progress: float, cloning: Cloning | None = None
    ) -> dict[str, torch.Tensor | float]:
        """One step on B joint rows.

        rewards: per block [B, N_b]. cloning: expert rows, for the behaviour-cloning term of the policies' loss. All of
        them may be on another device than the networks, and are moved to theirs.
        Returns means over agents and rows, where they were computed: nothing here waits for a GPU.
        """
        schedule = Schedule.at(progress, self.settings)
        self._set(schedule)
        tensors = batch.to(self.device).tensors() + moved([*rewards, *self._draw_numbers(len(batch.rows))], self.device)
        learn = self._recorded if self._draws_before and cloning is None else partial(self._learn, cloning=cloning)
        with rounding(self.settings.precision):
            return learn(tensors) | {"temperature": schedule.temperature}

    def state(self) -> dict[str, np.ndarray]:
        """Networks, targets, optimisers, random state, by name; `load_state` is the inverse."""
        arrays = {f"{name}/{key}": value for name, network in self._networks() for key, value in _arrays_of(network)}
        for name, optimiser in self._optimisers.items():
            arrays |= {f"{name}_adam/{key}": value for key, value in optimiser.arrays()}
        return arrays | {"generator": self._generator.get_state().numpy()}

    def load_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Take over a state of the same networks. Raises KeyError or RuntimeError if it is of others."""
        for name, network in self._networks():
            network.load_state_dict({key: torch.tensor(value) for key, value in part(arrays, name).items()})
        for name, optimiser in self._optimisers.items():
            optimiser.load_arrays(part(arrays, f"{name}_adam"))
        self._recorded.forget()
        self._generator.set_state(torch.tensor(arrays["generator"]))

    def _networks(self) -> Iterator[tuple[str, nn.Module]]:
        yield "policy", self.policy
        yield "critic", self.critic
        yield "target_policy", self.target_policy
        yield "target_critic", self.target_critic

    def _draw_numbers(self, size: int) -> list[torch.Tensor]:
        """What the next actions of B rows are drawn with: uniform numbers [G, S·B] of each block and each chunk."""
        counts = [min(rows.stop, size) - rows.start for rows in self._chunks(size)]
        shapes = [(block.groups, count * block.slots) for count in counts for block in self.layout.blocks]
        return [torch.rand(shape, generator=self._generator) for shape in shapes]

    def _learn(self, tensors: Sequence[torch.Tensor], cloning: Cloning | None = None) -> dict[str, torch.Tensor]:
        """One step on the tensors of a batch, its rewards, and the random numbers; returns means."""
        for optimiser in self._optimisers.values():
            optimiser.zero_grad()
        blocks, left = len(self.layout.blocks), iter(tensors)
        batch = Batch.taken(self.layout, left)
        rewards, numbers = list(islice(left, blocks)), left
        # Of the whole batch, so that gradients of its chunks add up to that of its mean, however it is cut.
        weights = losses.row_weights(self.layout, batch.rows.active)
        sums = []
        for rows in self._chunks(len(batch.rows)):
            part = (
                batch.map(itemgetter(rows)),
                [r[rows] for r in rewards],
                [w[:, :, rows].flatten(1, 2) for w in weights],
            )
            sums.append(self._backward(*part, list(islice(numbers, blocks))))
        totals = {name: torch.stack([s[name] for s in sums]).sum() / self.num_groups for name in sums[0]}
        if cloning is not None:
            cloning_loss = cloning.loss(self.policy)
            (self.settings.cloning_weight * cloning_loss).backward()
            totals["cloning_loss"] = cloning_loss.detach()
        self._step()
        return totals

    def _chunks(self, size: int) -> list[slice]:
        height = self._chunk_rows(size)
        return [slice(start, start + height) for start in range(0, size, height)]

    def _chunk_rows(self, size: int) -> int:
        """Joint rows of one forward and backward pass, in even parts: this bounds the memory of many agents."""
        return math.ceil(size / math.ceil(size * self.layout.spec.num_agents / rows_at_once(self.device, self.critic)))

    def _backward(
        self, batch: Batch, rewards: list[torch.Tensor], weights: list[torch.Tensor], numbers: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Add the gradients of some rows to the parameters; returns sums over networks."""
        temperature = self._temperature
        observations = self._see(batch.rows.observations)
        sums = {name: torch.zeros((), device=self.device) for name in ("critic_loss", "policy_loss", "value")}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
            targets = self._targets(batch, rewards, numbers)
            encoded = self.critic.encode(observations)
            own = [e.detach().requires_grad_() for e in encoded]  # their gradient comes from heads and contexts
            contexts = self.critic.contexts(own, batch.rows)
            d_contexts: list[list[torch.Tensor]] = [[] for _ in contexts]
            for b, (target, weight) in enumerate(zip(targets, weights, strict=True)):
                seen = [part[b] for part in (own, *contexts)]
                options = observations[b].options()
                q, critic_loss, (own[b].grad, *d_context) = self._judge(b, seen, options, batch, target, weight)
                for gradients, gradient in zip(d_contexts, d_context, strict=True):
                    gradients.append(gradient)
                sums["critic_loss"] += critic_loss
                sums["policy_loss"] += self._improve(b, observations[b], options, q, temperature, weight)
                sums["value"] += (weight * target).sum()
        for context, gradients in zip(contexts, d_contexts, strict=True):
            # Of all blocks at once: their keys and values are of one graph, which a pass through it gives up.
            torch.autograd.backward(context, gradients)
        torch.autograd.backward(encoded, [e.grad for e in own])
        return sums | self._entropy(sums["policy_loss"], temperature)

    def _entropy(self, policy_loss: torch.Tensor, temperature: float | torch.Tensor) -> dict[str, torch.Tensor]:
        """Of the policies, which the value of Eq. 13's loss tells (see `losses.policy_loss`)."""
        return {"policy_entropy": -policy_loss / temperature} if self.settings.policy == "actor" else {}

    def _targets(self, batch: Batch, rewards: list[torch.Tensor], numbers: list[torch.Tensor]) -> list[torch.Tensor]:
        """y of Eq. 8 per block [G, S·B]; ã' from actions that the target policies draw with the next masks."""
        # No graph is built here, as target networks have no gradients (`_frozen`).
        observations = self._see(batch.next_observations)
        options = [seen.options() for seen in observations]
        # Zeros, here and below: rows of empty slots may be in no tile, and what they hold must be finite.
        logits = [torch.zeros(option.allowed.shape, device=self.device) for option in options]
        actions = []
        for b, block in enumerate(self.layout.blocks):
            for tile, output in _stack(self.target_policy.networks, b).outputs(observations[b]):
                logits[b][tile] = options[b][tile].logits(output)
            actions.append(block.joint(options[b].action(draw(log_softmax(logits[b]), numbers[b]))))
        rows = JointRows(batch.next_observations, actions, batch.next_active)
        encoded = self.target_critic.encode(observations)
        contexts = self.target_critic.contexts(encoded, rows)
        targets = []
        for b, block in enumerate(self.layout.blocks):
            values = torch.zeros(logits[b].shape[:2], device=self.device)
            for tile, q in _stack(self.target_critic.heads, b).outputs(
                encoded[b], *(context[b] for context in contexts)
            ):
                values[tile] = losses.soft_value(options[b][tile].of(q.float()), logits[b][tile], self._temperature)
            targets.append(self._target(block, batch.next_active[b], batch.terminated, rewards[b], values))
        return targets

    def _target(
        self,
        block: Block,
        next_active: torch.Tensor,
        terminated: torch.Tensor,
        reward: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        """y of one block [G, S·B] from v(s') [G, S·B]; the others are joint rows."""
        continues = grid(block, next_active & ~terminated.unsqueeze(1))
        centred = grid(block, reward) - self.settings.reward_offset
        return losses.critic_target(centred, value, continues, self.settings.discount)

    def _judge(
        self,
        b: int,
        seen: list[torch.Tensor],
        options: Options,
        batch: Batch,
        target: torch.Tensor,
        weight: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """The critics' heads of one block: Q of the options [G, S·B, D], their loss, its gradients with respect to
        `seen`."""
        block = self.layout.blocks[b]
        actions = grid(block, batch.rows.actions[b])
        q_values = torch.zeros(options.allowed.shape, device=self.device)
        total = torch.zeros((), device=self.device)

        def gradient(tile: Tile, q: torch.Tensor) -> torch.Tensor:
            # Under autocast heads say bfloat16: differences of Q and losses are taken in float32.
            q = q.to(q_values.dtype)
            q_values[tile] = options[tile].of(q)
            loss, d_q = losses.critic_loss(q, actions[tile], target[tile], weight[tile])
            total.add_(loss)
            return d_q

        d_seen = _stack(self.critic.heads, b).backpropagate([x.detach() for x in seen], gradient, to_inputs=True)
        return q_values, total, d_seen

    def _improve(
        self,
        b: int,
        observations: ObservationGrid,
        options: Options,
        q: torch.Tensor,
        temperature: float | torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        """The policies of one block: their loss.   q: of their options, [G, S·B, D]."""
        improve = losses.boltzmann_loss if self.settings.policy == "boltzmann" else losses.policy_loss
        total = torch.zeros((), device=self.device)

        def gradient(tile: Tile, output: torch.Tensor) -> torch.Tensor:
            there = options[tile]
            loss, d_logits = improve(there.logits(output), q[tile], temperature, weight[tile])
            total.add_(loss)
            return there.spread(d_logits, self.layout.blocks[b].action_dim)

        _stack(self.policy.networks, b).backpropagate([observations], gradient, to_inputs=False)
        return total

    def _see(self, observations: list[Observations]) -> list[ObservationGrid]:
        return [block.see(seen) for block, seen in zip(self.layout.blocks, observations, strict=True)]

    def _set(self, schedule: Schedule) -> None:
        """The temperature and the steps of the next update."""
        if isinstance(self._temperature, torch.Tensor):
            # In place: a recorded graph reads this very tensor.
            self._temperature.fill_(schedule.temperature)
        else:
            self._temperature = schedule.temperature
        rates = {"policy": self.settings.policy_learning_rate, "critic": self.settings.critic_learning_rate}
        for name, optimiser in self._optimisers.items():
            optimiser.set_rate(rates[name] * schedule.learning_rate)

    def _step(self) -> None:
        """Clip, let the optimisers step, move the targets."""
        for clip in self._clips:
            clip()
        for optimiser in self._optimisers.values():
            optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(self._target_parameters, self._parameters, self.settings.target_rate)


def rows_at_once(device: torch.device, critic: Critic) -> int:
    """Rows of all agents together in one forward and backward pass."""
    if device.type == "cpu":
        return CHUNK_ROWS
    attended = 0 if critic.others is None else critic.others.heads * len(critic.others.own)
    return max(1, numbers_at_once(device) // (NUMBERS_PER_ROW + attended))


def grid(block: Block, rows: torch.Tensor) -> torch.Tensor:
    """Joint rows [B, N_b, …] → [G, S·B, …], contiguous: read many times, network by network."""
    return block.grid(rows).flatten(1, 2).contiguous()


def _stack(networks: nn.ModuleList, b: int) -> StackedMLP:
    stack = networks[b]
    assert isinstance(stack, StackedMLP)
    return stack


def _frozen(network: Network) -> Network:
    return copy.deepcopy(network).requires_grad_(False)


def _arrays_of(network: nn.Module) -> Iterator[tuple[str, np.ndarray]]:
    for key, value in network.state_dict().items():
        yield key, value.detach().cpu().numpy()
