"""Work that a GPU may record; here, on a CPU, it is called."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch

from bm3il.learner.recorded import Recorded


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


class _OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda")


def test_a_part_of_another_size_does_not_spoil_the_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Graph:
        def replay(self) -> None:
            told.append("play")

    def record(self: Recorded, inputs: Sequence[torch.Tensor]) -> Graph:
        told.append("record")
        return Graph()

    monkeypatch.setattr(Recorded, "_record", record)
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *_: None)
    recorded = Recorded(lambda inputs: told.append("call") or {})  # type: ignore[func-returns-value]
    for size in (5, 5, 5, 3, 5, 3, 5):
        recorded([torch.zeros(size).as_subclass(_OnGpu)])
    assert told == ["call", "record", "play", "play", "call", "play", "call", "play"]
    recorded.forget()
    recorded([torch.zeros(5).as_subclass(_OnGpu)])
    assert told[-1] == "call"


@pytest.mark.parametrize("fails", [False, True])
def test_no_other_recording_is_given_back_in_the_middle_of_one(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    collects: list[bool] = []

    def work(inputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        collects.append(gc.isenabled())
        if fails and len(collects) == 2:
            raise RuntimeError("out of memory")
        return {}

    class Graph:
        def replay(self) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "_foreach_copy_", lambda *_: None)
    recorded = Recorded(work)
    recorded([torch.zeros(2).as_subclass(_OnGpu)])
    with pytest.raises(RuntimeError, match="out of memory") if fails else nullcontext():
        recorded([torch.zeros(2).as_subclass(_OnGpu)])
    assert collects == [True, False]
    assert gc.isenabled()
