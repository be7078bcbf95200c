"""Environments by name: `rover_tower?pairs=4`, `pettingzoo:mpe2.simple_spread_v3`.

A name is an entry point of the group `bm3il.environments`, so a user's package adds its own:

    [project.entry-points."bm3il.environments"]
    my_town = "my_package.town:Town"        # called as Town(num_envs=E, **options)

What follows `:` is passed as the option `target`; options follow `?`, joined by `&`, and are converted to the types
that the factory's signature names, or of their defaults; if that ends with `**arguments`, these are all others, as
text. A factory whose options name files says so by a function `with_files(option, value, change)`, also for `target`:
the value with `change` applied to the part of it that is the path of a file; then runs know these files again. One
whose copies are costly has an attribute `most_copies`: evaluations and recorders step no more of them together. Every
environment also takes `slip` and `noise` (`protocol.perturbation`), and `processes` (`protocol.pool`) if its copies
can be divided, unless its factory has an option of that name itself.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from bm3il.protocol.adapters.options import one_line
from bm3il.protocol.environment import Environment
from bm3il.protocol.errors import InputError, SimulatorError, unknown_name
from bm3il.protocol.perturbation import OPTIONS, perturbed
from bm3il.protocol.pool import Pool

GROUP = "bm3il.environments"
PROCESSES, FIRST_COPY, DRAWN = "processes", "first_copy", "drawn"
AROUND = {**dict.fromkeys(OPTIONS, float), PROCESSES: int}
"""What can be around every environment → its type."""


def known_environments() -> list[str]:
    """The names that `make_environment` understands on this machine."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def make_environment(name: str, num_envs: int, drawn: bool = False) -> Environment:
    """Build E = `num_envs` copies of the environment that `name` describes.

    drawn: whether it will be asked to `render`; a factory that must know has a parameter of that name.
    Raises InputError for an unknown name or option, a value of the wrong kind, or a package that cannot be imported;
    SimulatorError, naming the environment, for whatever else it raises in being imported or made.
    """
    inner, around = _parted(name)
    processes = min(around.pop(PROCESSES, 1), num_envs)
    divided = processes > 1 and not drawn  # children draw nothing
    if divided:
        environment: Environment = Pool(inner, num_envs, processes)
    else:
        with _blamed(name):
            environment = make_share(inner, num_envs, drawn=drawn)
    # Around the pool, so that one stream of chances is for all copies, however they are divided.
    return perturbed(environment, **around)


def make_share(name: str, num_envs: int, first_copy: int = 0, drawn: bool = False) -> Environment:
    """So many copies of an environment as it is, without slip, noise and processes: those from `first_copy` on.

    Raises InputError as `make_environment`.
    """
    path, _, query = name.partition("?")
    key, _, target = path.partition(":")
    factory = _factory(key)
    kinds = AROUND | _options_of(factory)
    options = dict(_parse_option(key, part, kinds, _takes_any(factory)) for part in query.split("&") if part)
    if target:
        if "target" not in _parameters(factory) and not _takes_any(factory):
            raise InputError(f"environment '{key}' takes nothing after ':', got '{target}'; its options follow '?'")
        options["target"] = target
    for option, value in ((FIRST_COPY, first_copy), (DRAWN, drawn)):
        if option in _parameters(factory):
            options[option] = value
    environment = factory(num_envs=num_envs, **options)
    if not isinstance(environment, Environment):
        raise InputError(f"environment '{key}': {factory!r} does not follow protocol.environment.Environment")
    return environment


def copies_at_once(name: str, most: int) -> int:
    """How many copies whoever plays many episodes steps together: `most`, or `most_copies` of the factory, if it has
    that and it is fewer, since each of its copies is a process, say."""
    return min(most, getattr(_factory(name.partition("?")[0].partition(":")[0]), "most_copies", most))


def with_absolute_files(name: str) -> tuple[str, list[str]]:
    """The name of an environment with the files in its options by absolute path, and these files.

    Raises InputError for an unknown name, and for a path that such a name cannot hold.
    """
    path, question, query = name.partition("?")
    key, colon, target = path.partition(":")
    factory = _factory(key)
    if not hasattr(factory, "with_files"):
        return name, []
    found: list[str] = []

    def absolute(file: str) -> str:
        if not os.path.isfile(file):
            return file
        whole = os.path.abspath(file)
        if sign := next((sign for sign in "?&" if sign in whole), ""):
            raise InputError(f"'{sign}' parts the options of an environment: move {whole} to a path without it")
        found.append(whole)
        return whole

    options = [part.partition("=") for part in query.split("&")]
    values = [option + equals + factory.with_files(option, value, absolute) for option, equals, value in options]
    return key + colon + factory.with_files("target", target, absolute) + question + "&".join(values), found


