"""Mean-field multi-agent soft actor-critic (Eq. 8, 10, 13): one gradient step for every critic and policy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from actors.policy import Policy, sample
from learner import losses
from learner.cloning import Cloning
from learner.critics import Critic
from learner.optimisation import adam_arrays, clip_per_network, load_adam_arrays, part
from learner.replay import Batch
from learner.settings import LearnerSettings
from protocol.errors import NumericalError
from protocol.layout import JointRows, Layout

CACHED_ROWS = 8_192

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

    def __init__(
        self, policy: Policy, critic: Critic, settings: LearnerSettings, device: torch.device, seed: int
    ) -> None:
        self.settings, self.device = settings, device
        self.layout: Layout = policy.layout
        self.num_groups = sum(block.groups for block in self.layout.blocks)
        self.policy, self.critic = policy.to(device), critic.to(device)
        self.target_policy, self.target_critic = _frozen(policy), _frozen(critic)
        self._optimisers = {
            "policy": torch.optim.Adam(policy.parameters(), settings.policy_learning_rate, fused=True),
            "critic": torch.optim.Adam(critic.parameters(), settings.critic_learning_rate, fused=True),
        }
        self._generator = torch.Generator().manual_seed(seed)

    def update(
        self, batch: Batch, rewards: list[torch.Tensor], progress: float, cloning: Cloning | None = None
    ) -> dict[str, float]:
        """One step on B joint rows.

        rewards: per block [B, N_b]. cloning: expert rows, for the behaviour-cloning term of the policies' loss.
        Returns means over agents and rows. Raises NumericalError if a loss is not finite; no network is changed then.
        """
        schedule = Schedule.at(progress, self.settings)
        for optimiser in self._optimisers.values():
            optimiser.zero_grad(set_to_none=True)
        size = len(batch.rows)
        totals = {"critic_loss": 0.0, "policy_loss": 0.0, "entropy": 0.0, "value": 0.0}
        weights = losses.row_weights(self.layout, batch.rows.active)
        for start in range(0, size, self._chunk_rows(size)):
            rows = slice(start, min(start + self._chunk_rows(size), size))
            for name, value in self._backward(
                _cut(batch, rows), [r[rows] for r in rewards], [w[:, rows] for w in weights], schedule.temperature
            ).items():
                totals[name] += value
        if cloning is not None:
            cloning_loss = cloning.loss(self.policy)
            (self.settings.cloning_weight * cloning_loss).backward()
            totals["cloning_loss"] = cloning_loss.item()
        for name in ("critic_loss", "policy_loss"):
            if not np.isfinite(totals[name]):
                raise NumericalError(f"{name} is {totals[name]}")
        self._step(schedule)
        return totals | {"temperature": schedule.temperature}

    def state(self) -> dict[str, np.ndarray]:
        """Networks, targets, optimisers, random state, by name; `load_state` is the inverse."""
        arrays = {f"{name}/{key}": value for name, network in self._networks() for key, value in _arrays_of(network)}
        for name, optimiser in self._optimisers.items():
            arrays |= {f"{name}_adam/{key}": value for key, value in adam_arrays(optimiser)}
        return arrays | {"generator": self._generator.get_state().numpy()}

    def load_state(self, arrays: dict[str, np.ndarray]) -> None:
        """Take over a state of the same networks. Raises KeyError or RuntimeError if it is of others."""
        for name, network in self._networks():
            network.load_state_dict({key: torch.tensor(value) for key, value in part(arrays, name).items()})
        for name, optimiser in self._optimisers.items():
            load_adam_arrays(optimiser, part(arrays, f"{name}_adam"))
        self._generator.set_state(torch.tensor(arrays["generator"]))

    def _networks(self) -> Iterator[tuple[str, nn.Module]]:
        yield "policy", self.policy
        yield "critic", self.critic
        yield "target_policy", self.target_policy
        yield "target_critic", self.target_critic

    def _chunk_rows(self, size: int) -> int:
        """Rows of one forward and backward pass: activations of all agents should stay in the processor's cache."""
        if self.device.type != "cpu":
            return size
        return max(32, min(size, CACHED_ROWS // self.layout.spec.num_agents))

    def _backward(
        self, batch: Batch, rewards: list[torch.Tensor], weights: list[torch.Tensor], temperature: float
    ) -> dict[str, float]:
        """Add the gradients of some rows to the parameters."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
            with torch.no_grad():
                next_values = self._next_values(batch, temperature)
            q_values = self.critic(batch.rows)
            log_policies = self._log_policies(self.policy, batch.rows.observations, batch.action_masks)
        sums: dict[str, list[torch.Tensor]] = {"critic_loss": [], "policy_loss": [], "entropy": [], "value": []}
        for b, block in enumerate(self.layout.blocks):
            q, weight = q_values[b].float(), weights[b]
            continues = block.grid(batch.next_active[b] & ~batch.terminated.unsqueeze(1))
            reward = block.grid(rewards[b]) - self.settings.reward_offset
            target = losses.critic_target(reward, next_values[b], continues, self.settings.discount)
            sums["critic_loss"].append(losses.critic_loss(q, block.grid(batch.rows.actions[b]), target, weight))
            sums["policy_loss"].append(losses.policy_loss(log_policies[b], q, temperature, weight))
            with torch.no_grad():
                sums["entropy"].append((weight * losses.entropy(log_policies[b])).sum() / self.num_groups)
                sums["value"].append((weight * target).sum() / self.num_groups)
        totals = {name: torch.stack(values).sum() for name, values in sums.items()}
        (totals["critic_loss"] + totals["policy_loss"]).backward()
        return {name: value.item() for name, value in totals.items()}

    def _next_values(self, batch: Batch, temperature: float) -> list[torch.Tensor]:
        """v(s') of the target networks, per block [G, B, S]; ã' from actions that the target policies draw."""
        log_policies = self._log_policies(self.target_policy, batch.next_observations, batch.next_action_masks)
        actions = [
            block.rows(sample(log_policy, self._generator))
            for block, log_policy in zip(self.layout.blocks, log_policies, strict=True)
        ]
        q_values = self.target_critic(JointRows(batch.next_observations, actions, batch.next_active))
        return [
            losses.soft_value(q.float(), log_policy, temperature)
            for q, log_policy in zip(q_values, log_policies, strict=True)
        ]

    def _log_policies(
        self, policy: Policy, observations: list[torch.Tensor], masks: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        return [
            policy.logits(b, block.grid(observations[b]), block.grid(masks[b])).float().log_softmax(-1)
            for b, block in enumerate(self.layout.blocks)
        ]

    def _step(self, schedule: Schedule) -> None:
        """Clip, let the optimisers step, move the targets."""
        rates = {"policy": self.settings.policy_learning_rate, "critic": self.settings.critic_learning_rate}
        clip_per_network(self.policy, self.settings.policy_gradient_norm)
        clip_per_network(self.critic, self.settings.critic_gradient_norm)
        for name, optimiser in self._optimisers.items():
            optimiser.param_groups[0]["lr"] = rates[name] * schedule.learning_rate
            optimiser.step()
        with torch.no_grad():
            for target, trained in ((self.target_policy, self.policy), (self.target_critic, self.critic)):
                torch._foreach_lerp_(list(target.parameters()), list(trained.parameters()), self.settings.target_rate)


def _frozen(network: Network) -> Network:
    return copy.deepcopy(network).requires_grad_(False)


def _arrays_of(network: nn.Module) -> Iterator[tuple[str, np.ndarray]]:
    for key, value in network.state_dict().items():
        yield key, value.detach().cpu().numpy()


def _cut(batch: Batch, rows: slice) -> Batch:
    def part(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor[rows] for tensor in tensors]

    return Batch(
        JointRows(part(batch.rows.observations), part(batch.rows.actions), part(batch.rows.active)),
        part(batch.action_masks),
        part(batch.next_observations),
        part(batch.next_action_masks),
        part(batch.next_active),
        part(batch.rewards),
        batch.terminated[rows],
    )
