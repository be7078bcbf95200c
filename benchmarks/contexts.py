"""What do the others' actions tell a critic that the agent's own observation and action do not?

Plays a run's policy in its world, one of Berlin's, and fits what each agent still gets on the day (true rewards,
discounted): from what it observes and does alone, with the mean action of everybody else, and with that of every type,
as critics see them (Eq. 6 and 7 without weights). Prints how much of the variance on other days each explains, R², and
the same for agents that do not see how full the roads are. What a context does not explain it cannot help a critic
with, whatever the algorithm.

    python benchmarks/contexts.py runs/NAME [--environment …]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bm3il.actors.rollout import rollout
from bm3il.launch.learned.trained import load_trained
from bm3il.protocol.networks.adam import Adam
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import EnvironmentSpec
from bm3il.protocol.trajectories import Trajectories

SEED, HELD_OUT = 55, 0.25
TRAINED_ROWS, TESTED_ROWS, EPOCHS, BATCH_ROWS, WIDTH = 60_000, 20_000, 12, 1_024, 128
FIGURE = "| {} | {} | {:.3f} ± {:.3f} | {:+.3f} |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--environment", help="another world than the run's")
    parser.add_argument("--days", type=int, default=60)
    parser.add_argument("--fits", type=int, default=3, help="networks, each from other numbers; the spread is theirs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    trained = load_trained(given.run)
    name = given.environment or trained.config.environment
    environment = make_environment(name, given.days)
    policy = trained.policy_in(environment.spec)
    played = rollout(environment, policy, SEED)
    target = to_go(played, trained.config.learner.discount)
    print(f"{name}, policy of {given.run}, {given.days} days\n| sees | context | R² | beside none |\n|---|---|---|---|")
    for sees, hidden in (("as observed", ()), ("not how full roads are", ("loads.",))):
        own = observed(played, environment.spec, hidden)
        contexts = {"none": own, "everybody's mean action": (*own, others(played, False))}
        contexts["each type's mean action"] = (*own, others(played, True))
        alone = None
        for context, inputs in contexts.items():
            found = np.array([explained(inputs, target, seed) for seed in range(given.fits)])
            alone = found.mean() if alone is None else alone
            print(FIGURE.format(sees, context, found.mean(), found.std(), found.mean() - alone), flush=True)


def to_go(played: Trajectories, discount: float) -> np.ndarray:
    """Discounted sum of what each agent still gets, [T, E, N]."""
    rewards = np.concatenate(played.rewards, axis=2)
    sums = np.zeros_like(rewards)
    after = np.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        after = rewards[t] + discount * after
        sums[t] = after
    return sums


def observed(played: Trajectories, spec: EnvironmentSpec, hidden: Sequence[str]) -> tuple[np.ndarray, ...]:
    """Own observations [T, E, N, O], parts of these names left out, and actions [T, E, N, A]."""
    parts = spec.types[0].parts
    kept = np.concatenate([np.full(part.width, not part.name.startswith(tuple(hidden))) for part in parts])
    steps = len(played.actions[0])
    return np.concatenate([seen[:steps, ..., kept] for seen in played.observations], axis=2), one_hot(played, spec)


def one_hot(played: Trajectories, spec: EnvironmentSpec) -> np.ndarray:
    """Of all agents' actions, [T, E, N, A]."""
    return np.concatenate(
        [np.eye(kind.action_dim, dtype=np.float32)[a] for kind, a in zip(spec.types, played.actions, strict=True)],
        axis=2,
    )


def others(played: Trajectories, by_type: bool) -> np.ndarray:
    """The mean action of the others, [T, E, N, A], or of those of each type, [T, E, N, M · A]."""
    counts = [actions.shape[2] for actions in played.actions]
    types = np.repeat(np.arange(len(counts)), counts) if by_type else np.zeros(sum(counts), np.int64)
    actions = one_hot(played, played.spec)
    means = []
    for kind in np.unique(types):
        mine = (types == kind)[:, None].astype(np.float32)
        total = actions[:, :, types == kind].sum(axis=2, keepdims=True)
        means.append((total - actions * mine) / np.maximum(total.sum(axis=3, keepdims=True) - mine, 1.0))
    return np.concatenate(means, axis=3)


def explained(inputs: Sequence[np.ndarray], target: np.ndarray, seed: int) -> float:
    """Part of the variance of a target [T, E, N] on days that were not fitted, by a network of these inputs."""
    torch.manual_seed(seed)
    random, days = np.random.default_rng(seed), target.shape[1]
    tested = np.arange(days) < HELD_OUT * days
    (x, y), (x_test, y_test) = (
        _rows(inputs, target, which, count, random) for which, count in ((~tested, TRAINED_ROWS), (tested, TESTED_ROWS))
    )
    middle, spread = y.mean(), y.std()
    width = x.shape[1]
    layers = (nn.Linear(width, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))
    network = nn.Sequential(*layers)
    optimiser = Adam(network.parameters(), 1e-3, weight_decay=1e-4)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(x)).split(BATCH_ROWS):
            loss = nn.functional.mse_loss(network(x[chosen])[:, 0], (y[chosen] - middle) / spread)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        left = y_test - (network(x_test)[:, 0] * spread + middle)
    return float(1 - left.var() / y_test.var())


def _rows(
    inputs: Sequence[np.ndarray], target: np.ndarray, days: np.ndarray, count: int, random: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """So many agents and moments of some days: what is known of each [rows, …], and what it got."""
    t, e, n = (random.integers(size, size=count) for size in (len(target), int(days.sum()), target.shape[2]))
    e = np.flatnonzero(days)[e]
    x = np.concatenate([array[t, e, n] for array in inputs], axis=1)
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(target[t, e, n].astype(np.float32))


if __name__ == "__main__":
    main()
