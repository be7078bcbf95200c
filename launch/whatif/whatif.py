"""`bm3il whatif RUN --environment CHANGED`: what the people whom a run imitated will do in a world that changed.

In RUN/whatif/CHANGE/ one run for each seed imitates in the changed world: it begins with the clone of the
demonstrations, which are of the old world, and learns a reward there that sees what agents are after. Then all that can
be compared plays the same fresh episodes; `whatif.json`, `whatif.md` and, for Berlin, `whatif.png` tell what came out.

`whatif.json`: `returns` in the changed world of `random`, the `run`'s policy and the `clone` as they are, the
`imitator` and the re-planned `expert` (absent where nobody has written one), `before_returns` of clone and expert in
the world as demonstrated, and `imitator_minus_clone`, each with `mean` and `interval` (null if unknown) of all agents
and by `types`; for Berlin `loads` of roads `before` and `after`, by hour of the day and over the hours of the rush.
Clone and imitator are one policy for each seed: their intervals are over seeds, on the same episodes; others' are over
episodes.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from bm3il.actors.environments.berlin.environment import Berlin
from bm3il.actors.experts.scripted import NoExpertError, expert_for
from bm3il.actors.policy import Policy, UniformPolicy
from bm3il.actors.rollout import Acts
from bm3il.launch import run_folder
from bm3il.launch.config import Config
from bm3il.launch.files import check_files, remembered
from bm3il.launch.learned.trained import load_trained, policy_of
from bm3il.launch.locks import held
from bm3il.launch.outcome import CRASHED, FINISHED, INTERRUPTED
from bm3il.launch.processes.supervisor import StopRequests
from bm3il.launch.run import check, differences, iterations
from bm3il.launch.run_folder import slug
from bm3il.launch.studies.board import Board
from bm3il.launch.studies.pool import LOG, finished, run_all
from bm3il.launch.surroundings import lasting_output, screen
from bm3il.launch.whatif.figures import OF_SEEDS, Figures, Sample, figures_of, loads_of, play
from bm3il.launch.whatif.report import draw_changes, markdown, print_tables
from bm3il.learner.algorithms import algorithm
from bm3il.learner.optimisation import part
from bm3il.protocol.errors import InputError
from bm3il.protocol.files import write_atomically
from bm3il.protocol.perturbation import unperturbed
from bm3il.protocol.registry import make_environment, with_absolute_files
from bm3il.protocol.specs import EnvironmentSpec
from bm3il.reward_server.sees import PURPOSE
from bm3il.reward_server.settings import RewardSettings

LEAST_EPISODES = 10
"""Of an iteration: advantages from fewer are too noisy to refine a clone."""

Arrays = dict[str, np.ndarray]


def changed_world(config: Config, environment: str, seed: int, steps: int) -> Config:
    """The configuration of one seed's imitation in a changed world: the run's, with the recipe for such worlds.

    The clone is refined in clipped steps by a reward that remembers the run, has seen nonsense first (babbling)
    and what was put together anew (imagined), and sees what agents are after only, where the environment says what that
    is.
    """
    spec = make_environment(environment, 1).spec
    imitates = algorithm(config.algorithm).imitates
    has_purpose = all(agent_type.purpose for agent_type in spec.types)
    has_parts = all(agent_type.parts for agent_type in spec.types)
    # What the parts of this recipe are worth: docs/when.md.
    return replace(
        config,
        environment=environment,
        algorithm=config.algorithm if imitates else "bm3il",
        mode="serial",
        seed=seed,
        steps=steps,
        actors=1,
        nodes=1,
        hostfile="",
        threads=1,
        learner=replace(
            config.learner,
            policy="clipped",
            start="cloned",
            clipped=replace(config.learner.clipped, clip=0.1, critic_first=3, clone_weight=0.0),
            policy_learning_rate=1e-3,
            critic_learning_rate=1e-3,
            final_learning_rate=0.3,
            discount=0.99,
            window_steps=0,
            cloning_weight=0.0,
            reward_offset=math.log(2),
            checkpoint_interval=10,
        ),
        actor=replace(
            config.actor,
            babbling=3,
            steps_per_iteration=max(config.actor.steps_per_iteration, LEAST_EPISODES * spec.episode_length),
        ),
        reward=replace(
            config.reward,
            memory="run",
            sees=(PURPOSE,) if has_purpose else config.reward.sees,
            imagined=0.5 if has_parts else 0.0,
            label_smoothing=0.1,
            final_learning_rate=0.05,
            # A run without a learned reward has forgotten how many particles there were to be.
            particles=config.reward.particles if imitates else RewardSettings().particles,
        ),
        # Start states were recorded in the old world, and so was what an expert returns from them.
        evaluation=replace(config.evaluation, starts="fresh"),
    )


@dataclass(frozen=True)
class Question:
    """A run, and a world that is a change of the one it imitated.

    config, arrays: of the run, and of its policy.   before, after: names of the two worlds.
    """

    run: Path
    config: Config
    arrays: Arrays
    before: str
    after: str
    before_spec: EnvironmentSpec
    after_spec: EnvironmentSpec

    @classmethod
    def of(cls, run: Path, environment: str) -> Question:
        """Raises InputError for a run that imitates nobody or has learned nothing, and for what is no change of it."""
        trained = load_trained(run)
        config = trained.config
        check_files(config)
        environment, _ = with_absolute_files(environment)
        if not config.demonstrations:
            raise InputError(f"{run} had no demonstrations, so there is nobody to imitate in another world")
        before = trained.policy.layout.spec.changes or config.environment
        changed, demonstrated = make_environment(environment, 1).spec, make_environment(before, 1).spec
        _check_change(demonstrated, changed)
        arrays = part(trained.checkpoint.learner, "policy")
        return cls(run, config, arrays, before, environment, demonstrated, changed)

    @property
    def changes(self) -> list[str]:
        """Options by which the worlds differ."""
        return changes(self.before_spec.name, self.after_spec.name)

    @property
    def folder(self) -> Path:
        """Where all that is said of it lies."""
        return self.run / "whatif" / slug(self.changes)

    def policy(self, arrays: Arrays, environment: str) -> Policy:
        """A policy of networks like the run's, for the agents of one of the worlds."""
        return policy_of(self.config, arrays, self.before_spec if environment == self.before else self.after_spec)


