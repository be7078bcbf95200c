"""What agents make of what they see: attention of many agents over few entities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from protocol.networks.stacked import TILE_NUMBERS

FORBIDDEN_SCORE = -1e9

Tile = tuple[slice, slice, slice]
"""Some rows and heads of an array [B, …, H]."""

_softmax_backward = torch.ops.aten._softmax_backward_data


@dataclass(frozen=True)
class Projected:
    """Keys or values.

    entities: [B, K, H].   own: [B, n, H], of the own actions of n agents, if those are to leave the means.
    """

    entities: torch.Tensor
    own: torch.Tensor | None = None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Projected:
        """Both, changed."""
        return Projected(change(self.entities), None if self.own is None else change(self.own))

    def of(self, slots: slice) -> Projected:
        """As these agents see it."""
        return Projected(self.entities, None if self.own is None else self.own[:, slots])

    def __getitem__(self, tile: Tile) -> Projected:
        """Views of some rows and heads."""
        return self.map(lambda x: x[tile])


@dataclass(frozen=True)
class Scene:
    """What n agents can look at in B joint rows.

    keys: W_k e_k/√d, or None if all weigh the same.   values: V e_k.
    visible: [B, K, n] bool, or [B, K, 1] if all agents see the same.
    share: [B, K, n], where own actions are to leave the means: 1/(X − 1) for the entity that is the mean of X actions,
        the agent's own among them, else 0. A key is linear in its mean, so that of the others' mean is
        key + share · (key − own key); and the value likewise.
    """

    keys: Projected | None
    values: Projected
    visible: torch.Tensor
    share: torch.Tensor | None = None

    def of(self, slots: slice) -> Scene:
        """As these agents see it."""
        visible = self.visible if self.visible.shape[2] == 1 else self.visible[:, :, slots]
        share = None if self.share is None else self.share[:, :, slots]
        return Scene(None if self.keys is None else self.keys.of(slots), self.values.of(slots), visible, share)

    def detach(self) -> Scene:
        """Itself as a constant."""
        keys = None if self.keys is None else self.keys.map(torch.detach)
        return Scene(keys, self.values.map(torch.detach), self.visible, self.share)


def mixture(queries: torch.Tensor, scene: Scene, heads: int) -> torch.Tensor:
    """Σ_k α_k V e_k of every agent, α = softmax_k(key · query) in each head; queries [B, n, H] → [B, n, H].

    0 for an agent that sees nothing; where all weigh the same, queries are not looked at. Differentiable once.
    """
    keys, values = scene.keys, scene.values
    if keys is None:
        weights = scene.visible / scene.visible.sum(1, keepdim=True).clamp(min=1)
        return _combined(weights.unsqueeze(1), values, scene.share).expand(-1, queries.shape[1], -1)
    seen = keys.entities, keys.own, values.entities, values.own
    return _Mixture.apply(queries, *seen, scene.visible, scene.share, heads)


def attention(queries: torch.Tensor, keys: Projected, scene: Scene, heads: int) -> torch.Tensor:
    """α as it reads in Eq. 11, for people to look at: queries [B, n, H] → [B, n, K], mean over heads."""
    return _softmax(_products(queries, keys, scene.share, heads), scene.visible).mean(1).mT


class _Mixture(torch.autograd.Function):
    """`mixture`, some rows and heads after others, so that what lies between its products stays cached.

    Scores and weights are [R, heads, K, n], agents last: a softmax along any other axis than the short one of the
    entities is twenty times as fast.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: torch.Tensor,
        keys: torch.Tensor,
        own_keys: torch.Tensor | None,
        values: torch.Tensor,
        own_values: torch.Tensor | None,
        visible: torch.Tensor,
        share: torch.Tensor | None,
        heads: int,
    ) -> torch.Tensor:
        sides = Projected(keys, own_keys), Projected(values, own_values)
        k, v = (side.map(lambda x: x.to(queries.dtype)) for side in sides)
        mixed = torch.empty_like(queries)
        weights = queries.new_empty(len(queries), heads, keys.shape[1], queries.shape[1])
        for rows, some, tile in _tiles(weights, queries):
            shares = None if share is None else share[rows]
            w = weights[rows, some]
            w.copy_(_softmax(_products(queries[tile], k[tile], shares, w.shape[1]), visible[rows]))
            mixed[tile] = _combined(w, v[tile], shares)
        ctx.save_for_backward(queries, k.entities, k.own, v.entities, v.own, share, weights)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        queries, keys, own_keys, values, own_values, share, weights = ctx.saved_tensors
        k, v = Projected(keys, own_keys), Projected(values, own_values)
        d_queries, d_k, d_v = torch.empty_like(queries), k.map(torch.empty_like), v.map(torch.empty_like)
        for rows, some, tile in _tiles(weights, queries):
            shares = None if share is None else share[rows]
            d, w = gradient[tile], weights[rows, some]
            d_weights = _products(d, v[tile], shares, w.shape[1])
            d_scores = _softmax_backward(d_weights, w.to(d_weights.dtype), 2, d_weights.dtype)
            d_queries[tile] = _combined(d_scores, k[tile], shares)
            _spread(d_scores, queries[tile], shares, d_k[tile])
            _spread(w, d, shares, d_v[tile])
        return d_queries, d_k.entities, d_k.own, d_v.entities, d_v.own, None, None, None


