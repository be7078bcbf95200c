"""Babbling: many kinds of nonsense, the same every time."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from bm3il.actors.babbling import Babble
from bm3il.actors.collector import Collector
from bm3il.actors.process import build_policy
from bm3il.actors.rollout import rollout
from bm3il.launch.config import load_preset
from bm3il.launch.topology import make_job
from bm3il.protocol.job import Endpoints
from bm3il.protocol.layout import Layout
from bm3il.protocol.registry import make_environment
from tests.plain import observed, to_rows

TOWN = "berlin?scenario=berlin46&types=5&agents=10&sight=near"


def test_it_shows_habits_and_chance_and_staying_at_home() -> None:
    torch.set_num_threads(1)
    town = make_environment(TOWN, 20)
    babble = Babble(Layout.of(town.spec, "type"), (16,), 20, seed=3)
    played = rollout(town, babble, seed=1)
    roads = 46
    place = np.concatenate([o[:-1, ..., : roads + 10].argmax(-1) for o in played.observations], axis=2)
    stays = (place[1:] == place[:-1]).mean(axis=0)  # [E, N] part of the steps in which an agent stays where it is
    assert stays.min() < 0.65
    assert (stays > 0.95).mean() > 0.05
    chances = np.concatenate(played.log_probabilities, axis=2).mean(axis=(0, 2))
    assert chances[0] < 5 * chances[15] < 0  # the first environment is played by chance, the sixteenth by habit


def test_an_environment_of_its_own_is_played_as_beside_others() -> None:
    layout = Layout.of(make_environment(TOWN, 1).spec, "type")
    town = make_environment(TOWN, 5)
    now = town.reset(0)
    babble = Babble(layout, (16,), 5, seed=3)
    actions, chances = babble.decide(now, torch.Generator().manual_seed(0), greedy=True)
    for e in range(5):
        seen, masks = (to_rows(layout, [a[e : e + 1] for a in part]) for part in (now.observations, now.action_masks))
        alone = babble._policies[e].choose(
            [observed(*block) for block in zip(seen, masks, strict=True)],
            torch.Generator().manual_seed(0),
            greedy=True,
        )
        for m in range(layout.spec.num_types):
            np.testing.assert_array_equal(actions[m][e], alone[0][m][0])
            np.testing.assert_allclose(chances[m][e], alone[1][m][0], rtol=1e-4, atol=1e-6)


def test_no_two_networks_are_one() -> None:
    babble = Babble(Layout.of(make_environment(TOWN, 1).spec, "type"), (16,), 3, seed=3)
    first_layers = [next(policy.parameters()) for policy in babble._policies]
    assert not any(torch.equal(one, other) for one, other in combinations(first_layers, 2))


def test_the_first_versions_are_babbled_whatever_the_weights() -> None:
    config = load_preset("berlin")
    config = replace(config, environment=TOWN, actors=1, actor=replace(config.actor, babbling=2, hidden=(16,)))
    job = make_job(config, make_environment(TOWN, 1).spec, "", Path(), Endpoints("", "", "", ""))
    collector = Collector(job, config.actor, 0)
    one, other = build_policy(job, config.actor), build_policy(replace(job, seed=5), config.actor)

    def actions(version: int) -> list[list[np.ndarray]]:
        return [collector.collect(policy, version).actions for policy in (one, other)]

    babbled, again = actions(1)
    assert all(np.array_equal(a, b) for a, b in zip(babbled, again, strict=True))
    mine, theirs = actions(2)
    assert not all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))
