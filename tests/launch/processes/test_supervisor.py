"""The supervisor, with workers of a few lines."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from bm3il.launch.config import load_preset
from bm3il.launch.outcome import Outcome
from bm3il.launch.processes import supervisor as module
from bm3il.launch.processes.supervisor import StopRequests, Supervisor
from bm3il.launch.topology import Node, Plan, Process, ipc_addresses
from bm3il.protocol.messages import Sender, Status
from bm3il.protocol.telemetry import Telemetry

SLEEP = "import time; time.sleep(60)"
OBEY = """
import signal, sys, time
def end(*_):
    print(sys.argv[1], "told", time.time(), flush=True)
    time.sleep(float(sys.argv[2]))
    print(sys.argv[1], "ended", time.time(), flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(60)
"""


def plan_of(folder: Path, *processes: Process) -> Plan:
    config = load_preset("rover_tower_8")
    return Plan("run", str(folder), config.to_yaml(), "", (Node("here"),), processes, ipc_addresses(folder, processes))


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    telemetry = Telemetry("supervisor", 0, Sender("run", "supervisor-0"))
    yield telemetry
    telemetry.close()


def watch(supervisor: Supervisor, until: Callable[[], bool] = lambda: False, seconds: float = 20.0) -> Outcome | None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (outcome := supervisor.watch()) or until():
            return outcome
        time.sleep(0.02)
    raise AssertionError("nothing happened in time")


def start(
    folder: Path, telemetry: Telemetry, workers: dict[str, list[str]], said: list[str] | None = None
) -> Supervisor:
    processes = tuple(Process(role, 0, 0) for role in workers)
    say = (lambda _: None) if said is None else said.append
    supervisor = Supervisor(
        plan_of(folder, *processes), 0, telemetry, say, lambda p: [sys.executable, "-c", *workers[p.role]]
    )
    supervisor.start()
    return supervisor


def end(supervisor: Supervisor) -> Outcome:
    stopped = StopRequests()
    outcome = supervisor.stop_learner(stopped, lambda: None)
    supervisor.stop_all(stopped, lambda: None)
    return outcome


@pytest.mark.parametrize(
    ("failure", "shown"),
    [
        ("raise SimulatorError('it ended')", ["it ended"]),
        (
            "\ntry: 1 / 0\nexcept ZeroDivisionError as error: raise SimulatorError('it raised') from error",
            ["Traceback (most recent call last):", "ZeroDivisionError: division by zero", "it raised"],
        ),
    ],
)
def test_a_run_whose_simulator_keeps_failing_ends_with_what_the_simulator_did_and_not_with_our_calls(
    tmp_path: Path, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch, failure: str, shown: list[str]
) -> None:
    monkeypatch.setattr(module, "RESTART_DELAY_SECONDS", 0.0)
    said: list[str] = []
    crash = f"from bm3il.protocol.errors import SimulatorError\n{failure}"
    supervisor = start(tmp_path, telemetry, {"learner": [SLEEP], "actor": [crash]}, said)
    outcome = watch(supervisor)
    end(supervisor)
    assert outcome is not None
    lines = outcome.text.splitlines()[1:]
    assert [line for line in lines if not line.startswith(" ")] == shown
    assert said[0].startswith(f"actor-0 ended with code 1; starting it again ({shown[-1]})")


def test_of_a_long_failure_both_ends_are_told(
    tmp_path: Path, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RESTART_DELAY_SECONDS", 0.0)
    said: list[str] = []
    crash = "raise RuntimeError('simulator ' + 'x' * 1000 + ' is under water')"
    supervisor = start(tmp_path, telemetry, {"learner": [SLEEP], "actor": [crash]}, said)
    watch(supervisor)
    end(supervisor)
    assert said[0].startswith("actor-0 ended with code 1; starting it again (RuntimeError: simulator xxx")
    assert said[0].endswith("xxx is under water)")
    assert len(said[0]) < 500


def test_a_process_that_keeps_crashing_ends_the_run_with_its_traceback(
    tmp_path: Path, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RESTART_DELAY_SECONDS", 0.0)
    said: list[str] = []
    crash = "print('a Traceback in a log'); raise RuntimeError('out of luck')"
    supervisor = start(tmp_path, telemetry, {"learner": [SLEEP], "actor": [crash]}, said)
    outcome = watch(supervisor)
    end(supervisor)
    assert outcome is not None
    assert outcome.code == 1
    assert "actor-0 ended with code 1, 6 times" in outcome.text
    assert outcome.text.count("Traceback (most recent call last)") == 1
    assert outcome.text.endswith("RuntimeError: out of luck")
    assert len(said) == 5
    name = "bm3il_supervisor_restarts_total"
    assert telemetry.registry.get_sample_value(name, {"process": "actor-0"}) == 5
    assert telemetry.registry.get_sample_value(name, {"process": "learner-0"}) == 0, "no increase without a 0"


TRAINS = """
import os, sys, time
told = b"3\\n" if sys.argv[1] == "still" else b"3\\ntrained\\n"
os.write(int(os.environ["BM3IL_DONE_FD"]), told)
time.sleep(60)
"""


@pytest.mark.parametrize(("training", "code"), [("still", 1), ("done", 0)])
@pytest.mark.parametrize(("end_code", "end_code_of_run"), [(1, 1), (2, 2)])
def test_a_training_that_is_complete_does_not_fail_with_its_evaluator(
    tmp_path: Path,
    telemetry: Telemetry,
    monkeypatch: pytest.MonkeyPatch,
    training: str,
    code: int,
    end_code: int,
    end_code_of_run: int,
) -> None:
    """Be it that it keeps crashing, or that it ends for good; and what it says is told."""
    monkeypatch.setattr(module, "RESTART_DELAY_SECONDS", 0.0)
    crash = f"import sys, time; time.sleep(0.5); print('no simulator', file=sys.stderr); sys.exit({end_code})"
    supervisor = start(tmp_path, telemetry, {"learner": [TRAINS, training], "evaluator": [crash]})
    outcome = watch(supervisor)
    end(supervisor)
    assert outcome is not None
    assert outcome.code == code * end_code_of_run
    assert "evaluator-0" in outcome.text
    assert "no simulator" in outcome.text


DOES = """
import os, sys
from pathlib import Path
starts = Path(sys.argv[1])
starts.write_text(starts.read_text() + "x")
number = len(starts.read_text())
done = {"nothing": 0, "something": number < 5, "the same": 7, "more": number}[sys.argv[2]]
if done:
    os.write(int(os.environ["BM3IL_DONE_FD"]), b"%d\\n" % done)
sys.exit("the simulator failed" if number < 12 else 3)
"""


@pytest.mark.parametrize(
    ("role", "does", "starts"),
    [
        ("actor", "nothing", 6),
        ("actor", "something", 10),  # four times, and six times nothing
        ("actor", "the same", 12),  # until it ends with a final code
        ("learner", "the same", 7),  # the iteration that it had come to before
        ("learner", "more", 12),
        ("reward-server", "nothing", 12),  # it does what it is asked for
    ],
)
def test_who_gets_nothing_done_is_given_up_however_seldom_it_crashes(
    tmp_path: Path, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch, role: str, does: str, starts: int
) -> None:
    monkeypatch.setattr(module, "RESTART_DELAY_SECONDS", 0.0)
    monkeypatch.setattr(module, "RESTART_WINDOW_SECONDS", 0.0)  # all crashes are long ago
    (tmp_path / "starts").write_text("")
    supervisor = start(tmp_path, telemetry, {role: [DOES, str(tmp_path / "starts"), does]})
    outcome = watch(supervisor)
    end(supervisor)
    assert len((tmp_path / "starts").read_text()) == starts
    assert outcome is not None
    if starts == 12:
        assert outcome.code == 3
    else:
        assert outcome.code == 1
        assert "it was started 6 times and got nothing done" in outcome.text
        assert outcome.text.endswith("the simulator failed")


def test_a_killed_process_comes_back(tmp_path: Path, telemetry: Telemetry) -> None:
    worker = "import os, sys, time; open(sys.argv[1], 'a').write(f'{os.getpid()} '); time.sleep(60)"
    pids = tmp_path / "pids"
    said: list[str] = []
    supervisor = start(tmp_path, telemetry, {"actor": [worker, str(pids)]}, said)
    watch(supervisor, pids.exists)
    time.sleep(0.1)
    psutil.Process(int(pids.read_text().split()[0])).kill()
    watch(supervisor, lambda: len(pids.read_text().split()) == 2)
    end(supervisor)
    assert said == ["actor-0 was killed by SIGKILL; starting it again"]


def test_a_process_whose_log_was_removed_comes_back(tmp_path: Path, telemetry: Telemetry) -> None:
    """Whoever makes room on the disk does not end the run."""
    crash = "import pathlib, shutil, sys; shutil.rmtree(sys.argv[1]); sys.exit(1)"
    said: list[str] = []
    supervisor = start(tmp_path, telemetry, {"actor": [crash, str(tmp_path / "logs")]}, said)
    assert watch(supervisor, lambda: len(said) == 2) is None
    assert "actor-0 ended with code 1; starting it again" in said[0]
    supervisor.stop_all(StopRequests(), lambda: None)


def test_who_was_told_the_end_before_its_supervisor_has_not_crashed(
    tmp_path: Path, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learner tells actors directly; on another node the supervisor hears of it up to a second later."""
    said: list[str] = []
    supervisor = start(tmp_path, telemetry, {"actor": ["pass"]}, said)
    began = time.monotonic()
    watch(supervisor, lambda: time.monotonic() - began > 1.2)
    assert not said
    watch(supervisor, lambda: bool(said))  # and if no end comes, it is one
    assert said == ["actor-0 ended with code 0; starting it again"]
    end(supervisor)


@pytest.mark.parametrize(("code", "role"), [(2, "actor"), (3, "learner"), (4, "learner")])
def test_final_codes_end_the_run_without_a_restart(tmp_path: Path, telemetry: Telemetry, code: int, role: str) -> None:
    script = f"import sys; print('why it ended', file=sys.stderr); sys.exit({code})"
    supervisor = start(tmp_path, telemetry, {role: [script], "evaluator": [SLEEP]})
    assert watch(supervisor) == Outcome(code, f"{role}-0: why it ended")
    end(supervisor)


def test_the_run_is_done_when_the_learner_is(tmp_path: Path, telemetry: Telemetry) -> None:
    supervisor = start(tmp_path, telemetry, {"learner": ["pass"], "actor": [SLEEP]})
    assert watch(supervisor) == Outcome(0)
    assert end(supervisor) == Outcome(0)


def test_the_learner_is_stopped_first_and_the_others_after_it(tmp_path: Path, telemetry: Telemetry) -> None:
    supervisor = start(
        tmp_path, telemetry, {"reward-server": [OBEY, "rewards", "0"], "learner": [OBEY, "learner", "0.4"]}
    )
    logs = [tmp_path / "logs" / f"{name}-0.log" for name in ("learner", "reward-server")]
    watch(supervisor, lambda: all("ready" in log.read_text() for log in logs))
    assert end(supervisor) == Outcome(130)
    times = {
        tuple(words[:2]): float(words[2]) for log in logs for words in map(str.split, log.read_text().splitlines()[1:])
    }
    assert times["learner", "told"] + 0.4 <= times["learner", "ended"] <= times["rewards", "told"]
    assert ("rewards", "ended") in times


def test_who_does_not_obey_is_killed(tmp_path: Path, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEARNER_GRACE_SECONDS", 0.3)
    supervisor = start(tmp_path, telemetry, {"learner": [OBEY, "learner", "60"]})
    log = tmp_path / "logs" / "learner-0.log"
    watch(supervisor, lambda: "ready" in log.read_text())
    began = time.monotonic()
    end(supervisor)
    assert 0.3 <= time.monotonic() - began < 2
    assert "learner ended" not in log.read_text()


def test_a_learner_gets_the_time_that_its_iterations_take(
    tmp_path: Path, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEARNER_GRACE_SECONDS", 0.3)
    supervisor = start(tmp_path, telemetry, {"learner": [OBEY, "learner", "1"]})
    log = tmp_path / "logs" / "learner-0.log"
    watch(supervisor, lambda: "ready" in log.read_text())
    assert supervisor.stop_learner(StopRequests(), lambda: None, lambda: 10.0) == Outcome(130)
    assert "learner ended" in log.read_text()


def test_a_heartbeat_that_comes_while_stopping_lengthens_the_patience(tmp_path: Path, telemetry: Telemetry) -> None:
    supervisor = start(tmp_path, telemetry, {"learner": [OBEY, "learner", "1"]})
    log = tmp_path / "logs" / "learner-0.log"
    watch(supervisor, lambda: "ready" in log.read_text())
    began = time.monotonic()
    grace = lambda: 10.0 if time.monotonic() - began > 0.3 else 0.6  # noqa: E731
    assert supervisor.stop_learner(StopRequests(), lambda: None, grace) == Outcome(130)
    assert "learner ended" in log.read_text()


@pytest.mark.parametrize(
    ("iteration", "checkpoint", "notice", "seconds"),
    [
        (0.1, 0.1, "", 5.9),
        (20.0, 1.0, "", 47.5),
        (20.0, 1.0, "60", 55.5),
        (20.0, 1.0, "30", 25.5),
        (20.0, 1.0, "5", 5.5),
        (20.0, 1.0, "soon", 47.5),
    ],
)
def test_patience_follows_from_what_was_measured_and_from_the_notice(
    iteration: float, checkpoint: float, notice: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"seconds_iteration": iteration, "seconds_checkpoint": checkpoint}
    monkeypatch.setenv("BM3IL_NOTICE_SECONDS", notice)
    assert module.patience(Status("learner", 0, 0, 1, "update", "", values)) == pytest.approx(seconds)


def test_a_learner_that_was_never_heard_gets_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BM3IL_NOTICE_SECONDS", raising=False)
    assert module.patience(None) == module.LEARNER_GRACE_SECONDS


def test_a_second_request_ends_the_patience(tmp_path: Path, telemetry: Telemetry) -> None:
    supervisor = start(tmp_path, telemetry, {"learner": [OBEY, "learner", "60"]})
    log = tmp_path / "logs" / "learner-0.log"
    watch(supervisor, lambda: "ready" in log.read_text())
    stopped = StopRequests()
    stopped.count = 1
    began = time.monotonic()
    supervisor.stop_learner(stopped, stopped.add)
    assert time.monotonic() - began < 1


SUPERVISE = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_supervisor import SLEEP, plan_of
from bm3il.launch.processes.supervisor import Supervisor
from bm3il.launch.topology import Process
from bm3il.protocol.messages import Sender
from bm3il.protocol.telemetry import Telemetry
processes = [Process("actor", index, 0) for index in range(3)]
plan = plan_of(Path(sys.argv[1]), *processes)
telemetry = Telemetry("supervisor", 0, Sender("run", "supervisor-0"))
supervisor = Supervisor(plan, 0, telemetry, print, lambda p: [sys.executable, "-c", SLEEP, sys.argv[2]])
supervisor.start()
print("started", flush=True)
time.sleep(60)
"""


def test_a_killed_supervisor_leaves_no_orphan(tmp_path: Path) -> None:
    token = f"token-{time.time_ns()}"
    command = [sys.executable, "-c", SUPERVISE, str(tmp_path), token, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        assert supervisor.stdout.readline() == "started\n"
        deadline = time.monotonic() + 10
        while len([p for p in _sleepers(token) if "-m" not in p.cmdline()]) < 3:  # the others guard them
            assert time.monotonic() < deadline, "the workers did not start"
            time.sleep(0.05)
        supervisor.kill()
    deadline = time.monotonic() + 3
    while _sleepers(token) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _sleepers(token) == []


def _sleepers(token: str) -> list[psutil.Process]:
    """Processes of the fake workers that are alive; the dead may stay zombies where nobody reaps them."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or []
        if command[-1:] == [token] and SLEEP in command and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def test_the_processes_of_a_lost_node_go_on_here(tmp_path: Path, telemetry: Telemetry) -> None:
    processes = (Process("learner", 0, 0), Process("actor", 0, 1))
    config = load_preset("rover_tower_8")
    nodes = (Node("here"), Node("there", "10.0.0.9"))
    plan = Plan("run", str(tmp_path), config.to_yaml(), "", nodes, processes, ipc_addresses(tmp_path, processes))
    echo = "import json, sys, time; print(json.load(sys.stdin)['processes'], flush=True); time.sleep(60)"
    supervisor = Supervisor(plan, 0, telemetry, lambda _: None, lambda p: [sys.executable, "-c", echo])
    supervisor.start()
    log = tmp_path / "logs" / "actor-0.log"
    assert not log.exists()
    supervisor.adopt(1)
    watch(supervisor, lambda: log.exists() and "'actor', 'index': 0, 'node': 0" in log.read_text())
    end(supervisor)


def test_adopted_processes_know_that_they_have_moved(tmp_path: Path, telemetry: Telemetry) -> None:
    config = load_preset("rover_tower_8")
    processes = (Process("learner", 0, 0), Process("actor", 0, 1), Process("actor", 1, 2))
    nodes = tuple(Node(name) for name in "abc")
    plan = Plan("run", str(tmp_path), config.to_yaml(), "", nodes, processes, ipc_addresses(tmp_path, processes))
    sleep = [sys.executable, "-c", "import sys, time; print(sys.stdin.read()); sys.stdout.flush(); time.sleep(60)"]
    supervisor = Supervisor(plan, 0, telemetry, lambda _: None, lambda p: sleep)
    try:
        supervisor.adopt(1)
        (adopted,) = [child for child in supervisor._children if child.process.role == "actor"]
        told = Plan.from_json(adopted._stdin)
        assert (adopted.process.node, [p.node for p in told.processes]) == (0, [0, 0, 2])
    finally:
        stopped = StopRequests()
        stopped.count = 2
        supervisor.stop_all(stopped, lambda: None)


def test_signals_are_given_back_once_a_run_has_ended() -> None:
    stopped, before = StopRequests(), signal.getsignal(signal.SIGTERM)
    with stopped.heard():
        signal.raise_signal(signal.SIGTERM)
    assert stopped.count == 1
    assert signal.getsignal(signal.SIGTERM) is before