def _products(x: torch.Tensor, y: Projected, share: torch.Tensor | None, heads: int) -> torch.Tensor:
    """x · y of every agent's x [R, n, H] and what it sees, in each head: [R, heads, K, n], at least float32."""
    products = torch.bmm(_block_diagonal(y.entities, heads), x.mT).unflatten(1, (heads, -1))
    products = products.to(torch.promote_types(products.dtype, torch.float32))
    if y.own is None or share is None:
        return products
    alone = (x * y.own).unflatten(2, (heads, -1)).sum(-1, dtype=products.dtype).mT.unsqueeze(2)
    return torch.addcmul(products, share.unsqueeze(1), products - alone)


def _combined(weights: torch.Tensor, y: Projected, share: torch.Tensor | None) -> torch.Tensor:
    """Σ_k weight_k y_k of every agent, [R, n, H]; weights [R, heads, K, n]."""
    heads, entities = weights.shape[1], _block_diagonal(y.entities, weights.shape[1])
    if y.own is None or share is None:
        return torch.bmm(weights.flatten(1, 2).mT.to(entities.dtype), entities)
    moved = weights * share.unsqueeze(1)
    combined = torch.bmm((weights + moved).flatten(1, 2).mT.to(entities.dtype), entities)
    of_own = moved.sum(2).mT.unsqueeze(-1).to(entities.dtype)
    combined.unflatten(2, (heads, -1)).addcmul_(of_own, y.own.unflatten(2, (heads, -1)), value=-1)
    return combined


def _spread(weights: torch.Tensor, x: torch.Tensor, share: torch.Tensor | None, d_y: Projected) -> None:
    """Write the gradient of Σ x · `_combined` with respect to its y."""
    heads = weights.shape[1]
    if d_y.own is not None and share is not None:
        moved = weights * share.unsqueeze(1)
        of_own = moved.sum(2).neg_().mT.unsqueeze(-1).to(x.dtype)
        torch.mul(x.unflatten(2, (heads, -1)), of_own, out=d_y.own.unflatten(2, (heads, -1)))
        weights = weights + moved
    d_y.entities.copy_(_diagonal(torch.bmm(weights.flatten(1, 2).to(x.dtype), x), heads))


def _softmax(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Weights of what an agent sees, all 0 if that is nothing; scores [R, heads, K, n], visible [R, K, 1 or n] bool."""
    seen = visible.unsqueeze(1).to(scores.dtype)
    return (scores + (1 - seen) * FORBIDDEN_SCORE).softmax(2).mul_(seen)


def _tiles(weights: torch.Tensor, agents: torch.Tensor) -> Iterator[tuple[slice, slice, Tile]]:
    """Rows, heads and what they are of an array [B, …, H]; weights [B, heads, K, n], agents [B, n, H]."""
    batch, heads, entities, count = weights.shape
    width = agents.shape[2] // heads
    # All heads in one product do `heads` times the work; products of few entities are too small to be worth more calls.
    together = heads if heads * entities < width else 1
    height = max(1, TILE_NUMBERS // (count * together * width)) if agents.device.type == "cpu" else batch
    for first in range(0, batch, height):
        for head in range(0, heads, together):
            rows, columns = slice(first, first + height), slice(head * width, (head + together) * width)
            yield rows, slice(head, head + together), (rows, slice(None), columns)


def _block_diagonal(y: torch.Tensor, heads: int) -> torch.Tensor:
    """[R, K, heads·d] → [R, heads·K, heads·d] with every head in its own rows and columns.

    One product with all heads' weights then does what would take one of each head.
    """
    if heads == 1:
        return y
    rows, count, width = y.shape
    spread = y.new_zeros(rows, heads, count, heads, width // heads)
    spread.diagonal(dim1=1, dim2=3).copy_(y.unflatten(2, (heads, -1)).movedim(2, 3))
    return spread.view(rows, heads * count, width)


def _diagonal(spread: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `_block_diagonal`, which forgets what is not on the diagonal."""
    if heads == 1:
        return spread
    blocks = spread.unflatten(1, (heads, -1)).unflatten(3, (heads, -1))
    return blocks.diagonal(dim1=1, dim2=3).movedim(3, 2).flatten(2)
