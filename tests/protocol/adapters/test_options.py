"""What adapters have in common: which agents are of one type."""

from __future__ import annotations

import pytest

from bm3il.protocol.adapters.options import agents_by_type
from bm3il.protocol.errors import InputError


def test_a_table_loses_no_agent() -> None:
    names = ["a", "b", "type0"]
    assert agents_by_type(names, "type0,a+b") == {"type0": ["type0"], "type1": ["a", "b"]}
    with pytest.raises(InputError, match="the agent 'type0' is called like a type of several agents"):
        agents_by_type(names, "a+b,type0")
