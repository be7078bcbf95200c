"""Environments of PettingZoo's kind that are odd: each works, or is refused in one line that says why."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("mpe2")

from bm3il.launch.cli import main
from bm3il.launch.environments.check import check_environment
from bm3il.protocol.environment import Environment
from bm3il.protocol.errors import InputError, SimulatorError
from bm3il.protocol.registry import make_environment

WHOLE, HALF = 8, 3


@pytest.fixture(autouse=True)
def worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))


def odd(quirk: str, more: str = "") -> str:
    return f"pettingzoo:odd_world?arguments=quirk:{quirk}{more}"


def history(environment: Environment, action: int = 1) -> Iterator[tuple[list[bool], str]]:
    """Who is active after each step, of the first copy, and whether the episode has ended."""
    environment.reset(0)
    for _ in range(environment.spec.episode_length):
        joint = [np.full((environment.num_envs, t.count), action) for t in environment.spec.types]
        now = environment.step(joint)
        ended = "terminated" * bool(now.terminated[0]) + "truncated" * bool(now.truncated[0])
        yield [bool(flag) for active in now.active for flag in active[0]], ended
        if ended:
            return


@pytest.mark.parametrize(
    "quirk",
    [
        "",
        "relay",
        "nobody at first",
        "masks in infos",
        "wrapped",
        "numbers",
        "silent",
        "few keys",
        "no last words",
        "mixed end",
        "dies and stays",
        "old reset",
    ],
)
def test_these_keep_the_contract(quirk: str) -> None:
    assert check_environment(odd(quirk)) == 0


def test_an_episode_goes_on_with_those_who_appear_when_the_last_others_end() -> None:
    steps = list(history(make_environment(odd("relay"), 1)))
    assert steps[HALF - 2 : HALF] == [([True, True, False], ""), ([False, False, True], "")]
    assert (len(steps), steps[-1]) == (WHOLE, ([False, False, True], "truncated"))


def test_an_episode_does_not_end_before_anybody_was_there() -> None:
    steps = list(history(make_environment(odd("nobody at first"), 1)))
    assert [any(active) for active, _ in steps] == [False] * (HALF - 1) + [True] * (WHOLE - HALF + 1)
    assert steps[-1][1] == "truncated"


def test_where_some_terminate_and_others_are_cut_off_these_alone_are_left() -> None:
    assert list(history(make_environment(odd("mixed end"), 1)))[-1] == ([False, True, True], "truncated")


def test_the_dead_who_stay_among_the_agents_are_inactive() -> None:
    active = [active for active, _ in history(make_environment(odd("dies and stays"), 1))]
    assert active[HALF - 2 : HALF + 1] == [[True] * 3, [False, True, True], [False, True, True]]


def test_masks_in_infos_are_obeyed() -> None:
    environment = make_environment(odd("masks in infos"), 2)
    now = environment.reset(0)
    assert [mask.tolist() for mask in now.action_masks] == [
        [[[False, True, True]] * 2] * 2,
        [[[False, True, True]]] * 2,
    ]
    assert environment.step([np.ones((2, 2), int), np.ones((2, 1), int)]).action_masks[0][0].tolist() == [[0, 1, 1]] * 2


def test_all_that_is_beside_a_mask_is_observed() -> None:
    spec = make_environment(odd("wrapped"), 1).spec
    assert [(part.name, part.width) for part in spec.types[0].parts] == [("what", 3), ("where", 2)]


def test_agents_named_by_numbers_are_of_one_type_or_of_those_given() -> None:
    assert [(t.name, t.count) for t in make_environment(odd("numbers"), 1).spec.types] == [("agent", 3)]
    given = make_environment(odd("numbers", "&types=0+2,1"), 1).spec
    assert [(t.name, t.count) for t in given.types] == [("type0", 2), ("1", 1)]


def test_a_reward_of_which_nothing_is_said_is_none() -> None:
    environment = make_environment(odd("few keys"), 1)
    environment.reset(0)
    assert environment.step([np.full((1, 2), 2), np.full((1, 1), 2)]).rewards[0].tolist() == [[2, 0]]


@pytest.mark.parametrize(
    ("name", "length"),
    [
        (odd("", ",max_cycles:5"), 5),  # the environment itself says 8
        (odd("", ",max_cycles:5&episode_length=4"), 4),
        (odd("endless", "&episode_length=6"), 6),
        ("pettingzoo:mpe2.simple_spread_v3?arguments=max_cycles:7", 7),
    ],
)
def test_the_length_that_is_given_is_the_episode_s(name: str, length: int) -> None:
    environment = make_environment(name, 1)
    assert environment.spec.episode_length == length
    steps = list(history(environment))
    assert (len(steps), steps[-1][1]) == (length, "truncated")
    assert check_environment(name) == 0


@pytest.mark.parametrize(
    ("quirk", "message"),
    [
        ("stranger", r"agent cat_0 is not announced in possible_agents \(ant_0, ant_1, bee_0\)"),
        ("grows", r"ant_0 observes an array of shape \(4,\), which is not of its space Box"),
        ("shrinks", r"ant_0 observes an array of shape \(1,\), which is not of its space Box"),
        ("words", r"ant_0 observes .*north.*, which is not of its space Box"),
        ("dictionary", "ant_0 observes {'where': .*}, expected a dictionary of what, where"),
        ("unseen", "ant_1 lives and observes nothing in step 3"),
        ("narrow mask", "ant_0: expected a mask of 3 actions, got one of 2"),
        ("old step", "step must return .* got 4 things, as of an older API"),
        ("unseeded", r"is of an older API: expected reset\(seed=None, options=None\), got reset\(\)"),
        ("no licence", "cannot be made with arguments quirk:no licence: RuntimeError: no licence for this simulator"),
        ("hidden need", "needs 'ancient', which is not installed"),
        ("no space", "tells no observation_space of ant_1: KeyError"),
        ("graph", "ant_0: observations must have a fixed number of numbers, got Sequence"),
        ("endless", r"does not tell how long an episode is: give \?episode_length="),
        ("remembers", r"other .* after .* steps.*new copies do give the same, and \?anew=true"),
        ("heedless", "the same seed and actions give the same episode; found: other .*default_rng"),
    ],
)
def test_others_are_one_line(quirk: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-environment", odd(quirk)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert quirk in ("remembers", "heedless") or "pettingzoo:odd_world" in error


def test_one_that_remembers_can_be_made_anew_for_every_episode() -> None:
    name = odd("remembers", "&anew=true")
    assert check_environment(name) == 0
    assert make_environment(name, 1).spec.name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mpe2.simple_spraed_v3", "unknown module of mpe2 'simple_spraed_v3'; did you mean simple_spread_v3"),
        ("mpe2.simple_spread_v2", "is not in what is installed, which has mpe2.simple_spread_v3"),
        ("mpe22.simple_spread_v3", "no module 'mpe22' is installed; did you mean mpe2?"),
        ("somebodys_world", "no module 'somebodys_world' is installed: install the package that has it"),
        ("mpe2.simple_spread_v3.parallel_env", "'mpe2.simple_spread_v3' is a module, and holds no module"),
        ("pettingzoo.mpe.simple_spread_v3", "cannot be imported: ImportError: MPE has been moved.*pip install mpe2"),
        ("needs_physics", "needs 'box_of_physics', which is not installed: install the package that has it"),
        ("needs_ours.world", r"needs 'gymnasium.old', which is not installed: pip install 'bm3il\[pettingzoo\]'"),
        ("half_written", "cannot be imported: SyntaxError"),
    ],
)
def test_an_import_that_fails_says_what_is_wrong(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "needs_physics.py").write_text("import box_of_physics", encoding="utf-8")
    (tmp_path / "half_written.py").write_text("def parallel_env(:", encoding="utf-8")
    (tmp_path / "needs_ours").mkdir()
    (tmp_path / "needs_ours" / "world.py").write_text("import gymnasium.old", encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        make_environment(f"pettingzoo:{name}", 1)
    assert "\n" not in str(caught.value)


def test_what_a_family_of_pettingzoo_needs_is_an_extra_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "Box2D", None)
    monkeypatch.setattr("importlib.import_module", lambda _: __import__("Box2D"))
    with pytest.raises(InputError, match=r"needs 'Box2D', which is not installed: pip install 'pettingzoo\[sisl\]'"):
        make_environment("pettingzoo:pettingzoo.sisl.multiwalker_v9", 1)


@pytest.mark.parametrize("missing", ["pettingzoo", "mpe2", "gymnasium"])
def test_who_has_no_pettingzoo_is_told_to_install_it(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.import_module

    def absent(name: str) -> ModuleType:
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named '{missing}'", name=missing)
        return there(name)

    monkeypatch.setattr("importlib.import_module", absent)
    target = {"gymnasium": "odd_world", "mpe2": "mpe2.simple_v3"}.get(missing, "pettingzoo.classic.connect_four_v3")
    with pytest.raises(InputError, match=rf"no module '{missing}' is installed: pip install 'bm3il\[pettingzoo\]'"):
        make_environment(f"pettingzoo:{target}", 1)


def test_what_may_pass_is_left_to_whoever_tries_again() -> None:
    """As a failure of the environment, after which an actor is started again."""
    with pytest.raises(SimulatorError, match=r"environment 'pettingzoo:odd_world.*' raised TimeoutError: no answer"):
        make_environment(odd("no answer"), 1)
