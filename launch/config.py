"""The configuration of a run: one dataclass that is the command line, the presets, and the record of the run."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import dacite
import tyro
import yaml

from bm3il.actors.settings import ActorSettings, EvaluationSettings
from bm3il.launch.nodes.reach import check_network
from bm3il.learner.settings import CloningSettings, LearnerSettings, Settings
from bm3il.protocol.errors import InputError, unknown_name
from bm3il.protocol.job import Mode
from bm3il.protocol.keys import read_token
from bm3il.protocol.settings import Count, Device, Natural, Port, check_bounds, flag
from bm3il.protocol.specs import ParameterSharing
from bm3il.protocol.yaml_text import parse_yaml
from bm3il.reward_server.settings import RewardSettings

Computing = TypeVar("Computing", LearnerSettings, RewardSettings)

DEFAULT_PRESET = "rover_tower_8"
PRESET_OF, OWN_PRESET = {"rover_tower": DEFAULT_PRESET, "berlin": "berlin"}, "own"
"""Of environments without a --preset: the settings of one, and its demonstrations, would be a guess for another."""

EXPECTED = {
    "invalid literal for int() with base 10": "a whole number",
    "could not convert string to float": "a number",
    "Could not find valid parse for arguments": "whole numbers",
}
"""By how Python and tyro say that they got something else."""
REFUSED = re.compile(
    rf"Error parsing (?P<flag>--[^ :]+):.* (?P<words>{'|'.join(map(re.escape, EXPECTED))}): (?P<got>.*)"
)


@dataclass(frozen=True)
class Config:
    """Train agents by imitation, on one machine or many."""

    preset: str = DEFAULT_PRESET
    """Configuration that the other options start from: a name, or the path of a YAML file. If only --environment is
    given, it is the preset of that environment, or `own` for an environment without one."""
    environment: str = "rover_tower?pairs=4"
    """Environment and its options."""
    demonstrations: str = ""
    """Expert trajectories: a file, or the name of one that comes with bm3il."""
    files: Annotated[dict[str, str], tyro.conf.Suppress, tyro.conf.Fixed] = field(default_factory=dict)
    """SHA-256 of each file that the run began with; see `launch.files`."""
    demonstration_episodes: Natural = 0
    """Number of demonstration episodes to use; 0: all."""
    algorithm: str = "bm3il"
    """bm3il, bm3il-released (like the authors' code), ma-gail, ma-daac, bayesian-ma-daac, mtmfil, bc (behaviour
    cloning), expert or maac (both trained on the true reward)."""
    mode: Mode = "lockstep"
    """lockstep: many processes that wait for each other. serial: the same in one process, for debugging, with results
    that are identical to the bit. async: actors send data without waiting, for throughput."""
    seed: Natural = 0
    """Random seed. In lockstep and serial mode it determines the whole run."""
    steps: Count = 200_000
    """Budget of joint environment steps; the run ends after the iteration that reaches it."""
    run: str = ""
    """Name of the run's folder; empty: composed of preset, algorithm, seed and time."""
    runs_folder: str = "runs"
    """Folder in which the run's folder is created."""
    actors: Natural = 0
    """Number of actor processes, which share the steps of an iteration; 0: one per node."""
    nodes: Count = 1
    """Number of nodes that the processes are spread over, with one supervisor on each."""
    hostfile: str = ""
    """File with the hosts of the nodes, one per line (host, host:2 or host slots=2), this machine first; empty: the
    Slurm allocation, or nodes simulated on this machine."""
    network: str = ""
    """Network for communication between the nodes, such as 10.1.0.0/24, or an interface that all of them have, such as
    eth1; needed only if the nodes do not find one themselves."""
    parameter_sharing: ParameterSharing = "type"
    """`agent`: one network per agent (as in the paper); `type`: one network per agent type."""
    device: Device = "auto"
    """Device of the learner and the reward server, unless set for one of them; auto: a GPU if there is one."""
    threads: Count = 1
    """Compute threads of each process, unless set for its role."""
    metrics_token_file: str = ""
    """File, on every host, with the token that requests for metrics must carry (Authorization: Bearer TOKEN); empty: no
    token is needed."""
    metrics_port: Port = 0
    """First port for metrics. Ports are assigned upwards from it: one to the supervisor of each node, then to the
    learner, the evaluator, the reward server and the actors. 0: any free ports."""
    metrics_address: str = ""
    """Address that metrics are served on, 0.0.0.0 for all interfaces; empty: the loopback address on one machine,
    otherwise the address of the node."""
    learner: LearnerSettings = field(default_factory=LearnerSettings)
    cloning: CloningSettings = field(default_factory=CloningSettings)
    actor: ActorSettings = field(default_factory=ActorSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)

    def checked(self) -> Config:
        """Itself, with what algorithm and mode force and what roles have in common filled in.

        Raises InputError for unknown names and for values that no run could use.
        """
        # Supervisors read configurations, and do without torch.
        from bm3il.learner.algorithms import algorithm
        from bm3il.protocol.registry import known_environments

        kind = algorithm(self.algorithm)
        name = self.environment.partition("?")[0].partition(":")[0]
        if not name:
            raise InputError(f"preset '{self.preset}' is of no environment: name yours by --environment")
        if name not in known_environments():
            raise unknown_name("environment", name, known_environments())
        check_bounds(self)
        self.learner.check()
        self.metrics_token()
        check_network(self.network)
        if (kind.imitates or kind.clones) and not self.demonstrations:
            raise InputError(
                f"algorithm '{self.algorithm}' learns from demonstrations: name a file by --demonstrations"
            )
        if self.learner.start == "cloned" and not self.demonstrations:
            raise InputError(
                "--learner.start cloned needs what it clones: name a file by --demonstrations, or take "
                "--learner.start random"
            )
        learner = self._of_role(kind.learner_settings(self.learner))
        reward = self._of_role(kind.reward_settings(self.reward))
        # A learner shall not give an actor up before its simulator is.
        step_seconds = min(self.actor.step_seconds, learner.deadline_seconds / 2)
        actor = replace(self.actor, threads=self.actor.threads or self.threads, step_seconds=step_seconds)
        if self.mode == "serial":  # one process has one number of threads
            actor, reward = replace(actor, threads=learner.threads), replace(reward, threads=learner.threads)
        # Nobody plays for cloning, so there is nothing to stream.
        mode = "lockstep" if kind.clones and self.mode == "async" else self.mode
        actors = self.actors or self.nodes
        return replace(self, mode=mode, actors=actors, learner=learner, actor=actor, reward=reward)

    def _of_role(self, settings: Computing) -> Computing:
        """The settings of a role that computes, with its device and its threads."""
        device = self.device if settings.device == "auto" else settings.device
        return replace(settings, device=device, threads=settings.threads or self.threads)

    def threads_of(self, role: str) -> int:
        """Of the process of a role, once they are filled in."""
        own = {"learner": self.learner.threads, "reward-server": self.reward.threads}
        return own.get(role, self.actor.threads) or self.threads

    @property
    def settings(self) -> Settings:
        """Those of all roles."""
        return Settings(self.learner, self.cloning, self.actor, self.reward, self.evaluation)

    @property
    def tells_agents_apart(self) -> bool:
        """Whether agents of one type differ to the networks, so that these fit no other number of them."""
        return self.parameter_sharing == "agent" or self.actor.agent_identity

    def metrics_token(self) -> str:
        """The word for metrics, or empty. Raises InputError for a file that others can read, or an empty one."""
        return read_token(Path(self.metrics_token_file)) if self.metrics_token_file else ""

    def to_yaml(self) -> str:
        """All of it, resolved: the text of `config.yaml`."""
        return yaml.safe_dump(_plain(asdict(self)), sort_keys=False)

    @classmethod
    def from_yaml(cls, text: str, source: str) -> Config:
        """The inverse of `to_yaml`; a key that is left out keeps its default. `source` is named in errors.

        Raises InputError for text that is not YAML, unknown keys (the nearest is named) and values of a wrong kind.
        """
        values = parse_yaml(text, source) or {}
        if not isinstance(values, dict):
            raise InputError(f"{source}: expected keys and values, got {type(values).__name__}")
        _check_keys(values, cls, source)
        try:
            hooks: dict[Any, Any] = {tuple[int, ...]: _to_tuple, tuple[str, ...]: _to_tuple, float: _to_float}
            return dacite.from_dict(cls, values, dacite.Config(type_hooks=hooks, strict=True))
        except dacite.WrongTypeError as error:
            kind = getattr(error.field_type, "__name__", str(error.field_type))
            raise InputError(f"{source}: {error.field_path} must be {kind}, got {error.value!r}") from error


