"""What every process of a run must know, whichever its role."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bm3il.protocol.specs import EnvironmentSpec, ParameterSharing

Mode = Literal["lockstep", "async", "serial"]
Role = Literal["actor", "learner", "reward-server", "evaluator"]


@dataclass(frozen=True)
class Endpoints:
    """Where each answering or broadcasting socket listens (`ipc://…` or `tcp://host:port`)."""

    experience: str
    """Learner, request and answer: chunks and evaluations."""
    weights: str
    """Learner, broadcast: policy weights."""
    rewards: str
    """Reward server, request and answer."""
    control: str
    """Director (the first node's supervisor), request and answer: status."""


@dataclass(frozen=True)
class Job:
    """One run. `run_id` keeps the messages of two runs apart; `seed` determines everything in lockstep.

    environment: its name.   spec: its description, which travels so that nobody builds it only to learn that.
    agent_identity: whether networks that agents share tell them apart.
    demonstrations: path of a demonstrations file, or empty.   demonstration_episodes: how many of them are used, 0 all.
    steps: budget of joint environment steps.
    """

    run_id: str
    run_folder: Path
    environment: str
    spec: EnvironmentSpec
    demonstrations: str
    demonstration_episodes: int
    algorithm: str
    mode: Mode
    seed: int
    steps: int
    actors: int
    parameter_sharing: ParameterSharing
    agent_identity: bool
    endpoints: Endpoints
