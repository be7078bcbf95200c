"""What a run has learned, from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bm3il.actors.policy import Policy
from bm3il.actors.process import build_policy
from bm3il.launch.config import Config
from bm3il.launch.files import check_scenario
from bm3il.launch.run_folder import read_config
from bm3il.launch.topology import make_job
from bm3il.learner.checkpoint import Checkpoint, CheckpointFolder, read_checkpoint
from bm3il.learner.critics import Critic
from bm3il.learner.imitation import build_critic, build_value_critic
from bm3il.learner.optimisation import part
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.device import use_threads
from bm3il.protocol.errors import InputError
from bm3il.protocol.job import Endpoints, Job
from bm3il.protocol.layout import Layout
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import EnvironmentSpec
from bm3il.protocol.trajectories import Trajectories
from bm3il.reward_server.particles import RewardModel


@dataclass(frozen=True)
class Trained:
    """The configuration of a run, its policy, and the checkpoint that it is from."""

    config: Config
    job: Job
    policy: Policy
    checkpoint: Checkpoint

    def policy_in(self, spec: EnvironmentSpec) -> Policy:
        """The policy for the agents of another environment than the run's. Raises InputError if it does not fit."""
        trained_in = self.policy.layout.spec
        if difference := trained_in.difference(spec, counts=self.config.tells_agents_apart):
            raise InputError(
                f"'{spec.name}' does not fit this run: {difference}; its world is '{trained_in.name}', and changes of "
                "that fit: add slip= (noise= for continuous actions), of berlin and sumo closed=, of berlin capacity=, "
                "demand="
            )
        return policy_of(self.config, self.policy.to_arrays(), spec)

    def reward_model(self) -> RewardModel | None:
        """The particles of the checkpoint, to be queried; None if the run has no learned reward."""
        config, arrays = self.config, self.checkpoint.rewards
        if config.reward.source != "learned" or not arrays:
            return None
        layout = self.policy.layout
        # Only a model that learns looks at the expert's rows.
        nothing = Demonstrations.from_trajectories(Trajectories.zeros(layout.spec, 1), layout.spec, "").rows(layout)
        model = RewardModel(layout, nothing, config.reward, seed=0)
        model.load_particles(arrays)
        return model

    def critic(self, layout: Layout) -> Critic | None:
        """The critic for agents that the policy fits; None if the algorithm has none."""
        parameters = part(self.checkpoint.learner, "critic")
        if not parameters:
            return None
        settings = self.config.learner
        build = build_value_critic if settings.policy == "clipped" else build_critic
        critic: Critic = build(self.job, settings, layout)
        critic.load_state_dict({name: torch.tensor(value) for name, value in parameters.items()})
        return critic


def policy_of(config: Config, arrays: dict[str, np.ndarray], spec: EnvironmentSpec) -> Policy:
    """A policy of a run's kind with these parameters, for the agents of an environment that they fit."""
    layout = Layout.of(spec, config.parameter_sharing, config.actor.agent_identity)
    policy = Policy(layout, config.actor.hidden, torch.Generator())
    policy.load_arrays(arrays)
    return policy


def load_trained(run: Path, best: bool = False) -> Trained:
    """The newest checkpoint of a run's folder, or the one with the highest evaluation return.

    Raises InputError if this is no run, it has no such checkpoint, or its environment's files are others by now.
    """
    config = read_config(run)
    check_scenario(config)
    use_threads(config.threads)
    spec = make_environment(config.environment, 1).spec
    job = make_job(config, spec, "", run, Endpoints("", "", "", ""))
    policy = build_policy(job, config.actor)
    folder = run / "checkpoints"
    checkpoint = CheckpointFolder(folder, 1).newest()
    if checkpoint is None:
        raise InputError(f"{run} has no checkpoint yet: let it run until the first is written (`bm3il status {run}`)")
    if best:
        if not (folder / "best").exists():
            raise InputError(
                f"{run} has no best checkpoint: no iteration of it was both evaluated and kept in a checkpoint "
                "(--evaluation.interval, --learner.checkpoint-interval); leave out --best for the newest"
            )
        checkpoint = read_checkpoint(folder / (folder / "best").read_text(encoding="utf-8").strip())
    policy.load_arrays(part(checkpoint.learner, "policy"))
    return Trained(config, job, policy, checkpoint)
