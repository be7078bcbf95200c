"""What agents make of what they see: attention of many agents over few entities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

TILE_NUMBERS = 1 << 18
"""Of what agents look for, [R, n, H], in a tile: a megabyte, which stays in the cache with as much of what is made of
it; smaller tiles are bound by Python."""
# Not −∞: the softmax of an agent that sees nothing would be NaN, and no factor of 0 mends that.
FORBIDDEN_SCORE = -1e9

_softmax_backward = torch.ops.aten._softmax_backward_data


@dataclass(frozen=True)
class Projected:
    """Keys or values.

    entities: [B, K, H].   actions: [T, H], of all actions that may be an agent's own, if those are to leave the means.
    """

    entities: torch.Tensor
    actions: torch.Tensor | None = None

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Projected:
        """Both, changed."""
        return Projected(change(self.entities), None if self.actions is None else change(self.actions))


@dataclass(frozen=True)
class Scene:
    """What n agents can look at in B joint rows.

    keys: W_k e_k/√d, or None if all weigh the same.   values: V e_k.
    visible: [B, K, n] bool, or [B, K, 1] if all agents see the same.
    share: [B, K, n], where own actions are to leave the means: 1/(X − 1) for the entity that is the mean of X actions,
        the agent's own among them (if X = 1, of which it sees nothing, 1), else 0. A key is linear in its mean, so that
        of the others' mean is key + share · (key − own key); and the value likewise.
    own: [B, n] int64, which of the projected actions is an agent's own.
    """

    keys: Projected | None
    values: Projected
    visible: torch.Tensor
    share: torch.Tensor | None = None
    own: torch.Tensor | None = None

    def of(self, agents: slice) -> Scene:
        """As these agents see it."""
        visible = self.visible if self.visible.shape[2] == 1 else self.visible[:, :, agents]
        if self.share is None or self.own is None:
            return replace(self, visible=visible)
        return replace(self, visible=visible, share=self.share[:, :, agents], own=self.own[:, agents])

    def detach(self) -> Scene:
        """Itself as a constant."""
        keys = None if self.keys is None else self.keys.map(torch.detach)
        return replace(self, keys=keys, values=self.values.map(torch.detach))

    def mix(self, queries: torch.Tensor, heads: int) -> torch.Tensor:
        """Σ_k α_k V e_k of every agent, α = softmax_k(key · query) in each head; queries [B, n, H] → [B, n, H].

        0 for an agent that sees nothing; where all weigh the same, queries are not looked at. Differentiable once.
        """
        if self.keys is None:
            return _average(self.values, self).expand(-1, queries.shape[1], -1)
        seen = self.keys.entities, self.keys.actions, self.values.entities, self.values.actions
        return _Mixture.apply(queries, *seen, self.visible, self.share, self.own, heads)

    @torch.no_grad()
    def weights(self, queries: torch.Tensor, heads: int) -> torch.Tensor:
        """α as it reads in Eq. 11, for people to look at: queries [B, n, H] → [B, n, K], mean over heads."""
        assert self.keys is not None
        scores = _Work(queries, heads).products(queries, _seen(self.keys, self.share, self.own))
        return _softmax(scores, self.visible).mean(0).mT


def _average(y: Projected, scene: Scene) -> torch.Tensor:
    """The mean of what an agent sees, [B, n, H], or [B, 1, H] if all agents see the same."""
    weights = scene.visible / scene.visible.sum(1, keepdim=True).clamp(min=1)
    if y.actions is None or scene.share is None or scene.own is None:
        return torch.bmm(weights.mT.to(y.entities.dtype), y.entities)
    moved = weights * scene.share
    of_own = moved.sum(1).unsqueeze(2).to(y.entities.dtype)
    averages = torch.bmm((weights + moved).mT.to(y.entities.dtype), y.entities)
    return averages - of_own * functional.embedding(scene.own, y.actions)


class _Mixture(torch.autograd.Function):
    """`Scene.mix`, some rows after others, so that what lies between its products stays cached: the keys and values of
    own actions, too, which are gathered there and nowhere else.

    Scores and weights are [heads, R, K, n], agents last: a softmax along any other axis than the short one of the
    entities is twenty times as fast.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: torch.Tensor,
        keys: torch.Tensor,
        key_of_action: torch.Tensor | None,
        values: torch.Tensor,
        value_of_action: torch.Tensor | None,
        visible: torch.Tensor,
        share: torch.Tensor | None,
        own: torch.Tensor | None,
        heads: int,
    ) -> torch.Tensor:
        sides = Projected(keys, key_of_action), Projected(values, value_of_action)
        k, v = (side.map(lambda x: x.to(queries.dtype)) for side in sides)
        mixed = torch.empty_like(queries, memory_format=torch.contiguous_format)
        weights = queries.new_empty(heads, len(queries), keys.shape[1], queries.shape[1])
        work = _Work(queries, heads)
        for rows in _tiles(queries):
            scores = work.products(queries[rows], _seen(k, share, own, rows))
            weights[:, rows] = _softmax(scores, visible[rows])
            work.combine(mixed[rows], weights[:, rows], _seen(v, share, own, rows))
        ctx.save_for_backward(queries, k.entities, k.actions, v.entities, v.actions, share, own, weights)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        queries, keys, key_of_action, values, value_of_action, share, own, weights = ctx.saved_tensors
        k, v = Projected(keys, key_of_action), Projected(values, value_of_action)
        d_queries = torch.empty_like(queries, memory_format=torch.contiguous_format)
        # A scene that is a constant, as it is for a policy's step, takes half of the work.
        d_k, d_v = (
            _room_for_gradient(y) if any(ctx.needs_input_grad[i : i + 2]) else None for y, i in ((k, 1), (v, 3))
        )
        work = _Work(queries, len(weights))
        for rows in _tiles(queries):
            w, q, d = weights[:, rows], queries[rows], gradient[rows]
            of_keys, of_values = _seen(k, share, own, rows), _seen(v, share, own, rows)
            # The slope of Σ_k α_k v_k in α_k is d · v_k: what scores are, with values for keys.
            d_weights = work.products(d, of_values)
            d_scores = _softmax_backward(d_weights, w.to(d_weights.dtype), 2, d_weights.dtype)
            work.combine(d_queries[rows], d_scores, of_keys)
            if d_k is not None:
                work.spread(d_scores, q, of_keys, _seen(d_k, rows=rows))
            if d_v is not None:
                work.spread(w, d, of_values, _seen(d_v, rows=rows))
        gradients = [(None, None) if d is None else (d.entities, d.actions) for d in (d_k, d_v)]
        return d_queries, *gradients[0], *gradients[1], None, None, None, None


