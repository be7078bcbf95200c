"""Does the learned reward rank policies as the true one does?

Plays, in the world of a run and in the one that it is a change of, who is known to be better or worse (the re-planned
expert, the clone, free flow, the clone with slips, staying at home, chance), and prints what the run's particles think
of each: mean reward of Eq. 9 per agent and step, beside the true return per agent and day, and Spearman's correlation
of the two. Fails unless it is at least 0.8 in both worlds.

    bm3il train --preset berlin_closed --run closed
    python benchmarks/ranking.py runs/closed
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from scipy.stats import spearmanr

from bm3il.actors.environments.berlin.environment import berlin_of
from bm3il.actors.experts.commuters import FreeFlow, StayHome
from bm3il.actors.experts.scripted import expert_for
from bm3il.actors.policy import Policy, UniformPolicy
from bm3il.actors.process import build_policy
from bm3il.actors.rollout import Acts, rollout
from bm3il.launch.learned.trained import load_trained
from bm3il.learner.optimisation import part
from bm3il.learner.segments import Segments
from bm3il.protocol.layout import Layout
from bm3il.protocol.registry import make_environment
from bm3il.reward_server.particles import RewardModel
from bm3il.reward_server.process import build_model

SEED, LEAST = 77, 0.8


def main() -> int:
    """Print a table a world; 1 if the ranks do not agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--days", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    trained = load_trained(given.run)
    model = build_model(trained.job, trained.config.reward)
    assert isinstance(model, RewardModel), "this run has no learned reward"
    model.load_state(trained.checkpoint.rewards)
    clone = build_policy(trained.job, trained.config.actor)
    clone.load_arrays(part(trained.checkpoint.learner, "clone"))
    changed = trained.config.environment
    worst = 1.0
    for world in dict.fromkeys((changed, make_environment(changed, 1).spec.changes or changed)):
        worst = min(worst, rank(world, model, clone, given.days))
    return int(worst < LEAST)


def rank(world: str, model: RewardModel, clone: Policy, days: int) -> float:
    """Print the policies in the order of their true returns; Spearman's correlation."""
    environment = make_environment(world, days)
    berlin = berlin_of(environment)
    players: list[tuple[str, Acts, str]] = [
        ("expert, re-planned", expert_for(environment.spec), ""),
        ("clone", clone, ""),
        ("free flow", FreeFlow(berlin), ""),
        ("clone, every tenth move gone wrong", clone, "slip=0.1"),
        ("home", StayHome(berlin), ""),
        ("random", UniformPolicy(environment.spec), ""),
    ]
    rows = []
    for name, player, slip in players:
        place = make_environment(f"{world}&{slip}", days) if slip and "slip=" not in world else environment
        played = rollout(place, player, SEED)
        steps = Segments.of([played], Layout.of(place.spec, model.layout.parameter_sharing)).rows()
        rewards, active = model.query(steps)[0], steps.active
        mean = float(sum(r.sum() for r in rewards) / sum(a.sum() for a in active))
        rows.append((float(played.returns().mean()), mean, name))
    print(f"{world}\n| policy | true return | learned reward per step |\n|---|---|---|")
    for true, learned, name in sorted(rows, reverse=True):
        print(f"| {name} | {true:.1f} | {learned:.3f} |")
    correlation = float(spearmanr([row[0] for row in rows], [row[1] for row in rows]).statistic)
    print(f"Spearman's correlation {correlation:.2f}\n")
    return correlation


if __name__ == "__main__":
    sys.exit(main())
