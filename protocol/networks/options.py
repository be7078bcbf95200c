"""What agents may do, of A actions: where a table allows few, softmaxes and sums go over those few."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

FORBIDDEN_LOGIT = -1e9
"""Of an action that is not allowed: its probability is exactly 0, and 0·log 0 stays finite."""
SHORT_AXIS = 16
"""Along an axis of so few numbers a CPU takes them one by one; across it, many rows at once."""


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """log_softmax along the last axis [..., D], ten times as fast on a CPU where D is small and rows are many.

    The last bits of a row may depend on how many there are.
    """
    if logits.dim() > 1 and logits.shape[-1] <= SHORT_AXIS and logits.device.type == "cpu":
        return logits.mT.log_softmax(-2).mT
    return logits.log_softmax(-1)


@dataclass(frozen=True)
class Options:
    """D options of each agent: all A actions, or, of many, those that are near.

    allowed: [..., D] bool.   actions: [..., D] int64, which these are; None if D is A.
    """

    allowed: torch.Tensor
    actions: torch.Tensor | None = None

    def __getitem__(self, tile: tuple[slice, slice]) -> Options:
        """Views of some of the agents."""
        return self.map(lambda values: values[tile])

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Options:
        """Both arrays changed in the same way."""
        return Options(change(self.allowed), None if self.actions is None else change(self.actions))

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """[..., A] of all actions → [..., D] of the options; where these are all actions, the same tensor."""
        return values if self.actions is None else values.gather(-1, self.actions)

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """What a policy's networks say of all actions [..., A] → masked logits [..., D], at least float32.

        Without a gradient `outputs` may be written over.
        """
        logits = self.of(outputs)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if logits.requires_grad:
            return logits.masked_fill(~self.allowed, FORBIDDEN_LOGIT)
        return logits.masked_fill_(~self.allowed, FORBIDDEN_LOGIT)

    def number(self, action: torch.Tensor) -> torch.Tensor:
        """[...] actions, which are allowed → which of the options they are."""
        if self.actions is None:
            return action
        # torch has no argmax of bool.
        return (self.actions == action.unsqueeze(-1)).to(torch.uint8).argmax(-1)

    def action(self, number: torch.Tensor) -> torch.Tensor:
        """The inverse of `number`."""
        return number if self.actions is None else self.actions.gather(-1, number.unsqueeze(-1)).squeeze(-1)

    def spread(self, gradient: torch.Tensor, actions: int) -> torch.Tensor:
        """The gradient with respect to `outputs` [..., A], from that with respect to the logits [..., D]."""
        if self.actions is None:
            return gradient
        return gradient.new_zeros(*gradient.shape[:-1], actions).scatter_(-1, self.actions, gradient)
