from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from bm3il.protocol.errors import InputError
from bm3il.protocol.settings import Count, Fraction, Natural, NonNegative, Positive, check_bounds


@dataclass(frozen=True)
class Inner:
    widths: tuple[Count, ...] = (4, 4)
    part_kept: Fraction = 1.0
    name: str = ""


@dataclass(frozen=True)
class Outer:
    batch_size: Count = 1
    seed: Natural = 0
    rate: Positive = 1e-30
    weight: NonNegative = 0.0
    inner: Inner = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("batch_size", 0, r"--batch-size must be at least 1, got 0"),
        ("seed", -1, r"--seed must be at least 0, got -1"),
        ("rate", 0.0, r"--rate must be above 0, got 0.0"),
        ("rate", float("nan"), r"--rate must be above 0, got nan"),
        ("weight", -1e-9, r"--weight must be at least 0"),
        ("inner", Inner((4, 0)), r"--inner.widths must be at least 1, got \(4, 0\)"),
        ("inner", Inner(part_kept=1.1), r"--inner.part-kept must be within 0..1, got 1.1"),
        ("inner", Inner(part_kept=-0.1), r"--inner.part-kept must be within 0..1"),
        ("inner", Inner(part_kept=float("nan")), r"--inner.part-kept must be within 0..1"),
    ],
)
def test_what_is_out_of_bounds_is_named_by_its_flag(name: str, value: object, words: str) -> None:
    check_bounds(Outer())
    with pytest.raises(InputError, match=words):
        check_bounds(replace(Outer(), **{name: value}))
