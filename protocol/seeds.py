"""Seeds for independent random streams, so that no stream depends on how much another one was used."""

from __future__ import annotations

import hashlib

MAX_SMALL_SEED = 2**31


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream `names` of the run `seed`; the same on every machine.

    `derive_seed(seed, "rollout", actor, version)` is what makes a chunk a pure function of these four.
    """
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def small_seed(seed: int, *names: str | int) -> int:
    """The same for simulators that hand seeds on to libraries which take signed 32-bit integers."""
    return derive_seed(seed, *names) % MAX_SMALL_SEED
