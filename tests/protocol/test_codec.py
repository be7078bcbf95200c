"""The codec: what is sent comes back, and nothing else gets through."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bm3il.protocol.codec import MAX_HEADER_BYTES, MAX_MESSAGE_BYTES, PROTOCOL_VERSION, decode, encode, frame_limit
from bm3il.protocol.errors import ProtocolError
from bm3il.protocol.messages import BODIES, Chunk, Done, Message, Query, Rewards, Sender, Statistics, Status
from bm3il.protocol.observations import integers

SENDER = Sender("run", "actor-0")
ARRAYS = {
    "0.observations": np.arange(12, dtype=np.float32).reshape(3, 4),
    "0.active": np.array([[True], [False], [True]]),
    "empty": np.zeros((0, 5), np.int64),
}
TABLE = {name: (array.dtype.name, array.shape) for name, array in ARRAYS.items()}
BODY = Query("session", 3, deviation=True)


def frames() -> list[bytes]:
    return [bytes(frame) for frame in encode(SENDER, 7, BODY, ARRAYS)]


def read(raw: list[bytes], run: str = "run", table: Any = TABLE) -> Message:
    return decode(raw, run, lambda body: table)


def with_header(**changes: Any) -> list[bytes]:
    header, *rest = frames()
    return [msgpack.packb({**msgpack.unpackb(header), **changes}), *rest]


def test_a_message_comes_back_as_it_was_sent() -> None:
    message = read(frames())
    assert (message.sender, message.sequence, message.body) == (SENDER, 7, BODY)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(message.arrays[name], array)
        assert message.arrays[name].dtype == array.dtype


def test_arrays_are_views_on_both_sides() -> None:
    array = np.arange(1000, dtype=np.float32)
    _, frame = encode(SENDER, 1, Done(), {"a": array})
    array[3] = -1
    assert np.frombuffer(frame, np.float32)[3] == -1
    raw = [bytes(part) for part in encode(SENDER, 1, Done(), {"a": array})]
    received = decode(raw, "run", lambda body: {"a": ("float32", (1000,))}).arrays["a"]
    assert not received.flags.owndata
    assert not received.flags.writeable


@pytest.mark.parametrize("count", [1 << 8, 1 << 8 | 1, 1 << 15 | 1])
def test_codes_and_actions_of_any_number_travel(count: int) -> None:
    codes = {"codes": np.array([0, count - 1], integers(count))}
    table = {"codes": (integers(count), (2,))}
    assert frame_limit(table) > 0
    raw = [bytes(frame) for frame in encode(SENDER, 7, BODY, codes)]
    np.testing.assert_array_equal(read(raw, table=table).arrays["codes"], codes["codes"])


def test_a_later_start_is_known_by_its_incarnation() -> None:
    first = Sender("run", "name").incarnation
    time.sleep(0.001)
    assert first < Sender("run", "name").incarnation


def test_every_body_survives_the_wire() -> None:
    values = {str: "text", int: 3, float: 0.5, bool: True}
    for body_type in BODIES.values():
        hints = {f.name: f.type for f in dataclasses.fields(body_type)}
        by_name = {t.__name__: v for t, v in values.items()} | {"dict[str, float]": {"loss": 0.25}}
        body = body_type(**{name: by_name[str(hint)] for name, hint in hints.items()})
        raw = [bytes(part) for part in encode(SENDER, 1, body)]
        assert decode(raw, "run", lambda _: {}).body == body


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        ([], "header"),
        ([b""], "header"),
        ([b"\xc1garbage"], "header"),
        ([msgpack.packb([1, 2])], "header"),
        ([b"\x00" * ((1 << 20) + 1)], "header"),
        (with_header(v=PROTOCOL_VERSION + 1), "version"),
        (with_header(seq="7"), "header"),
        (with_header(seq=True), "header"),
        (with_header(settled=None), "header"),
        (with_header(incarnation="a" * 23 + "x"), "header"),
        (with_header(arrays={}), "header"),
        (with_header(run="other"), "foreign"),
        (with_header(kind="unheard-of"), "kind"),
        (with_header(body={}), "body"),
        (with_header(body={"session": "s", "rows": 3, "deviation": 1, "alone": False}), "body"),
        (with_header(arrays=[["a", "float32"]]), "frame"),
        (with_header(arrays=[["a", "float32"]] * 3), "array_table"),
        (with_header(arrays=[["0.active", "object", [3, 1]]] * 3), "array_table"),
        (with_header(arrays=[["0.active", "bool", [3.0, 1]]] * 3), "array_table"),  # equal to [3, 1], and no shape
        (with_header(arrays=[["0.active", "bool", [1] * 9]] * 3), "array_table"),
        (with_header(arrays=[["0.active", "bool", [3, 2]]] * 3), "array_table"),
        (frames()[:-1], "frame"),
        ([*frames(), b""], "frame"),
        ([frames()[0], b"short", *frames()[2:]], "frame"),
    ],
)
def test_what_is_wrong_is_refused_by_its_cause(raw: list[bytes], cause: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        read(raw)
    assert caught.value.cause == cause


def test_a_refusal_of_another_version_says_what_to_do() -> None:
    with pytest.raises(ProtocolError, match="install the same release of bm3il on every node"):
        read(with_header(v=99))


def test_a_boolean_array_holds_only_zeros_and_ones() -> None:
    raw = [bytes(part) for part in encode(SENDER, 1, Done(), {"a": np.array([True, False])})]
    raw[1] = b"\x02\x00"
    with pytest.raises(ProtocolError, match="other than 0 and 1"):
        decode(raw, "run", lambda body: {"a": ("bool", (2,))})


def test_a_kind_that_is_not_welcome_is_refused() -> None:
    with pytest.raises(ProtocolError) as caught:
        read(frames(), table=None)
    assert caught.value.cause == "kind"


def test_a_missing_array_is_named() -> None:
    raw = [bytes(part) for part in encode(SENDER, 1, BODY, {"empty": ARRAYS["empty"]})]
    with pytest.raises(ProtocolError, match=r"'0\.active' is missing"):
        read(raw)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_mutation_does_anything_but_raise_a_protocol_error(data: st.DataObject) -> None:
    raw = [bytearray(frame) for frame in frames()]
    for _ in range(data.draw(st.integers(1, 4))):
        frame = raw[data.draw(st.integers(0, len(raw) - 1))]
        if frame:
            frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        message = read([bytes(frame) for frame in raw])
    except ProtocolError:
        return
    assert {name: (a.dtype.name, a.shape) for name, a in message.arrays.items()} == TABLE


def test_bodies_with_numbers_take_integers_for_floats() -> None:
    for body in (
        Statistics(1, {"loss": 2}),
        Chunk("s", 1, 2, 0, 25, 4, 1),
        Status("actor", 0, 0, 1, "x", "", {"a": 1}),
    ):
        raw = [bytes(part) for part in encode(SENDER, 1, body)]
        assert decode(raw, "run", lambda _: {}).body == body


def test_a_shape_beyond_all_numbers_is_refused() -> None:
    rows = (1 << 63, 1 << 1)
    header, *_ = encode(SENDER, 1, Rewards(rows[0], 1, 0.0, 0.0))
    header = msgpack.packb({**msgpack.unpackb(header), "arrays": [["0.rewards", "float32", list(rows)]]})
    with pytest.raises(ProtocolError, match="its frame has 0"):
        read([header, b""], table={"0.rewards": ("float32", rows)})


def test_a_frame_may_be_twice_the_largest_honest_one_but_an_honest_one_always_passes() -> None:
    assert frame_limit() == frame_limit({"a": ("float32", (3,))}) == 2 * MAX_HEADER_BYTES
    assert frame_limit({"a": ("float32", (1 << 20, 3)), "b": ("bool", (5,))}) == 2 * 12 << 20
    assert frame_limit({"a": ("bool", (MAX_MESSAGE_BYTES - 1,))}) == MAX_MESSAGE_BYTES
    assert frame_limit({"a": ("bool", (MAX_MESSAGE_BYTES, 3))}) == 3 * MAX_MESSAGE_BYTES


@pytest.mark.parametrize("more", [b"", b"\0", bytes(12)], ids=["less", "a byte more", "twice"])
def test_a_frame_of_another_length_than_was_announced_is_refused(more: bytes) -> None:
    header, frame = encode(SENDER, 1, Done("x"), {"a": np.arange(3, dtype=np.float32)})
    raw = [header, bytes(frame) + more if more else bytes(frame)[:-4]]
    with pytest.raises(ProtocolError, match="needs 12 bytes") as error:
        read(raw, table={"a": ("float32", (3,))})
    assert error.value.cause == "frame"
