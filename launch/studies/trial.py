"""One run of a study, in a process of its own: `launch.studies.trial FOLDER` trains it to its end, from wherever it is,
and then judges what it learned in the study's worlds.

`worlds.json` in its folder: of each world, as the study names it, what `bm3il evaluate` tells of drawn actions there,
and `greedy_return_mean`; of the policy with `policy_sha256`. `core_seconds`: a number, the processor time of all its
starts; one that was killed by SIGKILL is not counted.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from bm3il.launch import run
from bm3il.launch.learned.evaluate import judged
from bm3il.launch.learned.trained import load_trained
from bm3il.launch.outcome import FINISHED, INPUT_ERROR
from bm3il.launch.result import read_result
from bm3il.launch.run_folder import STUDY_FILE
from bm3il.launch.studies.file import Study, in_world
from bm3il.launch.studies.pool import finished
from bm3il.launch.surroundings import settle
from bm3il.protocol.errors import InputError
from bm3il.protocol.files import write_atomically

WORLDS, SPENT = "worlds.json", "core_seconds"
"""In a run's folder, how good its policy is in the worlds, and what it cost."""
AS_TRAINED = "as trained"
OF_RESULT = {"return_mean": "return_mean", "normalized_return": "normalized_return", "episodes": "return_episodes"}
"""Figures of the evaluation at the end of the training, and how `result.json` names them."""


def evaluations(folder: Path) -> dict[str, dict[str, Any]]:
    """What is known of the worlds: nothing if another policy than the run's was judged."""
    try:
        told = json.loads((folder / WORLDS).read_text(encoding="utf-8"))
        worlds = told["worlds"] if told["policy_sha256"] == read_result(folder).get("policy_sha256") else {}
        return {world: figures for world, figures in worlds.items() if isinstance(figures, dict)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def all_evaluations(folder: Path) -> dict[str, dict[str, Any]]:
    """Of a finished run, that at the end of its training among them."""
    result = read_result(folder)
    return {AS_TRAINED: {name: result.get(key) for name, key in OF_RESULT.items()}} | evaluations(folder)


def core_seconds(folder: Path) -> float | None:
    """What a run has cost, or None if nobody knows."""
    try:
        return float((folder / SPENT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def judge(folder: Path, study: Study) -> None:
    """Play in the worlds in which nobody has played yet. Raises InputError for one that the policy does not fit."""
    done, trained = evaluations(folder), load_trained(folder)
    for world in study.worlds:
        if world in done:
            continue
        drawn, greedy = judged(trained, in_world(trained.config.environment, world), study.episodes)
        done[world] = drawn | {"greedy_return_mean": greedy["return_mean"]}
        # After each world: whoever is stopped while judging repeats one world at most.
        told = {"policy_sha256": read_result(folder).get("policy_sha256"), "worlds": done}
        write_atomically(folder / WORLDS, json.dumps(told, indent=1) + "\n")


def main(folder: Path) -> int:
    """The exit code, as of `bm3il resume`."""
    settle()
    try:
        code = FINISHED if finished(folder) else run.resume(folder)
        if code == FINISHED:
            judge(folder, Study.read(folder.parent / STUDY_FILE))
        return code
    except InputError as error:
        print(f"bm3il: {error}", file=sys.stderr, flush=True)
        return INPUT_ERROR
    finally:
        write_atomically(folder / SPENT, f"{(core_seconds(folder) or 0.0) + sum(os.times()[:4]):.1f}\n")


if __name__ == "__main__":
    os._exit(main(Path(sys.argv[1])))
