"""Does a critic that sees the others' actions help where nothing else counts? `python benchmarks/meeting.py`

A world in which it is all about the others: agents, each of a type of its own, are partners two by two. In every step
each goes to a place, and has met if its partner went there, too. It sees whether it had met, and where it was; what
others do it cannot see, and no place is better than another: partners must agree on one, while all others go their own
ways. Experts agree on a place for each episode. The reward sees nothing but whether one has met.

Trains the critics' contexts, with one particle each (studies/meeting.yaml), and prints `bm3il compare` of them: ten
minutes of two cores. The world is `pettingzoo:meeting` for whoever has this folder on PYTHONPATH; it needs the extra
`pettingzoo`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from gymnasium import spaces
from pettingzoo import ParallelEnv

import bm3il
from bm3il.launch.cli import main as command

STUDY = Path(__file__).resolve().parent / "studies" / "meeting.yaml"
STEPS, AGENTS, PLACES, RECORDED = 25, 12, 12, 50


class Meeting(ParallelEnv):
    """A true reward of 1 for whoever met."""

    metadata = {"name": "meeting_v0", "render_modes": []}  # noqa: RUF012

    def __init__(self, agents: int = AGENTS, places: int = PLACES) -> None:
        if agents % 2:
            raise ValueError(f"agents are partners two by two, got {agents}")
        self.places, self.partners = places, np.arange(agents) ^ 1
        self.possible_agents = [chr(ord("a") + n) for n in range(agents)]
        self.agents: list[str] = []
        self._observed = spaces.Dict({"met": spaces.Box(0, 1, (1,)), "place": spaces.Box(0, 1, (places,))})
        self._places = spaces.Discrete(places)

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        return self._observed

    def action_space(self, agent: str) -> spaces.Space[Any]:
        return self._places

    def reset(self, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        if seed is not None:
            self._random = np.random.default_rng(seed)
        self.agents, self._step = list(self.possible_agents), 0
        places = self._random.integers(self.places, size=len(self.agents))
        return self._seen(places), {agent: {} for agent in self.agents}

    def step(self, actions: dict[str, int]) -> tuple[dict[str, Any], ...]:
        self._step += 1
        seen = self._seen(np.array([actions[agent] for agent in self.agents]))
        rewards = {agent: float(seen[agent]["met"][0]) for agent in self.agents}
        over = self._step >= STEPS
        told = tuple(dict.fromkeys(self.agents, value) for value in (False, over))
        infos: dict[str, Any] = {agent: {} for agent in self.agents}
        if over:
            self.agents = []
        return seen, rewards, *told, infos

    def _seen(self, places: np.ndarray) -> dict[str, Any]:
        """Of each agent, when they are at these places [agents]."""
        met = places == places[self.partners]
        shown = np.eye(self.places, dtype=np.float32)[places]
        return {
            agent: {"met": np.array([met[n]], np.float32), "place": shown[n]}
            for n, agent in enumerate(self.possible_agents)
        }


def parallel_env(**arguments: Any) -> Meeting:
    return Meeting(**arguments)


def record(name: str, path: Path) -> None:
    """Partners agree on a place for each episode."""
    env, random = bm3il.Recorder(parallel_env(), name), np.random.default_rng(0)
    for episode in range(RECORDED):
        env.reset(seed=7_000 + episode)
        agreed = dict(zip(env.agents, random.integers(PLACES, size=AGENTS // 2).repeat(2), strict=True))
        while env.agents:
            env.step({agent: int(agreed[agent]) for agent in env.agents})
    env.save(path)


def main() -> int:
    """The exit code of `bm3il study`, or of `bm3il compare`."""
    paths = [str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    settings = yaml.safe_load(STUDY.read_text(encoding="utf-8"))["settings"]
    demonstrations = Path(settings["demonstrations"])
    demonstrations.parent.mkdir(parents=True, exist_ok=True)
    record(settings["environment"], demonstrations)
    return command(["study", str(STUDY)]) or command(["compare", "runs/meeting", "--baseline", "ma-gail"])


if __name__ == "__main__":
    sys.exit(main())
