"""Somebody else's environments, through Gymnasium."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gymnasium")

from bm3il.launch.environments.check import check_environment
from bm3il.protocol.adapters.gymnasium import Gymnasium
from bm3il.protocol.errors import InputError
from bm3il.protocol.observations import forms
from bm3il.protocol.registry import make_environment

SMALL = "gymnasium:small_worlds:Small-v0"


@pytest.fixture(autouse=True)
def small_worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.mark.parametrize(
    "name",
    [
        "gymnasium:CartPole-v1?episode_length=40",
        "gymnasium:Pendulum-v1?episode_length=10",
        "gymnasium:FrozenLake-v1?arguments=is_slippery:false",
        "gymnasium:Taxi-v4?episode_length=20",
        "gymnasium:Blackjack-v1?episode_length=5",
        "gymnasium:MountainCarContinuous-v0?episode_length=10",
        f"{SMALL}?arguments=observed:dict,masked:some",
        f"{SMALL}?arguments=done:lever",
    ],
)
def test_they_keep_the_contract(name: str) -> None:
    assert check_environment(name) == 0
    assert make_environment(name, 1).spec.name == name


def test_it_is_what_gymnasium_plays() -> None:
    import gymnasium

    played, own = make_environment("gymnasium:CartPole-v1", 2), gymnasium.make("CartPole-v1")
    assert isinstance(played, Gymnasium)
    now = played.reset(3)
    seed = played._envs[1].unwrapped.np_random_seed
    seen, _ = own.reset(seed=seed)
    np.testing.assert_array_equal(now.observations[0][1, 0], seen)
    for t in range(500):
        action = t % 2
        now = played.step([np.full((2, 1), action)])
        seen, reward, terminated, truncated, _ = own.step(action)
        np.testing.assert_array_equal(now.observations[0][1, 0], seen)
        assert (now.rewards[0][1, 0], now.terminated[1], now.truncated[1]) == (reward, terminated, truncated)
        if terminated or truncated:
            break
    now = played.step([np.zeros((2, 1), int)])
    assert (now.active[0][1, 0], now.rewards[0][1, 0], now.terminated[1]) == (False, 0, True)
    assert not now.observations[0][1].any()


def test_a_time_limit_truncates_and_an_end_terminates() -> None:
    pendulum = make_environment("gymnasium:Pendulum-v1?episode_length=3", 2)
    pendulum.reset(0)
    for _ in range(3):
        now = pendulum.step([np.zeros((2, 1, 1), np.float32)])
    assert (now.terminated.tolist(), now.truncated.tolist()) == ([False, False], [True, True])
    assert now.active[0].all()
    cart = make_environment("gymnasium:CartPole-v1?episode_length=9", 1)
    cart.reset(0)
    for _ in range(9):
        now = cart.step([np.zeros((1, 1), int)])
    # It falls in the very step that the limit cuts off, or before: that is an end, and not a cut.
    assert (now.terminated.tolist(), now.truncated.tolist()) == ([True], [False])


def test_how_long_an_episode_is_is_read_or_given() -> None:
    lengths = {
        "gymnasium:CartPole-v1": 500,
        "gymnasium:CartPole-v1?arguments=max_episode_steps:70": 70,
        "gymnasium:CartPole-v1?episode_length=30": 30,
        "gymnasium:small_worlds:Endless-v0?episode_length=7": 7,
    }
    assert {name: make_environment(name, 1).spec.episode_length for name in lengths} == lengths


def test_seeds_decide_and_copies_differ() -> None:
    environment = make_environment(SMALL, 2)
    first = np.array(environment.reset(1).observations[0])
    assert (environment.reset(2).observations[0] != first).any()
    np.testing.assert_array_equal(environment.reset(1).observations[0], first)
    assert (first[0] != first[1]).any()


def test_actions_start_where_the_space_does_and_boxes_are_scaled() -> None:
    environment = make_environment(SMALL, 1)
    assert isinstance(environment, Gymnasium)
    environment.reset(0)
    environment.step([np.array([[2]])])
    assert environment._envs[0].unwrapped.told == [7]  # type: ignore[attr-defined]
    levers = make_environment(f"{SMALL}?arguments=done:lever", 1)
    assert isinstance(levers, Gymnasium)
    for given, expected in (([-1, 1], [0, 3]), ([0, 0], [2, 1]), ([9, -9], [4, -1])):
        np.testing.assert_allclose(levers._take(np.array([[given]], np.float32))[0][0], expected)


def test_infos_give_masks() -> None:
    environment = make_environment(f"{SMALL}?arguments=masked:some", 2)
    assert environment.reset(0).action_masks[0].tolist() == [[[True, False, True]]] * 2
    assert environment.step([np.zeros((2, 1), int)]).action_masks[0][0].tolist() == [[True, False, True]]
    nothing = make_environment(f"{SMALL}?arguments=masked:none", 1)
    assert nothing.reset(0).action_masks[0].all(), "which cannot be meant"
    with pytest.raises(InputError, match="expected one action_mask of 3 actions"):
        make_environment(f"{SMALL}?arguments=masked:few", 1).reset(0)
    taxi = make_environment("gymnasium:Taxi-v4", 3).reset(0)
    assert 0 < taxi.action_masks[0].mean() < 1


def test_entries_of_a_dictionary_are_named_parts_in_the_fewest_bytes() -> None:
    environment = make_environment(f"{SMALL}?arguments=observed:dict", 2)
    parts = [(part.name, part.width, part.kind) for part in environment.spec.types[0].parts]
    assert parts == [("level", 3, "uint8"), ("place", 2, "own")]
    environment.reset(0)
    now = environment.step([np.zeros((2, 1), int)])
    assert now.observations[0][:, 0, :3].tolist() == [[0, 1, 0]] * 2
    (lake,) = forms(make_environment("gymnasium:FrozenLake-v1", 1).spec)
    assert lake.table_of(1)["uint8"] == ("uint8", (1, 1, 16))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gymnasium", "name an environment of Gymnasium, as in gymnasium:CartPole-v1"),
        ("gymnasium:CartPoel-v1", "CartPoel.* Did you mean: `CartPole`"),
        ("gymnasium:CartPole-v7", "cannot be made: VersionNotFound"),
        ("gymnasium:no_module:Town-v0", "ModuleNotFoundError.*no_module"),
        ("gymnasium:CartPole-v1?arguments=pole:2", "unexpected keyword argument 'pole'"),
        (f"{SMALL}?arguments=fault:make", "Small-v0 cannot be made: RuntimeError: no such land$"),
        ("gymnasium:CartPole-v1?arguments=pole", "expected NAME:VALUE"),
        ("gymnasium:CartPole-v1?episode_lenght=9", "did you mean episode_length"),
        ("gymnasium:small_worlds:Endless-v0", "give .episode_length="),
        (f"{SMALL}?arguments=observed:words", "must have a fixed number of numbers, got Sequence"),
        (f"{SMALL}?arguments=done:any", "actions must be discrete or a bounded box"),
        (f"{SMALL}?arguments=done:pair", "Small-v0: actions must be discrete or a bounded box, got MultiDiscrete"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_line(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        make_environment(name, 1)
    assert "\n" not in str(raised.value)


def test_start_states_are_refused() -> None:
    with pytest.raises(InputError, match="cannot start from given states"):
        make_environment(SMALL, 1).reset(0, {"places": np.zeros((1, 2))})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_is_drawn_where_the_environment_draws() -> None:
    pytest.importorskip("pygame")
    world = make_environment("gymnasium:CartPole-v1", 2, drawn=True)
    world.reset(0)
    first = world.render()  # type: ignore[attr-defined]
    assert (first.dtype, first.shape) == (np.uint8, (400, 600, 3))
    for _ in range(5):
        world.step([np.ones((2, 1), int)])
    assert (world.render() != first).any()  # type: ignore[attr-defined]
    for undrawn in (make_environment("gymnasium:CartPole-v1", 1), make_environment(SMALL, 1, drawn=True)):
        undrawn.reset(0)
        assert undrawn.render() is None  # type: ignore[attr-defined]


def test_without_the_package_that_draws_there_is_no_picture(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from gymnasium.envs.classic_control import CartPoleEnv
    from gymnasium.error import DependencyNotInstalled

    def lacking(self: CartPoleEnv) -> None:
        raise DependencyNotInstalled('pygame is not installed, run `pip install "gymnasium[classic_control]"`')

    monkeypatch.setattr(CartPoleEnv, "render", lacking)
    world = make_environment("gymnasium:CartPole-v1", 1, drawn=True)
    world.reset(0)
    assert world.render() is None  # type: ignore[attr-defined]
    assert 'pip install "gymnasium[classic_control]"' in caplog.text
