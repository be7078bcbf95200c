"""What starts the nodes may fail, or never come: each is a line, and none is waited for without end."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from bm3il.launch.config import Config, load_preset
from bm3il.launch.nodes import backends, ranks
from bm3il.launch.nodes.rendezvous import REPORT, check_shared_memory
from bm3il.launch.outcome import CRASHED, DEADLINE, INPUT_ERROR, INTERRUPTED, Outcome
from bm3il.launch.processes.supervisor import StopRequests
from bm3il.protocol.errors import InputError
from bm3il.protocol.registry import make_environment
from tests.launch.test_faults import DEADLINE_SECONDS, SMALL, result_of, start

HOSTS = ("sub0", "sub1", "sub2")


class Played:
    """A shell script in the place of mpiexec, and what comes of it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.stopped = folder, StopRequests()
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(ranks, "TELL_SECONDS", 0.3)

    def run(
        self,
        script: str,
        start_seconds: float = 60.0,
        meet_seconds: float = 60.0,
        queues: bool = False,
        order_bytes: int = 0,
    ) -> Outcome:
        starts = backends.Backend(("/bin/sh", "-c", script, "sh"), dict(os.environ), HOSTS, queues)
        self._monkeypatch.setattr(ranks, "backend", lambda config: starts)
        self._monkeypatch.setattr(ranks, "START_SECONDS", start_seconds)
        self._monkeypatch.setattr(ranks, "MEET_SECONDS", meet_seconds)
        config: Config = replace(load_preset("rover_tower_8"), nodes=3, run="x" * order_bytes)
        spec = make_environment(config.environment, 1).spec
        return ranks.run_nodes(config, spec, self.folder, "run", self.stopped)

    def stop_after(self, seconds: float) -> None:
        threading.Timer(seconds, self.stopped.add).start()


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Played:
    return Played(tmp_path, monkeypatch)


def says(*reports: str) -> str:
    """The shell commands of ranks that report."""
    return "; ".join(f"echo {shlex.quote(f'{REPORT} {report}')} >&2" for report in reports)


ONE_STARTED = says('["started", 0]')


def children() -> list[int]:
    return [each.pid for each in psutil.process_iter(["cmdline"]) if "4217" in (each.info["cmdline"] or ())]


def test_ranks_that_never_start_are_given_up_by_name(played: Played, capfd: pytest.CaptureFixture[str]) -> None:
    outcome = played.run(f"{ONE_STARTED}; sleep 4217", start_seconds=1.5)
    assert outcome.code == DEADLINE
    assert outcome.text.startswith("node 1 (sub1), node 2 (sub2) did not start within 2 s")
    assert "waiting for node 1 (sub1), node 2 (sub2) to start, for " in capfd.readouterr().err
    assert not children()


@pytest.mark.parametrize("ignores", ["", "trap '' TERM; "])
def test_the_first_wish_to_stop_ends_a_start(played: Played, ignores: str) -> None:
    played.stop_after(1.0)
    asked = time.monotonic()
    assert played.run(f"{ignores}sleep 4217; sleep 4217").code == INTERRUPTED
    assert time.monotonic() - asked < 30  # and not START_SECONDS
    assert not children()


def test_a_program_that_does_not_read_its_orders_is_given_up(played: Played) -> None:
    assert played.run("sleep 4217", start_seconds=1.0, order_bytes=2**20).code == DEADLINE
    assert not children()


def test_slurm_is_waited_for_until_somebody_wants_to_stop(played: Played, capfd: pytest.CaptureFixture[str]) -> None:
    played.stop_after(2.0)
    outcome = played.run("echo 'srun: job 7 queued' >&2; sleep 4217", start_seconds=0.5, queues=True)
    assert outcome.code == INTERRUPTED
    assert "waiting for Slurm to start 3 nodes (srun: job 7 queued), for " in capfd.readouterr().err


def test_nodes_that_do_not_meet_are_given_up(played: Played) -> None:
    reports = [f'["started", {node}]' for node in range(3)]
    outcome = played.run(f"{says(*reports)}; sleep 4217", meet_seconds=1.0)
    assert outcome.code == DEADLINE
    assert "the nodes have started, but did not meet" in outcome.text
    assert "--network" in outcome.text


def test_what_a_rank_cannot_use_ends_the_start_in_a_line(played: Played, capfd: pytest.CaptureFixture[str]) -> None:
    failed = says('["failed", "--network eth1 fits nothing"]')
    outcome = played.run(f"{ONE_STARTED}; {failed}; {failed}; sleep 4217")
    assert outcome == Outcome(INPUT_ERROR, "--network eth1 fits nothing")
    assert capfd.readouterr().err == ""


