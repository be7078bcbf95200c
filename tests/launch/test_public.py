"""`import bm3il`, as in a notebook."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bm3il
from bm3il.actors.policy import UniformPolicy
from bm3il.launch.locks import locked
from bm3il.protocol.files import write_atomically

README = Path(__file__).parents[2] / "README.md"
TINY: dict[str, Any] = {
    "mode": "serial",
    "actor__steps_per_iteration": 50,
    "learner__policy": "actor",
    "learner__updates": 1,
    "learner__batch_size": 16,
    "reward__updates": 1,
    "reward__batch_size": 16,
    "evaluation__starts": "fresh",
    "evaluation__episodes": 2,
    "evaluation__final_episodes": 2,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def rovers(runs: Path) -> bm3il.Run:
    return bm3il.train("rover_tower_4", steps=100, run="rovers", runs_folder=runs, **TINY)


@pytest.fixture(scope="module")
def commuters(runs: Path) -> bm3il.Run:
    """Their environment says what observations are made of."""
    tiny = TINY | {"actor__steps_per_iteration": 180, "learner__start": "random", "demonstration_episodes": 1}
    return bm3il.train("berlin", steps=180, run="commuters", runs_folder=runs, **tiny)


def test_a_run_is_trained_and_found_again(rovers: bm3il.Run) -> None:
    again = bm3il.load(rovers.folder)
    assert again.policy.sha256() == rovers.policy.sha256() == rovers.result["policy_sha256"]
    assert [t.name for t in rovers.spec.types] == ["rover", "tower"]
    assert rovers.curve[-1]["iteration"] == rovers.result["iterations"] == 2


def test_a_run_that_goes_on_has_no_result_yet(rovers: bm3il.Run) -> None:
    with locked(rovers.folder):
        assert rovers.result == {}
    assert rovers.result["status"] == "finished"


@pytest.mark.parametrize("name", ["rovers", "commuters"])
def test_agents_act_on_plain_arrays_as_in_their_environment(name: str, request: pytest.FixtureRequest) -> None:
    run: bm3il.Run = request.getfixturevalue(name)
    environment = bm3il.make_environment(run.trained.config.environment, 3)
    now = environment.reset(7)
    names = [t.name for t in run.spec.types]
    seen, masks = dict(zip(names, now.observations, strict=True)), dict(zip(names, now.action_masks, strict=True))
    wanted = run.policy.act(now, torch.Generator().manual_seed(5), greedy=False)
    found = run.act(seen, masks, greedy=False, seed=5)
    for kind, actions in zip(names, wanted, strict=True):
        np.testing.assert_array_equal(found[kind], actions)
    one = run.act({k: v[0] for k, v in seen.items()}, {k: v[0] for k, v in masks.items()})
    greedy = run.act(seen, masks)
    for kind in names:
        np.testing.assert_array_equal(one[kind], greedy[kind][0])


@pytest.mark.parametrize("name", ["rovers", "commuters"])
def test_the_reward_is_that_of_the_particles(name: str, request: pytest.FixtureRequest) -> None:
    run: bm3il.Run = request.getfixturevalue(name)
    played = bm3il.rollout(run.trained.config.environment, run.policy, episodes=1)
    rows = played.rows(run.policy.layout)
    names = [t.name for t in run.spec.types]
    observations, actions, active = (
        dict(zip(names, part, strict=True)) for part in (played.observations, played.actions, played.active)
    )
    found = run.reward(observations, actions)
    wanted, deviations = run._rewards.query(rows, deviation=True)
    assert deviations is not None
    by_type = (run.spec.by_type([v.numpy() for v in part], axis=1) for part in (wanted, deviations))
    for kind, mean, deviation in zip(names, *by_type, strict=True):
        np.testing.assert_allclose(found[kind][0] * active[kind], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[kind][1] * active[kind], deviation, rtol=1e-4, atol=1e-6)
    assert max(float(deviation.max()) for _, deviation in found.values()) > 0


def test_arrays_that_fit_nothing_are_refused(rovers: bm3il.Run) -> None:
    rover, tower = rovers.spec.types
    good = {t.name: np.zeros((t.count, t.observation_dim), np.float32) for t in (rover, tower)}
    actions = {t.name: np.zeros(t.count, np.int64) for t in (rover, tower)}
    rovers.reward(good, actions)
    with pytest.raises(bm3il.InputError, match=r"observations: expected the types rover, tower, got rover$"):
        rovers.act({"rover": good["rover"]})
    with pytest.raises(
        bm3il.InputError, match=rf"of 'tower': expected the shape \({tower.count}, {tower.observation_dim}\)"
    ):
        rovers.act(good | {"tower": good["tower"][:, 1:]})
    with pytest.raises(bm3il.InputError, match=r"actions of 'rover': expected integers from 0 to 4, got 5"):
        rovers.reward(good, actions | {"rover": actions["rover"] + 5})
    for value in (0.5, np.nan, np.inf):
        with pytest.raises(bm3il.InputError, match=rf"'rover': expected integers from 0 to 4, got {value}$"):
            rovers.reward(good, actions | {"rover": np.full(rover.count, value)})
    with pytest.raises(bm3il.InputError, match=r"actions of 'tower': expected numbers, got <U4$"):
        rovers.reward(good, actions | {"tower": np.full(tower.count, "left")})
    whole = rovers.reward(good, {name: chosen.astype(np.float32) for name, chosen in actions.items()})
    np.testing.assert_array_equal(whole["rover"], rovers.reward(good, actions)["rover"])


def test_batches_that_do_not_fit_each_other_are_refused(rovers: bm3il.Run) -> None:
    def of(rows: tuple[int, ...], dim: str = "", dtype: Any = np.float32) -> dict[str, np.ndarray]:
        widths = {t.name: (getattr(t, dim),) if dim else () for t in rovers.spec.types}
        return {t.name: np.full((*rows, t.count, *widths[t.name]), dtype is bool, dtype) for t in rovers.spec.types}

    for seen, done in (((5,), ()), ((), (5,)), ((), (1,)), ((5,), (3,)), ((5,), (1,))):
        shape = re.escape(str((*seen, 2)))
        with pytest.raises(bm3il.InputError, match=rf"actions of 'rover': expected the shape {shape}, got"):
            rovers.reward(of(seen, "observation_dim"), of(done, dtype=np.int64))
        with pytest.raises(bm3il.InputError, match="action masks of 'rover': expected the shape"):
            rovers.act(of(seen, "observation_dim"), of(done, "action_dim", bool))
    assert rovers.reward(of((5,), "observation_dim"), of((5,), dtype=np.int64))["rover"][0].shape == (5, 2)
    assert rovers.act(of((), "observation_dim"), of((), "action_dim", bool))["rover"].shape == (2,)
    with pytest.raises(bm3il.InputError, match=r"masks of 'tower': expected true and false, .* got 0\.5"):
        rovers.act(of((), "observation_dim"), of((), "action_dim") | {"tower": np.full((2, 5), 0.5)})


def test_an_observation_that_a_world_cannot_show_is_refused(commuters: bm3il.Run) -> None:
    seen = {t.name: np.full((t.count, t.observation_dim), 0.3, np.float32) for t in commuters.spec.types}
    with pytest.raises(bm3il.InputError, match=r"no agent of 'berlin.*observes that"):
        commuters.act(seen)


def test_returns_are_told_of_each_type(rovers: bm3il.Run) -> None:
    found = bm3il.evaluate(rovers, episodes=4)
    assert set(found) == {"all", "rover", "tower"}
    counts = [t.count for t in rovers.spec.types]
    mean = np.average([found["rover"].mean, found["tower"].mean], weights=counts)
    assert found["all"].mean == pytest.approx(mean, rel=1e-5)
    with pytest.raises(bm3il.InputError, match="episodes must be at least 1, got 0"):
        bm3il.evaluate(rovers, episodes=0)
    slipping = bm3il.evaluate(rovers, "rover_tower?pairs=2&slip=0.5", episodes=4)
    assert slipping["all"].mean != found["all"].mean


def test_episodes_are_kept_as_demonstrations(rovers: bm3il.Run, tmp_path: Path) -> None:
    played = bm3il.rollout("rover_tower?pairs=2", UniformPolicy(rovers.spec), episodes=3, seed=1)
    played.save(tmp_path / "played.safetensors")
    again = bm3il.Demonstrations.load(tmp_path / "played.safetensors")
    assert (again.num_episodes, again.origin) == (3, "played")


def test_a_run_without_a_learned_reward_says_so(runs: Path) -> None:
    clone = bm3il.train("rover_tower_4", algorithm="bc", run="clone", runs_folder=runs, cloning__iterations=1, **TINY)
    seen = {t.name: np.zeros((t.count, t.observation_dim)) for t in clone.spec.types}
    actions = {t.name: np.zeros(t.count, np.int64) for t in clone.spec.types}
    with pytest.raises(bm3il.InputError, match="no learned reward: its algorithm is 'bc'"):
        clone.reward(seen, actions)


def test_what_is_misspelt_is_named(runs: Path) -> None:
    with pytest.raises(bm3il.InputError, match="steps"):
        bm3il.train("rover_tower_4", stepps=100, runs_folder=runs)
    with pytest.raises(bm3il.InputError, match=r"unknown option 'learner__hiden='; did you mean learner__hidden="):
        bm3il.train("rover_tower_4", learner__hiden=8, runs_folder=runs)
    with pytest.raises(AttributeError, match="it has Demonstrations"):
        bm3il.lode  # noqa: B018


def test_errors_speak_python(runs: Path, rovers: bm3il.Run) -> None:
    with pytest.raises(bm3il.InputError, match=r"rovers exists; bm3il\.load\('.*'\) is .*, or take another run=$"):
        bm3il.train("rover_tower_4", run="rovers", runs_folder=runs, **TINY)
    with pytest.raises(bm3il.InputError, match=r"leave out learner__window_steps= 9, or take learner__policy= actor"):
        bm3il.train("rover_tower_4", learner__window_steps=9, runs_folder=runs)


def test_the_package_is_small_and_its_names_are_there() -> None:
    assert all(getattr(bm3il, name) is not None for name in bm3il.__all__)
    code = "import sys, bm3il; print('torch' in sys.modules, dir(bm3il) == bm3il.__all__)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["False", "True"]


def test_the_folder_of_something_else_is_no_run(tmp_path: Path) -> None:
    write_atomically(tmp_path / "notes.txt", "none")
    with pytest.raises(bm3il.InputError, match="is not the folder of a run"):
        bm3il.load(tmp_path)


def test_the_notebook_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(import bm3il\n.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shorter = "cloning__iterations=1, evaluation__final_episodes=2, evaluation__episodes=2"
    assert "steps=10_000" in code
    told: dict[str, Any] = {}
    exec(code.replace("steps=10_000", f"steps=900, {shorter}"), told)
    assert told["mean"].shape == (1, 2)
    assert Path("played.safetensors").exists()
