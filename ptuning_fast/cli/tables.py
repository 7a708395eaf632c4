"""A user's texts: CSV, JSON lines, Parquet or plain text files, read and checked."""

import csv
import json
import re
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

__all__ = ["InputError", "lines_of", "read_labelled", "read_texts"]

TABLES = (".csv", ".jsonl", ".json", ".ndjson", ".parquet", ".pq")


class InputError(ValueError):
    """Something that the user gave cannot be used; the message says what, and what to do."""


def read_labelled(path: str, text_column: str, label_column: str) -> tuple[list[str], list[str]]:
    """The texts and labels of a CSV, JSON lines or Parquet file, both as strings, none of them empty."""
    texts, labels = _read(path, (text_column, label_column), TABLES)
    if not texts:
        raise InputError(f"{path} has no rows")
    for name, values in ((text_column, texts), (label_column, labels)):
        for row, value in enumerate(values, 1):
            if not value.strip():
                raise InputError(f"{path}: row {row} is empty in column {name!r}")
    return texts, labels


def read_texts(path: str, text_column: str) -> list[str]:
    """The texts of a CSV, JSON lines or Parquet file, or the lines of a .txt file."""
    return _read(path, (text_column,), (*TABLES, ".txt"))[0]


def lines_of(data: bytes, name: str) -> list[str]:
    """One text a line, blank ones too. Lines end as in any text file, not at the separators that Unicode adds."""
    try:
        lines = data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {name}: it is not UTF-8 (byte {error.start})") from None
    return lines if lines[-1] else lines[:-1]


def _read(path: str, columns: tuple[str, ...], suffixes: tuple[str, ...]) -> list[list[str]]:
    """These columns of a table, each a list of strings; of a .txt file its lines."""
    suffix = Path(path).suffix.lower()
    if suffix not in suffixes:
        raise InputError(f"{path}: the name must end in one of {', '.join(suffixes)}, which says how to read it")
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such file")
    try:
        if suffix == ".txt":
            return [lines_of(Path(path).read_bytes(), path)]
        if Path(path).stat().st_size == 0:
            raise InputError(f"{path} is empty")
        frame = _frame(path, suffix)
        return [_texts(frame, column) for column in columns]
    except InputError:
        raise
    except ImportError:
        raise InputError("reading files needs pandas: pip install 'ptuning-fast[train]'") from None
    except Exception as error:  # for a damaged Parquet file, pandas and pyarrow raise whatever comes up
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        way_out = "" if type(error) is ValueError else f"; is it a whole {suffix} file? Write it again"
        raise InputError(f"cannot read {path}: {reason}{way_out}") from None


def _frame(path: str, suffix: str) -> "pandas.DataFrame":
    """A table whose values are as they are written: 007 stays 007, NA is a text, no text becomes a date."""
    import pandas

    if suffix in (".parquet", ".pq"):
        frame = pandas.read_parquet(path)
        return frame.reset_index() if any(frame.index.names) else frame
    if suffix == ".csv":
        # pandas would rename columns that come twice, so their names are read as a row. Its default engine makes empty
        # texts of missing fields; the other reads with Python's csv, which refuses long texts unless told.
        csv.field_size_limit(2**31 - 1)
        exact: dict[str, Any] = {"header": None, "dtype": object, "na_filter": False, "skip_blank_lines": False}
        frame = pandas.read_csv(path, engine="python", encoding="utf-8-sig", **exact).dropna(how="all")
        short = frame.isna().any(axis=1)
        if short.any():
            raise ValueError(f"line {short.idxmax() + 1} has fewer fields than the first")
        return frame[1:].set_axis(frame[:1].to_numpy().ravel(), axis=1)
    rows = []
    exact = {"parse_int": str, "parse_float": str, "parse_constant": lambda name: None}
    for number, line in enumerate(lines_of(Path(path).read_bytes(), path), 1):
        try:  # pandas.read_json would make 1.1 of 1.10 and refuse long numbers
            rows += [{**json.loads(line, **exact)}] if line.strip() else []
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"line {number} is no JSON object: {error}") from None
    return pandas.DataFrame(rows, dtype=object)


def _texts(frame: "pandas.DataFrame", name: str) -> list[str]:
    """The values of a column as strings, if it is there and each value is one text."""
    names = list(frame.columns)
    if name not in names:
        raise ValueError(f"it has no column {name!r}; it has {', '.join(map(repr, names)) or 'none'}")
    if names.count(name) > 1:
        raise ValueError(f"it has {names.count(name)} columns {name!r}")
    for row, (value, missing) in enumerate(zip(frame[name], frame[name].isna()), 1):
        if missing:
            raise ValueError(f"row {row} has no value in column {name!r}")
        if isinstance(value, (Collection, timedelta)) and not isinstance(value, str):
            raise ValueError(f"row {row} of column {name!r} holds a {type(value).__name__}, not a text")
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            raise ValueError(f"row {row} of column {name!r} holds half a character (a lone surrogate)")
    return [str(value) for value in frame[name]]
