"""A real Slurm on hosts of our own: what ends a job, and how the run comes back to the bits of one node."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hosts import NoHosts
from slurm_cluster import NoSlurm, SlurmCluster

from tests.launch.test_faults import DEADLINE_SECONDS, REPLAYED, SMALL, finished, iterations, result_of

pytestmark = pytest.mark.processes

NODES = 4
SIZE = ["--actors", "4", "--steps", "4000", "--learner.deadline-seconds", "60"]
LAUNCHER = [sys.executable, "-m", "bm3il.launch.cli"]
ONLY_WHEN_STOPPED = ["--learner.checkpoint-interval", "1000"]
LONG = [*REPLAYED, "--learner.updates", "1800", "--steps", "300"]
"""Three iterations of ten to twenty seconds."""


@pytest.fixture
def slurm() -> Iterator[SlurmCluster]:
    try:
        with SlurmCluster(NODES) as made:
            yield made
    except (NoHosts, NoSlurm) as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of the same run on one node."""
    return finished(tmp_path_factory.mktemp("alone"), "run", *SIZE)


class Job:
    """The run as a batch job, submitted as a user would."""

    def __init__(self, slurm: SlurmCluster, folder: Path, *more: str) -> None:
        self.slurm, self.folder = slurm, folder
        options = ["--run", "run", *SMALL, *SIZE, "--nodes", str(NODES), "--time", "10", *more]
        self.number = slurm.call(*LAUNCHER, "submit", *options, cwd=folder).split()[1].rstrip(":")

    def wait_for(self, condition: Callable[[], Any]) -> float:
        """Wait until it holds; returns the seconds that it took."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < DEADLINE_SECONDS, f"{self.state()}\n{self.log()}"
            time.sleep(0.1)
        return time.monotonic() - began

    def in_flight(self) -> None:
        """Wait until the run has a checkpoint or two."""
        self.wait_for(lambda: iterations(self.folder, "run") >= 12)

    def goes_on(self) -> float:
        """Wait until an iteration more is done; returns the seconds that it took."""
        done = iterations(self.folder, "run")
        return self.wait_for(lambda: iterations(self.folder, "run") > done)

    def state(self) -> dict[str, str]:
        return self.slurm.job(self.number)

    def log(self) -> str:
        return (self.folder / "runs" / "run.slurm.log").read_text()

    def was_interrupted(self) -> None:
        """The run ended in order, and what it had done is kept."""
        assert result_of(self.folder, "run")["status"] == "interrupted"
        assert list((self.folder / "runs" / "run" / "checkpoints").glob("[!.]*")), self.log()

    def completes(self, alone: dict[str, Any]) -> None:
        """Wait for the end, which must be that of one node."""
        self.wait_for(lambda: self.state()["JobState"] not in ("RUNNING", "PENDING", "COMPLETING"))
        assert self.state()["JobState"] == "COMPLETED", f"{self.state()}\n{self.log()}"
        result = result_of(self.folder, "run")
        assert (result["status"], result["policy_sha256"]) == ("finished", alone["policy_sha256"])


def test_a_job_on_four_nodes_computes_what_one_node_computes(
    slurm: SlurmCluster, tmp_path: Path, alone: dict[str, Any]
) -> None:
    job = Job(slurm, tmp_path)
    job.completes(alone)
    targets = json.loads((tmp_path / "runs" / "run" / "targets.json").read_text())
    assert {target["targets"][0].partition(":")[0] for target in targets} == set(slurm.hosts.addresses[1:])


def test_a_lost_node_does_not_end_the_job(slurm: SlurmCluster, tmp_path: Path, alone: dict[str, Any]) -> None:
    job = Job(slurm, tmp_path)
    job.in_flight()
    slurm.hosts.power_off(4)
    away = job.wait_for(lambda: "node 3 is lost; its processes go on here" in job.log())
    print(f"node lost: {away + job.goes_on():.1f} s")
    assert job.state()["JobState"] == "RUNNING", job.state()
    job.completes(alone)
    assert job.state()["Restarts"] == "0"


@pytest.mark.slow
@pytest.mark.timeout(300)  # several waits, each with its deadline
def test_a_job_whose_first_node_is_lost_comes_back(slurm: SlurmCluster, tmp_path: Path, alone: dict[str, Any]) -> None:
    job = Job(slurm, tmp_path, "--learner.deadline-seconds", "10")
    job.in_flight()
    slurm.hosts.power_off(1)
    noticed = job.wait_for(lambda: job.state()["JobState"] == "PENDING")
    slurm.hosts.heal(1)
    slurm.boot(1)
    print(f"first node lost: noticed after {noticed:.1f} s, on after {job.goes_on():.1f} s more")
    job.completes(alone)


@pytest.mark.slow
@pytest.mark.timeout(300)  # several waits, each with its deadline
def test_a_preempted_job_comes_back(slurm: SlurmCluster, tmp_path: Path, alone: dict[str, Any]) -> None:
    job = Job(slurm, tmp_path, *ONLY_WHEN_STOPPED)
    job.in_flight()
    wrap = ["--parsable", "--partition=high", f"--nodes={NODES}", "--output=/dev/null", "--wrap", "srun sleep 3"]
    other = slurm.call("sbatch", *wrap).strip()
    taken = job.wait_for(lambda: slurm.job(other)["JobState"] == "RUNNING")
    assert job.state()["JobState"] == "PENDING", job.state()
    job.was_interrupted()
    print(f"preempted: nodes left after {taken:.1f} s, on after {job.goes_on():.1f} s more")
    job.completes(alone)
    assert job.state()["Restarts"] == "1"


@pytest.mark.slow
@pytest.mark.timeout(300)  # several waits, each with its deadline
def test_a_job_whose_time_is_nearly_over_requeues_itself(
    slurm: SlurmCluster, tmp_path: Path, alone: dict[str, Any]
) -> None:
    job = Job(slurm, tmp_path, *ONLY_WHEN_STOPPED)
    job.in_flight()
    slurm.call("scancel", "--batch", "--signal=USR1", job.number)  # as --signal=B:USR1@120 does
    job.wait_for(lambda: job.state()["Restarts"] == "1")
    job.was_interrupted()
    print(f"time over: {job.goes_on():.1f} s")
    job.completes(alone)


@pytest.mark.slow
@pytest.mark.timeout(600)  # several waits, each with its deadline
def test_the_notice_is_used_by_a_job_of_long_iterations(slurm: SlurmCluster, tmp_path: Path) -> None:
    wanted = finished(tmp_path, "undisturbed", *SIZE, *LONG, "--mode", "serial", deadline_seconds=200)
    job = Job(slurm, tmp_path, *LONG, *ONLY_WHEN_STOPPED)
    job.wait_for(lambda: iterations(tmp_path, "run") >= 1)
    time.sleep(2)  # the next one has begun
    slurm.call("scancel", "--batch", "--signal=USR1", job.number)
    print(f"left after {job.wait_for(lambda: job.state()['Restarts'] == '1'):.1f} s")
    job.was_interrupted()
    assert result_of(tmp_path, "run")["iterations"] == 2
    job.completes(wanted)
    seconds = [json.loads(line)["wall_seconds"] for line in (tmp_path / "runs/run/log.jsonl").read_text().splitlines()]
    assert seconds[1] - seconds[0] > 8, "the iterations were too short to show anything"


@pytest.mark.slow
@pytest.mark.timeout(300)  # several waits, each with its deadline
def test_a_cancelled_job_leaves_a_run_that_can_be_resumed(
    slurm: SlurmCluster, tmp_path: Path, alone: dict[str, Any]
) -> None:
    job = Job(slurm, tmp_path, *ONLY_WHEN_STOPPED)
    job.in_flight()
    slurm.call("scancel", job.number)
    print(f"cancelled: {job.wait_for(lambda: job.state()['JobState'] == 'CANCELLED'):.1f} s")
    job.wait_for(lambda: not slurm.at_work())
    job.was_interrupted()
    slurm.call(*LAUNCHER, "resume", "runs/run", cwd=tmp_path)
    assert result_of(tmp_path, "run")["policy_sha256"] == alone["policy_sha256"]


def test_inside_an_allocation_srun_starts_the_nodes(slurm: SlurmCluster, tmp_path: Path, alone: dict[str, Any]) -> None:
    train = [*LAUNCHER, "train", "--run", "run", *SMALL, *SIZE, "--nodes", str(NODES)]
    output = slurm.call("salloc", f"--nodes={NODES}", *train, cwd=tmp_path)
    nodes = zip(slurm.hosts.names[1:], slurm.hosts.addresses[1:], strict=True)
    assert all(f"({name}, {address}, " in output for name, address in nodes)
    assert result_of(tmp_path, "run")["policy_sha256"] == alone["policy_sha256"]
