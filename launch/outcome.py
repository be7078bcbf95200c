"""How a process, or a whole run, ended."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

from bm3il.protocol.errors import DeadlineError, InputError, NumericalError

FINISHED = 0
CRASHED = 1
INPUT_ERROR = 2
NUMERICAL_ERROR = 3
DEADLINE = 4
# As a shell reports Ctrl-C: 128 and the number of SIGINT.
INTERRUPTED = 130

FINAL_CODES = (INPUT_ERROR, NUMERICAL_ERROR, DEADLINE)
"""To start the process again would not help: the run ends."""

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


@dataclass(frozen=True)
class Outcome:
    """An exit code, and for people what happened."""

    code: int
    text: str = ""

    @property
    def status(self) -> str:
        """As `result.json` calls it."""
        return {FINISHED: "finished", INTERRUPTED: "interrupted"}.get(self.code, "failed")


def attempt(work: Callable[[], str | None]) -> Outcome:
    """Do the work of a process; errors that a restart cannot cure become an outcome, others are raised.

    `work` may return a status: `interrupted` if it was told to stop.
    """
    try:
        return Outcome(INTERRUPTED if work() == "interrupted" else FINISHED)
    except InputError as error:
        return Outcome(INPUT_ERROR, str(error))
    except NumericalError as error:
        return Outcome(NUMERICAL_ERROR, str(error))
    except DeadlineError as error:
        return Outcome(DEADLINE, str(error))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        return Outcome(INPUT_ERROR, f"cannot write {error.filename or 'to the run folder'}: {error.strerror}")
