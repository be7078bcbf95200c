from __future__ import annotations

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bm3il.protocol.channels import Server
from bm3il.protocol.messages import Done, Event, Sender, Status
from bm3il.protocol.telemetry import STOP, Telemetry


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    telemetry = Telemetry("reward-server", 2, Sender("run", "reward-server-2"))
    yield telemetry
    telemetry.close()


def scrape(telemetry: Telemetry) -> dict[str, float]:
    """Sample name with its labels → value, as the endpoint answers."""
    with urllib.request.urlopen(f"http://{telemetry.metrics_address}/metrics", timeout=5) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {
            s.name + "".join(f" {k}={v}" for k, v in s.labels.items()): s.value for f in families for s in f.samples
        }


def test_the_endpoint_answers_with_the_roles_names(telemetry: Telemetry) -> None:
    with telemetry.stage("query"):
        time.sleep(0.02)
    telemetry.count_drop("frame")
    telemetry.count_drop("frame")
    samples = scrape(telemetry)
    assert samples["bm3il_reward_server_stage_seconds_count stage=query"] == 1
    assert 0.02 <= samples["bm3il_reward_server_stage_seconds_sum stage=query"] < 1
    assert samples["bm3il_reward_server_dropped_messages_total cause=frame"] == 2
    assert samples["bm3il_reward_server_resident_memory_bytes"] > 1e6
    assert all(name.startswith("bm3il_reward_server_") for name in samples)
    assert not any("_created" in name for name in samples)


def test_metrics_are_for_who_knows_the_token(telemetry: Telemetry) -> None:
    guarded = Telemetry("actor", 0, Sender("run", "actor-0"), token="one-word")
    url = f"http://{guarded.metrics_address}/metrics"
    try:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Bearer \xfc"}):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5)
        request = urllib.request.Request(url, headers={"Authorization": "Bearer one-word"})
        assert b"bm3il_actor_" in urllib.request.urlopen(request, timeout=5).read()
    finally:
        guarded.close()


def test_stages_nest_and_tell_how_long_they_last(telemetry: Telemetry) -> None:
    with telemetry.stage("outer"):
        with telemetry.stage("inner"):
            assert telemetry.status().stage == "inner"
        time.sleep(0.03)
        assert telemetry.status().stage == "outer"
        assert telemetry.status().values["stage_seconds"] >= 0.03
    assert telemetry.numbers["seconds_outer"] > telemetry.numbers["seconds_inner"]


def test_what_was_spent_in_stages_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("bm3il.protocol.telemetry.time", SimpleNamespace(monotonic=lambda: now))
    telemetry = Telemetry("learner", 0, Sender("run", "learner-0"))
    try:
        for _ in range(2):
            with telemetry.stage("collect"):
                now += 1
                for _ in range(3):
                    with telemetry.stage("wait_for_chunks"):
                        now += 10
                now += 1
        now += 1000
        assert telemetry.take_spent() == {"seconds_collect": 4, "seconds_wait_for_chunks": 60}
        assert telemetry.take_spent() == {}
    finally:
        monkeypatch.undo()
        telemetry.close()


def test_between_two_stages_a_process_is_in_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("bm3il.protocol.telemetry.time", SimpleNamespace(monotonic=lambda: now))
    telemetry = Telemetry("learner", 0, Sender("run", "learner-0"))

    def told() -> tuple[str, float]:
        status = telemetry.status()
        return status.stage, status.values["stage_seconds"]

    try:
        now = 170.0
        assert told() == ("start", 70)
        with telemetry.stage("restore"):
            now = 175.0
            with telemetry.stage("checkpoint"):
                now = 185.0
                assert told() == ("checkpoint", 10)
            now = 186.0
            assert told() == ("restore", 16)
        assert told() == ("between", 0)
        now = 189.0
        assert told() == ("between", 3)
    finally:
        monkeypatch.undo()
        telemetry.close()


def test_a_wait_in_short_polls_is_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("bm3il.protocol.telemetry.time", SimpleNamespace(monotonic=lambda: now))
    telemetry = Telemetry("actor", 0, Sender("run", "actor-0"))

    def poll(times: int, name: str = "wait_for_weights") -> tuple[str, float]:
        nonlocal now
        for _ in range(times):
            with telemetry.stage(name):
                now += 0.25
        status = telemetry.status()
        return status.stage, status.values["stage_seconds"]

    try:
        assert poll(60) == ("wait_for_weights", 15)
        with telemetry.stage("wait_for_weights"):
            now += 1
            assert telemetry.status().values["stage_seconds"] == 16
        with telemetry.stage("collect"):  # what was waited for has come
            now += 1
        assert poll(4) == ("wait_for_weights", 1)
        assert poll(4, "wait_for_credit") == ("wait_for_credit", 1)
        now += 5  # work that is no stage
        assert telemetry.status().stage == "between"
        assert poll(4, "wait_for_credit") == ("wait_for_credit", 1)
        for _ in range(8):  # work again and again is no wait
            with telemetry.stage("collect"):
                now += 0.25
        with telemetry.stage("collect"):
            assert telemetry.status().values["stage_seconds"] == 0
    finally:
        monkeypatch.undo()
        telemetry.close()


