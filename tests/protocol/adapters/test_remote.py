"""Simulators in other processes: a queueing network in Node.js, walkers in Python, and those that say what is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bm3il.actors.policy import UniformPolicy
from bm3il.actors.rollout import rollout
from bm3il.actors.simulator import Simulator
from bm3il.launch.cli import main
from bm3il.launch.environments.check import check_environment
from bm3il.protocol.adapters.wire import HEAD, described
from bm3il.protocol.errors import InputError, SimulatorError
from bm3il.protocol.registry import make_environment, with_absolute_files

QUEUES = f"remote:node {Path(__file__).parent / 'queues.js'}"
DOCS = Path(__file__).resolve().parents[3] / "docs" / "remote.md"
PYTHON = sys.executable
SPEC = {"protocol": 1, "name": "x", "episode_length": 5, "types": [{"name": "a", "count": 1, **{"observation_dim": 1}}]}
SPEC["types"][0]["action_dim"] = 2  # type: ignore[index]

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="there is no node on the PATH")


@pytest.fixture(scope="module")
def walkers(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The simulator that the documentation shows."""
    (program,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path_factory.mktemp("walkers") / "walkers.py"
    path.write_text(program, encoding="utf-8")
    return f"remote:{PYTHON} {path}"


@needs_node
@pytest.mark.parametrize("options", ["", "?processes=2", "?slip=0.2"])
def test_queues_keep_the_contract(options: str) -> None:
    assert check_environment(QUEUES + options) == 0


def test_the_simulator_of_the_documentation_keeps_the_contract(walkers: str) -> None:
    assert check_environment(walkers) == 0


def test_the_bytes_of_the_documentation_are_what_is_said(walkers: str) -> None:
    dump = re.findall(
        r"^(->|<-|  ) ((?:[0-9a-f]{2} )*[0-9a-f]{2})( …)?", DOCS.read_text(encoding="utf-8"), re.MULTILINE
    )
    messages: list[tuple[str, bytes, bool]] = []
    for way, text, cut in dump:
        if way == "  ":
            way, before, _ = messages.pop()
            messages.append((way, before + bytes.fromhex(text), bool(cut)))
        else:
            messages.append((way, bytes.fromhex(text), bool(cut)))
    assert [way for way, _, _ in messages] == ["->", "<-"] * 3
    with subprocess.Popen(walkers.removeprefix("remote:").split(), stdin=-1, stdout=-1) as simulator:
        assert simulator.stdin is not None
        assert simulator.stdout is not None
        for way, data, cut in messages:
            if way == "->":
                simulator.stdin.write(data)
                simulator.stdin.flush()
                continue
            head = simulator.stdout.read(HEAD.size)
            answer = head + simulator.stdout.read(HEAD.unpack(head)[1])
            assert answer[: len(data)] == data
            assert cut or len(answer) == len(data)


@needs_node
def test_types_masks_and_those_who_come_later_are_shown() -> None:
    environment = make_environment(QUEUES, 2)
    spec = environment.spec
    assert [(t.name, t.count, t.observation_dim, t.action_dim) for t in spec.types] == [
        ("dispatcher", 3, 5, 3),
        ("server", 2, 7, 4),
    ]
    assert [part.name for part in spec.types[0].parts] == ["own", "queues", "loads"]
    assert (spec.view, spec.name) == ("remote:queues", QUEUES)
    now = environment.reset(0)
    assert now.observations[0][0].tolist() == [[1, 0, 0, 0, 0]] * 3
    assert now.action_masks[0].all()
    assert now.action_masks[1][0].tolist() == [[True, False, False, False], [True] * 4]
    assert now.active[1][0].tolist() == [True, False]
    assert not any(rewards.any() for rewards in now.rewards)
    now = environment.step([np.array([[1, 1, 2]] * 2), np.zeros((2, 2), int)])
    assert now.observations[0][:, :, 1:3].tolist() == [[[1, 0], [1, 0], [0, 1]]] * 2
    assert now.action_masks[1][0, 0].tolist() == [True, True, True, False]
    assert now.rewards[1][0].tolist() == [-2, -1]
    now = environment.step([np.zeros((2, 3), int), np.array([[2, 0]] * 2)])
    assert now.active[1].all()
    assert now.observations[1][:, 0, 4:].tolist() == [[0, 1, 0]] * 2


@needs_node
def test_an_episode_does_not_depend_on_the_number_of_processes() -> None:
    played = []
    for processes in (1, 3, 9):
        environment = Simulator(f"{QUEUES}?processes={processes}", 5)
        played.append(rollout(environment, UniformPolicy(environment.spec), 11).arrays)
        environment.close()
    for arrays in played[1:]:
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, played[0][name])


