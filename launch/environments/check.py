"""`bm3il check-environment`: does an environment keep what `protocol.environment` promises, and how fast is it?

A promise that is broken is an error, with the way to mend it. What may be meant but seldom is comes as a hint.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

import numpy as np

from bm3il.actors.simulator import Simulator
from bm3il.launch.environments.speed import speed
from bm3il.protocol.demonstrations import Demonstrations, resolve
from bm3il.protocol.environment import Environment, TimeStep
from bm3il.protocol.errors import InputError, ProtocolError, SimulatorError
from bm3il.protocol.likeness import unlike
from bm3il.protocol.observations import forms
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import EnvironmentSpec

COPIES, SEED = 3, 7
AFTER_END = 3
"""Steps that are played when all episodes have ended: how long they might have been is of no matter any more."""
LARGE = 30.0
"""Numbers in observations beyond which networks of ordinary size learn slowly: inputs are not normalised."""

Choose = Callable[[TimeStep, int], list[np.ndarray]]


@dataclass
class Episodes:
    """What was shown, from the reset on, and what was done in between."""

    steps: list[TimeStep] = field(default_factory=list)
    actions: list[list[np.ndarray]] = field(default_factory=list)


def check_environment(name: str, demonstrations: str = "") -> int:
    """Play random episodes and check shapes, dtypes, masks, ends and repeatability, and the world that it changes.

    demonstrations: to be compared with what it shows.

    Raises InputError with the first promise that is broken, and how to mend it.
    """
    recorded = Demonstrations.load(resolve(demonstrations)) if demonstrations else None
    try:
        environment = Simulator(name, COPIES)
        if recorded is not None:
            recorded.check_against(environment.spec)
        first = _played(environment, SEED, _drawn(environment.spec))
        _check_again(name, environment, first)
        _check_changes(environment.spec)
        hints = [*_of_other_plays(environment, first), *_of_numbers(first)]
        if recorded is not None:
            with closing(Simulator(name, 1)) as alone:
                hints += unlike(recorded, alone, steps=True)
        environment.close()
        how_fast, slow = speed(name)
    except SimulatorError as error:
        raise InputError(f"{error}{_place(error)}") from error
    spec = environment.spec
    what = f"{spec.num_agents} agents of {spec.num_types} types" + (
        f", a change of {spec.changes}" * bool(spec.changes)
    )
    print(f"{name}: {what}, {len(first.actions)} steps played, all checks passed")
    print(f"speed: {how_fast}")
    for hint in [*hints, *slow]:
        print(f"hint: {hint}")
    return 0


def _played(environment: Environment, seed: int, choose: Choose, steps: int = 0) -> Episodes:
    """Copies of all that is shown, each checked by itself.

    steps: how many, to be compared with others; 0: until a little after all episodes have ended.
    """
    played, spec = Episodes(), environment.spec
    step = environment.reset(seed)
    played.steps.append(_checked(environment, step))
    _expect(
        not np.any(step.terminated | step.truncated),
        "no episode has ended after reset",
        mend="reset clears `terminated` and `truncated`",
    )
    rest = AFTER_END
    for t in range(steps or spec.episode_length):
        ended = np.asarray(step.terminated | step.truncated)
        if not steps and ended.all():
            if not rest:
                break
            rest -= 1
        # From the copy: an environment may write its next step into the same arrays.
        actions = choose(played.steps[-1], t)
        given = [action.copy() for action in actions]
        step = environment.step(actions)
        unchanged = all(np.array_equal(a, b) for a, b in zip(actions, given, strict=True))
        _expect(unchanged, "the actions that are given stay as they are", mend="work on a copy of them")
        played.steps.append(_checked(environment, step))
        _check_ends(step, ended)
        played.actions.append(given)
    ended = np.asarray(step.terminated | step.truncated)
    _expect(
        bool(ended.all()) or len(played.actions) < spec.episode_length,
        f"every episode ends within {spec.episode_length} steps",
        f"{int((~ended).sum())} of {len(ended)} have not",
        "set `truncated` at the last step of the spec's episode_length, or make that longer",
    )
    return played


def _drawn(spec: EnvironmentSpec, others: int | None = None, inactive: bool = False) -> Choose:
    """Random actions that masks allow, the same each time.

    others: a copy of the environment that takes other ones.   inactive: agents that are inactive take other ones.
    """
    usual, unusual = np.random.default_rng(SEED), np.random.default_rng(SEED + 1)

    def choose(now: TimeStep, t: int) -> list[np.ndarray]:
        actions = _random_actions(spec, now.action_masks, usual)
        if others is not None:
            for action, other in zip(actions, _random_actions(spec, now.action_masks, unusual), strict=True):
                action[others] = other[others]
        if inactive:
            anything = [np.ones_like(mask) for mask in now.action_masks]
            for action, other, active in zip(
                actions, _random_actions(spec, anything, unusual), now.active, strict=True
            ):
                action[~active] = other[~active]
        return actions

    return choose


def _check_again(name: str, environment: Environment, first: Episodes) -> None:
    def as_before(now: TimeStep, t: int) -> list[np.ndarray]:
        return [action.copy() for action in first.actions[t]]

    steps = len(first.actions)
    if found := _first_difference(first, _played(environment, SEED, as_before, steps)):
        # Copies that remember what was played are told from those that do not heed their seed.
        remembers = not _first_difference(first, _played(Simulator(name, COPIES), SEED, as_before, steps))
        mend = (
            "let reset clear all that the last episode left: new copies do give the same"
            + ", and ?anew=true makes some for every episode" * name.startswith("pettingzoo")
            if remembers
            else "draw all chance from np.random.default_rng(seed), made in reset"
        )
        _expect(False, "the same seed and actions give the same episode", found, mend)
    idle = _first_difference(first, _played(environment, SEED, _drawn(environment.spec, inactive=True), steps))
    _expect(
        not idle,
        "what inactive agents are told to do changes nothing",
        idle,
        "leave out the actions of agents that the step before showed as inactive",
    )


def _first_difference(first: Episodes, again: Episodes, copies: Sequence[int] | slice = slice(None)) -> str:
    """In words, for these copies; "" if there is none."""
    for t, (a, b) in enumerate(zip(first.steps, again.steps, strict=True)):
        if differing := _differing(a, b, copies):
            return f"other {differing} after {t} steps"
    return ""


def _of_other_plays(environment: Environment, first: Episodes) -> Iterator[str]:
    """What other seeds, and other actions in one of the copies, tell."""
    other = environment.reset(SEED + 1)
    is_anybody_there = any(active.any() for active in other.active)  # else it is not seen yet how it starts
    if is_anybody_there and not _differing(first.steps[0], other):
        yield (
            "two seeds start in the same state. If starts should differ, draw them in reset by its seed: else the "
            "policy learns one start by heart"
        )
    apart = _played(environment, SEED, _drawn(environment.spec, others=1), len(first.actions))
    if found := _first_difference(first, apart, [copy for copy in range(environment.num_envs) if copy != 1]):
        yield (
            f"what one copy of the environment does changes others: {found}. Copies shall not share state, nor draw "
            "from one generator numbers that depend on what happens in another"
        )


def _of_numbers(first: Episodes) -> Iterator[str]:
    """What is allowed and seldom meant."""
    steps = first.steps
    largest = max(float(np.abs(o).max(initial=0)) for step in steps for o in step.observations)
    if largest > LARGE:
        yield (
            f"observations hold numbers up to {largest:.4g}, and networks see them as they are: divide them so that "
            "most are within -1 and 1"
        )
    if not any(rewards.any() for step in steps for rewards in step.rewards):
        yield (
            "no reward but 0 was seen. Imitation reads none, but then no evaluation tells how well it goes: give the "
            "true return if you know one"
        )
    last = len(steps) - 1
    if steps[last].terminated.all() and not steps[last - 1].terminated.any():
        yield (
            "all episodes end at their last step as `terminated`. If only their time is over, say `truncated`: what "
            "would have followed is then estimated"
        )


def _check_changes(spec: EnvironmentSpec) -> None:
    """A world that is changed can be made, and what fits it fits the change."""
    if not spec.changes:
        return
    promise = f"'{spec.changes}', of which it says it is a change,"
    try:
        base = make_environment(spec.changes, 1).spec
    except InputError as error:
        _expect(False, f"{promise} can be made", str(error), "the spec's `changes` is a name for make_environment")
    else:
        difference = base.difference(spec, counts=False)
        _expect(
            difference is None, f"{promise} has the same types of agents", str(difference), "a change keeps all shapes"
        )


def _check_ends(step: TimeStep, ended: np.ndarray) -> None:
    now, mend = np.asarray(step.terminated | step.truncated), "step changes nothing in a copy that has ended"
    _expect(bool((now | ~ended).all()), "an episode that has ended stays ended until reset", mend=mend)
    for rewards, active in zip(step.rewards, step.active, strict=True):
        _expect(not rewards[ended].any(), "an episode that has ended gives no more rewards", mend=mend)
        _expect(not active[ended].any(), "the agents of an episode that has ended are inactive", mend=mend)


def _checked(environment: Environment, shown: TimeStep) -> TimeStep:
    """A copy that lasts, and in which what a spec describes is expanded once and not with every look."""
    envs = environment.num_envs
    if shown.columns is not None:  # of which the arrays below are made
        _check_columns(environment, shown)
    dense = replace(shown, observations=list(shown.observations), action_masks=list(shown.action_masks), columns=None)
    step = copy.deepcopy(dense)
    for m, t in enumerate(environment.spec.types):
        agents, whose = (envs, t.count), f"of type '{t.name}'"
        _array(f"observations {whose}", step.observations[m], np.float32, (*agents, t.observation_dim))
        _array(f"action masks {whose}", step.action_masks[m], np.bool_, (*agents, t.action_dim))
        _array(f"active {whose}", step.active[m], np.bool_, agents)
        _array(f"rewards {whose}", step.rewards[m], np.float32, agents)
        for what, numbers in (("observations", step.observations[m]), ("rewards", step.rewards[m])):
            wrong = numbers[~np.isfinite(numbers)]
            _expect(not wrong.size, f"{what} {whose} are finite", str(wrong[:1]), "look for 0/0 and log(0)")
        allowed = np.asarray(step.action_masks[m].any(axis=-1))
        _expect(
            bool(allowed[step.active[m]].all()),
            f"every active agent {whose} may do something",
            mend="add an action 'wait' that is always allowed, or show the agent as inactive",
        )
    _array("terminated", step.terminated, np.bool_, (envs,))
    _array("truncated", step.truncated, np.bool_, (envs,))
    shown.seen(environment.spec)  # refuses a description without columns
    return step


def _check_columns(environment: Environment, step: TimeStep) -> None:
    """What is described is there, as it is described, and shows what the environment says that agents see."""
    spec = environment.spec
    blocks = zip(forms(spec), spec.blocks, step.columns or (), strict=True)
    for form, types, columns in blocks:
        whose, table = f"agents like '{spec.types[types[0]].name}'", form.table_of(environment.num_envs)
        _expect(set(columns) == set(table), f"the columns of {whose} are {sorted(table)}", str(sorted(columns)))
        for name, (dtype, shape) in table.items():
            _array(f"column '{name}' of {whose}", columns[name], np.dtype(dtype).type, shape)
    seen = step.seen(spec)
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


def _random_actions(
    spec: EnvironmentSpec, masks: Sequence[np.ndarray], random: np.random.Generator
) -> list[np.ndarray]:
    actions = []
    for t, mask in zip(spec.types, masks, strict=True):
        if t.discrete:
            actions.append((random.random(mask.shape) * mask).argmax(axis=-1))
        else:
            actions.append(random.uniform(-1, 1, mask.shape).astype(np.float32))
    return actions


def _array(what: str, array: np.ndarray, dtype: type, shape: Sequence[int]) -> None:
    found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
    good = isinstance(array, np.ndarray) and array.dtype == dtype and array.shape == tuple(shape)
    kind = np.dtype(dtype)
    mend = f"`.astype(np.{kind}_)`" if kind == np.bool_ else f"`.astype(np.{kind})`"
    mends = mend if isinstance(array, np.ndarray) and array.shape == tuple(shape) else "compare with the spec's types"
    _expect(good, f"{what} are {kind} {list(shape)}", found, mends)


def _differing(a: TimeStep, b: TimeStep, copies: Sequence[int] | slice = slice(None)) -> str:
    """The first thing in which two time steps differ in these copies, "" if in none."""
    for name in ("observations", "action_masks", "active", "rewards"):
        for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
            if not np.array_equal(x[copies], y[copies]):
                return name
    for name in ("terminated", "truncated"):
        if not np.array_equal(getattr(a, name)[copies], getattr(b, name)[copies]):
            return name
    return ""


def _place(error: SimulatorError) -> str:
    """File and line of what an environment raised, and that it shall not, as the end of a sentence."""
    cause = error.__cause__
    frames = traceback.extract_tb(cause.__traceback__) if cause is not None else []
    if not frames:  # it is another program, whose fault the error names
        return ""
    return f" ({frames[-1].filename}, line {frames[-1].lineno}); an environment raises nothing while it is played"


def _expect(holds: bool, promise: str, found: str = "it is not so", mend: str = "") -> None:
    if not holds:
        how = f"; to mend it: {mend}" if mend else ""
        raise InputError(f"the environment breaks its contract: expected that {promise}; found: {found}{how}")
