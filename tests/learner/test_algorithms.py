"""The table of algorithms: what a row forces, and that every row trains on both environments by name."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from bm3il.launch.cli import main
from bm3il.learner.algorithms import ALGORITHMS, algorithm
from bm3il.learner.imitation import build_critic
from bm3il.learner.settings import LearnerSettings
from bm3il.protocol.errors import InputError
from bm3il.protocol.job import Endpoints, Job
from bm3il.protocol.layout import JointRows, Layout
from bm3il.reward_server.settings import RewardSettings
from tests.learner.slow_reference import random_rows, spec_of

TINY = {
    "rover_tower_8": ["--actor.steps-per-iteration", "50", "--steps", "100"],
    "berlin": ["--actor.steps-per-iteration", "100", "--steps", "200"],
}
OPTIONS = {
    "boltzmann": ["--learner.policy", "boltzmann"],
    "state_action": ["--learner.query", "state_action"],
    "clipped": ["--learner.policy", "clipped", "--learner.window-steps", "0"],
}
QUICK = [
    *("--mode", "serial", "--demonstration-episodes", "1", "--seed", "3", "--learner.updates", "2"),
    *("--learner.batch-size", "16", "--reward.batch-size", "16", "--reward.updates", "1", "--cloning.updates", "2"),
    *("--cloning.iterations", "2", "--cloning.batch-size", "16", "--evaluation.episodes", "2"),
    *("--evaluation.final-episodes", "2", "--evaluation.starts", "fresh", "--learner.window-steps", "400"),
    *("--reward.window-steps", "400", "--learner.policy", "actor"),
]


def test_the_released_code_differs_from_the_text() -> None:
    released, text = algorithm("bm3il-released"), algorithm("bm3il")
    assert text.learner_settings(LearnerSettings()).attend_own_type
    assert not released.learner_settings(LearnerSettings()).attend_own_type
    assert text.reward_settings(RewardSettings()).kernel_scope == "function"
    assert released.reward_settings(RewardSettings()).kernel_scope == "tensor"
    assert released.context == text.context


def test_only_bayesian_rows_have_particles() -> None:
    particles = {name: row.reward_settings(RewardSettings(particles=4)).particles for name, row in ALGORITHMS.items()}
    assert {name for name, count in particles.items() if count == 4} == {"bm3il", "bm3il-released", "bayesian-ma-daac"}


def test_a_true_reward_is_not_centred() -> None:
    settings = LearnerSettings(reward_offset=0.7)
    assert algorithm("maac").learner_settings(settings).reward_offset == 0
    assert algorithm("bm3il").learner_settings(settings).reward_offset == 0.7


@pytest.mark.parametrize("name", ["bm3il", "mtmfil", "bm3il-released"])
def test_only_the_mean_of_all_has_the_own_action_in_it(name: str) -> None:
    """In the critics that algorithms get; the released one sees no own type at all."""
    spec = spec_of((2, 3, 4), (2, 3, 4))
    layout = Layout.of(spec, "type")
    job = Job("run", Path(), "toy", spec, "", 0, name, "serial", 3, 10, 1, "type", False, Endpoints("", "", "", ""))
    rows = random_rows(layout, 3, torch.Generator().manual_seed(0), alive=1.0)
    moved = JointRows(rows.observations, [(rows.actions[0] + torch.tensor([1, 0, 0, 0])) % 4], rows.active)
    depends = {}
    for mean_field in ("others", "all"):
        critic = build_critic(job, LearnerSettings(mean_field=mean_field), layout)
        before, after = (layout.blocks[0].rows(critic(r)[0])[:, 0] for r in (rows, moved))
        depends[mean_field] = not torch.allclose(before, after, atol=1e-6)
    assert depends == {"others": False, "all": name != "bm3il-released"}


def test_an_unknown_one_names_the_nearest() -> None:
    with pytest.raises(InputError, match="bm3il"):
        algorithm("bm3li")


@pytest.mark.parametrize("preset", TINY)
@pytest.mark.parametrize("name", [*ALGORITHMS, *OPTIONS])
def test_every_algorithm_trains_by_name(name: str, preset: str, tmp_path: Path) -> None:
    asked = OPTIONS.get(name, ["--algorithm", name])
    place = ["--runs-folder", str(tmp_path), "--run", "tiny"]
    assert main(["train", "--preset", preset, *TINY[preset], *QUICK, *asked, *place]) == 0
    result = json.loads((tmp_path / "tiny" / "result.json").read_text())
    assert result["status"] == "finished"
    with (tmp_path / "tiny" / "curve.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 2
    assert all(value not in ("nan", "inf") for row in rows for value in row.values())


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_trains_with_continuous_actions(name: str, tmp_path: Path) -> None:
    pytest.importorskip("mpe2")
    environment = "pettingzoo:mpe2.simple_spread_v3?arguments=continuous_actions:true,max_cycles:5"
    start = ["train", "--mode", "serial", "--environment", environment, *QUICK, "--runs-folder", str(tmp_path)]
    size = ["--actor.steps-per-iteration", "20", "--steps", "40"]
    expert = ["--algorithm", "maac", "--learner.start", "random", "--run", "expert"]
    assert main([*start, *size, *expert]) == 0
    recorded = str(tmp_path / "recorded.safetensors")
    trained = str(tmp_path / "expert")
    assert main(["demonstrations", "record", "--run", trained, "--episodes", "3", "--output", recorded]) == 0
    assert main([*start, *size, "--algorithm", name, "--demonstrations", recorded, "--run", "tiny"]) == 0
    assert json.loads((tmp_path / "tiny" / "result.json").read_text())["status"] == "finished"


def test_a_boltzmann_policy_needs_discrete_actions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mpe2")
    environment = "pettingzoo:mpe2.simple_spread_v3?arguments=continuous_actions:true"
    asked = [
        "--algorithm",
        "maac",
        "--learner.policy",
        "boltzmann",
        "--learner.start",
        "random",
        "--runs-folder",
        str(tmp_path),
    ]
    assert main(["train", "--mode", "serial", "--environment", environment, *QUICK, *asked]) == 2
    assert "boltzmann needs discrete actions" in capsys.readouterr().err
