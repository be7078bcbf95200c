"""Environments by name: `rover_tower?pairs=4`, `pettingzoo:mpe2.simple_spread_v3`.

A name is an entry point of the group `bm3il.environments`, so a user's package adds its own:

    [project.entry-points."bm3il.environments"]
    my_town = "my_package.town:Town"        # called as Town(num_envs=E, **options)

What follows `:` is passed as the option `target`; options follow `?`, joined by `&`, and are converted to the types
that the factory's signature names. A factory whose options name files says so by a function
`with_files(option, value, change)`, also for `target`: the value with `change` applied to the part of it that is the
path of a file; then runs know these files again. Every environment also takes `slip` and `noise`
(`protocol.perturbation`), unless its factory has an option of that name itself.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, get_type_hints

from bm3il.protocol.environment import Environment
from bm3il.protocol.errors import InputError, unknown_name
from bm3il.protocol.perturbation import OPTIONS, perturbed

GROUP = "bm3il.environments"


def known_environments() -> list[str]:
    """The names that `make_environment` understands on this machine."""
    return sorted({point.name for point in entry_points(group=GROUP)})


def make_environment(name: str, num_envs: int, drawn: bool = False) -> Environment:
    """Build E = `num_envs` copies of the environment that `name` describes.

    drawn: whether it will be asked to `render`; a factory that must know has an option of that name.
    Raises InputError for an unknown name or option, a value of the wrong kind, or a package that cannot be imported.
    """
    path, _, query = name.partition("?")
    key, _, target = path.partition(":")
    factory = _factory(key)
    own = _options_of(factory)
    ours = {name: float for name in OPTIONS if name not in own}
    options = dict(_parse_option(key, part, own | ours) for part in query.split("&") if part)
    perturbation = {name: options.pop(name) for name in ours if name in options}
    if target:
        options["target"] = target
    if drawn and "drawn" in own:
        options["drawn"] = True
    environment = factory(num_envs=num_envs, **options)
    if not isinstance(environment, Environment):
        raise InputError(f"environment '{key}': {factory!r} does not follow protocol.environment.Environment")
    return perturbed(environment, **perturbation)


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


def _factory(key: str) -> Callable[..., Any]:
    points = {point.name: point for point in entry_points(group=GROUP)}
    if key not in points:
        raise unknown_name("environment", key, points)
    try:
        return points[key].load()
    except (ImportError, AttributeError) as error:
        raise InputError(f"environment '{key}' is {points[key].value}, which cannot be imported: {error}") from error


def _options_of(factory: Callable[..., Any]) -> dict[str, Any]:
    """Option → its type, as the signature has them."""
    target = factory.__init__ if inspect.isclass(factory) else factory
    return {k: v for k, v in get_type_hints(target).items() if k not in ("num_envs", "return")}


def _parse_option(environment: str, part: str, hints: dict[str, Any]) -> tuple[str, Any]:
    option, _, text = part.partition("=")
    if option not in hints:
        raise unknown_name(f"option of environment {environment}", option, hints)
    kind = hints[option]
    if kind is bool and text in ("true", "false"):
        return option, text == "true"
    if kind in (int, float, str) and text:
        try:
            return option, kind(text)
        except ValueError:
            pass
    expected = {bool: "true or false", int: "an integer", float: "a number"}.get(kind, "a value")
    raise InputError(f"option {option} of environment {environment}: expected {expected}, got '{text}'")
