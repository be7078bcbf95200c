"""What a run will take is reckoned before it starts, shown, and refused where it is not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("gymnasium")

from bm3il.actors.experts.recording import record
from bm3il.actors.policy import Policy, UniformPolicy
from bm3il.launch import memory
from bm3il.launch.cli import main
from bm3il.launch.config import Config, parse_config
from bm3il.launch.memory import needs
from bm3il.launch.topology import make_job
from bm3il.learner.checkpoint import read_checkpoint
from bm3il.learner.imitation import build_critic, build_value_critic
from bm3il.learner.replay import Replay
from bm3il.protocol.demonstrations import Demonstrations
from bm3il.protocol.job import Endpoints
from bm3il.protocol.layout import Layout
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import EnvironmentSpec
from bm3il.protocol.trajectories import Trajectories
from bm3il.reward_server.held import Held
from bm3il.reward_server.particles import RewardModel

ENVIRONMENT = "pettingzoo:picture_world?arguments=agents:3,side:12,max_cycles:6"
SMALL = ["--learner.window-steps", "60", "--reward.window-steps", "40", "--actor.steps-per-iteration", "24"]
SMALL += ["--evaluation.starts", "fresh", "--evaluation.final-episodes", "2", "--learner.policy", "actor"]

CLIPPED = ["--learner.window-steps", "0"]


@pytest.fixture(autouse=True)
def picture_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "protocol"))


@pytest.fixture
def demonstrations(tmp_path: Path) -> Path:
    environment = make_environment(ENVIRONMENT, 4)
    made = record(environment, UniformPolicy(environment.spec), 4, 0, "a test")
    made.save(tmp_path / "pictures.safetensors")
    return tmp_path / "pictures.safetensors"


def configured(*options: str) -> tuple[Config, EnvironmentSpec]:
    config = parse_config(["--preset", "rover_tower_8", "--environment", ENVIRONMENT, *SMALL, *options]).checked()
    return config, make_environment(config.environment, 1).spec


def bytes_of(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def of_arrays(arrays: Mapping[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in arrays.values())


def of_tensors(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def is_near(reckoned: int, measured: int) -> bool:
    return 0.7 * measured <= reckoned <= 1.3 * measured


@pytest.mark.parametrize("options", [["--parameter-sharing", "agent"], ["--algorithm", "bayesian-ma-daac"]])
@pytest.mark.parametrize("window", ["60", "600"])
def test_what_is_reckoned_is_what_the_arrays_take(demonstrations: Path, options: list[str], window: str) -> None:
    config, spec = configured("--demonstrations", str(demonstrations), *options, "--learner.window-steps", window)
    items = {(item.role, item.what): item.bytes for item in needs(config, spec).items}
    layout = Layout.of(spec, config.parameter_sharing, config.actor.agent_identity)
    job = make_job(config, spec, "", Path(), Endpoints("", "", "", ""))
    replay = Replay(layout, int(window))
    assert is_near(items["learner", "the replay"], of_tensors(replay._columns.values()))
    expert = Demonstrations.load(demonstrations).rows(layout)
    model = RewardModel(layout, expert, config.reward, 0)
    assert is_near(items["reward-server", "the window of agents' rows"], of_tensors(model._memory.rows.tensors()))
    assert is_near(items["reward-server", "the demonstrations"], of_tensors(expert.without_masks().tensors()))
    held = Held(layout, replay.capacity, 0)
    assert is_near(items["reward-server", "the rows that the learner asks for"], of_tensors(held._rows.tensors()))
    particles = of_tensors(layer for layers in model._layers for layer in layers)
    assert is_near(items["reward-server", "particles and their optimiser"], 5 * particles)
    policy = Policy(layout, config.actor.hidden, torch.Generator())
    networks = bytes_of(policy) + bytes_of(build_critic(job, config.learner, layout))
    assert is_near(items["learner", "networks and their optimisers"], 5 * networks)
    assert is_near(items["evaluator", "the policy"], 2 * bytes_of(policy))
    chunk = of_arrays(Trajectories.zeros(spec, 4).arrays)
    assert is_near(items["learner", "the episodes of an iteration"], 2 * chunk)


def test_value_critics_are_smaller(demonstrations: Path) -> None:
    config, spec = configured("--demonstrations", str(demonstrations), "--learner.policy", "clipped", *CLIPPED)
    layout = Layout.of(spec, config.parameter_sharing, config.actor.agent_identity)
    job = make_job(config, spec, "", Path(), Endpoints("", "", "", ""))
    critic = build_value_critic(job, config.learner, layout)
    assert is_near(memory.critic_bytes(layout, config), bytes_of(critic))


def test_pictures_are_trained_on_and_kept_as_bytes(
    tmp_path: Path, demonstrations: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--demonstrations", str(demonstrations), "--mode", "serial", "--steps", "48", "--learner.updates", "1"]
    config, spec = configured(*options)
    where = ["--run", "run", "--runs-folder", str(tmp_path / "runs")]
    assert main(["train", "--preset", "rover_tower_8", "--environment", ENVIRONMENT, *SMALL, *options, *where]) == 0
    needed = needs(config, spec)
    assert needed.line() in capsys.readouterr().out
    (newest,) = sorted((tmp_path / "runs" / "run" / "checkpoints").glob("0*2"))
    checkpoint = read_checkpoint(newest)
    assert checkpoint.learner["replay/0.uint8"].dtype == checkpoint.rewards["memory.0.uint8"].dtype == np.uint8
    assert is_near(needed.checkpoint_bytes, sum(path.stat().st_size for path in newest.iterdir()))


def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--run", "run", "--runs-folder", str(tmp_path / "runs")]
    rewards = ["--algorithm", "maac", "--demonstrations", ""]
    train = ["train", "--preset", "rover_tower_8", "--environment", ENVIRONMENT, *SMALL, *rewards, *where]
    monkeypatch.setattr("bm3il.launch.run.available_memory", lambda: 1 << 30)
    assert main([*train, "--learner.window-steps", "3000000"]) == 2
    said = capsys.readouterr().err
    assert "this run does not fit this machine, which has 1.0 GiB of memory free" in said
    assert "the largest part is the replay of the learner, 4.3 GiB" in said
    assert "make it smaller with --learner.window-steps" in said
    assert main([*train, "--actor.hidden", "100000", "--parameter-sharing", "agent"]) == 2
    assert "--parameter-sharing type" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_checkpoints_that_the_disk_does_not_hold_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100 << 20))
    where = ["--run", "run", "--runs-folder", str(tmp_path / "runs")]
    train = [
        "train",
        "--preset",
        "rover_tower_8",
        "--environment",
        ENVIRONMENT,
        *SMALL,
        "--algorithm",
        "maac",
        "--demonstrations",
        "",
        *where,
    ]
    assert main([*train, "--learner.window-steps", "20000"]) == 2
    said = capsys.readouterr().err
    assert "the 5 checkpoints of this run take up to" in said
    assert "--learner.checkpoints-kept" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("groups", "limits", "least"),
    [
        ("0::/job/step", {"job/memory.max": "7000", "job/step/memory.max": "max"}, 7000),
        ("4:memory:/job\n0::/", {"memory/job/memory.limit_in_bytes": "5000"}, 5000),
        ("0::/job", {"job/memory.max": "7000", "job/memory.current": "3000", "job/memory.stat": ""}, 4000),
        # What files are cached in is given up when it is wanted.
        (
            "0::/job",
            {"job/memory.max": "7", "job/memory.current": "6", "job/memory.stat": "anon 1\ninactive_file 4"},
            5,
        ),
        (
            "4:memory:/job\n0::/",
            {"memory/job/memory.limit_in_bytes": "5000", "memory/job/memory.usage_in_bytes": "1000"},
            4000,
        ),
        ("0::/job", {}, None),
    ],
)
def test_limits_of_control_groups_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, limits: dict[str, str], least: int | None
) -> None:
    (tmp_path / "own").write_text(groups)
    for name, limit in limits.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(limit + "\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")
    free = memory.available_memory()
    assert free == least if least else free > 1 << 20
