"""Games in which one moves after the other, as joint steps."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("pettingzoo.classic")
pytest.importorskip("pygame")

from bm3il.actors.policy import UniformPolicy
from bm3il.actors.rollout import rollout
from bm3il.launch.cli import main
from bm3il.launch.environments.check import check_environment
from bm3il.protocol.environment import TimeStep
from bm3il.protocol.errors import InputError
from bm3il.protocol.registry import make_environment

CONNECT_FOUR = "pettingzoo:pettingzoo.classic.connect_four_v3?episode_length=42"
WAIT = 7
TICTACTOE = "pettingzoo:pettingzoo.classic.tictactoe_v3?episode_length=9"


def moves(now: TimeStep, e: int = 0) -> list[list[int]]:
    """What each of the two players may do."""
    return [np.flatnonzero(mask).tolist() for mask in now.action_masks[0][e]]


@pytest.mark.parametrize("name", [CONNECT_FOUR, TICTACTOE])
def test_they_keep_the_contract(name: str) -> None:
    assert check_environment(name) == 0


def test_one_step_is_one_turn_and_the_others_can_only_wait() -> None:
    environment = make_environment(CONNECT_FOUR, 1)
    now = environment.reset(0)
    assert moves(now) == [[*range(7)], [WAIT]]
    for turn in range(6):  # a column that is full
        assert now.active[0].all()
        now = environment.step([np.array([[3, WAIT] if turn % 2 == 0 else [WAIT, 3]])])
    assert moves(now) == [[0, 1, 2, 4, 5, 6], [WAIT]]
    board = now.observations[0][0, 0].reshape(6, 7, 2)
    assert board[:, 3].tolist() == [[0, 1], [1, 0]] * 3
    np.testing.assert_array_equal(now.observations[0][0, 1].reshape(6, 7, 2), board[:, :, ::-1])


def test_a_game_ends_for_both_and_the_loser_is_told_in_the_winner_s_turn() -> None:
    environment = make_environment(CONNECT_FOUR, 2)
    environment.reset(0)
    for turn in range(7):
        joint = [[0, WAIT] if turn % 2 == 0 else [WAIT, 1]] * 2
        now = environment.step([np.array(joint)])
    assert now.terminated.all()
    assert now.active[0].all()
    assert now.rewards[0].tolist() == [[1, -1]] * 2
    assert not environment.step([np.array(joint)]).active[0].any()


def test_random_games_by_the_masks_never_break_a_rule(recwarn: pytest.WarningsRecorder) -> None:
    environment = make_environment(CONNECT_FOUR, 8)
    played = rollout(environment, UniformPolicy(environment.spec), seed=5)
    assert not [warning for warning in recwarn if "llegal" in str(warning.message)]
    done, lengths = played.actions[0], played.lengths  # [T, E, 2]
    for e, length in enumerate(lengths):
        waits = done[:length, e] == WAIT
        assert waits.sum(axis=1).tolist() == [1] * length
        assert waits[:, 1].tolist() == [turn % 2 == 0 for turn in range(length)]
        assert sorted(np.abs(played.rewards[0][length - 1, e])) in ([1, 1], [0, 0])


def test_cycles_are_turns_of_all() -> None:
    name = "pettingzoo:turn_world?arguments=max_cycles:4"
    assert make_environment(name, 1).spec.episode_length == 8


def test_moves_in_turn_must_be_discrete() -> None:
    with pytest.raises(InputError, match=r"player_0 moves in its turn, so its actions must be discrete, got Box"):
        make_environment("pettingzoo:turn_world?arguments=continuous:true", 1)


def test_masks_of_games_in_infos_are_obeyed() -> None:
    environment = make_environment("pettingzoo:turn_world", 1)
    now = environment.reset(0)
    assert moves(now) == [[1], [2]]
    assert moves(environment.step([np.array([[1, 2]])])) == [[2], [1]]
    assert check_environment("pettingzoo:turn_world") == 0


def test_who_dies_leaves_and_the_others_play_on() -> None:
    environment = make_environment("pettingzoo:turn_world?arguments=players:3,fatal:1", 1)
    now = environment.reset(0)
    assert now.active[0].tolist() == [[True, True, True]]
    now = environment.step([np.array([[1, 2, 2]])])
    assert (now.active[0].tolist(), moves(now)[1:]) == ([[False, True, True]], [[1], [2]])
    now = environment.step([np.array([[0, 1, 2]])])
    assert (now.active[0].tolist(), moves(now)[2]) == ([[False, False, True]], [1])
    now = environment.step([np.array([[0, 0, 1]])])
    assert (now.active[0].tolist(), now.terminated.tolist()) == ([[False, False, True]], [True])


def test_it_trains(tmp_path: Path) -> None:
    tiny = ["--steps", "18", "--actor.steps-per-iteration", "18", "--learner.updates", "1", "--learner.batch-size", "8"]
    few = ["--evaluation.episodes", "2", "--evaluation.final-episodes", "2", "--evaluation.starts", "fresh"]
    place = ["--runs-folder", str(tmp_path), "--run", "four", "--mode", "serial", "--learner.start", "random"]
    assert main(["train", "--environment", TICTACTOE, "--algorithm", "maac", *tiny, *few, *place]) == 0
    result = SimpleNamespace(**json.loads((tmp_path / "four" / "result.json").read_text()))
    assert (result.status, result.environment) == ("finished", TICTACTOE)


@pytest.fixture(autouse=True)
def turn_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
