"""Bayesian multi-type mean field multi-agent imitation learning, as a distributed actor-learner system.

In a notebook:

    import bm3il

    run = bm3il.train("rover_tower_4", steps=10_000, run="mine")     # or bm3il.load("runs/mine")
    run.curve                                                        # what `curve.csv` says
    run.act(observations, masks)                                     # of each type by name
    run.reward(observations, actions)                                # and how far the particles disagree
    bm3il.evaluate(run, "rover_tower?pairs=2&slip=0.05")             # true returns there, beside random and expert
    recorded = bm3il.rollout("rover_tower?pairs=2", run.policy)      # episodes, as demonstrations
    recorded.save("played.safetensors")
    bm3il.as_parallel_env("berlin?agents=50")                        # for whoever speaks PettingZoo's API
    env = bm3il.Recorder(env, "pettingzoo:MODULE")                   # remembers what anybody plays; env.save(path)

The rest of the package is its inside: it may change with every release.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bm3il.launch.public import Run, as_parallel_env, evaluate, load, make_environment, rollout, train
    from bm3il.protocol.demonstrations import Demonstrations
    from bm3il.protocol.errors import InputError
    from bm3il.protocol.recordings.recorder import Recorder

_PUBLIC = ("Run", "as_parallel_env", "evaluate", "load", "make_environment", "rollout", "train")
_HOMES = {
    **dict.fromkeys(_PUBLIC, "bm3il.launch.public"),
    "Demonstrations": "bm3il.protocol.demonstrations",
    "InputError": "bm3il.protocol.errors",
    "Recorder": "bm3il.protocol.recordings.recorder",
}
__all__ = [
    "Demonstrations",
    "InputError",
    "Recorder",
    "Run",
    "as_parallel_env",
    "evaluate",
    "load",
    "make_environment",
    "rollout",
    "train",
]


def __getattr__(name: str) -> Any:
    """Imported when they are asked for: the command line shows its help without PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'bm3il' has no attribute '{name}'; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
