"""One iteration of Algorithm 1: collect, update the particles, query rewards, update critics and policies."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np
import torch

from bm3il.actors.collector import steps_per_iteration
from bm3il.actors.policy import Policy
from bm3il.actors.settings import ActorSettings
from bm3il.learner.action_critic import ActionActorCritic, ActionCritic
from bm3il.learner.actor_critic import ActorCritic
from bm3il.learner.algorithms import algorithm
from bm3il.learner.clipped import ClippedActorCritic
from bm3il.learner.cloning import Cloning, clone
from bm3il.learner.critics import Critic, ValueCritic
from bm3il.learner.experience import Experience
from bm3il.learner.figures import Figures, merged
from bm3il.learner.metrics import RewardMetrics
from bm3il.learner.optimisation import part
from bm3il.learner.replay import Batch, Replay
from bm3il.learner.segments import Segments
from bm3il.learner.settings import LearnerSettings, Settings
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.device import choose_device, choose_precision
from bm3il.protocol.errors import InputError
from bm3il.protocol.job import Job
from bm3il.protocol.layout import JointRows, Layout
from bm3il.protocol.seeds import derive_seed
from bm3il.protocol.telemetry import Telemetry
from bm3il.protocol.trajectories import Trajectories
from bm3il.reward_server.client import Kept, RewardService

PREFETCHED_BATCHES = 2
"""One is computed by the server and one is on its way while the learner trains on a third."""
REPLAY_STEPS = 8_000
"""Joint rows that off-policy updates draw from, unless the settings say otherwise."""

Arrays = dict[str, np.ndarray]
AnyCritic = TypeVar("AnyCritic", bound=Critic)


class Learner(Protocol):
    """What moves a policy."""

    def start_from(self, policy: Policy) -> None:
        """The policy has been set from outside, to what is to be its start."""

    def state(self) -> Arrays: ...

    def load_state(self, arrays: Arrays) -> None: ...


class Imitation(ABC):
    """A policy that learns from what actors play and the reward server thinks of it.

    Subclasses say what an iteration learns from. starts_cloned: whether its first policy is the clone.
    iterations: none are counted, the budget of steps is what ends a run.
    """

    def __init__(
        self,
        job: Job,
        settings: Settings,
        policy: Policy,
        demonstrations: Demonstrations | None,
        experience: Experience,
        rewards: RewardService,
        telemetry: Telemetry,
    ) -> None:
        kind = algorithm(job.algorithm)
        self.policy = policy
        self.starts_cloned = settings.learner.start == "cloned"
        self.iterations = None
        device = choose_device(settings.learner.device)
        self._job = job
        precision = choose_precision(settings.learner.precision, device)
        self._settings = replace(kind.learner_settings(settings.learner), precision=precision)
        self._cloning_settings, self._demonstrations = settings.cloning, demonstrations
        self._imitates = kind.imitates
        self._experience, self._rewards, self._telemetry = experience, rewards, telemetry
        self._metrics = RewardMetrics(telemetry.registry)
        self._learner = self._build(device, settings.actor)
        self._is_cloned = False

    def begin(self, session: str, learner: Arrays | None, rewards: Arrays | None, abort: Callable[[], None]) -> None:
        """Start a session on both sides: from a checkpoint's arrays, or from the seed and perhaps from the clone.

        `abort` may raise while the clone is made, which can take a minute.
        """
        if learner is not None:
            # First: `_kept` tells the server of the rows that the restored replay holds.
            self._load_state(learner)
        with self._waiting_for("particles"):
            self._rewards.begin(session, rewards, self._kept())
        # Made once: without a checkpoint, a session that begins anew has the clone already, and would clone a clone.
        if learner is None and self.starts_cloned and not self._is_cloned:
            if self._demonstrations is None:
                raise InputError("learner.start cloned needs demonstrations; name a file with --demonstrations")
            with self._telemetry.stage("clone"):
                clone(self.policy, self._demonstrations, self._cloning_settings, self._job.seed, self._telemetry, abort)
            self._learner.start_from(self.policy)
            self._is_cloned = True

    @abstractmethod
    def iterate(self, progress: float, abort: Callable[[], None]) -> tuple[int, dict[str, float]]:
        """One iteration; returns the fresh joint steps and the figures of the iteration.

        `abort` is called while nothing has changed yet, and may raise.
        """

    def state(self) -> tuple[Arrays, Arrays]:
        """Everything that a resume needs: of the learner, of the reward server."""
        with self._waiting_for("particles"):
            particles = self._rewards.state()
        return self._learner.state(), particles

    @abstractmethod
    def _build(self, device: torch.device, actor: ActorSettings) -> Learner:
        """Critics, and what moves them and the policy."""

    def _load_state(self, arrays: Arrays) -> None:
        self._learner.load_state(arrays)

    @abstractmethod
    def _kept(self) -> Kept:
        """Which rows the reward server is to keep from now on, for queries by number."""

    def _taken(self, ticket: int) -> list[torch.Tensor]:
        """The rewards that were asked for."""
        with self._telemetry.stage("query"), self._waiting_for("rewards"):
            rewards = self._rewards.rewards(ticket)
        self._metrics.reward_lag.observe(self._rewards.lag)
        return rewards

    def _collect(self, abort: Callable[[], None]) -> list[Trajectories]:
        with self._telemetry.stage("collect"), self._waiting_for("chunks"):
            return self._experience.collect(abort)

    def _waiting_for(self, what: str) -> AbstractContextManager[None]:
        """The stage of a wait for another process; there is none if all of the run is in this one."""
        return nullcontext() if self._job.mode == "serial" else self._telemetry.stage(f"wait_for_{what}")


class OffPolicyImitation(Imitation):
    """Updates of random rows of the newest ones in a replay, with rewards of the current particles."""

    _learner: ActorCritic

    def _build(self, device: torch.device, actor: ActorSettings) -> ActorCritic:
        job, settings, layout = self._job, self._settings, self.policy.layout
        critic = build_critic(job, settings, layout)
        kinds = ActionActorCritic if isinstance(critic, ActionCritic) else ActorCritic
        self._replay = Replay(layout, settings.window_steps or REPLAY_STEPS, device)
        self._generator = torch.Generator().manual_seed(derive_seed(job.seed, "replay"))
        self._asked: deque[tuple[Batch, int]] = deque()
        self._cloning: Cloning | None = None
        if settings.cloning_weight and self._demonstrations is not None:
            seed = derive_seed(job.seed, "cloning")
            self._cloning = Cloning(layout, self._demonstrations, settings.batch_size, seed, device)
        return kinds(self.policy, critic, settings, device, derive_seed(job.seed, "next-actions"))

    def begin(self, session: str, learner: Arrays | None, rewards: Arrays | None, abort: Callable[[], None]) -> None:
        # Tickets of the session before, which nobody answers any more.
        self._asked.clear()
        super().begin(session, learner, rewards, abort)

    def iterate(self, progress: float, abort: Callable[[], None]) -> tuple[int, dict[str, float]]:
        chunks = self._collect(abort)
        with self._telemetry.stage("observe"):
            fresh = self._replay.add_all(chunks)
            figures: dict[str, float] = {}
            if self._imitates:
                with self._waiting_for("particles"):
                    _, figures = self._rewards.updated(self._rewards.update(fresh, progress))
        learned = Figures()
        for batch, rewards in self._batches():
            self._train(batch, rewards, progress, learned)
        return sum(chunk.num_steps for chunk in chunks), merged(figures, learned.means())

    def state(self) -> tuple[Arrays, Arrays]:
        arrays, rewards = super().state()
        arrays |= {f"replay/{k}": v for k, v in self._replay.state().items()}
        arrays["sampling_generator"] = self._generator.get_state().numpy()
        if self._cloning is not None:
            arrays["cloning_generator"] = self._cloning.state()
        return arrays, rewards

    def _load_state(self, arrays: Arrays) -> None:
        super()._load_state(arrays)
        self._replay.load_state(part(arrays, "replay"))
        self._generator.set_state(torch.tensor(arrays["sampling_generator"]))
        if self._cloning is not None:
            self._cloning.load_state(arrays["cloning_generator"])

    def _train(self, batch: Batch, rewards: list[torch.Tensor], progress: float, learned: Figures) -> None:
        with self._telemetry.stage("update"):
            figures = self._learner.update(batch, rewards, progress, self._cloning)
        learned.add({**figures, "reward": _mean(rewards, batch.rows.active)})

    def _ask(self) -> None:
        """Draw a batch and ask for its rewards."""
        batch, numbers = self._replay.sample(self._settings.batch_size, self._generator)
        # Imitation never reads true rewards: here they stay behind.
        true_rewards = None if self._imitates else batch.rewards
        self._asked.append((batch, self._rewards.submit(batch.rows, true_rewards, numbers)))

    def _batches(self) -> Iterator[tuple[Batch, list[torch.Tensor]]]:
        """Batches with the rewards of the current particles; the next queries travel while one is trained on."""
        # All that was asked for is trained on: nothing is left for an iteration whose particles are newer.
        for number in range(self._settings.updates + PREFETCHED_BATCHES):
            if number < self._settings.updates:
                self._ask()
            if self._asked and number >= PREFETCHED_BATCHES:
                yield self._answered()

    def _answered(self) -> tuple[Batch, list[torch.Tensor]]:
        """The batch that was asked for first, and its rewards."""
        batch, ticket = self._asked.popleft()
        return batch, self._taken(ticket)

    def _kept(self) -> Kept:
        kept = self._replay.kept() if self._imitates else None
        if kept is None:
            return Kept(self._replay.capacity if self._imitates else 0, self._replay.observed)
        # A ring has more rows than transitions: whatever can be drawn is among the newest that the server keeps.
        return Kept(self._replay.capacity, *kept)


class OnPolicyImitation(Imitation):
    """Clipped updates from the fresh episodes of the iteration alone, with rewards of the particles that saw them."""

    _learner: ClippedActorCritic

    def _build(self, device: torch.device, actor: ActorSettings) -> ClippedActorCritic:
        job, settings = self._job, self._settings
        critic = build_value_critic(job, settings, self.policy.layout)
        self._seen, self._babbling = 0, actor.babbling
        if self._babbling and job.mode == "async":
            # Chunks of the last babbled version are taken for so many iterations more.
            self._babbling += settings.max_policy_lag
        # Rewards are asked for of fresh rows alone: the server need keep no more than an iteration's.
        self._room = steps_per_iteration(actor, job)
        seed = derive_seed(job.seed, "epochs")
        return ClippedActorCritic(self.policy, critic, settings, device, seed, lagging=job.mode == "async")

    def iterate(self, progress: float, abort: Callable[[], None]) -> tuple[int, dict[str, float]]:
        segments = Segments.of(self._collect(abort), self.policy.layout)
        rewards, figures = self._reward(segments, progress)
        figures = merged(figures, {"reward": _mean(rewards, segments.of_rows(segments.active))})
        self._seen += 1
        own = self._seen - self._babbling
        if own > 0:  # what was babbled is nobody's policy: there is no advantage over it
            with self._telemetry.stage("update"):
                learn_policy = own > self._settings.clipped.critic_first
                figures = merged(figures, self._learner.update(segments, rewards, progress, learn_policy))
        return segments.num_steps, figures

    def state(self) -> tuple[Arrays, Arrays]:
        arrays, rewards = super().state()
        return arrays | {"iterations_seen": np.array([self._seen], np.int64)}, rewards

    def _load_state(self, arrays: Arrays) -> None:
        super()._load_state(arrays)
        self._seen = int(arrays["iterations_seen"][0])

    def _reward(self, segments: Segments, progress: float) -> tuple[list[torch.Tensor], dict[str, float]]:
        """Rewards of the fresh steps by the particles that have just learned from them, and the particles' figures."""
        rows = segments.rows()
        if not self._imitates:
            return self._taken(self._rewards.submit(rows, segments.of_rows(segments.rewards))), {}
        with self._telemetry.stage("observe"):
            # All at once: the server does them in this order, and nothing lies between but its own work.
            updating = self._rewards.update(rows, progress)
            ticket = self._rewards.submit(rows, numbers=self._numbers(rows))
            with self._waiting_for("particles"):
                _, figures = self._rewards.updated(updating)
        return self._taken(ticket), figures

    def _numbers(self, rows: JointRows) -> torch.Tensor | None:
        """Of the rows that are shown to the server next, if it keeps them all."""
        first = self._observed
        # The server numbers all rows that it is shown, also those that it has no room for.
        self._observed += len(rows)
        return torch.arange(first, self._observed) if len(rows) <= self._room else None

    def _kept(self) -> Kept:
        self._observed = 0
        return Kept(self._room if self._imitates else 0)


