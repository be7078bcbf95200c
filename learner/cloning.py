"""Behaviour cloning: the likelihood of the experts' actions, as an algorithm (`bc`) and as a term of others' losses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from operator import itemgetter

import numpy as np
import torch

from bm3il.actors import gaussian
from bm3il.actors.policy import Policy
from bm3il.learner import losses
from bm3il.learner.kept_clones import KeptClone
from bm3il.learner.optimisation import part
from bm3il.learner.settings import CloningSettings
from bm3il.protocol.allocator import keep_freed_memory
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.device import CPU
from bm3il.protocol.errors import NumericalError
from bm3il.protocol.layout import JointRows, Layout
from bm3il.protocol.networks.adam import Adam
from bm3il.protocol.networks.options import log_softmax
from bm3il.protocol.seeds import derive_seed
from bm3il.protocol.telemetry import Telemetry

SHOWN = "cloning_iteration", "cloning_iterations", "cloning_left_seconds"
"""The numbers of a status while a run's first policy is made; the last is known from the second iteration on."""


class Cloning:
    """Expert rows with their action masks, and the cloning loss on random ones of them."""

    def __init__(
        self, layout: Layout, demonstrations: Demonstrations, batch_size: int, seed: int, device: torch.device = CPU
    ) -> None:
        """device: where the policies are."""
        self._layout, self._batch_size = layout, batch_size
        self._rows = demonstrations.rows(layout).to(device)
        self._generator = torch.Generator().manual_seed(seed)

    def loss(self, policy: Policy) -> torch.Tensor:
        """Mean over random expert rows, summed over networks, of −log π(a|s)."""
        index = torch.randint(len(self._rows), (self._batch_size,), generator=self._generator)
        rows = self._rows.select(index)
        return self._weighed(policy, rows, losses.row_weights(self._layout, rows.active))

    @torch.no_grad()
    def loss_of_all(self, policy: Policy) -> torch.Tensor:
        """As `loss`, of all expert rows; a batch at a time, since days of thousands of agents fill the memory."""
        # Over all rows at once: parts with weights of their own would count the last, smaller one for more.
        weights = losses.row_weights(self._layout, self._rows.active)
        total = torch.zeros((), device=self._rows.active[0].device)
        for first in range(0, len(self._rows), self._batch_size):
            part = slice(first, first + self._batch_size)
            total += self._weighed(policy, self._rows.map(itemgetter(part)), [w[:, :, part] for w in weights])
        return total

    def _weighed(self, policy: Policy, rows: JointRows, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """−Σ weight · log π(a|s); weights: per block [G, S, B]."""
        # Demonstrations stay as small as they are kept; only what is computed with becomes int64.
        rows = rows.widened()
        terms = []
        for b, block in enumerate(self._layout.blocks):
            observations, actions = block.see(rows.observations[b]), block.grid(rows.actions[b])
            if block.discrete:
                logits, options = policy.logits(b, observations)
                number = options.number(actions.flatten(1, 2))
                terms.append(losses.cloning_loss(log_softmax(logits), number, weights[b].flatten(1, 2)))
            else:
                log_density = gaussian.log_density(policy.outputs(b, observations).float(), actions)
                terms.append(-(weights[b] * log_density).sum())
        return torch.stack(terms).sum()

    def state(self) -> np.ndarray:
        """The random state."""
        return self._generator.get_state().numpy()

    def load_state(self, state: np.ndarray) -> None:
        self._generator.set_state(torch.tensor(state))


def clone(
    policy: Policy,
    demonstrations: Demonstrations,
    settings: CloningSettings,
    seed: int,
    telemetry: Telemetry,
    abort: Callable[[], None] = lambda: None,
) -> None:
    """Make the policy what the algorithm `bc` would end with, from the same start and seed to the same bits.

    `abort` is called between iterations, and may raise.
    """
    kept = KeptClone(policy, demonstrations, settings, seed) if settings.kept_in else None
    if kept and kept.load(policy):
        return
    device = next(policy.parameters()).device
    run = BehaviourCloning(policy, demonstrations, settings, device, seed, telemetry)
    began = time.monotonic()
    try:
        for iteration in range(run.iterations):
            abort()
            telemetry.numbers |= {"cloning_iteration": iteration, "cloning_iterations": run.iterations}
            if iteration:
                left = (time.monotonic() - began) / iteration * (run.iterations - iteration)
                telemetry.numbers["cloning_left_seconds"] = left
            # The progress that `Training` gives to `bc`, and so the same learning rates.
            run.iterate(iteration / run.iterations, abort)
    finally:
        for name in SHOWN:
            telemetry.numbers.pop(name, None)
    if kept:
        kept.save(policy)


class BehaviourCloning:
    """The algorithm `bc`: maximum likelihood on the expert rows.

    Some of the independent groups of episodes are held out, to tell whether the others are known by heart. They do not
    choose the policy, which is that of the last update: an expert's held-out likelihood is best long before its
    return is. With ten episodes of Rover Tower, one held out, the clone came to 0.70 so, and to 0.87 at its end
    (docs/results.md).
    """

    starts_cloned = False  # it ends so

    def __init__(
        self,
        policy: Policy,
        demonstrations: Demonstrations,
        settings: CloningSettings,
        device: torch.device,
        seed: int,
        telemetry: Telemetry,
    ) -> None:
        self.policy, self._settings, self._telemetry = policy.to(device), settings, telemetry
        self.iterations = settings.iterations
        train, held_out = demonstrations.split(settings.held_out, derive_seed(seed, "held-out"))
        self._train = Cloning(policy.layout, train, settings.batch_size, derive_seed(seed, "cloning"), device)
        # Nothing is drawn with this seed: `loss_of_all` takes every row.
        self._held_out = held_out and Cloning(policy.layout, held_out, settings.batch_size, 0, device)
        self._optimiser = Adam(policy.parameters(), weight_decay=settings.weight_decay)
        if device.type == "cpu":
            keep_freed_memory()

    def begin(
        self, session: str, learner: dict[str, np.ndarray] | None, rewards: object, abort: Callable[[], None]
    ) -> None:
        """Start, or go on from a checkpoint's arrays; there is no reward server."""
        if learner is not None:
            self._load_state(learner)

    def iterate(self, progress: float, abort: Callable[[], None]) -> tuple[int, dict[str, float]]:
        """`updates` steps without any environment step; returns losses (sums over networks of mean −log π)."""
        self._optimiser.set_rate(self._settings.learning_rate * (1 - 0.95 * progress))
        with self._telemetry.stage("update"):
            for _ in range(self._settings.updates):
                self._optimiser.zero_grad()
                loss = self._train.loss(self.policy)
                loss.backward()
                self._optimiser.step()
            figures = {"cloning_loss": loss.item()}
        if not math.isfinite(figures["cloning_loss"]):
            # Here, where it is known: a policy of NaN would be blamed on the simulator that it plays in.
            raise NumericalError(f"cloning_loss is {figures['cloning_loss']}")
        if self._held_out:
            figures["held_out_loss"] = self._held_out.loss_of_all(self.policy).item()
        return 0, figures

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Everything, for a checkpoint."""
        arrays = {f"policy/{k}": v for k, v in self.policy.to_arrays().items()}
        arrays |= {f"adam/{k}": v for k, v in self._optimiser.arrays()}
        return arrays | {"generator": self._train.state()}, {}

    def _load_state(self, arrays: dict[str, np.ndarray]) -> None:
        self.policy.load_arrays(part(arrays, "policy"))
        self._optimiser.load_arrays(part(arrays, "adam"))
        self._train.load_state(arrays["generator"])
