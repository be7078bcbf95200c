"""From one world to a changed one, through the commands: training on old demonstrations, evaluating an old policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.config import parse_config
from launch.run import check
from protocol.demonstrations import Demonstrations, resolve
from protocol.errors import InputError

BERLIN = "berlin?scenario=berlin46&types=10&agents=50&sight=near"
CROWD = f"{BERLIN}&demand=1.2"


def train(folder: Path, *args: str) -> dict[str, Any]:
    """The result of a tiny run with the name `run`."""
    tiny = ["--cloning.iterations", "1", "--evaluation.episodes", "1", "--evaluation.final-episodes", "2"]
    where = ["--mode", "serial", "--runs-folder", str(folder), "--run", "run"]
    assert main(["train", *tiny, *where, *args]) == 0
    return json.loads((folder / "run" / "result.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with one of the demonstrated days."""
    path = tmp_path_factory.mktemp("day") / "day.safetensors"
    Demonstrations.load(resolve("berlin46")).select(1, seed=0).save(path)
    return str(path)


def berlin(day: str, *args: str) -> list[str]:
    return ["--preset", "berlin", "--demonstrations", day, *args]


@pytest.mark.parametrize("apart", [["--parameter-sharing", "agent"], ["--actor.agent-identity"]])
def test_agents_with_parameters_of_their_own_are_as_many_as_recorded(day: str, apart: list[str]) -> None:
    config = parse_config(berlin(day, "--environment", CROWD))
    assert check(config) == config.checked()
    with pytest.raises(InputError, match="expected count 10, found 8; take --parameter-sharing type") as raised:
        check(parse_config(berlin(day, "--environment", CROWD, *apart)))
    assert BERLIN in str(raised.value)
    check(parse_config(berlin(day, "--environment", f"{BERLIN}&closed=22&slip=0.1", *apart)))


def test_demonstrations_of_a_smaller_crowd_train_a_larger_one(day: str, tmp_path: Path) -> None:
    result = train(tmp_path, *berlin(day, "--algorithm", "bc", "--environment", CROWD))
    assert (result["status"], result["environment"]) == ("finished", CROWD)


def test_a_reward_learned_from_a_smaller_crowd_judges_a_larger_one(day: str, tmp_path: Path) -> None:
    few = ["--steps", "100", "--learner.updates", "1", "--learner.batch-size", "8", "--reward.batch-size", "8"]
    result = train(tmp_path, *berlin(day, "--environment", CROWD, *few))
    assert (result["status"], result["env_steps"]) == ("finished", 1000)
