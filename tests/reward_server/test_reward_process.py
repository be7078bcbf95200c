from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from prometheus_client import generate_latest

from bm3il.protocol.channels import Refused, Unanswered
from bm3il.protocol.errors import NumericalError
from bm3il.protocol.layout import JointRows, Layout
from bm3il.protocol.messages import Query, Sender
from bm3il.protocol.specs import EnvironmentSpec, TypeSpec
from bm3il.protocol.telemetry import Telemetry
from bm3il.reward_server import client as module
from bm3il.reward_server.client import Kept, LocalRewards, RemoteRewards, RewardService
from bm3il.reward_server.model import Model, TrueRewards
from bm3il.reward_server.particles import RewardModel, state_table
from bm3il.reward_server.process import RewardServer, listen, request_schema
from bm3il.reward_server.settings import RewardSettings
from tests.plain import seen_by

torch.set_num_threads(1)

LAYOUT = Layout.of(EnvironmentSpec("two", (TypeSpec("a", 3, 4, 5), TypeSpec("b", 2, 6, 3)), 10), "agent")
SETTINGS = RewardSettings(particles=2, hidden=(8,), batch_size=16, window_steps=32, updates=2, max_queue_rows=64)


def some_rows(count: int, seed: int) -> JointRows:
    g = torch.Generator().manual_seed(seed)
    shapes = [((count, b.num_agents), b) for b in LAYOUT.blocks]
    return JointRows(
        seen_by(LAYOUT, [torch.randn(*shape, b.observation_dim, generator=g) for shape, b in shapes]),
        [torch.randint(b.action_dim, shape, generator=g) for shape, b in shapes],
        [torch.rand(shape, generator=g) < 0.9 for shape, _ in shapes],
    )


def make_model(settings: RewardSettings = SETTINGS) -> Model:
    if settings.source == "environment":
        return TrueRewards()
    return RewardModel(LAYOUT, some_rows(20, 1), settings, seed=3)


class Running:
    """A reward server in a thread."""

    def __init__(self, folder: Path, settings: RewardSettings) -> None:
        self.endpoint, self.settings = f"ipc://{folder}/rewards", settings
        self.clients: list[RemoteRewards] = []
        self.start()

    def start(self) -> None:
        self.telemetry = Telemetry("reward-server", 0, Sender("run", "reward-server"))
        server = listen(self.endpoint, LAYOUT, self.settings, state_table(LAYOUT, self.settings), self.telemetry)
        self.ledger = server._ledger
        service = RewardServer(server, lambda: make_model(self.settings), LAYOUT, self.settings, self.telemetry)

        def loop() -> None:
            while not self.telemetry.stop.is_set():
                service.serve(0.05)
            server.close()

        self.thread = threading.Thread(target=loop)
        self.thread.start()

    def stop(self) -> None:
        self.telemetry.stop.set()
        self.thread.join()
        self.telemetry.close()

    def client(self, alone: bool = True, deadline_seconds: float = 60.0) -> RemoteRewards:
        sender, table = Sender("run", f"learner-{len(self.clients)}"), state_table(LAYOUT, self.settings)
        client = RemoteRewards(self.endpoint, sender, LAYOUT, table, lambda cause: None, deadline_seconds, alone=alone)
        self.clients.append(client)
        return client

    def metric(self, name: str) -> float:
        text = generate_latest(self.telemetry.registry).decode()
        return sum(
            float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"bm3il_reward_server_{name}")
        )


@contextmanager
def running(folder: Path, settings: RewardSettings = SETTINGS) -> Iterator[Running]:
    server = Running(folder, settings)
    try:
        yield server
    finally:
        server.stop()
        for client in server.clients:
            client.close()


def train(service: RewardService) -> list[np.ndarray]:
    """A short run; every number that came out of it."""
    numbers: list[np.ndarray] = []
    for iteration in range(3):
        version, figures = service.updated(service.update(some_rows(10, iteration), iteration / 3))
        numbers.append(np.array([version, *(figures[name] for name in sorted(figures))]))
        tickets = [service.submit(some_rows(7, 10 + k)) for k in range(3)]
        numbers += [r.numpy() for ticket in tickets for r in service.rewards(ticket)]
    return numbers + list(service.state().values())


