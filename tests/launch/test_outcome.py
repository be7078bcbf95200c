from __future__ import annotations

import pytest

from bm3il.launch.outcome import Outcome, attempt
from bm3il.protocol.errors import DeadlineError, InputError, NumericalError


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (InputError("bad"), 2, "bad"),
        (NumericalError("critic loss"), 3, "critic loss"),
        (DeadlineError("no chunk"), 4, "no chunk"),
        (OSError(28, "No space left on device", "x.csv"), 2, "cannot write x.csv: No space left on device"),
        (OSError(28, "No space left on device"), 2, "cannot write to the run folder: No space left on device"),
    ],
)
def test_errors_that_a_restart_cannot_cure_become_an_outcome(error: Exception, code: int, text: str) -> None:
    def work() -> str:
        raise error

    outcome = attempt(work)
    assert outcome.code == code
    assert outcome.text == text
    assert outcome.status == "failed"


def test_other_errors_are_crashes() -> None:
    def work() -> str:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        attempt(work)
    assert attempt(lambda: "interrupted") == Outcome(130)
    assert attempt(lambda: None) == Outcome(0)
