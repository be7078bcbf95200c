"""What `import bm3il` offers: a day's work in a notebook. Arrays are numpy's, and types go by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from bm3il.actors.evaluation import ReturnEstimate
from bm3il.actors.evaluation import evaluate as play
from bm3il.actors.experts.recording import record
from bm3il.actors.policy import Policy
from bm3il.actors.rollout import Acts
from bm3il.launch import run as runs
from bm3il.launch import run_folder
from bm3il.launch.config import parse_config
from bm3il.launch.learned.evaluate import FRESH_SEED
from bm3il.launch.learned.trained import Trained, load_trained
from bm3il.launch.result import curve_rows, present_result, read_result
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.environment import Environment
from bm3il.protocol.errors import InputError
from bm3il.protocol.layout import JointRows
from bm3il.protocol.observations import Observations, compact, forms
from bm3il.protocol.registry import copies_at_once
from bm3il.protocol.registry import make_environment as of_registry
from bm3il.protocol.specs import EnvironmentSpec
from bm3il.reward_server.particles import RewardModel

if TYPE_CHECKING:
    from bm3il.protocol.adapters.as_pettingzoo import AsParallel

EPISODES_AT_ONCE = 16
OPTION = re.compile(r"--([a-z][a-z-]*(?:\.[a-z-]+)*)")
"""Of the command line."""
ByType = Mapping[str, ArrayLike]
"""An array of each type by the type's name, with its agents [X_m] in front, or a batch of them [B, X_m]."""


