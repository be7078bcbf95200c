"""One iteration of Algorithm 1: collect, update the particles, query rewards, update critics and policies."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch

from actors.policy import Policy
from actors.settings import ActorSettings
from learner.action_critic import ActionActorCritic, ActionCritic
from learner.actor_critic import ActorCritic
from learner.algorithms import algorithm
from learner.cloning import Cloning
from learner.critics import Critic
from learner.experience import Experience
from learner.optimisation import part
from learner.replay import Batch, Replay
from learner.settings import LearnerSettings
from protocol.demonstrations import Demonstrations
from protocol.errors import InputError
from protocol.job import Job
from protocol.layout import Layout
from protocol.seeds import derive_seed
from protocol.telemetry import Telemetry
from reward_server.client import RewardService

PREFETCHED_BATCHES = 2

Arrays = dict[str, np.ndarray]


class Imitation:
    """Replay, critics and policies, fed by actors and rewarded by the reward server."""

    def __init__(
        self,
        job: Job,
        settings: LearnerSettings,
        actor: ActorSettings,
        policy: Policy,
        demonstrations: Demonstrations | None,
        experience: Experience,
        rewards: RewardService,
        telemetry: Telemetry,
    ) -> None:
        kind = algorithm(job.algorithm)
        settings = kind.learner_settings(settings)
        device = choose_device(job.device)
        critic = build_critic(job, settings, actor, policy.layout)
        self.policy = policy
        self._settings = settings
        self._imitates = kind.imitates
        kinds = ActionActorCritic if isinstance(critic, ActionCritic) else ActorCritic
        self._actor_critic = kinds(policy, critic, settings, device, derive_seed(job.seed, "next-actions"))
        self._replay = Replay(policy.layout, settings.window_steps)
        self._generator = torch.Generator().manual_seed(derive_seed(job.seed, "replay"))
        self._asked: deque[tuple[Batch, int]] = deque()
        self._cloning: Cloning | None = None
        if settings.cloning_weight and demonstrations is not None:
            seed = derive_seed(job.seed, "cloning")
            self._cloning = Cloning(policy.layout, demonstrations, settings.batch_size, seed)
        self._experience, self._rewards, self._telemetry = experience, rewards, telemetry

    def begin(self, session: str, learner: Arrays | None, rewards: Arrays | None) -> None:
        """Start a session on both sides, from a checkpoint's arrays or from the seed."""
        self._asked.clear()
        self._rewards.begin(session, rewards)
        if learner is None:
            return
        self._actor_critic.load_state(learner)
        self._replay.load_state(part(learner, "replay"))
        self._generator.set_state(torch.tensor(learner["sampling_generator"]))
        if self._cloning is not None:
            self._cloning.load_state(learner["cloning_generator"])

    def iterate(self, progress: float, abort: Callable[[], None]) -> tuple[int, dict[str, float]]:
        """One iteration; returns the fresh joint steps and the figures of the iteration.

        `abort` is called while nothing has changed yet, and may raise.
        """
        with self._telemetry.stage("collect"):
            chunks = self._experience.collect(abort)
        with self._telemetry.stage("observe"):
            fresh = self._replay.add_all(chunks)
            figures: dict[str, float] = {}
            if self._imitates:
                self._rewards.observe(fresh)
                _, figures = self._rewards.update(progress)
        totals: dict[str, float] = {}
        for batch, rewards in self._batches():
            self._train(batch, rewards, progress, totals)
        return sum(chunk.num_steps for chunk in chunks), figures | totals

    def state(self) -> tuple[Arrays, Arrays]:
        """Everything that a resume needs: of the learner, of the reward server."""
        arrays = self._actor_critic.state()
        arrays |= {f"replay/{k}": v for k, v in self._replay.state().items()}
        arrays["sampling_generator"] = self._generator.get_state().numpy()
        if self._cloning is not None:
            arrays["cloning_generator"] = self._cloning.state()
        return arrays, self._rewards.state()

    def finish(self) -> None:
        """Nothing: the policy of the last iteration is the result."""

    def _train(self, batch: Batch, rewards: list[torch.Tensor], progress: float, totals: dict[str, float]) -> None:
        """One update; its figures are added to `totals`, means over the iteration."""
        with self._telemetry.stage("update"):
            update = self._actor_critic.update(batch, rewards, progress, self._cloning)
        for name, value in (update | {"reward": _mean(rewards)}).items():
            totals[name] = totals.get(name, 0.0) + value / self._settings.updates

    def _ask(self) -> None:
        """Draw a batch and ask for its rewards."""
        batch = self._replay.sample(self._settings.batch_size, self._generator)
        true_rewards = None if self._imitates else batch.rewards
        self._asked.append((batch, self._rewards.submit(batch.rows, true_rewards)))

    def _batches(self) -> Iterator[tuple[Batch, list[torch.Tensor]]]:
        """Batches with the rewards of the current particles; the next queries travel while one is trained on."""
        for number in range(self._settings.updates + PREFETCHED_BATCHES):
            if number < self._settings.updates:
                self._ask()
            if self._asked and number >= PREFETCHED_BATCHES:
                yield self._answered()

    def _answered(self) -> tuple[Batch, list[torch.Tensor]]:
        """The batch that was asked for first, and its rewards."""
        batch, ticket = self._asked.popleft()
        with self._telemetry.stage("query"):
            return batch, self._rewards.rewards(ticket)


def build_critic(job: Job, settings: LearnerSettings, actor: ActorSettings, layout: Layout) -> Critic:
    """The critics of the job's algorithm, at the start that its seed gives.

    Raises InputError for a Boltzmann policy over continuous actions.
    """
    kind = algorithm(job.algorithm)
    settings = kind.learner_settings(settings)
    discrete = all(block.discrete for block in layout.blocks)
    if settings.policy == "boltzmann" and not discrete:
        raise InputError("learner.policy boltzmann needs discrete actions; leave it out for continuous ones")
    critic = Critic if discrete and settings.query == "state" else ActionCritic
    return critic(
        layout,
        kind.context,
        settings.hidden,
        settings.heads,
        settings.attend_own_type,
        torch.Generator().manual_seed(derive_seed(job.seed, "critic")),
        actor.agent_identity,
    )


def choose_device(name: str) -> torch.device:
    """`auto` takes the GPU if there is one. Raises InputError for a GPU that this machine, or its torch, lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no GPU that this PyTorch can use; leave out --device cuda, or install another build")
    return torch.device(name)


def _mean(rewards: list[torch.Tensor]) -> float:
    return float(sum(r.sum() for r in rewards) / sum(r.numel() for r in rewards))
