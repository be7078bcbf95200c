"""Exported files say what policy and reward say, to whoever computes with them."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import bm3il
from bm3il.actors import gaussian
from bm3il.actors.policy import Policy
from bm3il.launch.cli import main
from bm3il.launch.config import load_preset, preset_names
from bm3il.launch.learned import export
from bm3il.launch.learned.export import Format
from bm3il.learner.algorithms import algorithm
from bm3il.protocol.layout import JointRows, Layout
from bm3il.protocol.observations import Form, Observations
from bm3il.protocol.registry import make_environment
from bm3il.protocol.specs import EnvironmentSpec, ParameterSharing, Part, TypeSpec
from bm3il.reward_server.particles import RewardModel
from bm3il.reward_server.settings import RewardSettings
from tests.launch.test_cli import fails
from tests.launch.test_public import TINY

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

ROWS, ROWS_AT_ONCE = 10_000, 20_000
"""Of agents, those of all types together."""
TOLERANCE = 1e-6
"""Of probabilities; of all other numbers, and of themselves where they are above 1."""
FORMATS: list[Format] = ["onnx", "torchscript"]
FACTS = {"name": "a run", "algorithm": "bm3il", "iteration": 7}
PARTS = (Part("goal", 3, "code"), Part("load", 5, "shared", masked=True), Part("speed", 1), Part("far", 2, "uint8"))
UNEVEN = EnvironmentSpec(
    "uneven",
    (
        TypeSpec("walker", 3, 4, 5),
        TypeSpec("diver", 1, 11, 5, parts=PARTS, purpose=("goal",)),
        TypeSpec("rider", 2, 4, 5),
        TypeSpec("flyer", 2, 3, 2, discrete=False),
    ),
    10,
)

Arrays = dict[str, np.ndarray]
Call = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> bm3il.Run:
    return bm3il.train("rover_tower_4", steps=50, run="rovers", runs_folder=tmp_path_factory.mktemp("runs"), **TINY)


def drawn(
    spec: EnvironmentSpec,
    settings: RewardSettings,
    sharing: ParameterSharing = "type",
    identity: bool = False,
    hidden: tuple[int, ...] = (64, 64),
) -> tuple[Policy, RewardModel]:
    """Networks as they are before the first update, but with policies that have preferences."""
    layout = Layout.of(spec, sharing, identity)
    policy = Policy(layout, hidden, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for networks in policy.networks:
            networks.weights[-1].mul_(8)
    return policy, RewardModel(layout, random_rows(layout, 1, 0), settings, seed=2)


def random_rows(layout: Layout, count: int, seed: int) -> JointRows:
    """Whatever columns may hold; some agents are inactive, some may do nothing at all."""
    random = np.random.default_rng(seed)
    actions = []
    for block in layout.blocks:
        shape = (count, block.num_agents)
        chosen = random.integers(block.action_dim, size=shape)
        actions.append(torch.tensor(chosen if block.discrete else random.uniform(-1, 1, (*shape, block.action_dim))))
    active = [torch.tensor(random.random((count, block.num_agents)) < 0.8) for block in layout.blocks]
    seen = [random_columns(block.form, count, random) for block in layout.blocks]
    return JointRows(seen, [a.float() if a.is_floating_point() else a for a in actions], active)


def random_columns(form: Form, count: int, random: np.random.Generator) -> Observations:
    columns: Arrays = {}
    for name, (dtype, shape) in form.table_of(count).items():
        if name == "masks":
            columns[name] = (random.random(shape) < 0.6) & (random.random(shape[:-1]) < 0.9)[..., None]
        elif name == "codes":
            columns[name] = random.integers(np.array(form.code_sizes) + 1, size=shape).astype(dtype)
        elif np.dtype(dtype).kind in "iu":
            columns[name] = random.integers(3, size=shape).astype(dtype)
        else:
            columns[name] = random.standard_normal(shape, np.float32)
    return Observations.of_arrays(form, columns)


def wanted(policy: Policy, rows: JointRows) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each type the outputs of its policy, as actors compute them."""
    found = []
    for b, (block, seen) in enumerate(zip(policy.layout.blocks, rows.observations, strict=True)):
        grid = block.see(seen)
        with torch.no_grad():
            if block.discrete:
                logits, options = policy.logits(b, grid)
                options = options.map(block.joint)
                near = block.joint(logits).log_softmax(-1)
                actions = (
                    torch.arange(block.action_dim).expand(near.shape) if options.actions is None else options.actions
                )
                chances = torch.zeros(len(rows), block.num_agents, block.action_dim).scatter_(-1, actions, near.exp())
                found.append((torch.full_like(chances, -1e9).scatter_(-1, actions, near), chances))
            else:
                output = block.rows(policy.outputs(b, grid))
                mean, log_std = output.chunk(2, -1)
                found.append((mean, log_std.clamp(*gaussian.LOG_STD_RANGE).exp()))
    pairs = (policy.layout.spec.by_type([pair[k] for pair in found], axis=1) for k in range(2))
    return list(zip(*pairs, strict=True))


