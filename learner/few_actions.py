"""Attention over types' mean actions, where all types together have few: `learner.mixture` by a shorter way.

What is seen of type k is linear in its mean action, whose shares add up to 1: q · W_k e_k = Σ_a ā_k(a) q · W_k e_k(a).
So queries meet the projected actions, which are the same in all rows, and then the shares. Nothing as wide as a query
is made for an agent's own action, which leaves the mean while that is a few numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from bm3il.learner.mixture import FORBIDDEN_SCORE

FEW_ACTIONS = 32
"""Of all types together: with 50 of them both ways take a CPU as long (queries of 128 numbers, float32)."""
TILE_NUMBERS = 1 << 18
"""Of queries in a tile on a CPU: a megabyte, as in `learner.mixture`."""

_softmax_backward = torch.ops.aten._softmax_backward_data


@dataclass(frozen=True)
class FewActions:
    """What each of R agents (those of a grid, row after row) can look at: K types of at most A actions.

    keys: W_k e_k(a)/√d of every type's every action, or None if all weigh the same.   values: V e_k(a).   Both
        [K, A, H].
    shares: [K, A, R], the mean action of each type as each agent sees it.   visible: [K, R] bool.
    """

    keys: torch.Tensor | None
    values: torch.Tensor
    shares: torch.Tensor
    visible: torch.Tensor

    def mix(self, queries: torch.Tensor, heads: int) -> torch.Tensor:
        """As `mixture.Scene.mix`: queries [R, H] → [R, H]."""
        if self.keys is None:
            weights = self.visible / self.visible.sum(0).clamp(min=1)
            seen = (weights.unsqueeze(1) * self.shares).flatten(0, 1).mT
            return seen.to(queries.dtype) @ self.values.flatten(0, 1).to(queries.dtype)
        return _Mixture.apply(queries, self.keys, self.values, self.shares, self.visible, heads)

    @torch.no_grad()
    def weights(self, queries: torch.Tensor, heads: int) -> torch.Tensor:
        """α as it reads in Eq. 11, for people to look at: [R, K], mean over heads."""
        assert self.keys is not None
        products = _products(_by_head(self.keys, heads), queries)
        return _softmax(_scores(products, self.shares), self.visible).mean(0).mT


class _Mixture(torch.autograd.Function):
    """`FewActions.mix`, some agents after others, so that what lies between its products stays cached.

    The r agents of a tile come last, [heads, K·A, r]: sums and softmaxes over types and actions go across them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        shares: torch.Tensor,
        visible: torch.Tensor,
        heads: int,
    ) -> torch.Tensor:
        k, v = (_by_head(y.to(queries.dtype), heads) for y in (keys, values))
        shares = shares.to(queries.dtype)
        mixed = torch.empty_like(queries, memory_format=torch.contiguous_format)
        weights = []
        for some in _tiles(queries):
            of_types = shares[:, :, some]
            weights.append(_softmax(_scores(_products(k, queries[some]), of_types), visible[:, some]))
            _combine(_of_actions(weights[-1], of_types), v, mixed[some])
        ctx.save_for_backward(queries, k, v, shares, *weights)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        queries, k, v, shares, *weights = ctx.saved_tensors
        d_queries = torch.empty_like(queries, memory_format=torch.contiguous_format)
        sums = torch.promote_types(k.dtype, torch.float32)  # many tiles are added up
        d_k, d_v = (torch.zeros_like(y, dtype=sums) for y in (k, v))
        for some, w in zip(_tiles(queries), weights, strict=True):
            of_types, d = shares[:, :, some], gradient[some].contiguous()
            d_weights = _scores(_products(v, d), of_types)
            d_scores = _of_actions(_softmax_backward(d_weights, w, 1, w.dtype), of_types)
            _combine(d_scores, k, d_queries[some])
            d_k += d_scores @ _agents(queries[some], len(k)).mT
            d_v += _of_actions(w, of_types) @ _agents(d, len(v)).mT
        tables = (d.movedim(0, 1).reshape(*shares.shape[:2], -1) for d in (d_k, d_v))
        return d_queries, *tables, None, None, None


def _tiles(agents: torch.Tensor) -> Iterator[slice]:
    """Some of the agents [R, H] after others."""
    count = max(1, TILE_NUMBERS // agents.shape[1]) if agents.device.type == "cpu" else max(1, len(agents))
    for first in range(0, len(agents), count):
        yield slice(first, first + count)


def _by_head(table: torch.Tensor, heads: int) -> torch.Tensor:
    """[K, A, H] → [heads, K·A, d]."""
    return table.flatten(0, 1).unflatten(1, (heads, -1)).movedim(1, 0).contiguous()


def _agents(x: torch.Tensor, heads: int) -> torch.Tensor:
    """A view of [r, H] as [heads, d, r]."""
    return x.unflatten(1, (heads, -1)).permute(1, 2, 0)


def _products(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Of every action [heads, K·A, d] with the x [r, H] of every agent: [heads, K·A, r]."""
    products = x.new_empty(*table.shape[:2], len(x))
    for product, actions, agents in zip(products, table, _agents(x, len(table)), strict=True):
        torch.mm(actions, agents, out=product)  # one by one: of all at once bfloat16 would copy the agents first
    return products


def _scores(products: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Those of types, [heads, K, r], at least float32: products [heads, K·A, r] in the proportion of shares
    [K, A, r]."""
    sums = torch.promote_types(products.dtype, torch.float32)
    return (products.unflatten(1, shares.shape[:2]) * shares).sum(2, dtype=sums)


def _of_actions(of_types: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """What is given to types, [heads, K, r], among their actions, [heads, K·A, r]."""
    return (of_types.unsqueeze(2).to(shares.dtype) * shares).flatten(1, 2)


def _combine(weights: torch.Tensor, table: torch.Tensor, target: torch.Tensor) -> None:
    """Write Σ_a weight_a · table_a of every agent to [r, H]."""
    torch.bmm(weights.mT, table, out=_agents(target, len(table)).mT)


def _softmax(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Weights of what an agent sees, all 0 if that is nothing; scores [heads, K, r], visible [K, r] bool."""
    return scores.masked_fill(~visible, FORBIDDEN_SCORE).softmax(1).mul_(visible)
