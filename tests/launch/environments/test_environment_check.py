"""`bm3il check-environment` finds descriptions that do not fit what is shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from bm3il.actors import simulator
from bm3il.actors.environments.rover_tower import RoverTower
from bm3il.launch.environments.check import check_environment
from bm3il.launch.environments.template.my_town import MyTown
from bm3il.protocol.environment import Environment, Starts, TimeStep
from bm3il.protocol.errors import InputError

Change = Callable[[TimeStep], TimeStep]


class Told(RoverTower):
    """Rover Tower whose time steps are told otherwise."""

    def __init__(self, num_envs: int, change: Change) -> None:
        super().__init__(num_envs, pairs=2)
        self._change = change

    def reset(self, seed: int, starts: object = None) -> TimeStep:
        return self._change(super().reset(seed))

    def step(self, actions: object) -> TimeStep:
        return self._change(super().step(actions))  # type: ignore[arg-type]


def with_column(b: int, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    def changed(step: TimeStep) -> TimeStep:
        columns = [dict(block) for block in step.columns or []]
        columns[b][name] = change(columns[b][name])
        return replace(step, columns=columns)

    return changed


def without(name: str) -> Change:
    def changed(step: TimeStep) -> TimeStep:
        columns = [{key: c for key, c in block.items() if key != name} for block in step.columns or []]
        return replace(step, columns=columns, observations=list(step.observations))

    return changed


def dense_too(step: TimeStep) -> TimeStep:
    return replace(step, observations=list(step.observations), action_masks=list(step.action_masks))


def shown_otherwise(step: TimeStep) -> TimeStep:
    step = dense_too(step)
    step.observations[1][0, 0, -1] += 1
    return step


def masked_otherwise(step: TimeStep) -> TimeStep:
    masks = [mask.copy() for mask in step.action_masks]
    masks[0][0, 0, 1] = False
    return replace(step, action_masks=masks)


@pytest.fixture
def check_made(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], Environment]], int]:
    """Checks what is made with so many copies."""

    def run(made: Callable[[int], Environment]) -> int:
        monkeypatch.setattr(simulator, "make_environment", lambda name, copies: made(copies))
        return check_environment("told")

    return run


@pytest.fixture
def check(check_made: Callable[[Callable[[int], Environment]], int]) -> Callable[[Change], int]:
    return lambda change: check_made(lambda copies: Told(copies, change))


def test_one_that_shows_what_it_describes_passes(check: Callable[[Change], int]) -> None:
    assert check(lambda step: step) == check(dense_too) == 0


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (shown_otherwise, "observations of type 'tower' are what its spec makes of the columns"),
        (masked_otherwise, "action masks of type 'rover' are what its spec makes of the columns"),
        (with_column(0, "codes", lambda codes: codes + np.uint8(9)), "codes in their range"),
        (with_column(1, "own", lambda own: np.full_like(own, np.nan)), "finite numbers"),
        (with_column(1, "own", lambda own: own.astype(np.float64)), "column 'own' of agents like 'tower' are float32"),
        (with_column(0, "codes", lambda codes: codes[..., :1]), "column 'codes' of agents like 'rover' are uint8"),
        (without("codes"), "the columns of agents like 'rover' are"),
        (lambda step: replace(step, columns=None, observations=list(step.observations)), "must hold `columns`"),
    ],
)
def test_one_that_does_not_is_told_so(check: Callable[[Change], int], change: Change, found: str) -> None:
    with pytest.raises(InputError, match=found):
        check(change)


class Faulty(MyTown):
    """A world with one fault, as people make them."""

    def __init__(self, num_envs: int, fault: str) -> None:
        super().__init__(num_envs)
        self._fault, self._episodes, self._drawn = fault, 0, np.random.default_rng(0)

    def reset(self, seed: int, starts: Starts | None = None) -> TimeStep:
        self._episodes += 1
        match self._fault:
            case "no seed":
                seed = int(np.random.default_rng().integers(1 << 30))
            case "one start":
                seed = 0
        now = super().reset(seed)
        if self._fault == "leftover" and self._episodes > 1:
            self._places[0][:] = 0
            now = self._shown()
        return self._spoilt(now)

    def step(self, actions: Sequence[np.ndarray]) -> TimeStep:
        actions = list(actions)
        match self._fault:
            case "raises" if self._steps == 3:
                raise KeyError("walker 4")
            case "actions in place":
                actions[0] -= 1
                actions[0] += 2
            case "ears of the dead":
                actions[0] = np.where(self._asleep(), 2 - actions[0], actions[0])
            case "empty at first" if self._steps == 0:
                actions = [np.zeros_like(action) for action in actions]
            case "over early":  # who has ended waits
                actions = [np.where((self._steps >= self._ends())[:, None], 1, action) for action in actions]
            case "copies mixed":
                actions[0] = (
                    actions[0][self.num_envs // 2][None].repeat(self.num_envs, 0) if self._steps == 2 else actions[0]
                )
            case "global chance":
                self._places[0] += self._drawn.integers(2, size=self._places[0].shape)
        return self._spoilt(super().step(actions))

    def _ends(self) -> np.ndarray:
        """When the episode of each copy is over, one after the other."""
        return 3 + np.arange(self.num_envs)

    def _asleep(self) -> np.ndarray:
        return np.full(self._places[0].shape, False) | (np.arange(self._places[0].shape[1]) == 0)

    def _spoilt(self, now: TimeStep) -> TimeStep:
        match self._fault:
            case "float64":
                now.observations[0] = now.observations[0].astype(np.float64)  # type: ignore[index]
            case "one copy":
                now.observations[1] = now.observations[1][0]  # type: ignore[index]
            case "nan":
                now.observations[0][1, 0, 5] = np.nan
            case "infinite reward" if self._steps == 5:
                now.rewards[1][:] = np.inf
            case "nothing allowed" if self._steps == 2:
                now.action_masks[1][0, 1] = False
            case "masks of numbers":
                now.action_masks[0] = now.action_masks[0].astype(np.float32)  # type: ignore[index]
            case "never ends":
                now.truncated[:] = False
            case "ended at once" if self._steps == 0:
                now.truncated[:] = True
            case "wakes up" if self._steps == 7:
                now.terminated[0] = True
            case "empty at first" if self._steps == 0:
                for seen, masks, active in zip(now.observations, now.action_masks, now.active, strict=True):
                    seen[:], masks[:], active[:] = 0, True, False
            case "ears of the dead":
                now.active[0][self._asleep()] = False
            case "rewards for ever":
                now.terminated[:] = self._steps >= 10
                for active in now.active:
                    active &= self._steps <= 10
                now.rewards[0][:] = 1
            case "active for ever":
                now.terminated[:] = self._steps >= 10
                for reward in now.rewards:
                    reward *= self._steps <= 10
            case "large":
                now.observations[0][:] *= 4000
            case "no reward":
                now.rewards = [reward * 0 for reward in now.rewards]
            case "over early":
                now.terminated[:] = self._steps >= self._ends()
                for active, reward in zip(now.active, now.rewards, strict=True):
                    active &= (self._steps <= self._ends())[:, None]
                    reward *= active
            case "end of time":
                now.terminated, now.truncated = now.truncated, now.terminated
        return now


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("float64", r"observations of type 'walker' are float32 .*found: float64 .*astype\(np.float32\)"),
        ("one copy", r"observations of type 'cart' are float32 \[3, 2, 22\]; found: float32 \[2, 22\]"),
        ("nan", "observations of type 'walker' are finite; found: .nan.; to mend it"),
        ("infinite reward", "rewards of type 'cart' are finite; found: .inf"),
        ("nothing allowed", "every active agent of type 'cart' may do something.*'wait'"),
        ("masks of numbers", "action masks of type 'walker' are bool .*found: float32"),
        ("never ends", "every episode ends within 20 steps; found: 3 of 3 have not; to mend it: set `truncated`"),
        ("ended at once", "no episode has ended after reset"),
        ("wakes up", "an episode that has ended stays ended"),
        ("rewards for ever", "an episode that has ended gives no more rewards"),
        ("active for ever", "the agents of an episode that has ended are inactive"),
        (
            "no seed",
            "the same seed and actions give the same episode; found: other observations after 0 steps.*default_rng",
        ),
        ("leftover", "the same seed and actions give the same episode.*new copies do give the same"),
        ("global chance", "the same seed and actions give the same episode.*new copies do give the same"),
        ("actions in place", "the actions that are given stay as they are"),
        ("ears of the dead", "what inactive agents are told to do changes nothing; found: other observations"),
        ("raises", r"raised KeyError: 'walker 4' \(.*test_environment_check.py, line \d+\)"),
    ],
)
def test_a_fault_is_named_with_how_to_mend_it(
    check_made: Callable[[Callable[[int], Environment]], int], fault: str, told: str
) -> None:
    with pytest.raises(InputError, match=told) as error:
        check_made(lambda copies: Faulty(copies, fault))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fault", "hint"),
    [
        ("", ""),
        ("empty at first", ""),
        ("one start", "two seeds start in the same state"),
        ("copies mixed", "what one copy of the environment does changes others: other observations after 3 steps"),
        ("large", "observations hold numbers up to 4000"),
        ("no reward", "no reward but 0 was seen"),
        ("end of time", "all episodes end at their last step as `terminated`"),
    ],
)
def test_what_is_seldom_meant_is_a_hint(
    check_made: Callable[[Callable[[int], Environment]], int],
    capsys: pytest.CaptureFixture[str],
    fault: str,
    hint: str,
) -> None:
    assert check_made(lambda copies: Faulty(copies, fault)) == 0
    shown = capsys.readouterr().out
    assert "steps/s with one copy" in shown
    hints = [line for line in shown.splitlines() if line.startswith("hint: ")]
    hints = [line for line in hints if "one after the other" not in line]  # how fast it is depends on who else computes
    assert len(hints) == bool(hint)
    assert not hint or hint in hints[0]


def test_it_does_not_play_on_when_all_episodes_have_ended(
    check_made: Callable[[Callable[[int], Environment]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    """However long they might have been: of a million steps it kept all that was shown, five times."""
    made: list[Faulty] = []

    def of_a_million(copies: int) -> Environment:
        made.append(Faulty(copies, "over early"))
        made[-1].spec = replace(made[-1].spec, episode_length=1_000_000)
        return made[-1]

    assert check_made(of_a_million) == 0
    assert "8 steps played, all checks passed" in capsys.readouterr().out
    assert max(environment._steps for environment in made) < 1000