def preset_names() -> list[str]:
    """The presets that come with bm3il."""
    files = resources.files("bm3il.launch").joinpath("presets").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_preset(name: str) -> Config:
    """A preset by name, or a YAML file of the same shape. Raises InputError."""
    if name.endswith((".yaml", ".yml")):
        try:
            return replace(Config.from_yaml(Path(name).read_text(encoding="utf-8"), name), preset=name)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the preset {name}: {error}") from error
    if name not in preset_names():
        raise unknown_name("preset", name, preset_names())
    text = resources.files("bm3il.launch").joinpath("presets").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return replace(Config.from_yaml(text, f"preset {name}"), preset=name)


def configured(settings: Mapping[str, Any], source: str) -> Config:
    """The configuration that settings by dotted keys (`learner.batch_size`) describe, on top of the preset that they
    name, or else of their environment's. `source` is named in errors.

    Raises InputError for unknown keys (the nearest is named) and values of a wrong kind.
    """
    named = [f"--{key}={settings[key]}" for key in ("preset", "environment") if key in settings]
    values = _plain(asdict(load_preset(_preset_of(named))))
    for key, value in settings.items():
        *groups, name = key.split(".")
        place = values
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise InputError(f"{source}: '{key}' cannot be set: {group} holds no other keys")
        place[name] = value
    return Config.from_yaml(yaml.safe_dump(values), source)