@needs_node
def test_copies_start_alike_and_are_not_the_same() -> None:
    environment = make_environment(QUEUES, 2)
    idle = [np.zeros((2, 3), int), np.zeros((2, 2), int)]
    shown = [environment.reset(4), *(environment.step(idle) for _ in range(3))]
    same = [bool((now.observations[0][0] == now.observations[0][1]).all()) for now in shown]
    assert same[0]
    assert not all(same)


@needs_node
def test_simulators_of_one_world_are_started_for_each_copy() -> None:
    alone = f"{QUEUES} --most 1"
    with pytest.raises(SimulatorError, match=r"it failed: at most 1 copies"):
        make_environment(alone, 3)
    environment = make_environment(f"{alone}?processes=100", 3)
    assert environment.reset(1).observations[0].shape == (3, 3, 5)


def test_an_episode_without_an_end_is_cut_off(walkers: str) -> None:
    environment = make_environment(walkers, 2)
    environment.reset(0)
    stay = [np.ones((2, 3), int)]
    for step in range(20):
        now = environment.step(stay)
        assert now.truncated.tolist() == [step == 19] * 2
    assert now.active[0].all()
    after = environment.step(stay)
    assert after.truncated.all()
    assert not any(array.any() for array in (after.active[0], after.rewards[0], after.terminated))


@needs_node
@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (
            "nan@2",
            r"agent 1 of type 'dispatcher' in copy 0 observes nan as its number 1 \('queues'\), expected finite num",
        ),
        ("nan@0", "observes nan"),
        ("stuck@2", "agent 0 of type 'dispatcher' in copy 0 is active, and its mask allows nothing"),
        ("bits@2", "action_masks must be bytes of 0 and 1, got 2"),
        ("throw@2", r"its last words: .* \| Error: the server room is under water$"),
        (
            "short@2",
            r"expected SHOW of 314 bytes, got SHOW of 313; it is made of observations of dispatcher 2×3×5 float32, "
            r"observations of server 2×2×7 float32, rewards .* active of server 2×2 uint8, terminated 2 uint8, trunc",
        ),
        ("double@2", r"expected SHOW of 314 bytes, got SHOW of 586"),
        ("endless@2", r"expected SHOW of 314 bytes, got SHOW of 4294967295"),
        ("chatter@2", r"expected the head of SHOW, got b'three jo'; does it print to its standard output"),
        ("fail@2", "it failed: no server left"),
        ("exit@2", r"should answer with SHOW, but ended with code 3; its last words: the queue is on fire \| good bye"),
        ("silence@2", r"did not answer with SHOW within 0.5 s"),
        ("deaf@2", r"did not answer with SHOW within 0.5 s"),
    ],
)
def test_what_a_simulator_does_wrong_is_named(fault: str, text: str) -> None:
    environment = make_environment(f"{QUEUES} --fault {fault}?seconds=0.5", 2)
    process = environment._copies._sessions[0]._process  # type: ignore[attr-defined]
    nothing = [np.zeros((2, 3), int), np.zeros((2, 2), int)]

    def play() -> None:
        environment.reset(1)
        for _ in range(3):
            environment.step(nothing)

    with pytest.raises(SimulatorError, match=text) as raised:
        play()
    assert str(raised.value).startswith(f"environment '{QUEUES} --fault {fault}?seconds=0.5'")
    if fault.partition("@")[0] not in ("nan", "stuck", "bits"):  # what is said next would be no answer to what is asked
        with pytest.raises(SimulatorError, match=text):
            environment.reset(2)
    environment.close()  # type: ignore[attr-defined]
    assert process.poll() is not None