def _tiles(agents: torch.Tensor) -> Iterator[slice]:
    """Rows of an array [B, n, H] that are worked on together."""
    batch, count, width = agents.shape
    height = max(1, TILE_NUMBERS // (count * width) if agents.device.type == "cpu" else batch)
    for first in range(0, batch, height):
        yield slice(first, first + height)


def _room_for_gradient(y: Projected) -> Projected:
    """Each entity is of one tile; an action is of many, which are added up in at least float32."""
    if y.actions is None:
        return y.map(torch.empty_like)
    sums = torch.zeros_like(y.actions, dtype=torch.promote_types(y.actions.dtype, torch.float32))
    return Projected(torch.empty_like(y.entities), sums)


@dataclass(frozen=True)
class _Seen:
    """Keys or values of some rows, or their gradient.

    entities: [R, K, H].   actions: [T, H].   own: [R, n], which of them.   share: [R, K, n].
    """

    entities: torch.Tensor
    actions: torch.Tensor | None
    own: torch.Tensor | None
    share: torch.Tensor | None


def _seen(
    y: Projected, share: torch.Tensor | None = None, own: torch.Tensor | None = None, rows: slice = slice(None)
) -> _Seen:
    return _Seen(
        y.entities[rows], y.actions, None if own is None else own[rows], None if share is None else share[rows]
    )


class _Work:
    """The arithmetic on tiles, all in the same memory: what one tile wrote is overwritten by the next."""

    def __init__(self, like: torch.Tensor, heads: int) -> None:
        self._like, self._heads = like, heads
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def products(self, x: torch.Tensor, seen: _Seen) -> torch.Tensor:
        """x · y of every agent's x [R, n, H] and what it sees, in each head: [heads, R, K, n], at least float32."""
        products = self._take("products", self._heads, *seen.entities.shape[:2], x.shape[1])
        for product, y_h, x_h in zip(products, self._split(seen.entities), self._split(x), strict=True):
            torch.bmm(y_h, x_h.mT, out=product)
        products = products.to(torch.promote_types(products.dtype, torch.float32))
        if (own := self._own(seen)) is None or seen.share is None:
            return products
        pairs = torch.mul(x, own, out=self._take("pairs", *x.shape)).unflatten(2, (self._heads, -1))
        alone = pairs.sum(-1, dtype=products.dtype).movedim(2, 0).contiguous().unsqueeze(2)
        return products.mul_(1 + seen.share).addcmul_(seen.share, alone, value=-1)

    def combine(self, target: torch.Tensor, weights: torch.Tensor, seen: _Seen) -> None:
        """Write Σ_k weight_k y_k of every agent to [R, n, H]; weights [heads, R, K, n]."""
        weights, of_own = self._moved(weights, seen.share)
        by_head = self._take("sums", self._heads, *target.shape[:2], target.shape[2] // self._heads)
        for total, weight, y_h in zip(by_head, weights.to(by_head.dtype), self._split(seen.entities), strict=True):
            torch.bmm(weight.mT, y_h, out=total)
        sums, target = by_head.movedim(0, 2), target.unflatten(2, (self._heads, -1))
        if (own := self._own(seen)) is None or of_own is None:
            target.copy_(sums)
        else:
            torch.addcmul(sums, of_own.to(own.dtype), own.unflatten(2, (self._heads, -1)), value=-1, out=target)

    def spread(self, weights: torch.Tensor, x: torch.Tensor, seen: _Seen, target: _Seen) -> None:
        """Write the gradient of Σ x · `combine` with respect to what is seen; that of the actions is added."""
        weights, of_own = self._moved(weights, seen.share)
        by_head = self._take("of entities", self._heads, *seen.entities.shape[:2], x.shape[2] // self._heads)
        for total, weight, x_h in zip(by_head, weights.to(x.dtype), self._split(x), strict=True):
            torch.bmm(weight, x_h, out=total)
        target.entities.unflatten(2, (self._heads, -1)).copy_(by_head.movedim(0, 2))
        if of_own is not None and seen.own is not None and target.actions is not None:
            d_own = self._take("pairs", *x.shape)
            parts = d_own.unflatten(2, (self._heads, -1))
            torch.mul(x.unflatten(2, (self._heads, -1)), of_own.to(x.dtype).neg_(), out=parts)
            _add_rows(target.actions, seen.own.flatten(), d_own.flatten(0, 1))

    def _own(self, seen: _Seen) -> torch.Tensor | None:
        """What is the agents' own, [R, n, H]."""
        if seen.actions is None or seen.own is None:
            return None
        own = self._take("own", *seen.own.shape, seen.actions.shape[1])
        torch.index_select(seen.actions, 0, seen.own.flatten(), out=own.flatten(0, 1))
        return own

    def _moved(self, weights: torch.Tensor, share: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weights of the means as they are, with what leaving out own actions adds to them, [heads, R, K, n]; and
        the weight of what is left out, [R, n, heads, 1]."""
        if share is None:
            return weights, None
        moved = torch.mul(weights, share, out=self._take("moved", *weights.shape, dtype=weights.dtype))
        of_own = moved.sum(2).movedim(0, 2).contiguous().unsqueeze(3)
        return moved.add_(weights), of_own

    def _split(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Views of the columns of each head."""
        return x.split(x.shape[2] // self._heads, dim=2)

    def _take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Uninitialised memory, of which the first tile needs the most."""
        dtype = dtype or self._like.dtype
        held = self._buffers.get((name, dtype))
        if held is None:
            held = self._buffers[name, dtype] = self._like.new_empty(shape, dtype=dtype)
        return held if held.shape == shape else held.flatten()[: math.prod(shape)].view(shape)


def _add_rows(target: torch.Tensor, index: torch.Tensor, rows: torch.Tensor) -> None:
    """target[index[i]] += rows[i]; target [T, H], rows [R, H]."""
    if target.device.type == "cpu":
        target.index_add_(0, index, rows.to(target.dtype))
    else:  # this adds them up in the same order each time
        target.add_(torch.ops.aten.embedding_dense_backward(rows.to(target.dtype), index, len(target), -1, False))


def _softmax(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Weights of what an agent sees, all 0 if that is nothing; scores [heads, R, K, n], visible [R, K, 1 or n] bool."""
    seen = visible.to(scores.dtype)
    return (scores + (1 - seen) * FORBIDDEN_SCORE).softmax(2).mul_(seen)
