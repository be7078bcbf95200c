"""The policies of all agents: stacked networks from observation to action."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import nn

from bm3il.actors import gaussian
from bm3il.protocol.environment import TimeStep
from bm3il.protocol.layout import Layout
from bm3il.protocol.networks.grid import ObservationGrid
from bm3il.protocol.networks.options import FORBIDDEN_LOGIT, Options, log_softmax
from bm3il.protocol.networks.stacked import StackedMLP
from bm3il.protocol.observations import Observations
from bm3il.protocol.specs import ArrayTable, EnvironmentSpec


class Policy(nn.Module):
    """π^i(a|s^i) of every agent; one network per parameter group of `layout`.

    Networks put out the logits of discrete actions, or what `actors.gaussian` makes continuous ones of.
    """

    def __init__(self, layout: Layout, hidden: Sequence[int], generator: torch.Generator) -> None:
        super().__init__()
        self.layout = layout
        self.networks = nn.ModuleList(
            StackedMLP(
                block.groups,
                (block.observation_dim, *hidden, block.action_dim if block.discrete else 2 * block.action_dim),
                generator,
                identity_slots=block.identity_slots,
                agents=block.agents,
            )
            for block in layout.blocks
        )

    def logits(self, block_index: int, seen: ObservationGrid) -> tuple[torch.Tensor, Options]:
        """Masked logits of a block of discrete actions, [G, S·B, D], and which these are."""
        options = seen.options()
        return options.logits(self.networks[block_index](seen)), options

    def outputs(self, block_index: int, seen: ObservationGrid) -> torch.Tensor:
        """What the networks of one block say of what agents see: [G, S, B, A], or [G, S, B, 2·A] if continuous."""
        return self.networks[block_index](seen).unflatten(1, (seen.slots, seen.steps))

    def act(self, now: TimeStep, generator: torch.Generator, greedy: bool = False) -> list[np.ndarray]:
        """Draw actions (or take the likeliest; of continuous ones the centre): per type [E, X_m] int64, or
        [E, X_m, A_m] float32. The generator is the CPU's, wherever the policy is."""
        return self.decide(now, generator, greedy)[0]

    def decide(
        self, now: TimeStep, generator: torch.Generator, greedy: bool = False
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The actions of `act`, and log π(a|s) of each (of continuous ones the density's): [E, X_m] float32."""
        return self.choose(now.seen(self.layout.spec), generator, greedy)

    @torch.no_grad()
    def choose(
        self, observations: Sequence[Observations], generator: torch.Generator, greedy: bool = False
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """As `decide`, on what the agents of each block see."""
        device = next(self.parameters()).device
        actions, chances = [], []
        for b, (block, seen) in enumerate(zip(self.layout.blocks, observations, strict=True)):
            grid = block.see(seen.to(device))
            if block.discrete:
                logits, options = self.logits(b, grid)
                logits, options = block.joint(logits), options.map(block.joint)
                log_policy = log_softmax(logits)
                if greedy:
                    chosen = logits.argmax(-1)
                else:
                    numbers = torch.rand(log_policy.shape[:-1], generator=generator)
                    chosen = draw(log_policy, numbers.to(device, non_blocking=True))
                action = options.action(chosen)
                chance = log_policy.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
            else:
                output = block.rows(self.outputs(b, grid))
                if greedy:
                    action = gaussian.mode(output)
                    chance = gaussian.log_density(output, action)
                else:
                    action, chance = gaussian.draw(output, generator)
            actions.append(action)
            chances.append(chance)
        by_type = partial(self.layout.spec.by_type, axis=1)
        return [a.cpu().numpy() for a in by_type(actions)], [c.cpu().numpy() for c in by_type(chances)]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Copies of the parameters by name: the payload of `Weights`."""
        # Copied: a broadcast lends them to ZeroMQ, and repeats them, while updates change the parameters in place.
        return {name: value.detach().cpu().numpy().copy() for name, value in self.state_dict().items()}

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take over parameters that were checked against `array_table`."""
        self.load_state_dict({name: torch.tensor(value) for name, value in arrays.items()})

    def array_table(self) -> ArrayTable:
        """Name → (dtype, shape) of the parameters."""
        return {name: ("float32", tuple(value.shape)) for name, value in self.state_dict().items()}

    def sha256(self) -> str:
        """Fingerprint of the parameters, bit by bit."""
        digest = hashlib.sha256()
        for name, value in sorted(self.to_arrays().items()):
            digest.update(name.encode() + value.tobytes())
        return digest.hexdigest()


class UniformPolicy:
    """Draws every allowed action with the same probability: the zero of the normalised return."""

    def __init__(self, spec: EnvironmentSpec) -> None:
        self._spec = spec

    def act(self, now: TimeStep, generator: torch.Generator, greedy: bool = False) -> list[np.ndarray]:
        """As `Policy.act`; `greedy` makes no difference."""
        return [
            sample(torch.zeros(mask.shape).masked_fill(~torch.as_tensor(mask), FORBIDDEN_LOGIT), generator).numpy()
            if agent_type.discrete
            else torch.empty(mask.shape).uniform_(-1, 1, generator=generator).numpy()
            for agent_type, mask in zip(self._spec.types, now.action_masks, strict=True)
        ]


def draw(log_policy: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Options [...] of these log-probabilities [..., D] by one uniform number each, [...]: the first whose cumulated
    share exceeds it.

    An option of probability 0 adds nothing to the share and so is never the first.
    """
    shares = log_policy.exp().cumsum(-1)
    # Of the sum as it was rounded, not of 1: a number near 1 could otherwise lie beyond all options.
    threshold = numbers * shares[..., -1]
    return (shares <= threshold.unsqueeze(-1)).sum(-1)


def sample(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw from softmax(logits) along the last axis by the exponential race: argmax_a p_a / e_a, e_a ~ Exp(1).

    As `draw`, with a number for each action: what scripted experts have always drawn with, so that what was recorded of
    them can be recorded again. The generator is the CPU's.
    """
    race = torch.empty_like(logits, device="cpu").exponential_(generator=generator).to(logits.device, non_blocking=True)
    return (torch.softmax(logits, -1) / race).argmax(-1)