@needs_node
@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("version", "speaks version 2 of the wire protocol, this bm3il speaks 1"),
        ("misspelt", "unknown key of SPEC 'episode_lenght'; did you mean episode_length"),
        ("spec", "type 'dispatcher': count must be an integer in"),
    ],
)
def test_what_it_says_of_itself_must_fit(fault: str, text: str) -> None:
    with pytest.raises(InputError, match=text):
        make_environment(f"{QUEUES} --fault {fault}", 1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"types": 3}, "expected 'types' to be a list, got 3"),
        ({"types": [3]}, "expected a type of SPEC to be an object of JSON, got int"),
        ({"types": []}, "has no agent types"),
        ({"name": ["x"]}, "expected 'name' to be a str"),
        ({"episode_length": 10**20}, "the most steps of an episode, got 1000"),
        ({"episode_length": 1.5}, r"episode_length must be an integer in 1\.\.10000000"),
        ({"type": {"count": True}}, "count must be an integer"),
        ({"type": {"action_dim": 1 << 40}}, "action_dim must be an integer in"),
        ({"type": {"masks": 1}}, "'masks' must be true or false, got 1"),
        ({"type": {"discrete": False, "masks": True}}, "masks, which are of discrete actions only"),
        ({"type": {"parts": [{"name": "x", "width": 1, "kind": "code"}]}}, "unknown key of a part of type 'a' 'kind'"),
        ({"type": {"parts": [{"name": "x", "width": 2}]}}, "parts are 2 wide, its observation 1"),
        ({"type": {"parts": 3}}, "expected a part of type 'a' to be an object"),
        ({"type": {"purpose": ["x"]}}, "unknown part"),
        ({"type": {"purpose": 3}}, "not an environment spec"),
    ],
)
def test_a_description_that_cannot_be_meant_is_refused(change: dict[str, object], text: str) -> None:
    told = {**SPEC, **change}
    if isinstance(of_type := told.pop("type", None), dict):
        told["types"] = [{**SPEC["types"][0], **of_type}]  # type: ignore[index]
    with pytest.raises(InputError, match=text):
        described(json.dumps(told).encode(), "remote:x")


@pytest.mark.parametrize(
    "value",
    [None, True, -1, 0, 1 << 70, 1e308, float("nan"), "", "x" * 70_000, [], {}, [[]], [{}], {"name": []}, "é\x00"],
)
def test_whatever_it_says_of_itself_is_taken_or_refused(value: object) -> None:
    kind = {**SPEC["types"][0], "discrete": True, "masks": True, "active": True}  # type: ignore[index]
    kind |= {"parts": [{"name": "x", "width": 1}], "purpose": ["x"]}
    told = {**SPEC, "types": [kind]}
    assert described(json.dumps(told).encode(), "x").masks == (True,)
    part = kind["parts"][0]
    for place in (told, kind, part):
        for key in place:
            before, place[key] = place[key], value
            with suppress(InputError):
                described(json.dumps(told).encode(), "x")
            place[key] = before


