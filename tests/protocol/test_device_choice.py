"""Which device, and which arithmetic, a role computes with."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from bm3il.learner.replay import Replay
from bm3il.protocol import device
from bm3il.protocol.device import choose_device, choose_precision
from bm3il.protocol.errors import InputError
from bm3il.protocol.layout import Layout
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec
from bm3il.reward_server.memory import Memory

CPU = torch.device("cpu")


def test_without_a_gpu_the_cpu_is_taken_or_the_gpu_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == CPU
    with pytest.raises(InputError, match="no GPU"):
        choose_device("cuda")


def test_with_a_gpu_it_is_taken_unless_the_cpu_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda")
    assert choose_device("cpu") == CPU


@pytest.mark.parametrize(
    ("features", "precision", "warned"),
    [("avx2 avx512f", "float32", True), ("avx512_bf16", "bfloat16", False), (None, "float32", True)],
)
def test_a_cpu_without_bfloat16_computes_in_float32_and_says_so(
    features: str | None,
    precision: str,
    warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "cpuinfo"
    if features is not None:
        path.write_text(f"flags : {features}")
    monkeypatch.setattr(device, "CPU_FEATURES", path)
    with caplog.at_level(logging.WARNING):
        assert choose_precision("bfloat16", CPU) == precision
    assert ("no instructions for bfloat16" in caplog.text) == warned
    assert choose_precision("float32", CPU) == "float32"


def test_a_cpu_has_no_tf32_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_precision("tf32", CPU) == "float32"
    assert "this CPU has no instructions for tf32" in caplog.text


def test_another_role_of_the_process_keeps_its_arithmetic() -> None:
    before = torch.get_float32_matmul_precision()
    with device.rounding("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
    for precision in ("float32", "bfloat16"):
        with device.rounding(precision):
            assert torch.get_float32_matmul_precision() == before


def test_a_window_that_no_memory_holds_is_refused_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=1_000_000))
    table = {"0.observations": ("float32", (100, 50, 20)), "0.active": ("bool", (100, 50))}
    device.check_room(table, CPU, "reward.window-steps", 100)
    table["1.observations"] = ("float32", (100, 50, 40))
    with pytest.raises(InputError, match=r"--reward.window-steps 100 would take 0.0 GB.* half of that holds 41"):
        device.check_room(table, CPU, "reward.window-steps", 100)


@pytest.mark.parametrize("make", [lambda layout: Memory(layout, 100, "run", 0), lambda layout: Replay(layout, 100)])
def test_who_keeps_rows_asks_for_room_first(make: Callable[[Layout], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=10_000))
    spec = EnvironmentSpec("crowd", (TypeSpec("a", 50, 20, 3),), 10)
    with pytest.raises(InputError, match="window-steps 100 would take"):
        make(Layout.of(spec, "type"))
