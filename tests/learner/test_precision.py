"""Which arithmetic the products of an update are computed in, forward and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bm3il.actors.policy import Policy
from bm3il.learner import few_actions, mixture
from bm3il.learner.action_critic import ActionActorCritic, ActionCritic
from bm3il.learner.settings import LearnerSettings
from bm3il.protocol.layout import Layout
from bm3il.protocol.networks.stacked import _Layers
from tests.learner.slow_reference import random_batch
from tests.learner.test_actor_critic import UNEVEN
from tests.learner.test_actor_critic import build as build_off_policy
from tests.learner.test_clipped import build as build_clipped
from tests.learner.test_clipped import played

TF32 = LearnerSettings(hidden=8, heads=2, precision="tf32")


def of_the_actor() -> None:
    built = build_off_policy(settings=TF32)
    batch = random_batch(built.layout, 6, 1)
    built.update(batch, batch.rewards, 0.0)


def of_the_action_critic() -> None:
    layout, generator = Layout.of(UNEVEN, "type"), torch.Generator().manual_seed(0)
    critic = ActionCritic(layout, "types", 8, 2, True, generator)
    built = ActionActorCritic(Policy(layout, (8,), generator), critic, TF32, torch.device("cpu"), 0)
    batch = random_batch(layout, 6, 1)
    built.update(batch, batch.rewards, 0.0)


def of_clipped_steps() -> None:
    built = build_clipped(settings=dataclasses.replace(TF32, discount=0.9))
    built.update(*played(built), 0.0)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("update", [of_the_actor, of_the_action_critic, of_clipped_steps])
def test_tf32_lasts_from_the_first_product_to_the_last(
    update: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[str]] = {}

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watch(*args: Any, **kwargs: Any) -> Any:
            seen.setdefault(name, set()).add(torch.get_float32_matmul_precision())
            return function(*args, **kwargs)

        return watch

    for name in ("forward", "backward"):
        monkeypatch.setattr(_Layers, name, watched(f"layers {name}", getattr(_Layers, name)))
        for function in (few_actions._Mixture, mixture._Mixture):
            attended = watched(f"attention {name}", getattr(function, name))
            monkeypatch.setattr(function, name, staticmethod(attended))
    update()
    assert set(seen) == {"layers forward", "layers backward", "attention forward", "attention backward"}
    assert set().union(*seen.values()) == {"high"}
    assert torch.get_float32_matmul_precision() == "highest"
