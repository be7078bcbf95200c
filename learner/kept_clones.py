"""Clones that are kept for the next run that starts from the same one: `FOLDER/HASH.safetensors`, the parameters.

The hash is of all that decides their bits: the policy before, the recordings, the settings, the seed, and what computes
them. So a clone is found only where making it anew would come to these bits, and any file may be removed at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from bm3il.actors.policy import Policy
from bm3il.learner.settings import CloningSettings
from bm3il.protocol.demonstrations import Demonstrations

log = logging.getLogger(__name__)

WAY = 2
"""Counted up where this release makes other bits of the same: since 2 a clone is that of its last update."""


class KeptClone:
    """The place of one clone, to be asked for before `policy` changes."""

    def __init__(self, policy: Policy, demonstrations: Demonstrations, settings: CloningSettings, seed: int) -> None:
        self._path = Path(settings.kept_in, f"{_key(policy, demonstrations, settings, seed)}.safetensors")

    def load(self, policy: Policy) -> bool:
        """Give the policy the clone's parameters, if they are there. A file that holds none is as good as absent."""
        try:
            arrays = load_file(self._path)
        except FileNotFoundError:
            return False
        except (OSError, SafetensorError) as error:
            log.warning("%s cannot be read, so its clone is made anew: %s", self._path, error)
            return False
        told = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
        if told != policy.array_table() or not all(np.isfinite(array).all() for array in arrays.values()):
            log.warning("%s holds no policy of this run, so its clone is made anew", self._path)
            return False
        policy.load_arrays(arrays)
        log.info("starts from the clone that %s keeps", self._path)
        return True

    def save(self, policy: Policy) -> None:
        """Keep it. Where that fails a warning says so, since nothing is lost but time."""
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}")  # others may be making the same clone
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(save(policy.to_arrays()))
            # Not synced to the disk: a file that a power cut leaves broken is made anew (`load`).
            temporary.rename(self._path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            log.warning("the clone cannot be kept in %s: %s", self._path.parent, error)


def _key(policy: Policy, demonstrations: Demonstrations, settings: CloningSettings, seed: int) -> str:
    """Not of the environment that the run is in: the clone is made without it."""
    facts = {
        "made": WAY,
        # Where clones are kept changes none of their bits.
        "settings": asdict(settings) | {"kept_in": ""},
        "seed": seed,
        "networks": [(block.groups, block.slots) for block in policy.layout.blocks],
        "recorded": demonstrations.spec.to_json(),
        # Sums have another order with other threads, and other last bits with other kernels.
        "computed": (next(policy.parameters()).device.type, torch.get_num_threads(), torch.__version__),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    per_episode = {"lengths": demonstrations.episode_lengths, "groups": demonstrations.groups}
    for name, array in sorted((dict(demonstrations.arrays) | per_episode).items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    digest.update(policy.sha256().encode())
    return digest.hexdigest()[:32]
