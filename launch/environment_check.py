"""`bm3il check-environment`: does an environment keep what `protocol.environment` promises?"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np

from bm3il.protocol.environment import Environment, TimeStep
from bm3il.protocol.errors import InputError, ProtocolError
from bm3il.protocol.observations import forms
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import EnvironmentSpec

COPIES = 3
SEED = 7


def check_environment(name: str) -> int:
    """Play random episodes and check shapes, dtypes, masks, ends and repeatability, and the world that it changes.

    Raises InputError with the first promise that is broken.
    """
    environment = make_environment(name, COPIES)
    first = list(_episode(environment))
    second = list(_episode(environment))
    _expect(len(first) == len(second), "the same seed and actions give episodes of the same length")
    for a, b in zip(first, second, strict=True):
        for x, y in zip(_arrays(a), _arrays(b), strict=True):
            _expect(np.array_equal(x, y), "the same seed and actions give the same episode")
    spec = environment.spec
    _check_changes(spec)
    what = f"{spec.num_agents} agents of {spec.num_types} types" + (
        f", a change of {spec.changes}" * bool(spec.changes)
    )
    print(f"{name}: {what}, {len(first) - 1} steps played, all checks passed")
    return 0


def _check_changes(spec: EnvironmentSpec) -> None:
    """A world that is changed can be made, and what fits it fits the change."""
    if not spec.changes:
        return
    promise = f"'{spec.changes}', of which it says it is a change,"
    try:
        base = make_environment(spec.changes, 1).spec
    except InputError as error:
        _expect(False, f"{promise} can be made", str(error))
    else:
        difference = base.difference(spec, counts=False)
        _expect(difference is None, f"{promise} has the same types of agents", str(difference))


def _episode(environment: Environment) -> Iterator[TimeStep]:
    spec, random = environment.spec, np.random.default_rng(SEED)
    step = environment.reset(SEED)
    _check(environment, step)
    _expect(not np.any(step.terminated | step.truncated), "no episode has ended after reset")
    yield copy.deepcopy(step)
    for _ in range(spec.episode_length):
        ended = np.asarray(step.terminated | step.truncated)
        step = environment.step(_random_actions(environment, step, random))
        _check(environment, step)
        now = np.asarray(step.terminated | step.truncated)
        _expect(bool((now | ~ended).all()), "an episode that has ended stays ended until reset")
        for rewards, active in zip(step.rewards, step.active, strict=True):
            _expect(not rewards[ended].any(), "an episode that has ended gives no more rewards")
            _expect(not active[ended].any(), "the agents of an episode that has ended are inactive")
        yield copy.deepcopy(step)
    _expect(bool((step.terminated | step.truncated).all()), f"every episode ends within {spec.episode_length} steps")


def _check(environment: Environment, step: TimeStep) -> None:
    envs = environment.num_envs
    _check_columns(environment, step)
    for m, t in enumerate(environment.spec.types):
        agents = (envs, t.count)
        _array(f"observations of type '{t.name}'", step.observations[m], np.float32, (*agents, t.observation_dim))
        _array(f"action masks of type '{t.name}'", step.action_masks[m], np.bool_, (*agents, t.action_dim))
        _array(f"active of type '{t.name}'", step.active[m], np.bool_, agents)
        _array(f"rewards of type '{t.name}'", step.rewards[m], np.float32, agents)
        _expect(bool(np.isfinite(step.observations[m]).all()), f"observations of type '{t.name}' are finite")
        allowed = np.asarray(step.action_masks[m].any(axis=-1))
        _expect(bool(allowed[step.active[m]].all()), f"every active agent of type '{t.name}' may do something")
    _array("terminated", step.terminated, np.bool_, (envs,))
    _array("truncated", step.truncated, np.bool_, (envs,))


def _check_columns(environment: Environment, step: TimeStep) -> None:
    """What is described is there, as it is described, and shows what the environment says that agents see."""
    spec = environment.spec
    seen = step.seen(spec)  # refuses a description without columns
    if step.columns is None:
        return
    blocks = zip(forms(spec), spec.blocks, step.columns, strict=True)
    for form, types, columns in blocks:
        whose, table = f"agents like '{spec.types[types[0]].name}'", form.table_of(environment.num_envs)
        _expect(set(columns) == set(table), f"the columns of {whose} are {sorted(table)}", str(sorted(columns)))
        for name, (dtype, shape) in table.items():
            _array(f"column '{name}' of {whose}", columns[name], np.dtype(dtype).type, shape)
    for each in seen:
        try:
            each.check("an agent")
        except ProtocolError as error:
            _expect(False, "columns hold finite numbers and codes in their range", str(error))
    dense = spec.by_type([each.dense().numpy() for each in seen], axis=1)
    masks = spec.by_type([each.masks().numpy() for each in seen], axis=1)
    for m, t in enumerate(spec.types):
        for what, described, shown in (
            ("observations", dense, step.observations),
            ("action masks", masks, step.action_masks),
        ):
            same = described[m].shape == shown[m].shape and np.array_equal(described[m], shown[m])
            _expect(same, f"{what} of type '{t.name}' are what its spec makes of the columns", "others are shown")


def _random_actions(environment: Environment, step: TimeStep, random: np.random.Generator) -> list[np.ndarray]:
    actions = []
    for t, mask in zip(environment.spec.types, step.action_masks, strict=True):
        if t.discrete:
            actions.append((random.random(mask.shape) * mask).argmax(axis=-1))
        else:
            actions.append(random.uniform(-1, 1, mask.shape).astype(np.float32))
    return actions


def _array(what: str, array: np.ndarray, dtype: type, shape: Sequence[int]) -> None:
    found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
    good = isinstance(array, np.ndarray) and array.dtype == dtype and array.shape == tuple(shape)
    _expect(good, f"{what} are {np.dtype(dtype)} {list(shape)}", found)


def _arrays(step: TimeStep) -> list[np.ndarray]:
    lists = (step.observations, step.action_masks, step.active, step.rewards, [step.terminated, step.truncated])
    return [array for each in lists for array in each]


def _expect(holds: bool, promise: str, found: str = "it is not so") -> None:
    if not holds:
        raise InputError(f"the environment breaks its contract: expected that {promise}; found: {found}")
