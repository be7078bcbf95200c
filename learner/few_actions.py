"""Attention over types' mean actions, where all types together have few: `learner.mixture` by a shorter way.

What is seen of type k is linear in its mean action, whose shares add up to 1: q · W_k e_k = Σ_a ā_k(a) q · W_k e_k(a).
So queries meet the projected actions, which are the same in all rows, and then the shares. Nothing as wide as a query
is made for an agent's own action, which leaves the mean while that is a few numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from learner.mixture import FORBIDDEN_SCORE, tiles

FEW_ACTIONS = 32
"""Of all types together: with 50 of them both ways take a CPU as long (queries of 128 numbers, float32)."""

_softmax_backward = torch.ops.aten._softmax_backward_data


@dataclass(frozen=True)
class FewActions:
    """What agents, in a grid [G, R], can look at: K types of at most A actions.

    keys: W_k e_k(a)/√d of every type's every action, or None if all weigh the same.   values: V e_k(a).   Both
        [K, A, H].
    shares: [K, A, G, R], the mean action of each type as each agent sees it.   visible: [K, G, R] bool.
    """

    keys: torch.Tensor | None
    values: torch.Tensor
    shares: torch.Tensor
    visible: torch.Tensor

    def detach(self) -> FewActions:
        """Itself as a constant."""
        return replace(self, keys=None if self.keys is None else self.keys.detach(), values=self.values.detach())

    def mix(self, queries: torch.Tensor, heads: int) -> torch.Tensor:
        """As `mixture.Scene.mix`: queries [G, R, H] → [G, R, H]."""
        if self.keys is None:
            weights = self.visible / self.visible.sum(0).clamp(min=1)
            seen = (weights.unsqueeze(1) * self.shares).flatten(0, 1).movedim(0, -1)
            return seen.to(queries.dtype) @ self.values.flatten(0, 1).to(queries.dtype)
        return _Mixture.apply(queries, self.keys, self.values, self.shares, self.visible, heads)

    @torch.no_grad()
    def weights(self, queries: torch.Tensor, heads: int) -> torch.Tensor:
        """α as it reads in Eq. 11, for people to look at: [G, R, K], mean over heads."""
        assert self.keys is not None
        of_actions = _products(_by_head(self.keys, heads), queries)
        weights = _softmax(_scores(of_actions, self.shares.flatten(2)), self.visible.flatten(1))
        return weights.mean(0).mT.unflatten(0, queries.shape[:2])


class _Mixture(torch.autograd.Function):
    """`FewActions.mix`, some agents after others, so that what lies between its products stays cached.

    The g·R agents of a tile come last, [heads, K·A, g·R]: sums and softmaxes over types and actions go across them.
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
        kept = []
        for rows in tiles(queries):
            of_types = shares[:, :, rows].flatten(2)
            weights = _softmax(_scores(_products(k, queries[rows]), of_types), visible[:, rows].flatten(1))
            _combine(_of_actions(weights, of_types), v, mixed[rows])
            kept.append(weights)
        ctx.save_for_backward(queries, k, v, shares, *kept)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        queries, k, v, shares, *kept = ctx.saved_tensors
        d_queries = torch.empty_like(queries, memory_format=torch.contiguous_format)
        wanted = ctx.needs_input_grad[1:3]  # a scene that is a constant, as it is for a policy's step, has none
        sums = torch.promote_types(k.dtype, torch.float32)
        d_k, d_v = (torch.zeros_like(y, dtype=sums) if want else None for y, want in zip((k, v), wanted, strict=True))
        for rows, weights in zip(tiles(queries), kept, strict=True):
            of_types, d = shares[:, :, rows].flatten(2), gradient[rows].contiguous()
            d_weights = _scores(_products(v, d), of_types)
            d_scores = _of_actions(_softmax_backward(d_weights, weights, 1, weights.dtype), of_types)
            _combine(d_scores, k, d_queries[rows])
            if d_k is not None:
                d_k += d_scores @ _agents(queries[rows], len(k)).mT
            if d_v is not None:
                d_v += _of_actions(weights, of_types) @ _agents(d, len(v)).mT
        tables = [None if d is None else d.movedim(0, 1).reshape(*shares.shape[:2], -1) for d in (d_k, d_v)]
        return d_queries, *tables, None, None, None


def _by_head(table: torch.Tensor, heads: int) -> torch.Tensor:
    """[K, A, H] → [heads, K·A, d]."""
    return table.flatten(0, 1).unflatten(1, (heads, -1)).movedim(1, 0).contiguous()


def _agents(x: torch.Tensor, heads: int) -> torch.Tensor:
    """A view of [g, R, H] as [heads, d, g·R]."""
    return x.flatten(0, 1).unflatten(1, (heads, -1)).permute(1, 2, 0)


def _products(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Of every action [heads, K·A, d] with the x [g, R, H] of every agent: [heads, K·A, g·R]."""
    products = x.new_empty(*table.shape[:2], x.shape[0] * x.shape[1])
    for product, actions, agents in zip(products, table, _agents(x, len(table)), strict=True):
        torch.mm(actions, agents, out=product)  # one by one: of all at once bfloat16 would copy the agents first
    return products


def _scores(products: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Those of types, [heads, K, g·R], at least float32: products [heads, K·A, g·R] in the proportion of the shares
    [K, A, g·R]."""
    sums = torch.promote_types(products.dtype, torch.float32)
    return (products.unflatten(1, shares.shape[:2]) * shares).sum(2, dtype=sums)


def _of_actions(of_types: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """What is given to types, [heads, K, g·R], among their actions [heads, K·A, g·R]."""
    return (of_types.unsqueeze(2).to(shares.dtype) * shares).flatten(1, 2)


def _combine(weights: torch.Tensor, table: torch.Tensor, target: torch.Tensor) -> None:
    """Write Σ_a weight_a · table_a of every agent to [g, R, H]."""
    torch.bmm(weights.mT, table, out=_agents(target, len(table)).mT)


def _softmax(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Weights of what an agent sees, all 0 if that is nothing; scores [heads, K, g·R], visible [K, g·R] bool."""
    return scores.masked_fill(~visible, FORBIDDEN_SCORE).softmax(1).mul_(visible)
