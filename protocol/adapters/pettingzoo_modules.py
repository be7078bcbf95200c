"""The module that `pettingzoo:MODULE` names, what it makes, and what is wrong if it makes nothing."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from bm3il.protocol.adapters.options import arguments_of, one_line
from bm3il.protocol.adapters.turns import Turns
from bm3il.protocol.errors import InputError, unknown_name

EXAMPLE = "name a module, as in pettingzoo:mpe2.simple_spread_v3"
OWN_EXTRA = ("pettingzoo", "mpe2", "gymnasium")
LENGTHS = ("max_cycles", "max_steps")
"""What environments call the most joint steps of an episode."""


def maker(target: str, arguments: str, drawn: bool = False) -> Callable[[], Any]:
    """What makes copies of the environment of a module: its `parallel_env`, else its `env` turn by turn.

    arguments: what it is called with, `NAME:VALUE,…`.   drawn: with pictures as arrays, if it knows of such a thing.
    Raises InputError for a module that cannot be imported or offers neither. So does what is returned, if the
    environment cannot be made or is of an older API; what may pass, of networks, is raised as it is.
    """
    module, options = _module(target), arguments_of(arguments)
    _module("gymnasium")  # an environment of the old gym comes without, and has spaces of another kind
    offered = getattr(module, "parallel_env", None) or getattr(module, "env", None)
    if not callable(offered):
        raise InputError(f"'{target}' offers no parallel_env, and no env of turns: {EXAMPLE}")
    offered = _drawing(offered) if drawn else offered
    with_these = f" with arguments {arguments}" if arguments else ""

    def make() -> Any:
        try:
            env = offered(**options)
            env = Turns(env, f"pettingzoo:{target}") if hasattr(env, "agent_iter") else env
        except (InputError, TimeoutError, ConnectionError):
            raise
        except ModuleNotFoundError as error:
            raise _missing(target, error) from error
        except Exception as error:
            raise InputError(f"pettingzoo:{target} cannot be made{with_these}: {one_line(error)}") from error
        _expect_seeds(env, target)
        return env

    return make


def _drawing(offered: Callable[..., Any]) -> Callable[..., Any]:
    def made(**options: Any) -> Any:
        try:
            return offered(**{"render_mode": "rgb_array", **options})
        except TypeError:
            return offered(**options)

    return made


def steps_of(env: Any, options: Mapping[str, Any]) -> int:
    """The most joint steps of an episode, as the user gave them or the environment tells; 0 if nobody does."""
    told = [getattr(part, name, None) for part in _inside(env) for name in LENGTHS]
    given = [options.get(name) for name in LENGTHS]
    cycles = next((value for value in (*given, *told) if type(value) is int and value > 0), 0)
    return cycles * (env.turns if isinstance(env, Turns) else 1)


def _inside(env: Any) -> list[Any]:
    """The environment, and what it wraps, from the outside in."""
    found = [env]
    for part in found:
        inner = [getattr(part, name, None) for name in ("env", "aec_env", "unwrapped")]
        found += [other for other in inner if other is not None and not any(other is known for known in found)]
    return found


def _module(target: str) -> ModuleType:
    if not target:
        raise InputError(f"'' offers no parallel_env: {EXAMPLE}")
    try:
        return importlib.import_module(target)
    except ModuleNotFoundError as error:
        raise _missing(target, error) from error
    except Exception as error:  # a module may raise anything
        raise InputError(f"pettingzoo:{target} cannot be imported: {one_line(error)}") from error


def _missing(target: str, error: ModuleNotFoundError) -> InputError:
    """Whether the module itself is not there, and what is in its place, or what it needs."""
    name = error.name or ""
    if target != name and not target.startswith(f"{name}."):
        return InputError(
            f"pettingzoo:{target} needs '{name}', which is not installed: {_install(name, target.split('.'))}"
        )
    parent, _, last = name.rpartition(".")
    if not parent:
        near = difflib.get_close_matches(name, [info.name for info in pkgutil.iter_modules()], n=3, cutoff=0.8)
        hint = f"; did you mean {' or '.join(near)}?" if near and name not in OWN_EXTRA else f": {_install(name, [])}"
        return InputError(f"pettingzoo:{target}: no module '{name}' is installed{hint}")
    path = getattr(sys.modules.get(parent), "__path__", None)
    if path is None:
        return InputError(f"pettingzoo:{target}: '{parent}' is a module, and holds no module '{last}'")
    beside = [info.name for info in pkgutil.iter_modules(path) if not info.name.startswith("_")]
    worlds = [other for other in beside if re.search(r"_v\d+$", other)] or beside
    stem = re.sub(r"_v\d+$", "", last)
    versions = [f"{parent}.{other}" for other in worlds if re.sub(r"_v\d+$", "", other) == stem]
    if versions:
        return InputError(f"pettingzoo:{target} is not in what is installed, which has {' and '.join(versions)}")
    return unknown_name(f"module of {parent}", last, worlds)


def _install(name: str, target: list[str]) -> str:
    """How what is missing comes: PettingZoo's families of environments are extras of its own."""
    if name.partition(".")[0] in OWN_EXTRA:
        return "pip install 'bm3il[pettingzoo]'"
    if target[:1] == ["pettingzoo"] and len(target) > 1:
        return f"pip install 'pettingzoo[{target[1]}]'"
    return "install the package that has it"


def _expect_seeds(env: Any, target: str) -> None:
    try:
        signature = inspect.signature(env.reset)
    except ValueError:  # a builtin, which does not tell
        return
    try:
        signature.bind(seed=0)
    except TypeError as error:
        raise InputError(
            f"pettingzoo:{target} is of an older API: expected reset(seed=None, options=None), got "
            f"reset({', '.join(signature.parameters)})"
        ) from error
