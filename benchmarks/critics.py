"""How much of what a trained critic says hangs on the others?

Plays the policies of runs (of discrete actions, with the update of Eq. 13, in a world whose episodes are equally long)
and asks their critics for the advantages Q^i(s, a) − Σ_a' π(a') Q^i(s, a') of all allowed actions: with what the others
did, with what they did at another moment of any episode, and with what they did at the same hour of another one. Prints
the spread of the advantages and those of the two changes, and how even attention is: its entropy as a part of the
largest possible. A context that changes at another moment and not in another episode is a clock.

    python benchmarks/critics.py runs/NAME …
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bm3il.actors.policy import Policy
from bm3il.actors.rollout import rollout
from bm3il.launch.learned.trained import load_trained
from bm3il.learner.critics import Critic
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.layout import JointRows
from bm3il.protocol.registry import make_environment

SEED = 56
HEAD = "| run | algorithm | spread of advantages | others of another moment | of another day | attention's entropy |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--episodes", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{HEAD}\n|{'---|' * 6}")
    for run in given.runs:
        trained = load_trained(run)
        environment = make_environment(trained.config.environment, given.episodes)
        policy = trained.policy_in(environment.spec)
        critic = trained.critic(policy.layout)
        if critic is None or critic.others is None or trained.config.learner.policy == "clipped":
            raise SystemExit(f"{run}: wanted a run whose critic judges actions and sees others, got one without")
        played = Demonstrations.from_trajectories(rollout(environment, policy, SEED), environment.spec, "")
        rows = played.rows(policy.layout).widened()
        told = [f"{number:.3f}" for number in spreads(critic, policy, rows, given.episodes)]
        weights = critic.attention(rows)
        even = "–" if weights is None else f"{evenness(weights):.3f}"
        print(f"| {run.name} | {trained.config.algorithm} | {' | '.join([*told, even])} |", flush=True)


def spreads(critic: Critic, policy: Policy, rows: JointRows, episodes: int) -> tuple[float, float, float]:
    """Standard deviations, over rows [episodes · hours], agents and allowed actions: of the advantages, and of what is
    added to them when the others are taken from another moment, and from another episode."""
    numbers = torch.arange(len(rows))
    another_day = numbers.view(episodes, -1).roll(1, dims=0).flatten()
    another_moment = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))
    taken = advantages(critic, policy, rows, numbers)
    changes = [advantages(critic, policy, rows, index) - taken for index in (another_moment, another_day)]
    own, moment, day = (float(values.std()) for values in (taken, *changes))
    return own, moment, day


@torch.no_grad()
def advantages(critic: Critic, policy: Policy, rows: JointRows, index: torch.Tensor) -> torch.Tensor:
    """Of all allowed actions, one after the other, the others taken from the rows of these numbers."""
    grids = [block.see(seen) for block, seen in zip(critic.layout.blocks, rows.observations, strict=True)]
    encoded = critic.encode(grids)
    contexts = critic.contexts(encoded, rows.select(index))
    found = []
    for b, (head, grid, *inputs) in enumerate(zip(critic.heads, grids, encoded, *contexts, strict=True)):
        logits, options = policy.logits(b, grid)
        values = options.of(head(*inputs))
        middle = (logits.softmax(-1) * values).sum(-1, keepdim=True)
        found.append((values - middle)[options.allowed])
    return torch.cat(found)


def evenness(weights: torch.Tensor) -> float:
    """Mean entropy of weights [B, N, K], as a part of that of equal ones among those that are not 0."""
    entropy = torch.special.entr(weights).sum(-1)
    seen = (weights > 0).sum(-1)
    return float((entropy / seen.log())[seen > 1].mean())


if __name__ == "__main__":
    main()
