"""A table of text, whatever it holds until somebody asks for numbers: CSV, TSV or Parquet, read by polars."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bm3il.protocol.errors import InputError, nearest

SEPARATORS = {".csv": ",", ".tsv": "\t"}
PARQUET = (".parquet", ".pq")
SUFFIXES = (*SEPARATORS, *PARQUET)
MAX_INTEGER = 1 << 53
"""Up to here float64 holds all of them."""
FLAGS = {"true": "1", "false": "0"}


class Table:
    """Columns of a file by name. Errors name the file, and the row as an editor counts: the heading is row 1, if there
    is one (in Parquet there is none).

    `columns`: all names, in their order.   `read`: those that somebody has asked for.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises InputError for what is no table, or an empty one."""
        self.path = Path(path)
        self._frame = _frame(self.path)
        self._first = 1 if self.path.suffix.lower() in PARQUET else 2
        self.columns: list[str] = self._frame.columns
        self.read: set[str] = set()
        if not len(self):
            raise InputError(f"{path}: expected a table with rows, found none below the heading")

    def __len__(self) -> int:
        return self._frame.height

    def line(self, index: int) -> int:
        """The number of row number `index`, from 0, in the file."""
        return index + self._first

    def row(self, index: int) -> str:
        """Where row number `index`, from 0, is."""
        return f"{self.path}, row {self.line(index)}"

    def require(self, name: str, why: str) -> None:
        """Raise InputError, naming the nearest, if there is no column of this name."""
        if name not in self.columns:
            raise InputError(f"{self.path}: the column '{name}' ({why}) is missing; {nearest(name, self.columns)}")

    def is_empty(self, name: str, rows: np.ndarray) -> bool:
        """Whether there is nothing in any of these rows, or no such column."""
        return name not in self.columns or bool(_nothing(self._frame[name][rows]).all())

    def texts(self, name: str, why: str) -> np.ndarray:
        """[rows] text, stripped. Raises InputError for a column that is missing, or empty in a row."""
        texts = _stripped(self._column(name, why).cast(_polars().String))
        if texts.null_count():
            raise InputError(f"{self.row(texts.is_null().arg_max())}: expected {why} in '{name}', got nothing")
        return texts.to_numpy()

    def numbers(
        self,
        name: str,
        why: str,
        rows: np.ndarray,
        whole: bool = False,
        words: Mapping[str, int] | None = None,
        optional: bool = False,
    ) -> np.ndarray:
        """[len(rows)] float64 at these rows.

        whole: integers are expected.   words: that stand for numbers.   optional: NaN where there is nothing.
        Raises InputError for a column that is missing, and for the first of these rows that holds no such number.
        """
        written = self._column(name, why)[rows]
        values = _values(written, words or {})
        wrong = ~np.isfinite(values)
        if whole:
            wrong |= (values != np.round(values)) | (np.abs(values) > MAX_INTEGER)
        if optional:
            wrong &= ~_nothing(written)
        if wrong.any():
            at = int(wrong.argmax())
            text = "" if written[at] is None else str(written[at]).strip()
            found = f"'{text}'" if text else "nothing"
            hint = f"; {nearest(text, words)}" if words and text else ""
            expected = "an integer" if whole else "a number"
            if words and np.isfinite(_plain(written[at : at + 1])[0]):
                expected = "a word of the mapping file"
            raise InputError(f"{self.row(rows[at])}: expected {expected} in '{name}' ({why}), got {found}{hint}")
        return values

    def _column(self, name: str, why: str) -> Any:
        self.require(name, why)
        self.read.add(name)
        column, polars = self._frame[name], _polars()
        if column.dtype in (polars.Categorical, polars.Enum) or column.dtype.is_temporal():
            return column.cast(polars.String)
        if column.dtype not in (polars.String, polars.Boolean, polars.Null) and not column.dtype.is_numeric():
            raise InputError(f"{self.path}: expected text or numbers in '{name}' ({why}), got {column.dtype}")
        return column


def _polars() -> Any:
    try:
        import polars
    except ImportError as error:
        raise InputError("tables are read by polars, which is not installed: pip install 'bm3il[tables]'") from error
    return polars


def _frame(path: Path) -> Any:
    polars, suffix = _polars(), path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: expected a table, a file that ends with {', '.join(SUFFIXES)}")
    try:
        if suffix in PARQUET:
            return polars.read_parquet(path)
        frame = polars.read_csv(path, separator=SEPARATORS[suffix], infer_schema=False)
    except (OSError, polars.exceptions.PolarsError, polars.exceptions.PanicException) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(f"{path}: this cannot be read as a table: {reason}") from error
    stripped = [name.strip() for name in frame.columns]
    if doubled := [name for name in stripped if stripped.count(name) > 1]:
        raise InputError(f"{path}: expected columns of different names, found '{doubled[0]}' more than once in row 1")
    written = frame.select(polars.any_horizontal(polars.all().is_not_null())).to_series().arg_true()
    rows = 0 if written.is_empty() else written[-1] + 1  # many files end with empty lines
    return frame.head(rows).rename(dict(zip(frame.columns, stripped, strict=True)))


def _stripped(texts: Any) -> Any:
    """Without spaces around them; nothing in place of what is empty."""
    return texts.str.strip_chars().replace("", None)


def _values(written: Any, words: Mapping[str, int]) -> np.ndarray:
    """Numbers, NaN where there are none. Where words are numbers themselves, they number anew: one that is no word may
    not be told from one of ours, and is none."""
    if not words:
        return _plain(written)
    polars = _polars()
    texts = _stripped(written.cast(polars.String))
    found = texts.replace_strict(words, default=None, return_dtype=polars.Float64).to_numpy()
    values = _plain(texts)
    meant = zip(_plain(polars.Series(list(words))).tolist(), words.values(), strict=True)
    if anew := {value: number for value, number in meant if np.isfinite(value)}:
        # By value: programs write the same number as 1, 1.0 or 01.
        values = polars.Series(values).replace_strict(anew, default=None, return_dtype=polars.Float64).to_numpy()
    return np.where(np.isnan(found), values, found)


def _plain(written: Any) -> np.ndarray:
    """Numbers as they are written, NaN where there are none."""
    polars = _polars()
    if written.dtype == polars.String:
        written = _stripped(written).str.to_lowercase().replace(FLAGS)
    return written.cast(polars.Float64, strict=False).to_numpy().astype(np.float64)


def _nothing(written: Any) -> np.ndarray:
    """[rows] bool, where there is nothing."""
    return (_stripped(written) if written.dtype == _polars().String else written).is_null().to_numpy()
