"""What is said of files that are no YAML."""

from __future__ import annotations

import pytest

from bm3il.protocol.errors import InputError
from bm3il.protocol.yaml_text import parse_yaml


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "seeds: [1]\ngrid:\n  algorithm: [bc, bm3il\nworlds: [own]\n",
            "is not YAML: line 4, column 7: expected ',' or ']', but got ':', "
            "while parsing a flow sequence that begins in line 3, column 14",
        ),
        ("a: b: c", "is not YAML: line 1, column 5: mapping values are not allowed here"),
        ("a:\nb: \x07", "is not YAML: line 2: special characters are not allowed (#x07)"),
        ("!!python/object/apply:os.system [ls]", "is not YAML: line 1, column 1: could not determine a constructor"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_an_error_names_file_line_and_column(text: str, told: str) -> None:
    with pytest.raises(InputError) as raised:
        parse_yaml(text, "mine.yaml")
    said = str(raised.value)
    assert said.startswith("mine.yaml")
    assert told in said
    assert not any(noise in said for noise in ("^", "<unicode string>", "\n"))


def test_words_stay_words() -> None:
    assert parse_yaml("a: [no, 12]", "f") == {"a": [False, 12]}
    assert parse_yaml("a: [no, 12]", "f", words=True) == {"a": ["no", "12"]}