def test_remote_and_local_give_the_same_bits_and_a_state_continues(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        remote, local = server.client(), LocalRewards(make_model)
        for service in (remote, local):
            service.begin("first")
        for far, near in zip(train(remote), train(local), strict=True):
            np.testing.assert_array_equal(far, near)
        state = local.state()
        for service in (remote, local):
            service.begin("second", state)
        for far, near in zip(train(remote), train(local), strict=True):
            np.testing.assert_array_equal(far, near)
        assert remote.particles_version == 6
        assert server.metric("queries_total") == 18
        assert server.metric("query_rows_total") == 126
        assert server.metric("particles_version") == 6


@pytest.mark.parametrize(("name", "most"), [("ROWS_AT_ONCE", 10), ("AGENTS_AT_ONCE", 30)])
def test_rows_that_are_named_are_those_that_were_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, most: int
) -> None:
    """Queries by number and by value give the same bits, whatever was overwritten, and after a restart, which brings
    the rows in several messages."""
    monkeypatch.setattr(module, name, most)
    shown = [some_rows(rows, seed) for seed, rows in enumerate((12, 20, 7))]
    with running(tmp_path) as server:
        remote = server.client()
        remote.begin("first", kept=Kept(25, 100))
        for rows in shown:
            remote.updated(remote.update(rows, 0.0))
        together = JointRows.joined(shown)
        numbers = torch.tensor([138, 114, 120, 120, 131])
        named = remote.submit(together.select(numbers - 100), numbers=numbers)
        brought = remote.submit(together.select(numbers - 100))
        for mine, theirs in zip(remote.rewards(named), remote.rewards(brought), strict=True):
            assert torch.equal(mine, theirs)
        state = remote.state()
        remote.begin("second", state, Kept(25, 114, together.select(torch.arange(14, 39))))
        again = remote.submit(together.select(numbers - 100), numbers=numbers)
        for mine, theirs in zip(
            remote.rewards(again), remote.rewards(remote.submit(together.select(numbers - 100))), strict=True
        ):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("number", [113, 139, -1, 2**60])
def test_rows_that_are_not_held_are_refused(tmp_path: Path, number: int) -> None:
    with running(tmp_path) as server:
        client = server.client()
        client.begin("s", kept=Kept(25, 100))
        client.updated(client.update(some_rows(39, 0), 0.0))
        numbers = torch.tensor([120, number])
        with pytest.raises(Refused, match=r"holds 114\.\.138") as refused:
            client.rewards(client.submit(some_rows(2, 0), numbers=numbers))
        assert refused.value.cause == "not_held"


