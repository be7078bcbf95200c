"""Tests of my_town: `pytest`."""

import numpy as np
from my_town import PLACES, STEPS, MyTown, Planner

from bm3il.launch.environments.check import check_environment


def test_it_keeps_the_contract_of_bm3il() -> None:
    assert check_environment("my_town") == 0  # installed with `pip install -e .`


def test_a_cart_goes_two_places_on() -> None:
    town = MyTown(num_envs=2)
    before = town.reset(seed=1).observations[1][..., :PLACES].argmax(-1)
    after = town.step([np.full((2, 3), 1), np.full((2, 2), 2)]).observations[1][..., :PLACES].argmax(-1)
    assert ((before + 2) % PLACES == after).all()


def test_the_planner_arrives() -> None:
    town = MyTown(num_envs=8)
    now = town.reset(seed=1)
    for _ in range(STEPS):
        now = town.step(Planner(town.spec).act(now))
    assert all((reward == 1).all() for reward in now.rewards)
