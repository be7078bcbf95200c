from __future__ import annotations

from dataclasses import is_dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from bm3il.launch.config import Config, load_preset, parse_config, preset_names
from bm3il.launch.run import check
from bm3il.launch.whatif.whatif import changed_world
from bm3il.protocol.errors import InputError

CONTINUOUS = "pettingzoo:mpe2.simple_spread_v3?arguments=continuous_actions:true,max_cycles:25"


@pytest.mark.parametrize("name", preset_names())
def test_presets_load_and_pass_their_checks(name: str) -> None:
    config = load_preset(name)
    assert config.preset == name
    if name == "own":
        with pytest.raises(InputError, match="name yours by --environment"):
            config.checked()
        config = replace(config, environment=CONTINUOUS)
        with pytest.raises(InputError, match="name a file by --demonstrations"):
            config.checked()
        config = replace(config, demonstrations="mine.safetensors")
    config.checked()


@pytest.mark.parametrize(
    ("flags", "preset"),
    [
        ([], "rover_tower_8"),
        (["--environment", "rover_tower?pairs=2"], "rover_tower_8"),
        (["--environment=berlin?closed=22"], "berlin"),
        (["--environment", CONTINUOUS], "own"),
        (["--environment", "mine?size=3", "--preset", "rover_tower_4"], "rover_tower_4"),
    ],
)
def test_an_environment_does_not_get_the_settings_of_another_one(flags: list[str], preset: str) -> None:
    config = parse_config(flags)
    assert config.preset == preset
    assert config.demonstrations == load_preset(preset).demonstrations


def test_yaml_round_trips_everything() -> None:
    flags = ["--seed", "7", "--actor.hidden", "32", "16", "--reward.sees", "time", "action"]
    config = parse_config([*flags, "--learner.no-attend-own-type"])
    assert config.actor.hidden == (32, 16)
    assert config.reward.sees == ("time", "action")
    assert not config.learner.attend_own_type
    assert Config.from_yaml(config.to_yaml(), "test") == config


def test_flags_win_over_the_preset() -> None:
    config = parse_config(["--preset", "rover_tower_4", "--steps=5"])
    assert config.environment == "rover_tower?pairs=2"
    assert config.steps == 5


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--preset", "rover_towr_8"], "unknown preset 'rover_towr_8'; did you mean rover_tower_8"),
        (["--sed", "3"], "did you mean --seed"),
        (["--learner.batchsize=3"], "did you mean --learner.batch-size"),
        (["--steps", "8e3"], "--steps: expected a whole number, got '8e3'"),
        (["--learner.clipped.clone-weight", "much"], "--learner.clipped.clone-weight: expected a number, got 'much'"),
        (["--actor.hidden", "64", "x"], "--actor.hidden: expected whole numbers, got ['64', 'x']"),
        (["--mode", "quick"], "'lockstep', 'async', 'serial'"),
        (["--seed"], "Missing value for argument '--seed'"),
        (["stray"], "stray"),
    ],
)
def test_what_cannot_be_understood_is_one_line(args: list[str], expected: str) -> None:
    with pytest.raises(InputError) as error:
        parse_config(args)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert "│" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"algorithm": "bm4il"}, "unknown algorithm 'bm4il'; did you mean bm3il"),
        ({"environment": "rover_tover?pairs=4"}, "unknown environment 'rover_tover'; did you mean rover_tower"),
        ({"steps": 0}, "--steps must be at least 1"),
        ({"demonstrations": ""}, "learns from demonstrations"),
    ],
)
def test_checks_name_what_is_wrong(change: dict[str, object], expected: str) -> None:
    with pytest.raises(InputError) as error:
        replace(load_preset("rover_tower_8"), **change).checked()
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--learner.batch-size", "0"], "--learner.batch-size must be at least 1, got 0"),
        (["--evaluation.interval", "0"], "--evaluation.interval must be at least 1"),
        (["--actor.hidden", "8", "0"], "--actor.hidden must be at least 1"),
        (["--demonstration-episodes", "-1"], "--demonstration-episodes must be at least 0"),
        (["--learner.temperature", "0"], "--learner.temperature must be above 0"),
        (["--learner.temperature", "nan"], "--learner.temperature must be above 0, got nan"),
        (["--learner.discount", "2"], "--learner.discount must be within 0..1"),
        (["--learner.heads", "3"], "--learner.heads must divide --learner.hidden, got 3 and 64"),
    ],
)
def test_numbers_that_no_run_can_use_are_refused_before_it_starts(flags: list[str], expected: str) -> None:
    with pytest.raises(InputError) as error:
        parse_config(flags).checked()
    assert expected in str(error.value)


def test_a_reward_that_cannot_see_what_it_shall_is_refused_before_the_run_starts() -> None:
    config = parse_config(["--preset", "berlin", "--reward.sees", "place.facilty", "time"])
    with pytest.raises(InputError, match=r"did you mean place.facility"):
        check(config)
    check(replace(config, algorithm="expert"))  # the true reward sees for itself


def test_roles_compute_where_they_say_or_where_all_do() -> None:
    flags = ["--device", "cpu", "--threads", "3", "--reward.device", "cuda", "--learner.threads", "2"]
    config = parse_config(flags).checked()
    assert (config.learner.device, config.reward.device) == ("cpu", "cuda")
    roles = ("learner", "reward-server", "actor", "evaluator")
    assert [config.threads_of(role) for role in roles] == [2, 3, 3, 3]
    assert config.checked() == config


def test_a_missing_gpu_is_not_held_against_a_login_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config, _ = check(parse_config(["--reward.device", "cuda", "--nodes", "2"]))
    assert config.reward.device == "cuda"


