"""A run of async mode at full speed for as long as asked: `make soak SECONDS=3600`.

Everything is the product's own: `bm3il train`, four actors, its metrics and its log. At the end it is asked to stop, as
a scheduler does. Whatever grows slowly, or is counted wrongly, shows here.

Prints the resident memory of every process, as a straight line over the second half of the time, and the peaks of its
two quarters. Fails if a peak grew by a twentieth, if anything was restarted, sent again or dropped, if iterations or
steps of `log.jsonl` do not add up, if actors sent other bytes than the learner received or played other steps than it
trained on (but for what is under way), or if the stopped run has no checkpoint.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families
from resident_memory import Memory

ACTORS, CHUNKS_UNDER_WAY = 4, 4
"""Of an actor: two not taken, one that is played, one whose taking is not yet told."""
OPTIONS = ["--preset", "rover_tower_4", "--mode", "async", "--actors", str(ACTORS), "--steps", "1000000000"]
LARGEST_GROWTH = 1.05
START_SECONDS, WARM_UP_SECONDS, STOP_SECONDS = 120.0, 60.0, 60.0
ACTOR, LEARNER, EVALUATOR = "bm3il_actor", "bm3il_learner", "bm3il_evaluator"
HEADER_BYTES = 1_000
"""At most, of a chunk, which has 23 kB here: its header names every array."""
RETURN_BYTES = 4 * 4 + 16
"""Of an episode that is evaluated: four agents' returns, and its part of the message's header."""
Counters = dict[tuple[str, str], float]
"""Of all processes together, by name and by the label that tells kinds apart."""


def main() -> int:
    """Run, stop, compare; prints all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bm3il-soak-") as name:
        folder, run = Path(name), Path(name) / "soak"
        command = [sys.executable, "-m", "bm3il.launch.cli", "train", "--run", run.name, "--runs-folder", name]
        with (folder / "screen").open("w") as screen:
            process = subprocess.Popen([*command, *OPTIONS], stdout=screen, stderr=screen, stdin=subprocess.DEVNULL)
        try:
            wait_for_iterations(run, process)
            time.sleep(WARM_UP_SECONDS)
            memory = Memory(pids_of(process.pid))
            time.sleep(given.seconds)
            counters = scraped(run)
            missed = memory.grown(LARGEST_GROWTH)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(STOP_SECONDS)
        missed += what_does_not_add_up(run, counters)
        print((folder / "screen").read_text()[-600:])
    print("\n".join(missed) or "as promised")
    return int(bool(missed))


def wait_for_iterations(run: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not (run / "log.jsonl").exists():
        assert process.poll() is None, (run.parent / "screen").read_text()
        assert time.monotonic() < deadline, f"no iteration in {START_SECONDS:.0f} s"
        time.sleep(0.5)


def pids_of(launcher: int) -> dict[str, int]:
    """The launcher and all workers, by name."""
    pids = {"launcher": launcher}
    for child in psutil.Process(launcher).children(recursive=True):
        command = child.cmdline()
        if "bm3il.launch.processes.worker" in command and "bm3il.launch.processes.lifeline" not in command:
            pids["-".join(command[command.index("bm3il.launch.processes.worker") + 1 :])] = child.pid
    return pids


def scraped(run: Path) -> Counters:
    """Actors first: what the learner has, one of them has sent."""
    total: Counters = defaultdict(float)
    targets = json.loads((run / "targets.json").read_text())
    for target in sorted(targets, key=lambda entry: entry["labels"]["process"] == "learner-0"):
        with urllib.request.urlopen(f"http://{target['targets'][0]}/metrics", timeout=10) as answer:
            for family in text_string_to_metric_families(answer.read().decode()):
                for sample in family.samples:
                    total[sample.name, sample.labels.get("kind") or sample.labels.get("cause") or ""] += sample.value
    return total


def what_does_not_add_up(run: Path, counters: Counters) -> list[str]:
    """Sentences about counters, log and result; none if all is well."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    result = json.loads((run / "result.json").read_text())
    share = lines[0]["env_steps"]
    played, trained = counters[f"{ACTOR}_env_steps_total", ""], counters[f"{LEARNER}_env_steps", ""]
    sent, received = counters[f"{ACTOR}_sent_bytes_total", "sent"], counters[f"{LEARNER}_received_bytes_total", "sent"]
    taken = counters[f"{LEARNER}_taken_bytes_total", ""]
    steps_under_way = (CHUNKS_UNDER_WAY + 1) * share
    bytes_under_way = steps_under_way * taken / trained
    evaluations = counters[f"{EVALUATOR}_episodes_total", ""] * RETURN_BYTES
    headers = ACTORS * len(lines) * HEADER_BYTES
    print(f"{len(lines):,} iterations, {played:,.0f} steps played, {trained:,.0f} trained on")
    print(f"{sent / 1e6:,.1f} MB sent, {received / 1e6:,.1f} MB received, {taken / 1e6:,.1f} MB trained on")
    unwanted = {key: value for key, value in counters.items() if value and is_unwanted(*key)}
    checks = {
        "iterations have gaps": [line["iteration"] for line in lines] != list(range(1, len(lines) + 1)),
        "steps of the log do not add up": any(line["env_steps"] != line["iteration"] * share for line in lines),
        "the result has other iterations than the log": result["iterations"] != len(lines),
        "steps were lost": abs(played - trained) > steps_under_way,
        "bytes were lost or sent twice": abs(received - evaluations - sent) > bytes_under_way,
        "bytes were received and not trained on": received - evaluations > 1.02 * taken + headers + bytes_under_way,
        f"counted: {unwanted}": bool(unwanted),
        "no checkpoint": not list((run / "checkpoints").glob("*")),
        f"the run is {result['status']}": result["status"] != "interrupted",
    }
    return [sentence for sentence, wrong in checks.items() if wrong]


def is_unwanted(name: str, kind: str) -> bool:
    """Whether a night without faults may not count it."""
    return kind == "resent" or name.endswith(
        ("_dropped_messages_total", "_restarts_total", "_rewinds_total", "_refused_requests_total")
    )


if __name__ == "__main__":
    sys.exit(main())
