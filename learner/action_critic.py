"""Critics of one own action at a time, Q^i(s^i, a^i, ã^i): for continuous actions, and for the attention of the text.

The critics of `learner.critics` give Q of all own actions in one pass, because nothing before their last layer knows
the own action. Here e^i = relu(W^i [s^i, a^i]), the query of Eq. 11 is W_q e^i(s^i, a^i), and Q^i = head^i([e^i, ã^i])
is one number, so that discrete actions take one pass each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bm3il.actors import gaussian
from bm3il.actors.policy import draw
from bm3il.learner import losses
from bm3il.learner.actor_critic import ActorCritic, grid
from bm3il.learner.critics import Critic
from bm3il.learner.few_actions import FewActions
from bm3il.learner.mean_field import action_vectors
from bm3il.learner.mixture import Scene
from bm3il.learner.replay import Batch
from bm3il.protocol.layout import Block, JointRows
from bm3il.protocol.networks.grid import ObservationGrid
from bm3il.protocol.networks.options import log_softmax


class ActionCritic(Critic):
    """Q^i(s^i, a^i, ã^i) of every agent; one network per parameter group, as in `Critic`."""

    def _ends(self, block: Block) -> tuple[int, int]:
        return block.observation_dim + block.action_dim, 1

    def forward(self, rows: JointRows) -> list[torch.Tensor]:
        """Joint rows → per block Q of every own action [G, S, B, A], or of the own action taken [G, S, B] if it is
        continuous; the others act as they did."""
        values = []
        for b, (block, scene) in enumerate(zip(self.layout.blocks, self.scenes(rows), strict=True)):
            observations = block.see(rows.observations[b])
            if block.discrete:
                q = self.of_all_actions(b, observations, scene)
            else:
                q = self.of(b, observations, grid(block, rows.actions[b]), scene)
            values.append(q.unflatten(1, (block.slots, len(rows))))
        return values

    def scenes(self, rows: JointRows) -> Sequence[Scene | FewActions | None]:
        """What the agents of each block see the others do in these rows; None if the critics do not see it."""
        return [None] * len(self.layout.blocks) if self.others is None else self.others.scenes(rows)

    def of(
        self, b: int, observations: ObservationGrid, actions: torch.Tensor, scene: Scene | FewActions | None
    ) -> torch.Tensor:
        """Q of one block [G, S·B] for what agents see and own action vectors [G, S·B, A]."""
        encoded = self.encoders[b](observations, actions)
        if self.others is None or scene is None:
            return self.heads[b](encoded).squeeze(-1)
        return self.heads[b](encoded, self.others.mix(b, encoded, scene)).squeeze(-1)

    def of_all_actions(self, b: int, observations: ObservationGrid, scene: Scene | FewActions | None) -> torch.Tensor:
        """Q of every own action of a block of discrete ones, [G, S·B, A]."""
        width = self.layout.blocks[b].action_dim
        one_hot = torch.eye(width, dtype=next(self.parameters()).dtype, device=observations.device)
        shape = (*observations.shape[:2], width)
        return torch.stack([self.of(b, observations, a.expand(shape), scene) for a in one_hot], dim=-1)

    @torch.no_grad()
    def attention(self, rows: JointRows) -> torch.Tensor | None:
        """As `Critic.attention`, of the own actions taken."""
        if self.others is None:
            return None
        encoded = [
            self.encoders[b](block.see(rows.observations[b]), grid(block, action_vectors(block, rows.actions[b])))
            for b, block in enumerate(self.layout.blocks)
        ]
        return self.others.weights(encoded, rows)


class ActionActorCritic(ActorCritic):
    """The actor-critic over an `ActionCritic`.

    Discrete actions as in `ActorCritic`, exact over the own action. Continuous ones: y = r + γ (Q̄(s',a',ã') −
    temperature · log π(a'|s')) with a' drawn from the target policy (Eq. 8), and the policy moves along the gradient of
    Q(s,a,ã) − temperature · log π(a|s) with respect to a reparameterised a.
    """

    critic: ActionCritic
    target_critic: ActionCritic
    _draws_before = False  # the noise of a Gaussian is drawn where it is needed

    def _draw_numbers(self, size: int) -> list[torch.Tensor]:
        return []

    def _backward(
        self, batch: Batch, rewards: list[torch.Tensor], weights: list[torch.Tensor], numbers: list[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        temperature = self._temperature
        zero = torch.zeros((), device=self.device)
        sums = {"policy_loss": zero, "value": zero}  # and the policy's entropy, where its update tells it
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
            targets = self._targets(batch, rewards, numbers)
            scenes = self.critic.scenes(batch.rows)
            loss = torch.zeros((), device=self.device)
            for b, (target, weight, scene) in enumerate(zip(targets, weights, scenes, strict=True)):
                block = self.layout.blocks[b]
                observations, actions = (
                    block.see(batch.rows.observations[b]),
                    grid(block, batch.rows.actions[b]),
                )
                if block.discrete:
                    q, options = self.critic.of_all_actions(b, observations, scene).float(), observations.options()
                    taken = q.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
                    policy_loss = self._improve(b, observations, options, options.of(q.detach()), temperature, weight)
                    figures = {"policy_loss": policy_loss} | self._entropy(policy_loss, temperature)
                else:
                    taken = self.critic.of(b, observations, actions, scene).float()
                    # `FewActions` are of discrete blocks alone. A constant scene spares gradients that nobody takes.
                    seen = scene.detach() if isinstance(scene, Scene) else None
                    figures = self._improve_continuous(b, observations, seen, temperature, weight)
                loss = loss + (weight * (taken - target) ** 2).sum()
                for name, value in figures.items():
                    sums[name] = sums.get(name, zero) + value
                sums["value"] = sums["value"] + (weight * target).sum()
        loss.backward()
        return sums | {"critic_loss": loss.detach()}

    def _improve_continuous(
        self,
        b: int,
        observations: ObservationGrid,
        scene: Scene | None,
        temperature: float | torch.Tensor,
        weight: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Add the gradients of the policies of one block; nothing is added to the critics'."""
        network = self.policy.networks[b]
        action, log_density = gaussian.draw(network(observations).float(), self._generator)
        q = self.critic.of(b, observations, action, scene).float()
        loss = (weight * (temperature * log_density - q)).sum()
        # Named inputs: the same loss has gradients in the critic, which must not move to make its own Q larger.
        torch.autograd.backward(loss, inputs=list(network.parameters()))
        return {"policy_loss": loss.detach(), "policy_entropy": -(weight * log_density.detach()).sum()}

    @torch.no_grad()
    def _targets(self, batch: Batch, rewards: list[torch.Tensor], numbers: list[torch.Tensor]) -> list[torch.Tensor]:
        temperature = self._temperature
        drawn = [self._draw(b, batch) for b in range(len(self.layout.blocks))]
        actions = [block.joint(action) for block, (action, _) in zip(self.layout.blocks, drawn, strict=True)]
        scenes = self.target_critic.scenes(JointRows(batch.next_observations, actions, batch.next_active))
        targets = []
        for b, ((action, likelihood), scene) in enumerate(zip(drawn, scenes, strict=True)):
            block, observations = self.layout.blocks[b], self.layout.blocks[b].see(batch.next_observations[b])
            if block.discrete:
                q = self.target_critic.of_all_actions(b, observations, scene).float()
                value = losses.soft_value(observations.options().of(q), likelihood, temperature)
            else:
                value = self.target_critic.of(b, observations, action, scene).float() - temperature * likelihood
            targets.append(self._target(block, batch.next_active[b], batch.terminated, rewards[b], value))
        return targets

    def _draw(self, b: int, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Next actions of one block by the target policies, and their masked logits [G, S·B, D] or log densities."""
        block = self.layout.blocks[b]
        seen = block.see(batch.next_observations[b])
        output = self.target_policy.networks[b](seen).float()
        if not block.discrete:
            return gaussian.draw(output, self._generator)
        options = seen.options()
        logits = options.logits(output)
        numbers = torch.rand(logits.shape[:-1], generator=self._generator).to(logits.device, non_blocking=True)
        return options.action(draw(log_softmax(logits), numbers)), logits
