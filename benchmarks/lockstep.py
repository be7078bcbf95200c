"""Where the time of a lockstep run goes: `python benchmarks/lockstep.py [--json]`.

Trains the default preset for a while, in processes, and reads the learner's stages from its metrics endpoint: the part
of an iteration that it waits for rewards must be small, since they are asked for ahead of their use.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

LARGEST_WAIT = 0.05
STAGE = re.compile(r'bm3il_learner_stage_seconds_sum\{stage="(\w+)"\} (\S+)')
ITERATION_STAGES = ("collect", "observe", "query", "update", "publish", "checkpoint")


def waiting_for_rewards() -> tuple[float, dict[str, float]]:
    """The part of an iteration that the learner waits for rewards in a lockstep run, and seconds by stage."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "bm3il.launch.cli", "train", "--run", "run", "--steps", "48000"]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stages: dict[str, float] = {}
        while process.poll() is None:
            time.sleep(0.5)
            with suppress(OSError, ValueError, StopIteration):
                targets = json.loads((Path(folder) / "runs" / "run" / "targets.json").read_text())
                address = next(t["targets"][0] for t in targets if t["labels"]["role"] == "learner")
                with urllib.request.urlopen(f"http://{address}/metrics", timeout=1) as answer:
                    found = {name: float(value) for name, value in STAGE.findall(answer.read().decode())}
                stages = {name: found.get(name, 0.0) for name in ITERATION_STAGES}
        if process.returncode:
            raise RuntimeError("the lockstep run failed")
    return stages["query"] / sum(stages.values()), stages


def main(arguments: list[str]) -> int:
    waited, stages = waiting_for_rewards()
    for name, seconds in stages.items():
        print(f"{name:10} {seconds:6.2f} s, {100 * seconds / sum(stages.values()):4.1f} %")
    if "--json" in arguments:
        print(json.dumps({"waiting_for_rewards": waited, "seconds": stages}))
    assert waited < LARGEST_WAIT, f"the learner waits {100 * waited:.1f} % of an iteration for rewards"
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
