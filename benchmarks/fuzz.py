"""Hostile bytes against everything that reads some: `python benchmarks/fuzz.py [--cases 1000000] [--seed 0]`.

1. A run trains in lockstep while all its four sockets are attacked, with the run's id and without. It must end with
   exit code 0, none of its processes started again, and the policy of a run that is left alone.
2. All sockets of a run are made in this process, those that listen and those that ask or hear, and each gets mutated
   messages from a hostile other end. After each batch an honest message must be answered, or heard. Connections that
   speak no ZeroMQ, or break off its handshake, knock at a TCP port with keys and at a file.
3. The codec, and files of demonstrations, checkpoints and scenarios, mutated as bytes.

At least four fifths of the cases travel over a socket. Whatever comes of a case must be the documented error or an
accepted value: another exception, a case or batch of more than 5 s, or more than 512 MiB of new memory (of this process
by RLIMIT_AS; of a process of the run as resident memory) ends this with the number of the case and the seed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import torch
from fuzz_cases import codec_cases, file_cases
from fuzz_live import Live
from fuzz_sockets import Sockets

CASE_SECONDS, NEW_BYTES = 5.0, 512 << 20
CODEC_CASES, FILE_CASES = 18, 6
"""Beside one storm on every surface."""

Counts = dict[str, Counter[str]]


def main() -> int:
    """Run all cases; prints counts by outcome, and fails with the case that did what it must not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1_000_000, help="beside those of the run that is attacked")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20_000, help="of the run that is attacked")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    dice, counts, start = random.Random(given.seed), Counts(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        live = Live(Path(name), dice, given.steps, NEW_BYTES)
        live.attack()
        counts |= {f"live {socket}": Counter(sent=count) for socket, count in live.sent.items()}
        print(f"a run of {given.steps} steps was attacked: the same policy after {time.monotonic() - start:.0f} s")
        sockets = Sockets(Path(name), dice)
        try:
            storm(sockets, Path(name), dice, counts, given.cases)
            sockets.assert_answers()
        except BaseException:
            sys.__stderr__.write(f"after case {_total(counts)} of seed {given.seed}\n")  # type: ignore[union-attr]
            raise
        finally:
            sockets.close()
    report(counts, sockets, live, time.monotonic() - start)
    return 0


def storm(sockets: Sockets, folder: Path, dice: random.Random, counts: Counts, cases: int) -> None:
    """Every surface in turn, until there were enough cases."""
    signal.signal(signal.SIGALRM, _too_long)
    before = _total(counts)
    turns = _turns(sockets, folder, dice)
    for turn, batch in enumerate(turns):
        if turn == 10:  # what is needed anyhow is not counted as new memory
            limit = psutil.Process().memory_info().vms + NEW_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        for surface, case in batch:
            signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
            counts.setdefault(surface, Counter()).update(case())
        signal.setitimer(signal.ITIMER_REAL, 0)
        if _total(counts) >= before + cases:
            return


def _turns(sockets: Sockets, folder: Path, dice: random.Random) -> Iterator[list[tuple[str, Any]]]:
    codec, files = codec_cases(dice), file_cases(folder, dice)
    while True:
        singles = [("codec", next(codec)) for _ in range(CODEC_CASES)] + [next(files) for _ in range(FILE_CASES)]
        yield [(surface.name, surface.storm) for surface in sockets.surfaces] + [
            (name, lambda case=case: Counter([case()])) for name, case in singles
        ]


def report(counts: Counts, sockets: Sockets, live: Live, seconds: float) -> None:
    """Print what was sent and what became of it."""
    drops: dict[str, dict[str, int]] = {}
    for (process, cause), count in sorted(live.drops.items()):
        drops.setdefault(process, {})[cause] = int(count)
    print(json.dumps({name: dict(sorted(counter.items())) for name, counter in sorted(counts.items())}, indent=1))
    print("dropped by the attacked run:", json.dumps(drops))
    print("dropped by the other sockets:", json.dumps(dict(sorted(sockets.drops.items()))))
    total, offline = _total(counts), sum(counts[name].total() for name in counts if name in OFFLINE)
    print(
        f"{total} cases, {total / seconds:.0f} a second, {1 - offline / total:.0%} of them over sockets; "
        "honest requests still answered"
    )


OFFLINE = ("codec", "demonstrations", "checkpoint", "scenario")


def _total(counts: Counts) -> int:
    return sum(counter.total() for counter in counts.values())


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"a case took more than {CASE_SECONDS} s")


if __name__ == "__main__":
    sys.exit(main())
