"""Clipped policy updates (Schulman et al. 2017) over the mean-field critics: on-policy, from fresh episodes alone.

Why they stand beside Eq. 13's off-policy update: the targets of that one carry a value back by one step per update, so
that hundreds of updates pass before the morning knows of the evening; and a critic of actions that the policy never
takes leads it away from where it is good. Here whole episodes are looked back over at once, and the policy stays near
the one that played them. That is what refines a clone.

The baseline is V^i(e^i(s), ã^{−i}), a value head of the same critics: what the others do at t does not depend on a_t^i,
so that it takes nothing from the gradient's expectation and much from its variance, as Eq. 13's baseline does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import nn

from bm3il.actors import gaussian
from bm3il.actors.policy import Policy, draw
from bm3il.learner import losses
from bm3il.learner.actor_critic import Schedule, grid, rows_at_once
from bm3il.learner.advantages import advantages, normalised
from bm3il.learner.critics import ValueCritic
from bm3il.learner.figures import Figures
from bm3il.learner.optimisation import NetworkClip, part
from bm3il.learner.recorded import Recorded
from bm3il.learner.segments import Segments
from bm3il.learner.settings import LearnerSettings
from bm3il.protocol.allocator import keep_freed_memory
from bm3il.protocol.device import moved, rounding
from bm3il.protocol.layout import JointRows, Layout
from bm3il.protocol.networks.adam import Adam
from bm3il.protocol.networks.grid import ObservationGrid, Tile
from bm3il.protocol.networks.options import log_softmax
from bm3il.protocol.networks.stacked import StackedMLP

FIGURES = ("critic_loss", "policy_loss", "policy_entropy", "value")


@dataclass
class _Steps:
    """What the epochs read: R joint steps, one entry per block in each list, joint rows [R, N_b, …].

    advantage, target, weight, old_log_probability: [R, N_b]; `weight` is the truncated weight of a lagging chunk, 0 for
    an agent that is not there.
    """

    rows: JointRows
    old_log_probability: list[torch.Tensor]
    advantage: list[torch.Tensor]
    target: list[torch.Tensor]
    weight: list[torch.Tensor]
    clone_outputs: list[torch.Tensor] | None

    def tensors(self) -> list[torch.Tensor]:
        """All of them, for `of`."""
        columns = (self.old_log_probability, self.advantage, self.target, self.weight, self.clone_outputs or [])
        return [*self.rows.tensors(), *(tensor for column in columns for tensor in column)]

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor], layout: Layout) -> _Steps:
        """The inverse of `tensors`."""
        left = iter(tensors)
        rows = JointRows.taken(layout, left)
        old, advantage, target, weight = (list(islice(left, len(layout.blocks))) for _ in range(4))
        return cls(rows, old, advantage, target, weight, list(left) or None)


class ClippedActorCritic:
    """Policies, value critics, their optimisers, and π_clone if policies are held near it.

    lagging: chunks may come from older policies (async): their rows count by the truncated weight min(1, π/μ), and the
    policy is held near the learner's own of the iteration's start instead of near the one that acted.
    """

    def __init__(
        self,
        policy: Policy,
        critic: ValueCritic,
        settings: LearnerSettings,
        device: torch.device,
        seed: int,
        lagging: bool = False,
    ) -> None:
        self.settings, self.device, self._lagging = settings, device, lagging
        self.layout = policy.layout
        self.num_groups = sum(block.groups for block in self.layout.blocks)
        self.policy, self.critic = policy.to(device), critic.to(device)
        self.clone: Policy | None = None
        # V is learned in units of the horizon: numbers of the size of one reward, whatever γ and the episodes are.
        discount, length = settings.discount, self.layout.spec.episode_length
        # The bound is for γ = 1, where episodes alone end the horizon.
        self._horizon = min(float(length), 1 / max(1 - discount, 1e-6))
        self._optimisers = {"policy": Adam(policy.parameters()), "critic": Adam(critic.parameters())}
        self._clips = {
            "policy": NetworkClip(policy, settings.policy_gradient_norm),
            "critic": NetworkClip(critic, settings.critic_gradient_norm),
        }
        self._generator = torch.Generator().manual_seed(seed)
        # Two of them, since a recorded graph has no branches.
        self._learn_critic = Recorded(lambda tensors: self._learn(tensors, False))
        self._learn_both = Recorded(lambda tensors: self._learn(tensors, True))
        if device.type == "cpu":
            keep_freed_memory()

    def start_from(self, policy: Policy) -> None:
        """Begin with the policy as it is now, and remember it as π_clone."""
        self.clone = copy.deepcopy(policy).requires_grad_(False)

    def update(
        self, segments: Segments, rewards: list[torch.Tensor], progress: float, learn_policy: bool = True
    ) -> dict[str, float]:
        """Several epochs over the fresh episodes, in parts.

        rewards: per block [R, N_b], of `segments.rows()`.   learn_policy: false while only the critics learn.
        Returns means over agents, rows and parts. Raises NumericalError if a loss is not finite.
        """
        with rounding(self.settings.precision):
            return self._update(segments, rewards, progress, learn_policy)

    def _update(
        self, segments: Segments, rewards: list[torch.Tensor], progress: float, learn_policy: bool
    ) -> dict[str, float]:
        settings = self.settings.clipped
        self._set_rates(Schedule.at(progress, self.settings))
        # Before the first epoch, for all of them: ρ and Â are against the policy of the iteration's start.
        steps = self._look_back(segments.to(self.device), moved(rewards, self.device))
        learned = Figures()
        # The entropy of continuous policies is that of a draw, and draws are the CPU's.
        recordable = all(block.discrete for block in self.layout.blocks)
        learn = self._learn_both if learn_policy else self._learn_critic
        for _ in range(settings.epochs):
            # Joint steps are shuffled, and not the rows of agents: contexts need all agents of a step.
            order = torch.randperm(len(steps.rows), generator=self._generator)
            for index in order.chunk(settings.parts):
                part = _select(steps, index.to(self.device, non_blocking=True)).tensors()
                learned.add(learn(part) if recordable else self._learn(part, learn_policy))
        return {name: value / self.num_groups for name, value in learned.means().items()}

    def state(self) -> dict[str, np.ndarray]:
        """Networks, optimisers, π_clone, random state, by name; `load_state` is the inverse."""
        arrays: dict[str, np.ndarray] = {}
        for name, network in self._networks():
            arrays |= {f"{name}/{key}": value.detach().cpu().numpy() for key, value in network.state_dict().items()}
        for name, optimiser in self._optimisers.items():
            arrays |= {f"{name}_adam/{key}": value for key, value in optimiser.arrays()}
        return arrays | {"generator": self._generator.get_state().numpy()}

    def load_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Take over a state of the same networks. Raises KeyError or RuntimeError if it is of others."""
        if part(arrays, "clone"):
            # Makes room for π_clone, whose parameters are loaded below with the others.
            self.start_from(self.policy)
        for name, network in self._networks():
            network.load_state_dict({key: torch.tensor(value) for key, value in part(arrays, name).items()})
        for name, optimiser in self._optimisers.items():
            optimiser.load_arrays(part(arrays, f"{name}_adam"))
        for recorded in (self._learn_critic, self._learn_both):
            recorded.forget()
        self._generator.set_state(torch.tensor(arrays["generator"]))

    def _networks(self) -> Iterator[tuple[str, nn.Module]]:
        yield from (("policy", self.policy), ("critic", self.critic))
        if self.clone is not None:
            yield "clone", self.clone

    @torch.no_grad()
    def _look_back(self, segments: Segments, rewards: list[torch.Tensor]) -> _Steps:
        """Advantages and value targets of all steps, by the policy and the critics as they are."""
        played, discount = segments.played, self.settings.discount
        values = self._values(segments)
        rows, per_step = segments.rows(), segments.spread(rewards)
        acted = segments.of_rows(segments.log_probabilities)
        old = self._log_probabilities(rows) if self._lagging or self._is_rounded else acted
        weights: list[torch.Tensor | None] = [None] * len(self.layout.blocks)
        if self._lagging:
            ratios = [(mine - theirs).exp().clamp(max=1) for mine, theirs in zip(old, acted, strict=True)]
            weights = [*segments.spread(ratios)]
        advantage: list[torch.Tensor] = []
        target: list[torch.Tensor] = []
        weight: list[torch.Tensor] = []
        for b, active in enumerate(segments.active):
            present = active[:-1] & played.unsqueeze(-1)
            goes_on = torch.cat([present[1:], torch.zeros_like(present[:1])])
            continues = active[1:] & ~segments.terminated.unsqueeze(-1)
            centred = per_step[b] - self.settings.reward_offset
            ahead, aim = advantages(
                centred, values[b], continues, goes_on, weights[b], discount, self.settings.clipped.decay
            )
            truncated = weights[b]
            counted = present.to(ahead.dtype) if truncated is None else present * truncated
            for collected, tensor in ((advantage, ahead), (target, aim), (weight, counted)):
                collected += segments.of_rows([tensor])
        clone = None
        if self.clone is not None and self.settings.clipped.clone_weight:
            clone = self._outputs(self.clone, rows)
        return _Steps(rows, old, self._normalised(advantage, rows.active), target, weight, clone)

    def _normalised(self, advantage: list[torch.Tensor], active: list[torch.Tensor]) -> list[torch.Tensor]:
        """Per parameter group: what is much for one type may be little for another."""
        weights = losses.row_weights(self.layout, active)
        result = []
        for block, values, weight in zip(self.layout.blocks, advantage, weights, strict=True):
            scaled = normalised(grid(block, values), weight.flatten(1, 2))
            result.append(block.joint(scaled))
        return result

    def _values(self, segments: Segments) -> list[torch.Tensor]:
        """V of every step and of each episode's last view, [T+1, E, N_b] per block.

        Nobody has acted on a last view: what the others would do there is drawn from their policies.
        """
        shape = segments.active[0].shape[:2]
        last = segments.played.sum(0), torch.arange(shape[1], device=self.device)
        views = JointRows([o[last] for o in segments.observations], [], [a[last] for a in segments.active])
        drawn = self._draw(views)
        actions = [torch.cat([a, torch.zeros_like(a[:1])]) for a in segments.actions]
        for column, action in zip(actions, drawn, strict=True):
            column[last] = action
        rows = JointRows(segments.observations, actions, segments.active).map(lambda tensor: tensor.flatten(0, 1))
        found: list[list[torch.Tensor]] = [[] for _ in self.layout.blocks]
        for index in torch.arange(len(rows), device=self.device).split(self._height):
            for values, block, value in zip(found, self.layout.blocks, self.critic(rows.select(index)), strict=True):
                # Back in units of a reward, which advantages are sums of.
                values.append(block.rows(value.float()) * self._horizon)
        return [torch.cat(values).unflatten(0, shape) for values in found]

    def _draw(self, rows: JointRows) -> list[torch.Tensor]:
        drawn = []
        for b, block in enumerate(self.layout.blocks):
            seen = block.see(rows.observations[b])
            if block.discrete:
                logits, options = self.policy.logits(b, seen)
                numbers = torch.rand(logits.shape[:-1], generator=self._generator)
                chosen = draw(log_softmax(logits), numbers.to(self.device, non_blocking=True))
                drawn.append(block.joint(options.action(chosen)))
            else:
                drawn.append(gaussian.draw(block.rows(self.policy.outputs(b, seen).float()), self._generator)[0])
        return drawn

    @property
    def _is_rounded(self) -> bool:
        """Whether log π(a|s) is not what the actor said of the same policy: near its bounds a squashed action does not
        tell the number that was drawn, and bfloat16 has other logits. Ratios must begin at 1 all the same."""
        return self.settings.precision == "bfloat16" or not all(block.discrete for block in self.layout.blocks)

    def _log_probabilities(self, rows: JointRows) -> list[torch.Tensor]:
        """log π(a|s) of the actions taken, [R, N_b] per block, in the arithmetic of the updates."""
        result = []
        for b, block in enumerate(self.layout.blocks):
            seen = block.see(rows.observations[b])
            with self._autocast():
                if block.discrete:
                    logits, options = self.policy.logits(b, seen)
                    taken = options.number(grid(block, rows.actions[b])).unsqueeze(-1)
                    result.append(block.joint(log_softmax(logits.float()).gather(-1, taken).squeeze(-1)))
                else:
                    output = block.rows(self.policy.outputs(b, seen).float())
                    result.append(gaussian.log_density(output, rows.actions[b]))
        return result

    def _outputs(self, policy: Policy, rows: JointRows) -> list[torch.Tensor]:
        """What a policy's networks say, as joint rows [R, N_b, …]."""
        return [
            block.rows(policy.outputs(b, block.see(rows.observations[b])).float())
            for b, block in enumerate(self.layout.blocks)
        ]

    @property
    def _height(self) -> int:
        return max(1, rows_at_once(self.device, self.critic) // self.layout.spec.num_agents)

    def _learn(self, tensors: Sequence[torch.Tensor], learn_policy: bool) -> dict[str, torch.Tensor]:
        """One gradient step on the tensors of some `_Steps`; returns sums over networks."""
        figures = self._backward(_Steps.of(tensors, self.layout), learn_policy)
        for name in ("critic", "policy") if learn_policy else ("critic",):
            self._clips[name]()
            self._optimisers[name].step()
        return figures

    def _backward(self, steps: _Steps, learn_policy: bool) -> dict[str, torch.Tensor]:
        """Write the gradients of some rows into the parameters; returns sums over networks."""
        for optimiser in self._optimisers.values():
            optimiser.zero_grad()
        plain = [w.flatten(1, 2) for w in losses.row_weights(self.layout, steps.rows.active)]
        weights = [w * grid(b, steps.weight[k]) for k, (b, w) in enumerate(zip(self.layout.blocks, plain, strict=True))]
        # What is told of values and entropy is a mean, also where old chunks weigh less than new ones.
        shares = [w.sum() / p.sum().clamp(min=1e-9) for w, p in zip(weights, plain, strict=True)]
        shares = [share.clamp(min=1e-9) for share in shares]
        figures = {name: torch.zeros((), device=self.device) for name in FIGURES}
        with self._autocast():
            loss = torch.zeros((), device=self.device)
            for b, (block, value) in enumerate(zip(self.layout.blocks, self.critic(steps.rows), strict=True)):
                target = grid(block, steps.target[b])
                error = value.float().flatten(1, 2) - target / self._horizon
                loss = loss + (weights[b] * error**2).sum()
                figures["value"] += (weights[b] * target).sum() / shares[b]
        loss.backward()  # outside: what was kept in float32 goes back in float32
        figures["critic_loss"] = loss.detach()
        with self._autocast():
            for b in range(len(self.layout.blocks)) if learn_policy else ():
                policy_loss, entropy = self._improve(b, steps, weights[b])
                figures["policy_loss"] += policy_loss
                figures["policy_entropy"] += entropy / shares[b]
        return figures

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    def _improve(self, b: int, steps: _Steps, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the policies of one block; their loss, and their entropy."""
        block, settings = self.layout.blocks[b], self.settings.clipped
        columns = (steps.rows.actions[b], steps.old_log_probability[b], steps.advantage[b])
        action, old, advantage = (grid(block, column) for column in columns)
        observations = block.see(steps.rows.observations[b])
        clone = None if steps.clone_outputs is None else grid(block, steps.clone_outputs[b])
        if not block.discrete:
            return self._improve_continuous(b, observations, action, old, advantage, weight, clone)
        total, entropy = torch.zeros((), device=self.device), torch.zeros((), device=self.device)

        def gradient(tile: Tile, output: torch.Tensor) -> torch.Tensor:
            options = observations.options(tile)
            loss, d_logits, surprise = losses.clipped_loss(
                options.logits(output),
                options.number(action[tile]),
                old[tile],
                advantage[tile],
                weight[tile],
                settings.clip,
                settings.entropy_weight,
                settings.clone_weight or 0.0,
                None if clone is None else options.logits(clone[tile]),
            )
            total.add_(loss)
            entropy.add_(surprise)
            return options.spread(d_logits, block.action_dim)

        stack = self.policy.networks[b]
        assert isinstance(stack, StackedMLP)
        stack.backpropagate([observations], gradient, to_inputs=False)
        return total, entropy

    def _improve_continuous(
        self,
        b: int,
        observations: ObservationGrid,
        action: torch.Tensor,
        old: torch.Tensor,
        advantage: torch.Tensor,
        weight: torch.Tensor,
        clone: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The entropy of a squashed Gaussian has no closed form: it is that of a reparameterised draw."""
        settings = self.settings.clipped
        output = self.policy.networks[b](observations).float()
        log_ratio = gaussian.log_density(output, action) - old
        entropy = -(weight * gaussian.draw(output, self._generator)[1]).sum()
        loss, d_ratio = losses.clipped_gain(log_ratio.detach(), advantage, settings.clip, weight)
        # Not the loss, but it has its gradient: `d_ratio` is a constant, which autograd carries to the network.
        surrogate = (d_ratio * log_ratio).sum() - settings.entropy_weight * entropy
        loss = loss - settings.entropy_weight * entropy.detach()
        if clone is not None:
            assert settings.clone_weight is not None
            away = settings.clone_weight * (weight * gaussian.divergence(output, clone)).sum()
            surrogate, loss = surrogate + away, loss + away.detach()
        surrogate.backward()
        return loss, entropy.detach()

    def _set_rates(self, schedule: Schedule) -> None:
        rates = {"policy": self.settings.policy_learning_rate, "critic": self.settings.critic_learning_rate}
        for name, rate in rates.items():
            self._optimisers[name].set_rate(rate * schedule.learning_rate)


def _select(steps: _Steps, index: torch.Tensor) -> _Steps:
    def taken(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor.index_select(0, index) for tensor in tensors]

    return _Steps(
        steps.rows.select(index),
        taken(steps.old_log_probability),
        taken(steps.advantage),
        taken(steps.target),
        taken(steps.weight),
        None if steps.clone_outputs is None else taken(steps.clone_outputs),
    )