def test_stages_may_end_in_any_order(telemetry: Telemetry) -> None:
    first, second = telemetry.stage("first"), telemetry.stage("second")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert telemetry.status().stage == "second"
    second.__exit__(None, None, None)
    assert telemetry.status().stage == "between"


def test_a_stage_that_raises_is_still_timed(telemetry: Telemetry) -> None:
    with pytest.raises(KeyError), telemetry.stage("broken"):
        raise KeyError
    assert telemetry.status().stage == "between"
    assert telemetry.registry.get_sample_value("bm3il_reward_server_stage_seconds_count", {"stage": "broken"}) == 1


def test_the_heartbeat_reaches_the_director_and_brings_back_the_wish_to_stop(tmp_path: Path) -> None:
    control = f"ipc://{tmp_path}/control"
    telemetry = Telemetry("actor", 3, Sender("run", "actor-3"), node=1)
    telemetry.numbers["env_steps"] = np.float64(7)
    telemetry.start_heartbeat(control)  # before the director listens
    director = Server(
        control, Sender("run", "supervisor-0"), lambda body: {} if isinstance(body, Status) else None, print
    )
    try:
        (request,) = director.poll(5)
        status = request.message.body
        assert request.message.sender.name == "actor-3"
        assert (status.role, status.index, status.node, status.stage) == ("actor", 3, 1, "start")
        assert status.values["env_steps"] == 7
        assert status.metrics_address == telemetry.metrics_address
        assert not telemetry.stop.is_set()
        director.answer(request, Done(STOP))
        assert telemetry.stop.wait(5)
    finally:
        telemetry.close()
        director.close()


def test_an_event_is_told_until_it_is_answered_and_counts_once(tmp_path: Path) -> None:
    control = f"ipc://{tmp_path}/control"
    telemetry = Telemetry("learner", 0, Sender("run", "learner-0"))
    telemetry.start_heartbeat(control)
    telemetry.event("best", "return 1")
    telemetry.event("restart", "was killed", "actor-3")
    director = Server(control, Sender("run", "supervisor-0"), lambda body: {}, print)
    told: list[Event] = []
    try:
        deadline = time.monotonic() + 15
        closing = threading.Timer(3.0, telemetry.close)  # by then the first are sent again
        telemetry.event("checkpoint", "x" * 5000)
        unanswered = []
        while len(told) < 3:
            assert time.monotonic() < deadline
            for request in director.poll(0.1):
                if isinstance(request.message.body, Event):
                    told.append(request.message.body)
                    unanswered.append(request)
        closing.start()
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            for request in director.poll(0.1):
                assert not isinstance(request.message.body, Event)
                director.answer(request, Done())
        for request in unanswered:
            director.answer(request, Done())
        closing.join()
    finally:
        director.close()
    assert [(event.what, event.process) for event in told] == [
        *(("best", "learner-0"), ("restart", "actor-3"), ("checkpoint", "learner-0"))
    ]
    assert all(len(event.text) <= 1000 for event in told)


def test_what_happens_last_is_told_before_the_end(tmp_path: Path) -> None:
    control = f"ipc://{tmp_path}/control"
    director = Server(control, Sender("run", "supervisor-0"), lambda body: {}, print)
    telemetry = Telemetry("learner", 0, Sender("run", "learner-0"))
    telemetry.start_heartbeat(control)
    telemetry.event("evaluated", "return 1")
    telemetry.close()
    kinds = {request.message.body.kind for request in director.poll(5)}
    director.close()
    assert kinds == {"event", "status"}


def test_without_a_director_closing_is_quick() -> None:
    telemetry = Telemetry("actor", 0, Sender("run", "actor-0"))
    telemetry.start_heartbeat("ipc:///nowhere/control")
    start = time.monotonic()
    telemetry.close()
    assert time.monotonic() - start < 3.5
    assert not telemetry.stop.is_set()


def test_the_same_names_can_be_used_by_two_in_one_process(telemetry: Telemetry) -> None:
    other = Telemetry("reward-server", 3, Sender("run", "reward-server-3"))
    assert other.metrics_address != telemetry.metrics_address
    other.close()
