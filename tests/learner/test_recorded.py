"""Work that a GPU may record; here, on a CPU, it is called."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from learner.recorded import Recorded


def test_without_a_gpu_every_call_is_made() -> None:
    parameter, calls = torch.zeros(2), []

    def work(inputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        calls.append(len(inputs))
        parameter.add_(inputs[0])
        return {"loss": inputs[0].sum()}

    recorded = Recorded(work)
    for value in (1.0, 2.0, 3.0):
        assert recorded([torch.full((2,), value)])["loss"] == 2 * value
    recorded.forget()
    assert calls == [1, 1, 1]
    assert parameter.tolist() == [6.0, 6.0]