def test_rewards_tell_how_far_behind_their_particles_are(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        client = server.client()
        client.begin("s")
        early = client.submit(some_rows(3, 1))
        for _ in range(2):
            client.updated(client.update(some_rows(10, 0), 0.0))
        late = client.submit(some_rows(3, 1))
        lags = []
        for ticket in (early, late):
            client.rewards(ticket)
            lags.append(client.lag)
        assert lags == [2, 0]


def test_rows_are_shown_learned_from_and_rewarded_in_one_exchange(tmp_path: Path) -> None:
    """All asked before anything is answered: rewards by the number of rows that are still on their way."""
    with running(tmp_path) as server:
        remote, local = server.client(), LocalRewards(make_model)
        answers = []
        for service in (remote, local):
            service.begin("s", kept=Kept(10))
            rows = some_rows(10, 0)
            updating = service.update(rows, 0.5)
            ticket = service.submit(rows, numbers=torch.arange(10))
            answers.append((service.updated(updating), service.rewards(ticket)))
        (far, far_rewards), (near, near_rewards) = answers
        assert far == near
        assert all(map(torch.equal, far_rewards, near_rewards))
        assert (remote.lag, remote.particles_version) == (0, 1)


def test_rows_are_rewarded_first_and_learned_from_later_but_shown_once(tmp_path: Path) -> None:
    rows = some_rows(10, 0)
    answers = []
    with running(tmp_path) as server:
        for numbers in (None, torch.arange(10)):
            client = server.client()
            client.begin("s", kept=Kept(10))
            if numbers is not None:
                client.hold(rows)
            ticket = client.submit(rows, numbers=numbers)
            updating = client.update(rows, 0.5, numbers)
            answers.append((client.rewards(ticket), client.updated(updating), client.state()))
    (value_rewards, value_figures, value_state), (rewards, figures, state) = answers
    assert all(map(torch.equal, value_rewards, rewards))
    assert value_figures == figures
    for name, array in value_state.items():
        np.testing.assert_array_equal(state[name], array, err_msg=name)


def test_a_restarted_server_refuses_the_session_it_does_not_know(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        client = server.client()
        client.begin("first")
        server.stop()
        server.start()
        with pytest.raises(Refused) as refused:
            client.rewards(client.submit(some_rows(3, 0)))
        assert refused.value.cause == "no_session"
        client.begin("second")
        assert len(client.rewards(client.submit(some_rows(3, 0)))[0]) == 3


@pytest.mark.parametrize("older_asks_first", [False, True])
@pytest.mark.parametrize("restarted", [False, True])
def test_of_two_learners_the_one_that_started_later_goes_on(
    tmp_path: Path, older_asks_first: bool, restarted: bool
) -> None:
    """Each begins again when it is told that its session is over, as learners do: they do not take turns for ever."""
    with running(tmp_path) as server:
        older, newer = server.client(), server.client()
        asking, refused = [older, newer] if older_asks_first else [newer, older], []
        for number in range(8):
            if restarted and number == 1:
                server.stop()
                server.start()
            for client in list(asking):
                try:
                    client.updated(client.update(some_rows(10, 0), 0.0))
                except Refused as error:
                    refused.append(error)
                    if error.cause == "superseded":
                        asking.remove(client)
                        continue
                    with suppress(Refused):
                        client.begin(f"{number} of {client._client._sender.name}")
        assert asking == [newer]
        assert 2 <= len(refused) <= 5
        assert "another learner of this run, which started later" in str(
            next(error for error in refused if error.cause == "superseded")
        )
        newer.updated(newer.update(some_rows(10, 0), 0.0))
        newest = server.client()
        newest.begin("restarted")
        newest.state()


def test_queries_of_several_clients_are_computed_together(tmp_path: Path) -> None:
    with running(tmp_path, dataclasses.replace(SETTINGS, max_delay_seconds=30.0, max_batch_rows=15)) as server:
        clients = [server.client(alone=False) for _ in range(3)]
        clients[0].begin("s")
        for client in clients[1:]:
            client._session = "s"
        tickets = [client.submit(some_rows(4 + k, k)) for k, client in enumerate(clients)]
        answers = [client.rewards(ticket) for client, ticket in zip(clients, tickets, strict=True)]
        assert server.metric("batch_rows_count") == 1
        local = LocalRewards(make_model)
        local.begin("s")
        for k, answer in enumerate(answers):
            for mine, theirs in zip(local.rewards(local.submit(some_rows(4 + k, k))), answer, strict=True):
                torch.testing.assert_close(mine, theirs)


def test_a_query_that_came_before_an_update_is_answered_by_the_older_particles(tmp_path: Path) -> None:
    with running(tmp_path, dataclasses.replace(SETTINGS, max_delay_seconds=30.0)) as server:
        client = server.client(alone=False)
        client.begin("s")
        ticket = client.submit(some_rows(5, 1), deviation=True)
        client.updated(client.update(some_rows(10, 0), 0.0))
        rewards, deviations = client.answer(ticket)
        assert client.particles_version == 0
        assert deviations is not None
        assert [d.shape for d in deviations] == [r.shape for r in rewards]


def test_an_overloaded_server_is_asked_again(tmp_path: Path) -> None:
    with running(tmp_path, dataclasses.replace(SETTINGS, max_delay_seconds=0.3)) as server:
        client = server.client(alone=False)
        client.begin("s")
        tickets = [client.submit(some_rows(40, k)) for k in range(4)]  # 64 rows may wait
        for ticket in tickets:
            assert len(client.rewards(ticket)[0]) == 40
        assert server.metric('refused_requests_total{cause="overloaded"}') >= 1


def test_nothing_is_kept_of_requests_that_are_over(tmp_path: Path) -> None:
    """Answered, refused, given up or overloaded; by the client nothing, by the server the newest answer."""
    with running(tmp_path, dataclasses.replace(SETTINGS, max_delay_seconds=0.3)) as server:
        client = server.client(alone=False)
        client.begin("s")
        for _ in range(3):
            client.updated(client.update(some_rows(10, 0), 0.0))
            client.state()
            for ticket in [client.submit(some_rows(40, k)) for k in range(4)]:
                client.rewards(ticket)
            with pytest.raises(Refused):
                client.updated(client.update(some_rows(3, 0), 1.5))
            client._deadline_seconds = 0.01
            with pytest.raises(Unanswered):
                client.rewards(client.submit(some_rows(40, 0)))
            client._deadline_seconds = 60.0
        time.sleep(0.5)  # what was given up is answered all the same
        client.rewards(client.submit(some_rows(1, 0)))
        assert (client._asked, client._client.pending, client._client._answers) == ({}, 0, {})
        assert server.ledger.bytes_kept < 1000


def test_a_query_that_waited_too_long_is_refused(tmp_path: Path) -> None:
    with running(tmp_path, dataclasses.replace(SETTINGS, deadline_seconds=0.1, max_delay_seconds=5.0)) as server:
        client = server.client(alone=False)
        client.begin("s")
        ticket = client.submit(some_rows(5, 0))
        with pytest.raises(Refused) as refused:
            client.rewards(ticket)
        assert refused.value.cause == "deadline"


def test_a_query_waits_while_the_particles_are_updated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that time is counted: in the queue, and against its deadline."""
    update = RewardModel.update

    def slow(model: RewardModel, progress: float) -> dict[str, float]:
        time.sleep(0.5)
        return update(model, progress)

    monkeypatch.setattr(RewardModel, "update", slow)
    with running(tmp_path, dataclasses.replace(SETTINGS, deadline_seconds=0.8)) as server:
        client = server.client()
        client.begin("s")
        updating = client.update(some_rows(10, 0), 0.0)
        ticket = client.submit(some_rows(5, 0))
        client.updated(updating)
        client.rewards(ticket)
        assert server.metric("queue_seconds_sum") >= 0.5
        updates = [client.update(some_rows(10, k), 0.0) for k in range(2)]
        ticket = client.submit(some_rows(5, 0))
        for updating in updates:
            client.updated(updating)
        with pytest.raises(Refused) as refused:
            client.rewards(ticket)
        assert refused.value.cause == "deadline"


def test_a_missing_reward_is_an_error(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        client = server.client(deadline_seconds=0.3)
        client.begin("s")
        server.stop()
        start = time.monotonic()
        with pytest.raises(Unanswered):
            client.rewards(client.submit(some_rows(3, 0)))
        assert time.monotonic() - start < 3
        server.start()


def test_a_reward_that_is_not_finite_stops_the_learner(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        client = server.client()
        client.begin("s")
        state = client.state()
        state["1.1.parameter"][:] = -3e38
        client.begin("s", state)
        rows = some_rows(3, 0)
        rows.observations[1].columns["own"].mul_(100)  # finite on the wire, not in the network
        with pytest.raises(NumericalError, match="reward of block 1"):
            client.rewards(client.submit(rows))


def test_bad_values_are_refused_and_the_server_goes_on(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        client = server.client()
        client.begin("s")
        rows = some_rows(3, 0)
        rows.actions[0][1, 1] = 5
        for ask in (
            lambda: client.rewards(client.submit(rows)),
            lambda: client.updated(client.update(rows, 0.0)),
            lambda: client.updated(client.update(some_rows(3, 0), 1.5)),
            lambda: client.rewards(client.submit(some_rows(65, 0))),
        ):
            with pytest.raises(Refused) as refused:
                ask()
            assert refused.value.cause in ("bad_value", "body", "input")
        assert len(client.rewards(client.submit(some_rows(64, 0)))[1]) == 64


def test_the_environment_as_source_travels_the_same_path(tmp_path: Path) -> None:
    with running(tmp_path, dataclasses.replace(SETTINGS, source="environment")) as server:
        client = server.client()
        client.begin("s")
        rows = some_rows(3, 0)
        true = [torch.randn(active.shape) for active in rows.active]
        for answered, reward, active in zip(client.rewards(client.submit(rows, true)), true, rows.active, strict=True):
            assert torch.equal(answered, reward * active)
        assert client.updated(client.update(rows, 0.0)) == (1, {})
        client.begin("t", client.state())
        assert client.updated(client.update(rows, 0.0))[0] == 2


def test_the_schema_accepts_no_more_rows_than_may_wait() -> None:
    schema = request_schema(LAYOUT, SETTINGS, {})
    assert schema(Query("s", 64)) is not None
    for rows in (0, -1, 65, 2**62):
        with pytest.raises(ValueError, match="rows"):
            schema(Query("s", rows))
