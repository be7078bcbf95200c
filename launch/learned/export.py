"""`bm3il export RUN`: what a run has learned, as files of ONNX or TorchScript that need nothing of ours."""

from __future__ import annotations

import importlib.util
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from bm3il.actors.policy import Policy
from bm3il.launch.learned.exported import Function, policies, rewards
from bm3il.launch.learned.trained import Trained, load_trained
from bm3il.launch.provenance import provenance
from bm3il.protocol.errors import InputError
from bm3il.protocol.specs import FREE, OWN_MASK, EnvironmentSpec, TypeSpec
from bm3il.reward_server.particles import RewardModel

Format = Literal["onnx", "torchscript"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torchscript": ".pt"}
OPSET = 17
"""Of ONNX: what runtimes since 2022 understand."""
EXAMPLE_ROWS, EXAMPLE_AGENTS = 2, 3
INDEX, README = "export.json", "README.md"

KINDS = {
    "own": "numbers of the agent",
    "uint8": "integers 0..255 of the agent, as numbers",
    "int16": "integers within ±32767 of the agent, as numbers",
    "code": "one-hot; neighbours whose names are equal up to the dot are one one-hot; all 0 for none of them",
    "shared": "numbers that all agents see; with `masked`, 0 where the action mask forbids the action of that number",
    "constant": "always `values`, for all agents of the type",
}
DRAWN = "argmax over actions of log_probabilities + Gumbel noise, −log(−log(U)) with U uniform in (0, 1)"
LIKELIEST = "argmax over actions of log_probabilities"
SQUASHED = "tanh(mean + scale · N), N standard normal; in [-1, 1]"
CENTRE = "tanh(mean)"


def main(run: Path, best: bool, form: Format, folder: Path) -> int:
    """Write policy and reward of every type into a new folder, with `export.json` and a README that explain them.

    best: the checkpoint with the highest evaluation return instead of the newest.
    Raises InputError if this is no run, the folder exists or cannot be written, or ONNX is not installed.
    """
    if form == "onnx" and importlib.util.find_spec("onnx") is None:
        raise InputError("ONNX files need onnx: pip install 'bm3il[export]', or take --format torchscript")
    if folder.exists():
        raise InputError(f"{folder} exists; take another --output")
    trained = load_trained(run, best)
    model = trained.reward_model()
    try:
        written = write(folder, form, trained.policy, model, _facts(run, trained))
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from error
    what = "policy and reward" if model else f"policy (there is no learned reward in {trained.config.algorithm})"
    print(f"{what} of {len(written['types'])} types: {folder / README}")
    return 0


def write(
    folder: Path, form: Format, policy: Policy, model: RewardModel | None, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write all files into a folder, which is made; returns what `export.json` says.

    model: None where no reward was learned.   facts: about the run.
    """
    folder.mkdir(parents=True)
    spec = policy.layout.spec
    names = _file_names([t.name for t in spec.types])
    told = {"format": form, "run": facts, **_described(spec, model)}
    learned = {"policy": policies(policy), "reward": rewards(model) if model else iter(())}
    for what, functions in learned.items():
        for function in functions:
            file = f"{names[function.m]}.{what}{SUFFIXES[form]}"
            _write(function, form, folder / file)
            told["types"][function.m][what] = {"file": file, **_signature(function)}
    (folder / INDEX).write_text(json.dumps(told, indent=1, ensure_ascii=False), encoding="utf-8")
    (folder / README).write_text(_readme(form, spec.types[0], told["types"][0], facts), encoding="utf-8")
    return told


def _write(function: Function, form: Format, path: Path) -> None:
    example = tuple(
        torch.zeros(EXAMPLE_ROWS, function.agents or EXAMPLE_AGENTS, *shape, dtype=getattr(torch, dtype))
        for dtype, shape in function.inputs.values()
    )
    with torch.no_grad(), warnings.catch_warnings():
        # PyTorch's newer exporters take seconds a file, and more packages; products of matrices need nothing newer.
        warnings.simplefilter("ignore")
        if form == "onnx":
            _write_onnx(function, example, path)
        else:
            torch.jit.trace(function.module, example, check_trace=False).save(str(path))


def _write_onnx(function: Function, example: tuple[torch.Tensor, ...], path: Path) -> None:
    # An extra of the package: it may be missing where TorchScript is written.
    import onnx

    inputs, outputs = [*function.inputs], [*function.outputs]
    torch.onnx.export(
        function.module,
        example,
        str(path),
        input_names=inputs,
        output_names=outputs,
        dynamic_axes=dict.fromkeys(inputs + outputs, {0: "batch"} if function.agents else {0: "batch", 1: "agents"}),
        opset_version=OPSET,
        dynamo=False,
    )
    model = onnx.load(str(path))
    # As they were asked for, also what is not looked at, as the action by a reward that sees none.
    for side, nodes in (("inputs", model.graph.input), ("outputs", model.graph.output)):
        del nodes[:]
        for entry in _signature(function)[side]:
            element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(entry["dtype"]))
            nodes.append(onnx.helper.make_tensor_value_info(entry["name"], element, entry["shape"]))
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _signature(function: Function) -> dict[str, Any]:
    agents = function.agents or "agents"
    return {
        side: [
            {"name": name, "dtype": dtype, "shape": ["batch", agents, *shape]} for name, (dtype, shape) in table.items()
        ]
        for side, table in (("inputs", function.inputs), ("outputs", function.outputs))
    }


def _described(spec: EnvironmentSpec, model: RewardModel | None) -> dict[str, Any]:
    """What `export.json` says of environment and agents, but for the files."""
    reward = model and {"sees": list(model.settings.sees), "particles": model.settings.particles}
    return {
        "environment": {"name": spec.name, "changes": spec.changes, "episode_length": spec.episode_length},
        "reward": reward,
        "normalisation": "none: observations go in as the environment shows them, rewards come out as Eq. 9 has them",
        "inactive_agents": "have rows, too; what comes of these means nothing, and changes nothing for the others",
        "kinds": KINDS,
        "allowed_actions": {name: [list(actions) for actions in table] for name, table in spec.tables},
        "types": [_type(kind) for kind in spec.types],
    }


def _type(kind: TypeSpec) -> dict[str, Any]:
    columns, first = [], 0
    for part in kind.parts:
        column = {"name": part.name, "first": first, "end": first + part.width, "kind": part.kind}
        if part.masked:
            column["masked"] = True
        if part.values:
            column["values"] = list(part.values)
        columns.append(column)
        first += part.width
    masks = {OWN_MASK: "the environment's", FREE: "all true"}.get(kind.mask, f"allowed_actions of its {kind.mask}")
    if kind.discrete:
        actions = {"discrete": True, "count": kind.action_dim, "masks": masks, "drawn": DRAWN, "likeliest": LIKELIEST}
    else:
        actions = {"discrete": False, "width": kind.action_dim, "drawn": SQUASHED, "likeliest": CENTRE}
    return {
        "name": kind.name,
        "agents": kind.count,
        "observation": {"width": kind.observation_dim, "columns": columns},
        "actions": actions,
        "policy": None,
        "reward": None,
    }


def _file_names(types: Sequence[str]) -> list[str]:
    """One for each type, of letters that every file system takes, no two alike on one that ignores capitals."""
    plain = [re.sub(r"[^A-Za-z0-9_.+-]", "_", name).lstrip(".") for name in types]
    alike = len({name.lower() for name in plain}) < len(plain) or not all(plain)
    return [f"{m}.{name}" for m, name in enumerate(plain)] if alike else plain


def _facts(run: Path, trained: Trained) -> dict[str, Any]:
    config = trained.config
    by = provenance()
    return {
        "name": run.resolve().name,
        "algorithm": config.algorithm,
        "seed": config.seed,
        "iteration": trained.checkpoint.iteration,
        "policy_sha256": trained.policy.sha256(),
        "exported_by": {name: by[name] for name in ("version", "commit", "torch")},
    }


def _readme(form: Format, kind: TypeSpec, told: dict[str, Any], facts: dict[str, Any]) -> str:
    feeds = [f'"observations": np.zeros((1, {kind.count}, {kind.observation_dim}), np.float32)']
    if kind.discrete:
        feeds.append(f'"action_masks": np.ones((1, {kind.count}, {kind.action_dim}), bool)')
    return "\n".join(
        [
            f"# {facts['name']}: {facts['algorithm']}, iteration {facts['iteration']}",
            "",
            f"Policy and reward of each type of agents, as functions of plain arrays. `{INDEX}` says what goes in,",
            "what comes out, what the columns of an observation are, and how actions are drawn.",
            "",
            "```python",
            *_code(form, told["policy"]["file"], kind, feeds),
            "```",
            "",
        ]
    )


def _code(form: Format, file: str, kind: TypeSpec, feeds: Iterable[str]) -> list[str]:
    outputs = "log_probabilities, probabilities" if kind.discrete else "mean, scale"
    feed = f"seen = {{{', '.join(feeds)}}}  # [batch, agents, …]"
    if form == "onnx":
        lines = [
            "import numpy as np, onnxruntime",
            f'policy = onnxruntime.InferenceSession("{file}")',
            feed,
            f"{outputs} = policy.run(None, seen)",
        ]
    else:
        lines = [
            "import numpy as np, torch",
            f'policy = torch.jit.load("{file}")',
            feed,
            f"{outputs} = (part.numpy() for part in policy(*map(torch.from_numpy, seen.values())))",
        ]
    if kind.discrete:
        return [
            *lines,
            "actions = (log_probabilities + np.random.gumbel(size=probabilities.shape)).argmax(-1)  # a draw",
        ]
    return [*lines, "actions = np.tanh(mean + scale * np.random.standard_normal(mean.shape))  # a draw"]
