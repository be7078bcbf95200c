"""Work on a GPU that is recorded once and played again: a launch of one graph instead of hundreds of kernels.

What small networks take on a GPU is the time in which Python launches their kernels, and the GPU waits.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

Work = Callable[[Sequence[torch.Tensor]], dict[str, torch.Tensor]]
Shapes = tuple[tuple[torch.Size, torch.dtype], ...]


class Recorded:
    """A function of tensors that reads, and changes, others which stay where they are: parameters, optimisers' states.

    On a GPU the second call in a row with tensors of the same shapes records it (the first has made what is made once),
    and all further ones of these shapes play that; elsewhere it is simply called, and so is a part of another size in
    between, which does not spoil the recording. It must not wait for the device, nor draw random numbers.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._last: Shapes | None = None
        self._of: Shapes | None = None
        """What was recorded."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[torch.Tensor] = []
        self._answer: dict[str, torch.Tensor] = {}

    def forget(self) -> None:
        """What it reads or changes is no longer where it was."""
        self._last, self._of, self._graph = None, None, None

    def __call__(self, inputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The answer is overwritten by the next call."""
        if inputs[0].device.type != "cuda":
            return self._work(inputs)
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        again, self._last = shapes == self._last, shapes
        if shapes != self._of:
            if not again:
                return self._work(inputs)
            self._graph, self._of = self._record(inputs), shapes
        assert self._graph is not None
        # A graph reads and writes the addresses that it was recorded with: inputs go there.
        torch._foreach_copy_(self._inputs, list(inputs))
        # After a recording, too: while work is recorded, none of it is done.
        self._graph.replay()
        return self._answer

    def _record(self, inputs: Sequence[torch.Tensor]) -> torch.cuda.CUDAGraph:
        self._inputs = [tensor.clone() for tensor in inputs]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with _nothing_is_collected(), torch.cuda.graph(graph):
            self._answer = self._work(self._inputs)
        return graph


@contextmanager
def _nothing_is_collected() -> Iterator[None]:
    """While a graph is recorded, no other one may be given back: that spoils the recording, and Python's collector does
    it whenever it finds one in a cycle of what is no longer used (the graph of a learner before this one, say).
    """
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