@pytest.mark.parametrize("text", [b"\xff", b"{", b"[]", b"[" * 100_000, b'{"protocol": 1}'])
def test_bytes_that_are_no_description_are_refused(text: bytes) -> None:
    with pytest.raises(InputError, match=r"remote:x: (expected|SPEC lacks name, episode_length, types)"):
        described(text, "remote:x")


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("remote", InputError, "name the command that starts the simulator"),
        ("remote:nodd x.js", InputError, "there is no program 'nodd' here"),
        ("remote:node 'x.js", InputError, "expected a command"),
        ("remote:tcp://127.0.0.1", InputError, "expected tcp://HOST:PORT"),
        ("remote:tcp://127.0.0.1:1", SimulatorError, "nobody answers at tcp://127.0.0.1:1"),
        ("remote:cat?processes=0", InputError, "expected processes ≥ 1"),
        ("remote:cat?seconds=nan", InputError, "expected seconds above 0"),
        ("remote:cat", SimulatorError, "expected the head of SPEC, got b'HELO"),
        ("remote:true", SimulatorError, "but ended with code 0"),
        (f"remote:{PYTHON} -c 'import lost'", SimulatorError, "ended with code 1; its last words: .*No module"),
        ("remote:sleep 60?start_seconds=0.2", SimulatorError, "did not answer with SPEC within 0.2 s"),
    ],
)
def test_what_cannot_be_reached_is_said_in_one_line(
    name: str, error: type[Exception], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(error, match=text):
        make_environment(name, 1)
    assert main(["check-environment", name]) == 2
    assert re.search(text, capsys.readouterr().err)


@pytest.mark.parametrize("width", ["observation_dim", "action_dim"])
def test_too_large_a_step_is_refused_before_there_is_room_for_it(width: str) -> None:
    wide = {**SPEC, "types": [{**SPEC["types"][0], "count": 10_000, width: 1000}]}  # type: ignore[index]
    with Listening(json.dumps(wide).encode()) as name, pytest.raises(InputError, match="a step of 100 copies has"):
        make_environment(name, 100)


def test_a_step_may_be_larger_than_what_a_pipe_holds(tmp_path: Path) -> None:
    """Both ways: neither side can send all of it before the other begins to read."""
    program = tmp_path / "wide.py"
    program.write_text(WIDE, encoding="utf-8")
    environment = make_environment(f"remote:{PYTHON} {program}", 2)
    first = environment.reset(0)
    action = np.linspace(-1, 1, 2 * 300_000, dtype=np.float32).reshape(2, 1, -1)
    now = environment.step([action])
    assert not first.observations[0].any()
    np.testing.assert_array_equal(now.observations[0], action)


WIDE = """
import json, struct, sys
size = 300_000
spec = {"name": "a", "count": 1, "observation_dim": size, "action_dim": size, "discrete": False}
spec = {"protocol": 1, "name": "wide", "episode_length": 5, "types": [spec]}
while head := sys.stdin.buffer.read(8):
    kind, length = struct.unpack("<4sI", head)
    body = sys.stdin.buffer.read(length)
    if kind == b"RSET":
        body = bytes(2 * 4 * size)
    body = json.dumps(spec).encode() if kind == b"HELO" else body + bytes(2 * 4) + bytes(4)
    sys.stdout.buffer.write((b"SPEC" if kind == b"HELO" else b"SHOW") + struct.pack("<I", len(body)) + body)
    sys.stdout.buffer.flush()
"""


class Listening:
    """Somebody who answers whatever is asked with a `SPEC` of this body: the name by which to reach it."""

    def __init__(self, spec: bytes) -> None:
        self._answer = b"SPEC" + len(spec).to_bytes(4, "little") + spec
        self._socket = socket.create_server(("127.0.0.1", 0))

    def __enter__(self) -> str:
        threading.Thread(target=self._serve, daemon=True).start()
        return f"remote:tcp://127.0.0.1:{self._socket.getsockname()[1]}"

    def _serve(self) -> None:
        connection, _ = self._socket.accept()
        connection.recv(100)
        connection.sendall(self._answer)

    def __exit__(self, *_: object) -> None:
        self._socket.close()


@pytest.fixture
def served() -> Iterator[str]:
    """The queues, listening on a port."""
    command = [*QUEUES.removeprefix("remote:").split(), "--listen", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        port = re.findall(r"port (\d+)", server.stderr.readline())[0]
        yield f"remote:tcp://127.0.0.1:{port}"
        server.kill()


@needs_node
def test_a_simulator_that_listens_serves_everybody(served: str) -> None:
    assert check_environment(f"{served}?processes=2") == 0
    one, other, started = (make_environment(name, 2) for name in (served, served, QUEUES))
    first = [each.reset(seed).observations[0] for each, seed in ((one, 1), (other, 2), (started, 1))]
    nothing = [np.zeros((2, 3), int), np.zeros((2, 2), int)]
    for _ in range(5):
        first = [each.step(nothing).observations[0] for each in (one, other, started)]
    np.testing.assert_array_equal(first[0], first[2])
    assert (first[0] != first[1]).any()


@needs_node
def test_a_connection_that_is_closed_is_named(tmp_path: Path) -> None:
    with Listening(json.dumps(SPEC).encode()) as name:
        environment = make_environment(name, 1)
        time.sleep(0.2)  # its thread is over, and with it the connection
        with pytest.raises(SimulatorError, match=r"closed the connection|the connection broke"):
            environment.reset(0)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return not Path(f"/proc/{process}/stat").read_text(encoding="utf-8").split(")")[1].startswith(" Z")


def ends(process: int) -> bool:
    for _ in range(100):
        if not alive(process):
            return True
        time.sleep(0.05)
    return False


def test_a_simulator_that_nobody_needs_any_more_ends(walkers: str) -> None:
    environment = make_environment(walkers, 1)
    process = environment._copies._sessions[0]._process.pid  # type: ignore[attr-defined]
    assert alive(process)
    del environment
    assert ends(process)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends the children of a process that is killed")
def test_a_simulator_dies_with_whoever_started_it(tmp_path: Path) -> None:
    """Even if it does not look at its input, and there was no time for a word."""
    deaf = tmp_path / "deaf.py"
    spec = json.dumps(SPEC)
    deaf.write_text(
        f"import os, struct, sys, time; print(os.getpid(), file=sys.stderr, flush=True); spec = {spec!r}.encode()\n"
        "sys.stdout.buffer.write(struct.pack('<4sI', b'SPEC', len(spec)) + spec); sys.stdout.flush(); time.sleep(600)\n"
    )
    program = f"""
import time
from bm3il.protocol.adapters.remote import Remote
Remote(1, {f"{PYTHON} {deaf}"!r})
kept = Remote(1, {f"{PYTHON} {deaf}"!r})
print("there", flush=True)
time.sleep(600)
"""
    with subprocess.Popen([PYTHON, "-c", program], stdout=-1, stderr=-1, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stderr is not None
        children = [int(parent.stderr.readline()) for _ in range(2)]
        assert parent.stdout.readline() == "there\n"
        assert not alive(children[0])  # it was closed, did not hear, and was killed
        assert alive(children[1])
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert ends(children[1])


def test_words_that_are_files_are_known_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("sim.js", "map one.bin", "node"):
        Path(name).touch()
    found = with_absolute_files("remote:node sim.js --map 'map one.bin' --size 3?seconds=5&slip=0.1")
    assert found == (
        f"remote:node {tmp_path}/sim.js --map '{tmp_path}/map one.bin' --size 3?seconds=5&slip=0.1",
        [f"{tmp_path}/sim.js", f"{tmp_path}/map one.bin"],
    )
    for unchanged in ("remote:tcp://127.0.0.1:5555", "remote:node 'sim.js", "remote", "remote:"):
        assert with_absolute_files(unchanged) == (unchanged, [])
    (tmp_path / "a?b").mkdir()
    monkeypatch.chdir(tmp_path / "a?b")
    Path("sim.js").touch()
    with pytest.raises(
        InputError, match=r"'\?' parts the options of an environment: move .*sim.js to a path without it"
    ):
        with_absolute_files("remote:node sim.js")


def test_start_states_are_refused(walkers: str) -> None:
    with pytest.raises(InputError, match="cannot start from given states"):
        make_environment(walkers, 1).reset(0, {"places": np.zeros((1, 2))})


@needs_node
def test_it_trains(tmp_path: Path) -> None:
    tiny = ["--steps", "80", "--actor.steps-per-iteration", "40", "--learner.updates", "1", "--learner.batch-size", "8"]
    few = ["--evaluation.episodes", "2", "--evaluation.final-episodes", "2", "--evaluation.starts", "fresh"]
    place = ["--runs-folder", str(tmp_path), "--run", "queues", "--mode", "serial", "--learner.start", "random"]
    assert main(["train", "--environment", QUEUES, "--algorithm", "maac", *tiny, *few, *place]) == 0
    result = SimpleNamespace(**json.loads((tmp_path / "queues" / "result.json").read_text()))
    assert (result.status, result.environment) == ("finished", QUEUES)
