"""What a server remembers of requests, and for how long."""

from __future__ import annotations

import pytest

from bm3il.protocol import ledger as module
from bm3il.protocol.ledger import ANSWERED, AT_WORK, UNKNOWN, Ledger
from bm3il.protocol.messages import Done, Message, Sender

CLIENT = Sender("run", "client")


def message(sequence: int, settled: int = 0, sender: Sender = CLIENT) -> Message:
    return Message(sender, sequence, Done(), {}, settled)


def test_a_request_is_new_once() -> None:
    ledger = Ledger()
    assert ledger.look_up(message(1)) == (UNKNOWN, [])
    assert ledger.enter(message(1))
    assert not ledger.enter(message(1))
    assert ledger.look_up(message(1)) == (AT_WORK, [])
    ledger.keep(CLIENT, 1, [b"answer"])
    assert not ledger.enter(message(1))
    assert ledger.look_up(message(1)) == (ANSWERED, [b"answer"])
    assert ledger.enter(message(1, sender=Sender("run", "client")))  # another start of it
    assert ledger.enter(message(1, sender=Sender("run", "another", CLIENT.incarnation)))


def test_what_a_client_has_settled_is_let_go_and_not_done_again() -> None:
    ledger = Ledger()
    for sequence in (1, 2, 3):
        ledger.enter(message(sequence))
        ledger.keep(CLIENT, sequence, [b"x" * 100])
    assert ledger.enter(message(4, settled=3))
    assert ledger.bytes_kept == 100
    assert ledger.look_up(message(3)) == (ANSWERED, [b"x" * 100])
    assert not ledger.enter(message(2))
    ledger.enter(message(5, settled=5))
    ledger.keep(CLIENT, 4, [b"nobody waits for it"])
    assert ledger.bytes_kept == 0


def test_a_late_message_settles_nothing_anew() -> None:
    ledger = Ledger()
    ledger.enter(message(5, settled=5))
    assert not ledger.enter(message(3, settled=1))
    assert ledger.look_up(message(5)) == (AT_WORK, [])


def test_of_all_answers_so_many_bytes_are_kept_and_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_BYTES_KEPT", 250)
    ledger, others = Ledger(), [Sender("run", f"client-{n}") for n in range(4)]
    for other in others:
        ledger.enter(message(1, sender=other))
        ledger.keep(other, 1, [b"x" * 100])
    assert ledger.bytes_kept == 200
    found = [ledger.look_up(message(1, sender=other)) for other in others]
    assert found == [(ANSWERED, [])] * 2 + [(ANSWERED, [b"x" * 100])] * 2
    assert not ledger.enter(message(1, sender=others[0]))
    ledger.enter(message(2, sender=others[0]))
    ledger.keep(others[0], 2, [b"x" * 1000])
    assert ledger.look_up(message(2, sender=others[0])) == (ANSWERED, [b"x" * 1000])
    assert ledger.bytes_kept == 1000


def test_the_same_answer_is_counted_once() -> None:
    ledger = Ledger()
    ledger.enter(message(1))
    for _ in range(3):
        ledger.keep(CLIENT, 1, [b"x" * 100])
    assert ledger.bytes_kept == 100


def test_neither_many_numbers_nor_many_names_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REQUESTS_KEPT", 10)
    monkeypatch.setattr(module, "CLIENTS_KEPT", 5)
    ledger = Ledger()
    for sequence in range(100):
        assert ledger.enter(message(sequence))
        ledger.keep(CLIENT, sequence, [b"x"])
    assert ledger.bytes_kept == 10
    assert not ledger.enter(message(50))
    for number in range(100):
        other = Sender("run", f"client-{number}")
        ledger.enter(message(1, sender=other))
        ledger.keep(other, 1, [b"x"])
    assert ledger.bytes_kept == 5
    assert len(ledger._clients) == len(ledger._kept) == 5
