"""`bm3il evaluate RUN`: how good is the policy of a run, and the same figures for drawing and for greedy actions."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from bm3il.actors.environments.berlin.environment import Berlin
from bm3il.actors.evaluation import ReturnEstimate, Scale, evaluate
from bm3il.actors.experts.scripted import NoExpertError, expert_for
from bm3il.actors.policy import Policy, UniformPolicy
from bm3il.actors.rollout import Acts
from bm3il.launch.config import Config
from bm3il.launch.files import load_demonstrations
from bm3il.launch.learned.trained import Trained, load_trained
from bm3il.launch.progress import duration
from bm3il.launch.surroundings import lasting_output, screen
from bm3il.protocol.environment import Starts
from bm3il.protocol.errors import InputError
from bm3il.protocol.files import write_atomically
from bm3il.protocol.perturbation import unperturbed
from bm3il.protocol.registry import make_environment, with_absolute_files
from bm3il.protocol.specs import EnvironmentSpec

FIRST_SECONDS, MOST_SECONDS = 5.0, 60.0
"""After how long is told first, and later at the least, how far an evaluation is."""
RETURNS = ("return_mean", "return_stderr", "random_return", "expert_return")
"""As the table shows them. One episode has no standard error, and a strange world no expert."""
FRESH_SEED = 1_000_003
"""Start states that no training run of a small seed evaluates on."""


@dataclass(frozen=True)
class Episodes:
    """Episodes on which all are compared: `count` in `environment`, from given start states (whose unit of
    independence are `groups`) or fresh ones.

    expert: what each agent of the expert is known to return from these start states, [N].
    """

    environment: str
    count: int
    starts: Starts | None = None
    groups: np.ndarray | None = None
    expert: np.ndarray | None = None

    def returns(self, who: str, policy: Acts, greedy: bool = False) -> np.ndarray:
        """True returns [episodes, N]. who: whose they are, for whoever waits."""
        told = _Told(who)
        return evaluate(self.environment, policy, self.count, FRESH_SEED, greedy, self.starts, at_work=told)


class _Told:
    """Says on standard error how far an evaluation is, ever more seldom, if it takes long."""

    def __init__(self, who: str) -> None:
        self._who, self._began, self._next = who, time.monotonic(), FIRST_SECONDS

    def __call__(self, played: int, wanted: int) -> None:
        """After a step: so many episodes are played, of so many."""
        took = time.monotonic() - self._began
        if took < self._next:
            return
        self._next = took + min(took, MOST_SECONDS)
        left = f", left {duration(took / played * (wanted - played))}" if played else ""
        print(f"{self._who}: {played:,} of {wanted:,} episodes{left} (--episodes says how many)", file=sys.stderr)


def main(
    run: Path,
    episodes: int,
    paired: bool,
    best: bool = False,
    pictures: bool = False,
    hour: float = -1.0,
    environment: str = "",
) -> int:
    """Print a table of true returns per agent and episode, and write it to `evaluation.json` in the run's folder.

    pictures: also draw what is seen of the policy and of the demonstrations; hour: of the map, negative the busiest.
    paired: also play from the very start states of the demonstrations, where the expert's return is known.
    best: the checkpoint with the highest evaluation return instead of the newest.
    environment: play there, in a change of the run's world.
    The expert is the scripted one, if the environment has one, and has planned there; from the demonstrations' starts,
    in the world where they were recorded, it is the demonstrated one.
    Raises InputError for an environment that the policy does not fit.
    """
    if episodes < 1:
        raise InputError(f"--episodes must be at least 1, got {episodes}")
    trained = load_trained(run, best)
    name = with_absolute_files(environment)[0] if environment else trained.config.environment
    world = make_environment(name, 1).spec
    policy = trained.policy_in(world)
    compared = {"fresh": Episodes(name, episodes)}
    if paired:
        compared["paired"] = _demonstrated(trained.config, name, world)
    expert = _scripted_expert(world)
    rows = [row for starts, them in compared.items() for row in _rows(starts, them, policy, expert)]
    iteration = trained.checkpoint.iteration
    write_atomically(run / "evaluation.json", json.dumps({"iteration": iteration, "rows": rows}, indent=1))
    with lasting_output():
        _print(f"{run}, iteration {iteration}, in {world.name}", rows)
        if pictures:
            _draw(trained, name, policy, run / "pictures", hour)
    return 0


def judged(trained: Trained, environment: str, episodes: int) -> list[dict[str, Any]]:
    """How good a policy is in an environment, on fresh episodes: by drawn, and by greedy actions.

    Raises InputError for an environment that the policy does not fit.
    """
    name = with_absolute_files(environment)[0]
    world = make_environment(name, 1).spec
    return _rows("fresh", Episodes(name, episodes), trained.policy_in(world), _scripted_expert(world))


def _rows(starts: str, episodes: Episodes, policy: Policy, expert: Acts | None) -> list[dict[str, Any]]:
    """Drawn and greedy actions, beside random and an expert: the one whose return is known, else the one given."""
    spec = policy.layout.spec
    random = episodes.returns("random", UniformPolicy(spec)).mean(axis=0)
    known = episodes.expert
    if known is None and expert is not None:
        known = episodes.returns("expert", expert).mean(axis=0)
    scale = Scale(spec, random, known)
    rows = []
    for greedy in (False, True):
        actions = "greedy" if greedy else "drawn"
        returns = episodes.returns(f"policy, {actions}", policy, greedy)
        estimate = ReturnEstimate.of(returns, episodes.groups)
        rows.append(
            {
                "environment": spec.name,
                "starts": starts,
                "actions": actions,
                "episodes": episodes.count,
                "return_mean": estimate.mean,
                "return_stderr": estimate.stderr,
                "random_return": scale.random_return,
                "expert_return": scale.expert_return,
                "normalized_return": scale.normalized(estimate.mean),
                "types": scale.of_types(returns, episodes.groups),
            }
        )
    return rows


def _scripted_expert(world: EnvironmentSpec) -> Acts | None:
    try:
        return expert_for(world)
    except NoExpertError:  # not every environment has one
        return None


def _demonstrated(config: Config, name: str, world: EnvironmentSpec) -> Episodes:
    """From the start states of the run's demonstrations, in the environment of this name.

    Raises InputError if it has no such start states.
    """
    if not config.demonstrations:
        raise InputError("paired evaluation needs the run's demonstrations, and it had none")
    demonstrations = load_demonstrations(config)
    if not demonstrations.starts:
        raise InputError("the demonstrations hold no start states; evaluate without --paired")
    count, starts = demonstrations.num_episodes, demonstrations.starts
    make_environment(name, count).reset(FRESH_SEED, starts)  # says what does not fit before anything is played
    is_there = world.name == demonstrations.spec.name or (name == config.environment and not world.changes)
    expert = demonstrations.returns_of_agents if is_there else None
    return Episodes(name, count, starts, demonstrations.groups, expert)


def _draw(trained: Trained, name: str, policy: Policy, folder: Path, hour: float) -> None:
    # Here, because each run of a study imports this module, and draws nothing.
    from bm3il.launch.learned.pictures import draw_attention, draw_pictures

    folder.mkdir(exist_ok=True)
    config = trained.config
    critic = trained.critic(policy.layout)
    if critic is not None and draw_attention(critic, name, policy, folder / "attention.png"):
        print(folder / "attention.png")
    if not isinstance(unperturbed(make_environment(name, 1)), Berlin):
        print("maps, loads and places are drawn for berlin only")
    elif not config.demonstrations:
        raise InputError("pictures show the demonstrations beside the policy, and this run had none")
    else:
        demonstrations = load_demonstrations(config).for_crowd(policy.layout.spec)
        for path in draw_pictures(name, policy, demonstrations, folder, hour):
            print(path)


def _print(what: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{what}: true return per agent and episode", box=SIMPLE_HEAD, padding=0)
    for column in ("starts", "actions", "episodes", "of", "return", "± s.e.", "random", "expert", "normalised"):
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        for name, told in {"all": row, **row["types"]}.items():
            first = name == "all"
            table.add_row(
                *(row["starts"], row["actions"], str(row["episodes"])) if first else ("", "", ""),
                Text(name),  # no markup: a type may be called [bus]
                *("–" if told[key] is None else f"{told[key]:.1f}" for key in RETURNS),
                "–" if told["normalized_return"] is None else f"{told['normalized_return']:.3f}",
            )
    screen().print(table)
