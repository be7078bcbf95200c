"""Adam (Kingma and Ba, 2015; with decoupled weight decay Loshchilov and Hutter, 2019) by PyTorch's fused kernel.

Not `torch.optim.Adam`: the first object of that class imports PyTorch's compiler, 1.7 s and 70 MB of every process
that learns, which nothing here uses. The kernel is the same, so the bits are, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import nn
from torch.optim.adam import adam

FIRST_DECAY, SECOND_DECAY, SMALLEST_DIVISOR = 0.9, 0.999, 1e-8
"""β₁, β₂ and ε of the paper."""


class Adam:
    """The optimiser of some parameters; those without a gradient at a step are left as they are, their moments too.

    weight_decay: decoupled from the gradient.   ascend: whether gradients say where to go, not where to come from.
    On a GPU the rate and the counts of steps are numbers of the device, which a recorded graph reads anew each time.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], rate: float = 1e-3, weight_decay: float = 0.0, ascend: bool = False
    ) -> None:
        self._parameters = list(parameters)
        self._weight_decay, self._ascend = weight_decay, ascend
        device = self._parameters[0].device
        self._rate: float | torch.Tensor = torch.tensor(rate, device=device) if device.type == "cuda" else rate
        self.first_moments = [torch.zeros_like(p) for p in self._parameters]
        self.second_moments = [torch.zeros_like(p) for p in self._parameters]
        # The fused kernel takes counts as float32 tensors beside the parameters.
        self.steps = [torch.zeros((), dtype=torch.float32, device=p.device) for p in self._parameters]

    def set_rate(self, rate: float) -> None:
        """The step size α of all further updates."""
        if isinstance(self._rate, torch.Tensor):
            self._rate.fill_(rate)
        else:
            self._rate = rate

    def zero_grad(self) -> None:
        """No parameter has a gradient any more."""
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters by what their `grad` hold."""
        here = [k for k, parameter in enumerate(self._parameters) if parameter.grad is not None]
        gradients = [grad for parameter in self._parameters if (grad := parameter.grad) is not None]
        moved: list[torch.Tensor] = [self._parameters[k] for k in here]
        adam(
            moved,
            gradients,
            [self.first_moments[k] for k in here],
            [self.second_moments[k] for k in here],
            [],
            [self.steps[k] for k in here],
            fused=True,
            decoupled_weight_decay=self._weight_decay > 0,
            amsgrad=False,
            beta1=FIRST_DECAY,
            beta2=SECOND_DECAY,
            lr=self._rate,
            weight_decay=self._weight_decay,
            eps=SMALLEST_DIVISOR,
            maximize=self._ascend,
        )

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Moments and counts of steps as named arrays, one after the other; `load_arrays` is the inverse."""
        for name, tensor in self._tensors():
            yield name, tensor.cpu().numpy()

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Go on from `arrays`. Raises KeyError if one is absent, RuntimeError if one has another size."""
        for name, tensor in self._tensors():
            # A file gives a number back as an array of one.
            tensor.copy_(torch.tensor(arrays[name]).reshape(tensor.shape))

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for k, tensors in enumerate(zip(self.steps, self.first_moments, self.second_moments, strict=True)):
            yield from zip((f"{k}/step", f"{k}/exp_avg", f"{k}/exp_avg_sq"), tensors, strict=True)