def written(folder: Path, form: Format, policy: Policy, model: RewardModel | None) -> dict[str, Any]:
    export.write(folder, form, policy, model, FACTS)
    told: dict[str, Any] = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    return told


def loaded(folder: Path, form: Format, function: dict[str, Any]) -> Call:
    if form == "torchscript":
        module = torch.jit.load(str(folder / function["file"]))
        return lambda feed: [part.numpy() for part in module(*(torch.tensor(array) for array in feed.values()))]
    session = session_of(folder / function["file"])
    return lambda feed: session.run(None, dict(feed))


def session_of(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options)


def assert_close(found: np.ndarray, expected: torch.Tensor, relative: bool = True) -> None:
    expected_array = expected.numpy()
    scale = np.maximum(1, np.abs(expected_array)) if relative else 1
    assert found.dtype == np.float32
    assert float((np.abs(found - expected_array) / scale).max()) <= TOLERANCE


def compare(folder: Path, form: Format, policy: Policy, model: RewardModel, told: dict[str, Any], count: int) -> None:
    """On so many random rows of agents at least."""
    layout, spec = policy.layout, policy.layout.spec
    calls = [[loaded(folder, form, kind[what]) for what in ("policy", "reward")] for kind in told["types"]]
    most = max(1, ROWS_AT_ONCE // spec.num_agents)
    left, seed = -(-count // spec.num_agents), 0
    while left > 0:
        rows, seed = random_rows(layout, min(left, most), seed), seed + 1
        left -= len(rows)
        by_type = [
            spec.by_type(part, axis=1)
            for part in (
                [seen.dense() for seen in rows.observations],
                [seen.masks() for seen in rows.observations],
                rows.actions,
                rows.active,
            )
        ]
        answers = model.query(rows, deviation=True)
        assert answers[1] is not None
        expected = zip(wanted(policy, rows), *(spec.by_type(part, axis=1) for part in answers), strict=True)
        for kind, (act, judge), of_type, (outputs, *judged) in zip(
            spec.types, calls, zip(*by_type, strict=True), expected, strict=True
        ):
            observations, masks, actions, active = (part.numpy() for part in of_type)
            found = act({"observations": observations} | ({"action_masks": masks} if kind.discrete else {}))
            if kind.discrete:
                allowed = masks | ~masks.any(-1, keepdims=True)
                assert (found[1][~allowed] == 0).all()
                assert_close(found[1], outputs[1], relative=False)
                assert_close(found[0], outputs[0])
            else:
                for mine, theirs in zip(found, outputs, strict=True):
                    assert_close(mine, theirs)
            for mine, theirs in zip(judge({"observations": observations, "actions": actions}), judged, strict=True):
                assert_close(np.where(active, mine, np.float32(0)), theirs)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "preset", [pytest.param(n, marks=[pytest.mark.slow] if n == "berlin_5000" else []) for n in preset_names()]
)
def test_files_of_every_preset_are_its_policy_and_its_reward(preset: str, form: Format, tmp_path: Path) -> None:
    config = load_preset(preset)
    spec = make_environment(config.environment, 1).spec if config.environment else UNEVEN
    settings = algorithm(config.algorithm).reward_settings(config.reward)
    policy, model = drawn(spec, settings, config.parameter_sharing, config.actor.agent_identity, config.actor.hidden)
    told = written(tmp_path / "out", form, policy, model)
    compare(tmp_path / "out", form, policy, model, told, ROWS)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("sharing", "identity", "sees", "activation"),
    [
        ("agent", False, ("all",), "sigmoid"),
        ("type", True, ("all",), "relu"),
        ("type", False, ("goal", "far", "action"), "relu"),
        ("agent", False, ("purpose", "action"), "relu"),
    ],
)
def test_all_kinds_of_networks_are_the_same_elsewhere(
    sharing: ParameterSharing, identity: bool, sees: tuple[str, ...], activation: Any, form: Format, tmp_path: Path
) -> None:
    settings = RewardSettings(particles=3, hidden=(8, 6), sees=sees, activation=activation)
    policy, model = drawn(UNEVEN, settings, sharing, identity, (16,))
    told = written(tmp_path / "out", form, policy, model)
    compare(tmp_path / "out", form, policy, model, told, 2_000)


def test_a_reward_that_sees_no_action_still_takes_one(tmp_path: Path) -> None:
    settings = RewardSettings(particles=2, hidden=(8,), sees=("position",))
    policy, model = drawn(make_environment("rover_tower?pairs=2", 1).spec, settings, hidden=(8,))
    for form in FORMATS:
        told = written(tmp_path / form, form, policy, model)
        compare(tmp_path / form, form, policy, model, told, 100)