def flattened(values: Mapping[Any, Any], group: str = "") -> dict[str, Any]:
    """Nested keys as dotted ones, with `_` for `-`: {"learner": {"batch-size": 3}} → {"learner.batch_size": 3}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = group + str(name).replace("-", "_")
        flat |= flattened(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat


def parse_config(args: Sequence[str], default: Config | None = None) -> Config:
    """The configuration that command-line flags describe, on top of `default` or else of the preset they name.

    Raises InputError, one line, for whatever cannot be understood.
    """
    _check_flags(args)
    if default is None:
        default = load_preset(_preset_of(args))
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(Config, prog="bm3il train", default=default, args=list(args))
    except SystemExit as end:
        if end.code == 0:  # --help
            raise
        raise InputError(_one_line(messages.getvalue())) from end


def _preset_of(args: Sequence[str]) -> str:
    """The value of --preset, else that of the environment: it is needed before the other flags can be read."""
    if (preset := _value_of("--preset", args)) is not None:
        return preset
    if (environment := _value_of("--environment", args)) is not None:
        return PRESET_OF.get(environment.partition("?")[0], OWN_PRESET)
    return DEFAULT_PRESET


def _value_of(name: str, args: Sequence[str]) -> str | None:
    for position, arg in enumerate(args):
        if arg.startswith(f"{name}="):
            return arg.partition("=")[2]
        if arg == name and position + 1 < len(args):
            return args[position + 1]
    return None


def _check_flags(args: Sequence[str]) -> None:
    known = {"--help", *_flags(Config)}
    for arg in args:
        name = arg.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name not in known:
            raise unknown_name("option", name, known)


def _flags(kind: type, prefix: str = "--") -> list[str]:
    names = []
    for name, hint in get_type_hints(kind).items():
        if name == "files":  # written down, not asked for
            continue
        if is_dataclass(hint):
            names += _flags(hint, f"{prefix}{flag(name)}.")  # type: ignore[arg-type]
        else:
            names.append(prefix + flag(name))
            if hint is bool:
                names.append(f"{prefix}no-{flag(name)}")
    return names


def _check_keys(values: dict[Any, Any], kind: type, source: str, path: str = "") -> None:
    hints = get_type_hints(kind)
    known = {f.name for f in fields(kind)}
    for key, value in values.items():
        if key not in known:
            error = unknown_name("key", f"{path}{key}", {path + name for name in known})
            raise InputError(f"{source}: {error}")
        if is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise InputError(f"{source}: {path}{key} must hold keys and values, got {value!r}")
            _check_keys(value, hints[key], source, f"{path}{key}.")
        elif get_origin(hints[key]) is Literal and value not in get_args(hints[key]):
            raise InputError(f"{source}: {path}{key} must be one of {', '.join(get_args(hints[key]))}, got {value!r}")
        elif isinstance(value, bool) and hints[key] is not bool:
            raise InputError(f"{source}: {path}{key} must be {hints[key].__name__}, got {value!r}")


def _to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _to_float(value: Any) -> Any:
    """YAML 1.1 reads `1e-3` as text, for want of a dot."""
    if isinstance(value, int | str):
        with contextlib.suppress(ValueError):
            return float(value)
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _one_line(box: str) -> str:
    """What tyro's box says, without the frame and the advice below the rule, and without Python's words."""
    lines = [line.strip("│ \t") for line in box.splitlines()[1:]]
    end = next((i for i, line in enumerate(lines) if line.startswith(("─", "╰"))), len(lines))
    text = " ".join(" ".join(lines[:end]).split()) or "the command line cannot be understood; see --help"
    if refused := REFUSED.search(text):
        return f"{refused['flag']}: expected {EXPECTED[refused['words']]}, got {refused['got']}"
    return text