def build_value_critic(job: Job, settings: LearnerSettings, layout: Layout) -> ValueCritic:
    """The value critics of the job's algorithm, for clipped updates, at the start that its seed gives."""
    return _built(ValueCritic, job, settings, layout)


def build_critic(job: Job, settings: LearnerSettings, layout: Layout) -> Critic:
    """The critics of the job's algorithm, at the start that its seed gives.

    Raises InputError for a Boltzmann policy over continuous actions.
    """
    settings = algorithm(job.algorithm).learner_settings(settings)
    discrete = all(block.discrete for block in layout.blocks)
    if settings.policy == "boltzmann" and not discrete:
        raise InputError("learner.policy boltzmann needs discrete actions; leave it out for continuous ones")
    return _built(Critic if discrete and settings.query == "state" else ActionCritic, job, settings, layout)


def _built(critic: type[AnyCritic], job: Job, settings: LearnerSettings, layout: Layout) -> AnyCritic:
    kind = algorithm(job.algorithm)
    settings = kind.learner_settings(settings)
    return critic(
        layout,
        kind.context,
        settings.hidden,
        settings.heads,
        settings.attend_own_type,
        torch.Generator().manual_seed(derive_seed(job.seed, "critic")),
        settings.mean_field,
    )


def iterations_for(settings: ActorSettings, job: Job) -> int:
    """How many iterations the job's budget of environment steps takes, if no episode ends early."""
    return math.ceil(job.steps / steps_per_iteration(settings, job))


def _mean(rewards: list[torch.Tensor], active: list[torch.Tensor]) -> float:
    """Per agent and step of those who were there: of the others rewards are 0."""
    return float(sum(r.sum() for r in rewards) / max(1, sum(int(there.sum()) for there in active)))
