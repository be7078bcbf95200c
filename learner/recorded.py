"""Work on a GPU that is recorded once and played again: a launch of one graph instead of hundreds of kernels.

What small networks take on a GPU is the time in which Python launches their kernels, and the GPU waits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Work = Callable[[Sequence[torch.Tensor]], dict[str, torch.Tensor]]
Shapes = tuple[tuple[torch.Size, torch.dtype], ...]


class Recorded:
    """A function of tensors that reads, and changes, others which stay where they are: parameters, optimisers' states.

    On a GPU the second call with tensors of the same shapes records it (the first has made what is made once), and all
    further ones play that; elsewhere, and until then, it is simply called. It must not wait for the device, nor draw
    random numbers.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._seen: Shapes | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[torch.Tensor] = []
        self._answer: dict[str, torch.Tensor] = {}

    def forget(self) -> None:
        """What it reads or changes is no longer where it was."""
        self._seen, self._graph = None, None

    def __call__(self, inputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """The answer is overwritten by the next call."""
        if inputs[0].device.type != "cuda":
            return self._work(inputs)
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if shapes != self._seen:
            self._seen, self._graph = shapes, None
            return self._work(inputs)
        if self._graph is None:
            self._inputs = [tensor.clone() for tensor in inputs]
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._answer = self._work(self._inputs)
            self._graph = graph
        torch._foreach_copy_(self._inputs, list(inputs))
        self._graph.replay()
        return self._answer
