"""benchmarks/meeting.py: a world of PettingZoo's in which partners meet."""

from __future__ import annotations

import meeting
import pytest
from pettingzoo.test import parallel_api_test


def test_it_is_an_environment_of_pettingzoo() -> None:
    parallel_api_test(meeting.parallel_env(agents=4, places=3), num_cycles=60)


def test_partners_meet_and_nobody_else() -> None:
    env = meeting.parallel_env(agents=4, places=3)
    env.reset(seed=0)
    seen, rewards, *_ = env.step({"a": 1, "b": 1, "c": 1, "d": 2})
    assert rewards == {"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.0}
    assert [float(seen[agent]["met"][0]) for agent in env.agents] == [1, 1, 0, 0]
    assert seen["d"]["place"].tolist() == [0, 0, 1]


def test_an_episode_has_an_end_and_partners_are_two() -> None:
    env = meeting.parallel_env()
    env.reset(seed=0)
    for _ in range(meeting.STEPS):
        assert env.agents
        *_, truncations, _ = env.step(dict.fromkeys(env.agents, 0))
    assert not env.agents
    assert all(truncations.values())
    with pytest.raises(ValueError, match="two by two, got 3"):
        meeting.parallel_env(agents=3)