@pytest.mark.parametrize(
    ("change", "option", "written"),
    [
        ({"algorithm": "bm3il-released"}, "learner.attend_own_type", False),
        ({"algorithm": "bm3il-released"}, "reward.kernel_scope", "tensor"),
        ({"algorithm": "expert"}, "learner.reward_offset", 0.0),
        ({"algorithm": "bc", "mode": "async"}, "mode", "lockstep"),
        ({"mode": "serial"}, "actor.threads", 3),
        ({"mode": "serial"}, "reward.threads", 3),
        ({}, "actor.step_seconds", 2.5),
        ({"environment": CONTINUOUS, "algorithm": "maac", "demonstrations": ""}, "learner.query", "state_action"),
    ],
)
def test_what_is_written_down_is_what_runs(change: dict[str, Any], option: str, written: object) -> None:
    learner = replace(load_preset("rover_tower_8").learner, reward_offset=0.7, threads=3, deadline_seconds=5.0)
    asked = replace(load_preset("rover_tower_8"), **({"learner": learner} | change))
    config, _ = check(asked)
    found = reduce(getattr, option.split("."), config)
    assert found == written != reduce(getattr, option.split("."), asked)
    assert check(config)[0] == config


def test_every_number_has_its_bounds() -> None:
    assert unbounded(Config) == ["learner.reward_offset"]


def unbounded(kind: type, prefix: str = "") -> list[str]:
    """The options of a configuration that are plain numbers."""
    names = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if is_dataclass(hint):
            names += unbounded(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif hint in (int, float, tuple[int, ...]):
            names.append(prefix + name)
    return names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learner: {polcy_learning_rate: 0.1}", "did you mean learner.policy_learning_rate"),
        ("learner: {hidden: 3.5}", "learner.hidden must be int, got 3.5"),
        ("learner: {hidden: true}", "learner.hidden must be int, got True"),
        ("learner: 3", "learner must hold keys and values"),
        ("actor: {hidden: [1, x]}", "actor.hidden must be"),
        ("mode: quick", "mode must be one of lockstep, async, serial"),
        ("- 1", "expected keys and values"),
        ("a: [", "is not YAML"),
        ("!!python/object/apply:os.system [ls]", "is not YAML"),
    ],
)
def test_preset_files_are_checked(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        load_preset(str(file))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_scientific_notation_without_a_dot_is_a_number(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("learner: {policy_learning_rate: 1e-3}\nreward: {prior_stddev: 2}")
    config = load_preset(str(file))
    assert config.learner.policy_learning_rate == 1e-3
    assert config.reward.prior_stddev == 2.0


def test_the_algorithm_decides_particles_and_source() -> None:
    config = load_preset("rover_tower_8")
    assert config.checked().reward.particles == config.reward.particles
    assert replace(config, algorithm="ma-gail").checked().reward.particles == 1
    assert replace(config, algorithm="expert").checked().reward.source == "environment"


@pytest.mark.parametrize(("flags", "actors"), [([], 1), (["--nodes", "8"], 8), (["--nodes", "8", "--actors", "3"], 3)])
def test_every_node_has_an_actor_unless_told_otherwise(flags: list[str], actors: int) -> None:
    assert parse_config(flags).checked().actors == actors


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--learner.policy", "clipped", "--learner.window-steps", "500"], "fresh rows alone: leave out"),
        (["--learner.policy", "clipped", "--learner.cloning-weight", "1"], "--learner.clipped.clone-weight"),
        (["--learner.clipped.clone-weight", "0.1"], "add --learner.start cloned"),
        (["--algorithm", "expert", "--demonstrations", "", "--learner.start", "cloned"], "name a file by"),
        (["--learner.clipped.clip", "0"], "--learner.clipped.clip must be above 0"),
        (["--learner.policy", "clipt"], "'clipped'"),
    ],
)
def test_clipped_updates_and_the_clone_need_what_they_need(flags: list[str], expected: str) -> None:
    with pytest.raises(InputError) as error:
        parse_config(flags).checked()
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "weight"),
    [
        ([], 0.3),
        (["--environment", "rover_tower?pairs=4&slip=0.1"], 0.0),
        (["--learner.start", "random"], 0.0),
        (["--algorithm", "maac"], 0.0),
        (["--learner.clipped.clone-weight", "0"], 0.0),
        (["--learner.clipped.clone-weight", "0.1", "--environment", "rover_tower?pairs=4&slip=0.1"], 0.1),
    ],
)
def test_imitation_is_held_near_the_clone_in_the_world_that_it_knows(flags: list[str], weight: float) -> None:
    usual = ["--preset", "own", "--demonstrations", "rover_tower_8", "--environment", "rover_tower?pairs=4"]
    config, _ = check(parse_config([*usual, *flags]))
    assert config.learner.clipped.clone_weight == weight


@pytest.mark.parametrize("name", ["berlin_slip", "berlin_closed"])
def test_presets_of_changed_worlds_hold_the_recipe_of_whatif(name: str) -> None:
    preset = load_preset(name)
    town = replace(load_preset("berlin"), cloning=preset.cloning, evaluation=preset.evaluation)
    asked = changed_world(town, preset.environment, seed=preset.seed, steps=preset.steps)
    learner, reward = preset.learner, preset.reward
    assert replace(asked.learner, checkpoint_interval=0, batch_size=0, temperature=1, final_temperature=1) == replace(
        learner, checkpoint_interval=0, batch_size=0, temperature=1, final_temperature=1, temperature_anneal=1.0
    )
    assert asked.actor == preset.actor
    assert asked.reward == reward
