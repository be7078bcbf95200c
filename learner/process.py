"""The learner process, and the same run in one process (`serial`)."""

from __future__ import annotations

import torch

from actors.process import build_policy
from actors.settings import ActorSettings, EvaluationSettings
from learner.algorithms import Algorithm, algorithm
from learner.cloning import BehaviourCloning, expert_rows
from learner.experience import Experience, LocalExperience, RemoteExperience
from learner.imitation import Imitation
from learner.record import RunRecord
from learner.settings import CloningSettings, LearnerSettings
from learner.training import Training, iterations_for
from protocol.demonstrations import Demonstrations
from protocol.errors import InputError
from protocol.job import Job
from protocol.seeds import derive_seed
from protocol.telemetry import Telemetry
from reward_server.client import LocalRewards, RemoteRewards, RewardService
from reward_server.process import build_model
from reward_server.settings import RewardSettings