def _check_change(before: EnvironmentSpec, after: EnvironmentSpec) -> None:
    difference = before.difference(after, counts=not after.changes)
    if difference is None and after.name != before.name:
        return
    why = f"is no change of the run's world, '{before.name}': {difference}" if difference else "is the run's own world"
    example = f"{before.name}{'&' if '?' in before.name else '?'}slip=0.05"
    raise InputError(
        f"'{after.name}' {why}; what fits is that world with slip= (noise= for continuous actions), of berlin and "
        f"sumo also with closed=, of berlin with capacity=, demand=, e.g. '{example}'"
    )


def changes(before: str, after: str) -> list[str]:
    """The options in the name of the changed world that are not of the other's: `closed=22,23`."""
    old, new = (re.split("[?&]", name) for name in (before, after))
    return [part for part in new if part not in old] or [f"without {part}" for part in old if part not in new]


def main(run: Path, environment: str, seeds: int, steps: int, jobs: int, episodes: int) -> int:
    """Imitate in the changed world with each of the seeds 1..`seeds`, `jobs` at once, and compare; the exit code.

    steps: joint environment steps of each seed.   episodes: of each policy in the comparison.
    What was stopped goes on by the same command. Raises InputError before anything starts.
    """
    for option, value in (("seeds", seeds), ("steps", steps), ("jobs", jobs), ("episodes", episodes)):
        if value < 1:
            raise InputError(f"--{option} must be at least 1, got {value}")
    question = Question.of(run, environment)
    config, _ = check(remembered(changed_world(question.config, question.after, 1, steps)))
    places = [f"seed-{seed}" for seed in range(1, seeds + 1)]
    configs = [
        replace(config, seed=seed, run=name, runs_folder=str(question.folder)) for seed, name in enumerate(places, 1)
    ]
    console, stopped = screen(soft_wrap=True), StopRequests()
    with held(question.folder), stopped.heard(), lasting_output():
        folders = _opened(configs)
        console.print(f"{question.folder}: {seeds} runs of {steps:,} steps in {question.after_spec.name}", markup=False)
        size = dict.fromkeys(folders, iterations(config, question.after_spec))
        with Board(size, dict.fromkeys(folders, ""), jobs, console) as board:
            failed = run_all(folders, jobs, stopped, board.show)
        if (done := [folder for folder in folders if finished(folder)]) and not stopped.count:
            with suppress(_Stopped):
                _compare(question, config, done, episodes, stopped, console)
    if stopped.count:
        console.print("stopped; the same command goes on")
        return INTERRUPTED
    for folder, why in failed.items():
        print(f"bm3il: {folder.name} failed: {why}; log: {folder / LOG}", file=sys.stderr)
    return CRASHED if failed else FINISHED


