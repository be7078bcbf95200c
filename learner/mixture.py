"""What agents make of what they see: attention of many agents over few entities."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from protocol.stacked import TILE_NUMBERS

FORBIDDEN_SCORE = -1e9

Tile = tuple[slice, slice, slice]
"""Some rows and one head of an array [B, …, H]."""

_softmax_backward = torch.ops.aten._softmax_backward_data


@dataclass(frozen=True)
class Projected:
    """Keys or values.

    entities: [B, K, H].   own: [B, n, H], of the own actions of n agents, if those are to leave the means.
    """

    entities: torch.Tensor
    own: torch.Tensor | None = None

    def of(self, slots: slice) -> Projected:
        """As these agents see it."""
        return Projected(self.entities, None if self.own is None else self.own[:, slots])

    def detach(self) -> Projected:
        """Itself as a constant."""
        return Projected(self.entities.detach(), None if self.own is None else self.own.detach())

    def to(self, dtype: torch.dtype) -> Projected:
        """Itself in another arithmetic."""
        return Projected(self.entities.to(dtype), None if self.own is None else self.own.to(dtype))

    def empty_like(self) -> Projected:
        """Room for its gradient."""
        return Projected(torch.empty_like(self.entities), None if self.own is None else torch.empty_like(self.own))

    def __getitem__(self, tile: Tile) -> Projected:
        """Views of some rows and one head, [R, …, d]."""
        return Projected(self.entities[tile], None if self.own is None else self.own[tile])


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
        keys = None if self.keys is None else self.keys.detach()
        return Scene(keys, self.values.detach(), self.visible, self.share)


def mixture(queries: torch.Tensor, scene: Scene, heads: int) -> torch.Tensor:
    """Σ_k α_k V e_k of every agent, α = softmax_k(key · query) in each head; queries [B, n, H] → [B, n, H].

    0 for an agent that sees nothing; where all weigh the same, queries are not looked at. Differentiable once.
    """
    keys, values = scene.keys, scene.values
    if keys is None:
        weights = scene.visible / scene.visible.sum(1, keepdim=True).clamp(min=1)
        return _combined(weights, values, scene.share).expand(-1, queries.shape[1], -1)
    seen = keys.entities, keys.own, values.entities, values.own
    return _Mixture.apply(queries, *seen, scene.visible, scene.share, heads)


def attention(queries: torch.Tensor, keys: Projected, scene: Scene, heads: int) -> torch.Tensor:
    """α as it reads in Eq. 11, for people to look at: queries [B, n, H] → [B, n, K], mean over heads."""
    width = queries.shape[2] // heads
    columns = [(slice(None), slice(None), slice(first, first + width)) for first in range(0, width * heads, width)]
    scores = [_products(queries[head], keys[head], scene.share) for head in columns]
    return torch.stack([_softmax(score, scene.visible) for score in scores]).mean(0).mT


class _Mixture(torch.autograd.Function):
    """`mixture`, some rows and one head at a time, so that what lies between its products stays cached.

    Of a tile, scores and weights are [R, K, n], agents last: a softmax along any other axis than the short one of the
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
        k, v = Projected(keys, own_keys).to(queries.dtype), Projected(values, own_values).to(queries.dtype)
        mixed = torch.empty_like(queries)
        weights = queries.new_empty(heads, len(queries), keys.shape[1], queries.shape[1])
        for rows, head, tile in _tiles(queries, heads):
            shares = None if share is None else share[rows]
            w = _softmax(_products(queries[tile], k[tile], shares), visible[rows])
            mixed[tile] = _combined(w, v[tile], shares)
            weights[head, rows] = w
        ctx.save_for_backward(queries, k.entities, k.own, v.entities, v.own, share, weights)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        queries, keys, own_keys, values, own_values, share, weights = ctx.saved_tensors
        k, v = Projected(keys, own_keys), Projected(values, own_values)
        d_queries, d_k, d_v = torch.empty_like(queries), k.empty_like(), v.empty_like()
        for rows, head, tile in _tiles(queries, len(weights)):
            shares = None if share is None else share[rows]
            d, w = gradient[tile], weights[head, rows]
            d_weights = _products(d, v[tile], shares)
            d_scores = _softmax_backward(d_weights, w.to(d_weights.dtype), 1, d_weights.dtype)
            d_queries[tile] = _combined(d_scores, k[tile], shares)
            _spread(d_scores, queries[tile], shares, d_k[tile])
            _spread(w, d, shares, d_v[tile])
        return d_queries, d_k.entities, d_k.own, d_v.entities, d_v.own, None, None, None


def _products(x: torch.Tensor, y: Projected, share: torch.Tensor | None) -> torch.Tensor:
    """x · y of every agent's x [R, n, d] and what it sees: [R, K, n], at least float32."""
    products = torch.bmm(y.entities, x.mT)
    products = products.to(torch.promote_types(products.dtype, torch.float32))
    if y.own is None or share is None:
        return products
    alone = (x * y.own).sum(-1, dtype=products.dtype).unsqueeze(1)
    return torch.addcmul(products, share, products - alone)


def _combined(weights: torch.Tensor, y: Projected, share: torch.Tensor | None) -> torch.Tensor:
    """Σ_k weight_k y_k of every agent, [R, n, d]; weights [R, K, n]."""
    if y.own is None or share is None:
        return torch.bmm(weights.mT.to(y.entities.dtype), y.entities)
    moved = weights * share
    combined = torch.bmm((weights + moved).mT.to(y.entities.dtype), y.entities)
    return combined.addcmul_(moved.sum(1).unsqueeze(-1).to(combined.dtype), y.own, value=-1)


def _spread(weights: torch.Tensor, x: torch.Tensor, share: torch.Tensor | None, d_y: Projected) -> None:
    """Write the gradient of Σ x · `_combined` with respect to its y."""
    if d_y.own is not None and share is not None:
        moved = weights * share
        torch.mul(x, moved.sum(1).neg_().unsqueeze(-1).to(x.dtype), out=d_y.own)
        weights = weights + moved
    d_y.entities.copy_(torch.bmm(weights.to(x.dtype), x))


def _softmax(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Weights of what an agent sees, all 0 if that is nothing; scores [R, K, n], visible [R, K, 1 or n] bool."""
    seen = visible.to(scores.dtype)
    return (scores + (1 - seen) * FORBIDDEN_SCORE).softmax(1).mul_(seen)


def _tiles(agents: torch.Tensor, heads: int) -> Iterator[tuple[slice, int, Tile]]:
    """Rows, head and what they are of an array [B, …, H]."""
    batch, count, width = agents.shape[0], agents.shape[1], agents.shape[2] // heads
    height = max(1, TILE_NUMBERS // (count * width)) if agents.device.type == "cpu" else batch
    for first in range(0, batch, height):
        rows = slice(first, first + height)
        for head in range(heads):
            yield rows, head, (rows, slice(None), slice(head * width, (head + 1) * width))
