"""Weights reach who listens, also who came late; and a flood of subscriptions is survived."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from bm3il.protocol.broadcast import Broadcaster, Listener
from bm3il.protocol.messages import Sender, Weights
from bm3il.protocol.sockets import MESSAGES_PER_POLL

DEADLINE_SECONDS = 10.0
ARRAY = {"a": np.arange(100_000, dtype=np.float32)}


def schema(body: Any) -> Any:
    return {"a": ("float32", (100_000,))}


@pytest.fixture
def endpoint(tmp_path: Path) -> str:
    return f"ipc://{tmp_path}/socket"


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


def test_a_late_listener_gets_the_newest_broadcast(endpoint: str) -> None:
    broadcaster = Broadcaster(endpoint, Sender("run", "learner"), lambda cause: None)
    for version in range(3):
        broadcaster.publish(Weights("s", version, 0), ARRAY)
    listener = Listener(endpoint, Sender("run", "actor"), schema, lambda cause: None)
    received: list[int] = []

    def newest() -> bool:
        broadcaster.pump()
        message = listener.newest(0.05)
        received.extend([] if message is None else [message.body.version])
        return bool(received)

    wait_until(newest)
    assert received == [2]
    for version in range(3, 6):
        broadcaster.publish(Weights("s", version, 0), ARRAY)
    time.sleep(0.2)
    message = listener.newest(1.0)
    assert message is not None
    assert message.body.version == 5
    np.testing.assert_array_equal(message.arrays["a"], ARRAY["a"])
    listener.close()
    broadcaster.close()


def test_a_flood_of_subscriptions_is_taken_in_parts(endpoint: str) -> None:
    broadcaster = Broadcaster(endpoint, Sender("run", "learner"), lambda cause: None)
    flooder = zmq.Context.instance().socket(zmq.XSUB)
    flooder.set_hwm(0)
    flooder.connect(endpoint)
    for number in range(3 * MESSAGES_PER_POLL):
        flooder.send(b"\x01" + str(number).encode())
    wait_until(lambda: broadcaster._socket.poll(0))
    time.sleep(0.2)
    broadcaster.pump()
    assert broadcaster._socket.poll(5000), "all were taken at once"
    flooder.close(linger=0)
    broadcaster.close()