def _parted(name: str) -> tuple[str, dict[str, Any]]:
    """The name of an environment without the options of what is around it, and these."""
    path, _, query = name.partition("?")
    key = path.partition(":")[0]
    factory = _factory(key)
    kinds = {option: kind for option, kind in AROUND.items() if option not in _options_of(factory)}
    parts = [part for part in query.split("&") if part]
    outer = [part for part in parts if part.partition("=")[0] in kinds]
    around = dict(_parse_option(key, part, kinds) for part in outer)
    if around.get(PROCESSES, 1) < 1:
        raise InputError(f"expected {PROCESSES} ≥ 1, got {around[PROCESSES]}")
    if around.get(PROCESSES, 1) > 1 and FIRST_COPY not in _parameters(factory):
        raise InputError(
            f"the copies of environment '{key}' cannot be divided among processes: leave out {PROCESSES}=, or let its "
            f"factory take {FIRST_COPY} (protocol/pool.py)"
        )
    inner = "&".join(part for part in parts if part not in outer)
    return (f"{path}?{inner}" if inner else path), around


def _factory(key: str) -> Callable[..., Any]:
    point = _point(key)
    with _blamed(key):
        try:
            return point.load()
        except (ImportError, AttributeError) as error:
            raise InputError(f"environment '{key}' is {point.value}, which cannot be imported: {error}") from error


@contextmanager
def _blamed(name: str) -> Iterator[None]:
    """Whatever an environment raises is told in a line that names it, as `actors.simulator` does while it is played."""
    try:
        yield
    except (InputError, SimulatorError):  # which name it themselves
        raise
    except Exception as error:
        raise SimulatorError(f"environment '{name}' raised {one_line(error)}") from error


@cache  # to look through all installed packages takes longer than a short episode; what is not found is not kept
def _point(key: str) -> EntryPoint:
    points = {point.name: point for point in entry_points(group=GROUP)}
    if key not in points:
        raise unknown_name("environment", key, points)
    return points[key]


def _options_of(factory: Callable[..., Any]) -> dict[str, Any]:
    """Option → its type, as the signature has them: annotated, or else that of its default."""
    try:
        hints = get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    except Exception:  # an annotation that is there for type checkers alone, say
        texts = {name: str(parameter.annotation) for name, parameter in _parameters(factory).items()}
        plain = {kind.__name__: kind for kind in (bool, int, float, str)}
        hints = {name: plain[kind] for name, text in texts.items() if (kind := text.removesuffix(" | None")) in plain}
    return {
        name: _given(hints.get(name, type(parameter.default)))
        for name, parameter in _parameters(factory).items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        and name not in ("num_envs", FIRST_COPY, DRAWN)
        and (name in hints or parameter.default is not parameter.empty)
    }


def _given(kind: Any) -> Any:
    """The type of what is given for an option that may also be None; text, if nobody says of what type it is."""
    union = get_origin(kind) in (Union, UnionType)
    kinds = [each for each in get_args(kind) if each is not NoneType] if union else [kind]
    return str if kinds == [NoneType] else kinds[0] if len(kinds) == 1 else kind


def _takes_any(factory: Callable[..., Any]) -> bool:
    """Whether options that it does not name are handed to it, as text."""
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in _parameters(factory).values())


def _parameters(factory: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(factory).parameters


def _parse_option(environment: str, part: str, kinds: dict[str, Any], any_other: bool = False) -> tuple[str, Any]:
    option, _, text = part.partition("=")
    if option not in kinds and not any_other:
        raise unknown_name(f"option of environment {environment}", option, kinds)
    kind = kinds.get(option, str)
    if kind not in (bool, int, float, str):
        raise InputError(f"option {option} of environment {environment}: a name cannot hold {kind}; leave it out")
    if kind is bool and text in ("true", "false"):
        return option, text == "true"
    if kind is not bool and text:
        try:
            return option, kind(text)
        except ValueError:
            pass
    expected = {bool: "true or false", int: "an integer", float: "a number"}.get(kind, "a value")
    raise InputError(f"option {option} of environment {environment}: expected {expected}, got '{text}'")