@dataclass(frozen=True)
class Run:
    """What a run has learned, from its folder."""

    folder: Path
    trained: Trained = field(repr=False)

    @property
    def spec(self) -> EnvironmentSpec:
        """Types, observations and actions of its environment."""
        return self.policy.layout.spec

    @property
    def policy(self) -> Policy:
        """Acts in an environment: `bm3il.rollout(name, run.policy)`."""
        return self.trained.policy

    @property
    def curve(self) -> list[dict[str, float]]:
        """Every evaluation during the training, by the names of `curve.csv`; what is not known is left out."""
        return [{name: float(value) for name, value in row.items() if value} for row in curve_rows(self.folder)]

    @property
    def result(self) -> dict[str, Any]:
        """`result.json`; {} if it has not ended yet, or goes on: resumed, or to be, for more steps than it had."""
        return present_result(self.folder, run_folder.read_config(self.folder))

    def act(
        self, observations: ByType, action_masks: ByType | None = None, greedy: bool = True, seed: int = 0
    ) -> dict[str, np.ndarray]:
        """What the agents of each type do: [X_m] int64 ([X_m, A_m] float32 if continuous), [B] in front if that is so.

        observations: of each type [X_m, O_m] or [B, X_m, O_m].
        action_masks: of each type [X_m, A_m] or [B, X_m, A_m] bool, the actions allowed now; None: all.
        greedy: the likeliest action instead of a draw by `seed`.
        Raises InputError for arrays of other types or shapes, and for masks of another batch than observations, or of
        other values than 0 and 1.
        """
        seen, lead = self._seen(observations, action_masks)
        actions, _ = self.policy.choose(seen, torch.Generator().manual_seed(seed), greedy)
        return {t.name: a if lead else a[0] for t, a in zip(self.spec.types, actions, strict=True)}

    def reward(self, observations: ByType, actions: ByType) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The learned reward of each agent (Eq. 9), and its standard deviation over the particles: [X_m] each, [B] in
        front if that is so.

        actions: as `act` gives them, of the same batch as observations.
        Raises InputError for arrays of other types or shapes, or if this run has no learned reward.
        """
        seen, lead = self._seen(observations, None)
        shapes = [() if t.discrete else (t.action_dim,) for t in self.spec.types]
        per_type, _ = self._checked("actions", actions, shapes, lead)
        for m, t in enumerate(self.spec.types):
            chosen, expected = per_type[m], "finite numbers"
            wrong = ~np.isfinite(chosen)
            if t.discrete:
                expected = f"integers from 0 to {t.action_dim - 1}"
                wrong |= (chosen < 0) | (chosen >= t.action_dim) | (chosen != np.floor(chosen))
            if wrong.any():
                raise InputError(f"actions of '{t.name}': expected {expected}, got {chosen[wrong][0]}")
            per_type[m] = chosen.astype(np.int64) if t.discrete else chosen
        done = [torch.from_numpy(np.concatenate([per_type[m] for m in types], axis=1)) for types in self.spec.blocks]
        active = [torch.ones(action.shape[:2], dtype=torch.bool) for action in done]
        mean, deviation = self._rewards.query(JointRows(seen, done, active), deviation=True)
        assert deviation is not None
        means, deviations = (self.spec.by_type([v.numpy() for v in part], axis=1) for part in (mean, deviation))
        return {
            t.name: (m, d) if lead else (m[0], d[0]) for t, m, d in zip(self.spec.types, means, deviations, strict=True)
        }

    @cached_property
    def _rewards(self) -> RewardModel:
        model = self.trained.reward_model()
        if model is None:
            raise InputError(f"{self.folder} has no learned reward: its algorithm is '{self.trained.config.algorithm}'")
        return model

    def _seen(self, observations: ByType, masks: ByType | None) -> tuple[list[Observations], tuple[int, ...]]:
        """Of each block, and (B,) if there was a batch of them, else ()."""
        spec = self.spec
        dense, lead = self._checked("observations", observations, [(t.observation_dim,) for t in spec.types])
        if masks is None:
            allowed = [
                np.ones((*seen.shape[:2], t.action_dim), bool) for seen, t in zip(dense, spec.types, strict=True)
            ]
        else:
            allowed, _ = self._checked("action masks", masks, [(t.action_dim,) for t in spec.types], lead)
            for t, mask in zip(spec.types, allowed, strict=True):
                if (odd := ~np.isin(mask, (0, 1))).any():
                    raise InputError(
                        f"action masks of '{t.name}': expected true and false, or 1 and 0, got {mask[odd][0]}"
                    )
        found = []
        for form, types in zip(forms(spec), spec.blocks, strict=True):
            seen, may = (np.concatenate([part[m] for m in types], axis=1) for part in (dense, allowed))
            columns = Observations.of_arrays(form, compact(form, seen.astype(np.float32), may.astype(bool)))
            if not np.array_equal(columns.dense().numpy(), seen.astype(np.float32)):
                names = ", ".join(spec.types[m].name for m in types)
                raise InputError(f"no agent of '{spec.name}' observes that: observations of {names}")
            found.append(columns)
        return found, lead

    def _checked(
        self, what: str, given: ByType, shapes: Sequence[tuple[int, ...]], lead: tuple[int, ...] | None = None
    ) -> tuple[list[np.ndarray], tuple[int, ...]]:
        """Arrays [B, X_m, *shape] in the order of the types, and what stood in front of X_m: (B,), or ().

        lead: what must stand there, as in arrays of which these are; None: either.
        """
        names = [t.name for t in self.spec.types]
        if set(given) != set(names):
            raise InputError(f"{what}: expected the types {', '.join(names)}, got {', '.join(given) or 'none'}")
        arrays = [np.asarray(given[name]) for name in names]
        if lead is None:
            lead = arrays[0].shape[:1] if arrays[0].ndim == 2 + len(shapes[0]) else ()
        for t, array, shape in zip(self.spec.types, arrays, shapes, strict=True):
            expected = (*lead, t.count, *shape)
            if array.shape != expected:
                raise InputError(f"{what} of '{t.name}': expected the shape {expected}, got {array.shape}")
            if array.dtype.kind not in "biuf":
                raise InputError(f"{what} of '{t.name}': expected numbers, got {array.dtype}")
        return [array if lead else array[None] for array in arrays], lead


def load(run: str | Path, best: bool = False) -> Run:
    """What a run has learned, by its newest checkpoint, or the one with the highest evaluation return.

    Raises InputError if this is no run, or it has no such checkpoint.
    """
    return Run(Path(run), load_trained(Path(run), best))


def train(preset: str, **settings: Any) -> Run:
    """Train as `bm3il train` does, and return what was learned.

    settings: the options of `bm3il train`, with `_` for `-` and `__` for `.`: `steps=10_000`, `learner__hidden=64`.
    Raises InputError before anything is started, RuntimeError with the last words of a run that fails.
    """
    args = ["--preset", preset]
    for name, value in settings.items():
        flag = "--" + name.replace("__", ".").replace("_", "-")
        if isinstance(value, bool):
            # On the command line, the no- stands before the last part of the name: --actor.no-agent-identity.
            head, _, tail = flag.rpartition(".")
            args.append(flag if value else f"{head}.no-{tail}" if head else f"--no-{flag[2:]}")
        else:
            args += [flag, *(str(v) for v in (value if isinstance(value, (list, tuple)) else (value,)))]
    try:
        config = run_folder.named(parse_config(args))
        folder = Path(config.runs_folder) / config.run
        code = runs.train(config)
    except run_folder.RunExistsError:
        learned = f"bm3il.load('{folder}') is what it has learned"
        raise InputError(f"{folder} exists; {learned}, or take another run=") from None
    except InputError as error:
        raise InputError(_in_python(str(error))) from error
    if code:
        told = _in_python(read_result(folder).get("error") or str(folder))
        raise RuntimeError(f"the run ended with code {code}: {told}")
    return load(folder)


def _in_python(message: str) -> str:
    """With the options of the command line as `train` has them: `--learner.batch-size` is `learner__batch_size=`."""
    return OPTION.sub(lambda found: found[1].replace(".", "__").replace("-", "_") + "=", message)


def make_environment(name: str, copies: int = 1) -> Environment:
    """An environment by its name, stepped in so many copies: `"berlin?closed=22"`.

    Raises InputError for an unknown name or option.
    """
    return of_registry(name, copies)


def as_parallel_env(name: str) -> AsParallel:
    """An environment by its name, behind the parallel API of PettingZoo, for whoever trains or plays by that.

    Raises InputError for an unknown name or option, and where PettingZoo is not installed.
    """
    try:
        from bm3il.protocol.adapters.as_pettingzoo import AsParallel
    except ModuleNotFoundError as error:
        raise InputError(f"as_parallel_env needs '{error.name}': pip install 'bm3il[pettingzoo]'") from error
    return AsParallel(of_registry(name, 1))


def evaluate(
    run: Run, environment: str = "", episodes: int = 200, greedy: bool = False, seed: int = FRESH_SEED
) -> dict[str, ReturnEstimate]:
    """True returns per agent and episode, of the agents of each type and of "all". The same seed starts the episodes in
    the same states, whoever plays.

    environment: its name, as a change of the run's world; "": the run's own.
    Raises InputError for an environment that the policy does not fit, and for no episodes.
    """
    if episodes < 1:
        raise InputError(f"episodes must be at least 1, got {episodes}")
    name = environment or run.trained.config.environment
    spec = of_registry(name, 1).spec
    returns = play(name, run.trained.policy_in(spec), episodes, seed, greedy)
    parts = {"all": returns} | {t.name: returns[:, spec.agents(m)] for m, t in enumerate(spec.types)}
    return {name: ReturnEstimate.of(part) for name, part in parts.items()}


def rollout(
    environment: str,
    policy: Acts,
    episodes: int = 1,
    seed: int = 0,
    greedy: bool = False,
    origin: str = "played",
) -> Demonstrations:
    """Whole episodes, as demonstrations: `.observations`, `.actions`, `.returns`, `.save(path)`.

    policy: of a run, or anything that has its `act`.
    """
    at_once = copies_at_once(environment, min(episodes, EPISODES_AT_ONCE))
    return record(of_registry(environment, at_once), policy, episodes, seed, origin, greedy)