def _opened(configs: list[Config]) -> list[Path]:
    """The folders of the seeds' runs, made if need be. Raises InputError if one was begun with other settings."""
    folders = [Path(config.runs_folder, config.run) for config in configs]
    for folder, config in zip(folders, configs, strict=True):
        if folder.exists():
            begun = replace(run_folder.open_existing(folder), runs_folder=config.runs_folder)
            if begun != config:
                raise InputError(
                    f"{folder} was begun with other settings: {differences(begun, config)}; give these again, or "
                    f"delete {folder.parent}"
                )
    # Only when none of the runs that are there has objected: what is refused leaves nothing behind.
    for folder, config in zip(folders, configs, strict=True):
        if not folder.exists():
            run_folder.create(config)
    return folders


class _Stopped(Exception):
    """Somebody asked for the end while policies were being compared."""


def _compare(
    question: Question, config: Config, folders: list[Path], episodes: int, stopped: StopRequests, console: Console
) -> None:
    """Play, write down and print what came of the seeds' runs in `folders`."""
    before, after = _played(question, folders, episodes, stopped, console)
    report: Figures = {
        "run": str(question.run),
        "change": " ".join(question.changes),
        "environment": question.after_spec.name,
        "before": question.before_spec.name,
        "algorithm": config.algorithm,
        "steps": config.steps,
        "seeds": [int(folder.name.removeprefix("seed-")) for folder in folders],
        "episodes": episodes,
        **figures_of(question.before_spec, question.after_spec, before, after),
    }
    berlin = unperturbed(make_environment(question.after, 1))
    if isinstance(berlin, Berlin):
        report["loads"] = loads_of(berlin, before, after)
    write_atomically(question.folder / "whatif.json", json.dumps(report, indent=1) + "\n")
    write_atomically(question.folder / "whatif.md", markdown(report))
    print_tables(report, console)
    if isinstance(berlin, Berlin):
        draw_changes(berlin, report, question.folder / "whatif.png")
    for name in ("whatif.json", "whatif.md", "whatif.png"):
        if (question.folder / name).exists():
            console.print(str(question.folder / name), markup=False)


def _played(
    question: Question, folders: list[Path], episodes: int, stopped: StopRequests, console: Console
) -> tuple[dict[str, Sample], dict[str, Sample]]:
    """Everybody's episodes by name: in the world as demonstrated, and in the changed one."""
    seen: dict[str, dict[str, list[Sample]]] = {question.before: {}, question.after: {}}
    # Random, the run, and the expert in both worlds; of each seed the clone in both worlds, and the imitator.
    options: dict[str, Any] = {"total": 4 + 3 * len(folders), "console": console, "transient": True}
    for world, name, policy in track(_everybody(question, folders), "playing", **options):
        if stopped.count:
            raise _Stopped
        seen[world].setdefault(name, []).append(play(world, policy, episodes))
    before, after = (
        {name: Sample.of_seeds(samples) if name in OF_SEEDS else samples[0] for name, samples in of_world.items()}
        for of_world in seen.values()
    )
    return before, after


def _everybody(question: Question, folders: list[Path]) -> Iterator[tuple[str, str, Acts]]:
    """The world, the name and the policy of all that is compared; the seeds' have their names in common."""
    before, after = question.before, question.after
    yield after, "random", UniformPolicy(question.after_spec)
    yield after, "run", question.policy(question.arrays, after)
    for folder in folders:
        learned = load_trained(folder).checkpoint.learner
        clone, imitator = part(learned, "clone"), part(learned, "policy")
        yield before, "clone", question.policy(clone, before)
        yield after, "clone", question.policy(clone, after)
        yield after, "imitator", question.policy(imitator, after)
    for world, spec in ((before, question.before_spec), (after, question.after_spec)):
        if (expert := _expert(spec)) is not None:
            yield world, "expert", expert


def _expert(spec: EnvironmentSpec) -> Acts | None:
    """The scripted expert, which has planned in that world; None where nobody has written one."""
    try:
        return expert_for(spec)
    except NoExpertError:
        return None
