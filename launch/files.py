"""The files that a configuration names: known again by absolute path and content, from any working folder."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import replace

from bm3il.launch.config import Config
from bm3il.protocol.demonstrations import SUFFIX, Demonstrations, shipped_demonstrations
from bm3il.protocol.errors import InputError
from bm3il.protocol.registry import with_absolute_files

CHUNK_BYTES = 1 << 22
SHOWN = 12
"""Digits of a hash, for people."""


def remembered(config: Config) -> Config:
    """Itself with its files by absolute path, and in `files` the hashes of those whose content counts.

    What comes with the package keeps its name. What does not exist is left for others to complain of.
    Raises InputError for an unknown environment.
    """
    environment, counting = with_absolute_files(config.environment)
    demonstrations = config.demonstrations
    if os.path.isfile(demonstrations) and demonstrations not in shipped_demonstrations():
        demonstrations = os.path.abspath(demonstrations)
        counting.append(demonstrations)
    elif demonstrations.removesuffix(SUFFIX) in shipped_demonstrations():
        demonstrations = demonstrations.removesuffix(SUFFIX)
    return replace(
        config,
        environment=environment,
        demonstrations=demonstrations,
        files={path: _sha256(path) for path in counting},
        hostfile=config.hostfile and os.path.abspath(config.hostfile),
        metrics_token_file=config.metrics_token_file and os.path.abspath(config.metrics_token_file),
    )


def check_files(config: Config) -> None:
    """Raise InputError for a file that is not what it was when the run began. Older runs did not write that down."""
    check_demonstrations(config)
    check_scenario(config)


def check_demonstrations(config: Config) -> None:
    """`check_files` for what experts did."""
    _check(config, {config.demonstrations} & set(config.files))


def check_scenario(config: Config) -> None:
    """`check_files` for what the environment is made of."""
    _check(config, set(config.files) - {config.demonstrations})


def load_demonstrations(config: Config) -> Demonstrations:
    """Those of a run. Raises InputError if their file is another one by now."""
    check_demonstrations(config)
    return Demonstrations.load(config.demonstrations)


def _check(config: Config, paths: Iterable[str]) -> None:
    for path in paths:
        then, now = config.files[path], _sha256(path)
        if now != then:
            raise InputError(
                f"{path} has changed since the run began: its SHA-256 was {then[:SHOWN]}…, now it is {now[:SHOWN]}…; "
                "put the file back as it was, or start a new run with what it is now"
            )


def _sha256(path: str) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise InputError(f"cannot read {path}, which the run began with: {error.strerror}; put it back") from error
    return digest.hexdigest()
