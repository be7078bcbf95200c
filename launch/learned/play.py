"""`bm3il play RUN`: an episode of a run's policy, to look at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from bm3il.actors.evaluation import AtWork
from bm3il.actors.experts.scripted import expert_for
from bm3il.actors.policy import UniformPolicy
from bm3il.actors.rollout import Acts, play
from bm3il.launch.files import load_demonstrations
from bm3il.launch.learned.episode_picture import MOVING, Episode, check_path, draw
from bm3il.launch.learned.trained import Trained, load_trained
from bm3il.launch.progress import Meanwhile
from bm3il.launch.surroundings import screen
from bm3il.protocol.environment import Environment, Starts, TimeStep
from bm3il.protocol.errors import InputError
from bm3il.protocol.perturbation import unperturbed
from bm3il.protocol.registry import make_environment, with_absolute_files
from bm3il.protocol.specs import EnvironmentSpec

MOST_FRAMES = 200
"""Of longer episodes every second moment is looked at, or every third, …"""
MOST_PIXELS = 640
"""Of a picture, in height and width."""


@dataclass(frozen=True)
class Start:
    """Where an episode begins: as `seed` has it, or as the episode of this number of the run's demonstrations did."""

    seed: int = 0
    episode: int | None = None


def main(
    run: Path, best: bool, start: Start, environment: str, beside: list[str], greedy: bool, output: Path | None
) -> int:
    """Play an episode, print what each type returned, and draw it.

    environment: another world to play in, which the policy fits.   beside: `expert`, `random`, who play from the same
    start.   output: a .gif that moves, or a picture of some moments; None: `play.gif` in the run's folder.
    Raises InputError for an environment that the policy does not fit, a start or an expert that there is not, and a
    kind of file that cannot be drawn or a place that cannot be written to: before anything is played.
    """
    path = run / f"play{MOVING}" if output is None else output
    if start.seed < 0:
        raise InputError(f"--seed must be at least 0, got {start.seed}")
    trained = load_trained(run, best)
    check_path(path)
    name = with_absolute_files(environment)[0] if environment else trained.config.environment
    spec = make_environment(name, 1).spec
    players: dict[str, Acts] = {"policy": trained.policy_in(spec)}
    makers = {"expert": expert_for, "random": UniformPolicy}
    players |= {who: makers[who](spec) for who in beside}
    starts = None if start.episode is None else _demonstrated(trained, start.episode)
    title = f"{run.resolve().name}, iteration {trained.checkpoint.iteration}, in {spec.name}"
    with Meanwhile() as meanwhile:
        episodes = {}
        for who, player in players.items():
            told = partial(meanwhile.tell, f"{who} plays: step")
            episodes[who] = record(name, player, start.seed, greedy, starts, told)
        try:
            draw(episodes, spec, title, path, partial(meanwhile.tell, "drawing: picture"))
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error
    _print(spec, episodes)
    print(path)
    return 0


def record(
    name: str,
    player: Acts,
    seed: int,
    greedy: bool = False,
    starts: Starts | None = None,
    at_work: AtWork = lambda *_: None,
) -> Episode:
    """Play one episode in the environment of this name. at_work: called after each step with its number, and how many
    there are at most."""
    world = make_environment(name, 1, drawn=True)
    every = math.ceil(world.spec.episode_length / MOST_FRAMES)
    first, moments = play(world, player, seed, greedy, starts)
    frames = {0: _picture(world)}
    active, actions, rewards = _active(first), [], [np.zeros(world.spec.num_agents)]
    for step, moment in enumerate(moments, 1):
        at_work(step, world.spec.episode_length)
        now = moment.now
        actions.append(np.where(active, _shown(world.spec, moment.actions), np.nan))
        rewards.append(np.concatenate(now.rewards, axis=1)[0])
        active = _active(now)
        if step % every == 0 or now.terminated[0] or now.truncated[0]:
            frames[step] = _picture(world)
    # No part of the contract of an environment, but some hold processes or a window.
    if callable(close := getattr(world, "close", None)):
        close()
    seen = {step: picture for step, picture in frames.items() if picture is not None}
    return Episode(seen, np.array(actions), np.cumsum(rewards, axis=0))


def _picture(world: Environment) -> np.ndarray | None:
    """What it draws, made smaller; None if it draws nothing. Raises InputError for what is no picture."""
    draws = getattr(unperturbed(world), "render", None)
    picture = draws() if callable(draws) else None
    if picture is None:
        return None
    if not (isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.shape[2:] == (3,)):
        found = f"{picture.dtype} {list(picture.shape)}" if isinstance(picture, np.ndarray) else type(picture).__name__
        raise InputError(f"'{world.spec.name}': render() must give uint8 [H, W, 3], gave {found}")
    every = math.ceil(max(picture.shape[:2]) / MOST_PIXELS)
    # A view would keep the large picture, of which there may be hundreds, in memory.
    return picture[::every, ::every].copy()


def _active(now: TimeStep) -> np.ndarray:
    """[N] who is there."""
    return np.concatenate(now.active, axis=1)[0]


def _shown(spec: EnvironmentSpec, actions: list[np.ndarray]) -> np.ndarray:
    """[N] a number for what each agent does: of a continuous action the mean of its own."""
    per_type = zip(spec.types, actions, strict=True)
    return np.concatenate([a[0] if kind.discrete else a[0].mean(axis=-1) for kind, a in per_type])


def _demonstrated(trained: Trained, episode: int) -> Starts:
    if not trained.config.demonstrations:
        raise InputError("--episode is of the run's demonstrations, and it had none; take --seed")
    demonstrations = load_demonstrations(trained.config)
    if not demonstrations.starts:
        raise InputError("the demonstrations hold no start states; take --seed")
    if not 0 <= episode < demonstrations.num_episodes:
        raise InputError(f"--episode must be within 0..{demonstrations.num_episodes - 1}, got {episode}")
    return {name: array[episode : episode + 1] for name, array in demonstrations.starts.items()}


def _print(spec: EnvironmentSpec, episodes: Mapping[str, Episode]) -> None:
    steps = " and ".join(dict.fromkeys(str(episode.steps) for episode in episodes.values()))
    table = Table("type")
    for who in episodes:
        table.add_column(who, justify="right")
    groups = {"all": slice(None)} | {kind.name: spec.agents(m) for m, kind in enumerate(spec.types)}
    for name, agents in groups.items():
        table.add_row(Text(name), *(f"{episode.returns[-1, agents].mean():.2f}" for episode in episodes.values()))
    console = screen()
    console.print(f"true return per agent in this episode, of {steps} steps:", markup=False, soft_wrap=True)
    console.print(table)