def test_an_mpiexec_that_fails_is_quoted_in_a_line(played: Played, capfd: pytest.CaptureFixture[str]) -> None:
    script = "echo x >> starts; echo ==== BAD ====; echo 'ssh: no such host sub1' >&2; echo more >&2; exit 5"
    outcome = played.run(f"cd {played.folder}; {script}")
    assert outcome.code == CRASHED
    assert "(code 5: ssh: no such host sub1; more: " in outcome.text
    assert "\n" not in outcome.text
    assert (played.folder / "logs" / "mpi.log").read_text().count("\n") == 3
    assert len((played.folder / "starts").read_text().split()) == ranks.MEETINGS
    assert capfd.readouterr().err.count("trying again") == ranks.MEETINGS - 1


def test_what_nodes_say_after_they_have_met_is_passed_on(played: Played, capfd: pytest.CaptureFixture[str]) -> None:
    met, late = f"touch {played.folder / ranks.MET}", says('["failed", "late"]')
    assert played.run(f"echo plan; echo held >&2; {met}; sleep 0.5; echo passed >&2; {late}").code == CRASHED
    assert capfd.readouterr() == ("plan\n", "held\npassed\nlate\n")


def test_what_the_first_node_says_of_the_end_counts_where_no_disk_took_it(played: Played) -> None:
    ended = says('["ended", 2, "learner-0: No space left on device"]')
    outcome = played.run(f"touch {played.folder / ranks.MET}; {ended}")
    assert outcome == Outcome(INPUT_ERROR, "learner-0: No space left on device")


def test_reports_that_are_none_are_lines(played: Played, capfd: pytest.CaptureFixture[str]) -> None:
    script = says("[]", "[1, 2, 3]", '["started", "x"]', "{", '["failed"]')
    outcome = played.run(f"{script}; touch {played.folder / ranks.MET}; exit 3")
    assert outcome.text == "the nodes ended without a result (code 3)"
    assert capfd.readouterr().err.count(REPORT) == 5


def test_too_little_shared_memory_is_refused(tmp_path: Path) -> None:
    check_shared_memory(tmp_path, 64)
    check_shared_memory(tmp_path / "not there", 64)
    with pytest.raises(InputError, match=r"MPI needs .*docker run --shm-size"):
        check_shared_memory(tmp_path, 2**40)


@pytest.mark.processes
def test_left_over_variables_and_a_small_shared_memory_do_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = {"PMI_FD": "7", "PMI_RANK": "3", "PMI_SIZE": "9", "PMI_PORT": "nowhere:1", "PMIX_RANK": "0"}
    left |= {"PMIX_NAMESPACE": "gone", "OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "1"}
    left |= {"SLURM_JOB_ID": "7", "SLURM_NODELIST": "gone[1-4]", "SLURM_NNODES": "4", "SLURM_TASKS_PER_NODE": "1(x4)"}
    for name, value in (left | {"FI_PROVIDER": "psm9", "MPIR_CVAR_CH4_NETMOD": "ucx"}).items():
        monkeypatch.setenv(name, value)
    process = start(tmp_path, "run", "--nodes", "2", "--actors", "2", "--steps", "300")
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, output
    assert result_of(tmp_path, "run")["status"] == "finished"


@pytest.mark.processes
@pytest.mark.parametrize(("size", "code"), [("2m", 0), ("64k", 2)])
def test_shared_memory_of_a_container(tmp_path: Path, size: str, code: int) -> None:
    options = ["--run", "run", *SMALL, "--nodes", "4", "--steps", "400"]
    train = [sys.executable, "-m", "bm3il.launch.cli", "train", *options]
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    if os.geteuid() or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("a /dev/shm of its own needs root and unshare")
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", *train]
    done = subprocess.run(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=110
    )
    assert done.returncode == code, done.stdout
    if code:
        assert "/dev/shm has room for 0.1 MiB, and MPI needs 1" in done.stdout
        assert len(done.stdout.splitlines()) < 12


@pytest.mark.processes
def test_a_host_that_does_not_answer_is_left_in_order(tmp_path: Path) -> None:
    """A real mpiexec, with an ssh that waits for ever."""
    agent = tmp_path / "ssh"
    agent.write_text("#!/bin/sh\nexec sleep 4218\n")
    agent.chmod(0o700)
    (tmp_path / "hosts").write_text("198.51.100.1\n198.51.100.2\n")
    options = ["--run", "run", *SMALL, "--nodes", "2", "--hostfile", "hosts"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bm3il.launch.cli", "train", *options],
        cwd=tmp_path,
        env=os.environ | {"HYDRA_LAUNCHER": "ssh", "HYDRA_LAUNCHER_EXEC": str(agent)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line.startswith("waiting for node 0 (198.51.100.1), node 1 (198.51.100.2) to start, for 10 s now"), line
    agents = [each for each in psutil.process_iter(["cmdline"]) if (each.info["cmdline"] or ())[1:] == ["4218"]]
    assert agents
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert result_of(tmp_path, "run")["status"] == "interrupted"
    assert not [each for each in agents if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