def test_what_is_told_is_what_the_files_take_and_give(tmp_path: Path) -> None:
    policy, model = drawn(UNEVEN, RewardSettings(hidden=(8,)), "type", hidden=(8,))
    told = written(tmp_path / "out", "onnx", policy, model)
    for kind in told["types"]:
        for what in ("policy", "reward"):
            session = session_of(tmp_path / "out" / kind[what]["file"])
            for side, nodes in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
                found = [{"name": n.name, "dtype": n.type, "shape": n.shape} for n in nodes]
                names = {"float32": "tensor(float)", "int64": "tensor(int64)", "bool": "tensor(bool)"}
                assert found == [entry | {"dtype": names[entry["dtype"]]} for entry in kind[what][side]]
    diver = told["types"][1]
    assert [(c["name"], c["first"], c["end"]) for c in diver["observation"]["columns"]] == [
        ("goal", 0, 3),
        ("load", 3, 8),
        ("speed", 8, 9),
        ("far", 9, 11),
    ]
    assert told["run"] == FACTS
    assert (told["types"][0]["actions"]["count"], told["types"][3]["actions"]["width"]) == (5, 2)


def test_allowed_actions_and_constants_are_told(tmp_path: Path) -> None:
    world = make_environment("berlin?types=10&agents=50&sight=near", 1)
    policy, _ = drawn(world.spec, RewardSettings(), hidden=(8,))
    told = written(tmp_path / "out", "torchscript", policy, None)
    (table,) = told["allowed_actions"].values()
    now = world.reset(0)
    for kind, seen, masks in zip(told["types"], now.observations, now.action_masks, strict=True):
        assert kind["reward"] is None
        place = int(seen[0, 0].argmax())
        assert np.flatnonzero(masks[0, 0]).tolist() == table[place]
        for column in kind["observation"]["columns"]:
            if column["kind"] == "constant":
                assert seen[0, 0, column["first"] : column["end"]].tolist() == column["values"]


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_holds_the_networks_of_its_type_alone(form: Format, tmp_path: Path) -> None:
    policy, _ = drawn(UNEVEN, RewardSettings(), hidden=(128, 128))
    written(tmp_path / "out", form, policy, None)
    parameters = (4 + 1) * 128 + (128 + 1) * 128 + (128 + 1) * 5
    assert (tmp_path / "out" / f"rider.policy{export.SUFFIXES[form]}").stat().st_size < 4 * parameters + 20_000


@pytest.mark.parametrize("form", FORMATS)
def test_agents_that_are_not_told_apart_may_be_any_number(form: Format, tmp_path: Path) -> None:
    settings = RewardSettings(particles=2, hidden=(8,))
    more = replace(UNEVEN, types=tuple(replace(kind, count=kind.count + 4) for kind in UNEVEN.types))
    policy, model = drawn(UNEVEN, settings, hidden=(8,))
    crowd, their_model = drawn(more, settings, hidden=(8,))  # of the same seeds
    told = written(tmp_path / "out", form, policy, model)
    compare(tmp_path / "out", form, crowd, their_model, told, 1_000)


def test_names_that_are_no_file_names_do_not_leave_the_folder(tmp_path: Path) -> None:
    names = ("../up", "Ox", "oX", "")
    spec = EnvironmentSpec("odd", tuple(TypeSpec(name, 1, 2, 2) for name in names), 5)
    policy, _ = drawn(spec, RewardSettings(), hidden=(4,))
    told = written(tmp_path / "out", "torchscript", policy, None)
    files = [kind["policy"]["file"] for kind in told["types"]]
    assert len({file.lower() for file in files}) == len(files)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*files, "export.json", "README.md"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("form", FORMATS)
def test_a_run_is_exported_and_its_readme_runs(
    form: Format, run: bm3il.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ["export", str(run.folder), "--format", form, "--output", str(out)]
    assert main(command) == 0
    assert "policy and reward of 2 types" in capsys.readouterr().out
    assert "exists; take another --output" in fails(capsys, *command)
    told = json.loads((out / "export.json").read_text(encoding="utf-8"))
    assert told["run"]["policy_sha256"] == run.result["policy_sha256"]
    now = make_environment("rover_tower?pairs=2", 5).reset(3)
    likeliest = run.act(dict(zip(("rover", "tower"), now.observations, strict=True)))
    for kind, seen, masks in zip(told["types"], now.observations, now.action_masks, strict=True):
        log_chances, _ = loaded(out, form, kind["policy"])({"observations": seen, "action_masks": masks})
        np.testing.assert_array_equal(log_chances.argmax(-1), likeliest[kind["name"]])
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(out)
    said: dict[str, Any] = {}
    exec(code, said)
    assert said["actions"].shape == (1, 2)


def test_onnx_that_is_not_installed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = fails(capsys, "export", str(tmp_path), "--output", str(tmp_path / "out"))
    assert "pip install 'bm3il[export]'" in error
    assert "is not the folder of a run" in fails(
        capsys, "export", str(tmp_path), "--format", "torchscript", "--output", str(tmp_path / "out")
    )
