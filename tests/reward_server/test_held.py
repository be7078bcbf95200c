"""Rows by their numbers: the newest ones, as they were shown."""

from __future__ import annotations

import pytest
import torch

from bm3il.protocol.errors import InputError, ProtocolError
from bm3il.protocol.layout import JointRows, Layout
from bm3il.reward_server.held import Held
from tests.reward_server import small_model

LAYOUT = Layout.of(small_model.SPEC, "type")


def some_rows(count: int, seed: int) -> JointRows:
    return small_model.some_rows(LAYOUT, count, seed).without_masks()


def assert_equal(one: JointRows, other: JointRows) -> None:
    for a, b in zip(one.tensors(), other.tensors(), strict=True):
        assert torch.equal(a, b.to(a.dtype))


@pytest.mark.parametrize("sizes", [(3,), (10,), (4, 4, 4), (7, 30, 2), (30,)])
def test_the_newest_are_there_under_their_numbers(sizes: tuple[int, ...]) -> None:
    held = Held(LAYOUT, 10, first=1_000)
    shown = JointRows.joined([some_rows(size, seed) for seed, size in enumerate(sizes)])
    for seed, size in enumerate(sizes):
        held.keep(some_rows(size, seed))
    newest = torch.arange(max(0, len(shown) - 10), len(shown))
    for order in (newest, newest.flip(0), newest[[0, -1, 0]]):
        assert_equal(held.take(order + 1_000), shown.select(order))
    for number in (int(newest[0]) - 1, len(shown)):
        with pytest.raises(ProtocolError, match="this server holds") as refused:
            held.take(torch.tensor([1_000 + number]))
        assert refused.value.cause == "not_held"


def test_what_is_taken_is_a_copy() -> None:
    held = Held(LAYOUT, 4, first=0)
    held.keep(some_rows(4, 0))
    held.take(torch.arange(4)).active[0].fill_(False)
    assert_equal(held.take(torch.arange(4)), some_rows(4, 0))


def test_more_than_the_memory_holds_is_refused() -> None:
    with pytest.raises(InputError, match="window-steps"):
        Held(LAYOUT, 2**40, first=0)
