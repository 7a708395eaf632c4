"""A user's texts: CSV, TSV, JSON, Parquet or plain text files, read and checked."""

import csv
import io
import json
import re
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

__all__ = ["InputError", "lines_of", "read_labelled", "read_pairs", "read_texts"]

SEPARATORS = {".csv": ",", ".tsv": "\t"}
TABLES = (*SEPARATORS, ".jsonl", ".json", ".ndjson", ".parquet", ".pq")


class InputError(ValueError):
    """Something that the user gave cannot be used; the message says what, and what to do."""


def read_labelled(path: str, text_column: str, label_column: str) -> tuple[list[str], list[str]]:
    """The texts and labels of a table, both as strings, none of them empty."""
    columns = text_column, label_column
    texts, labels = _filled(path, columns, _read(path, columns, TABLES))
    return texts, labels


def read_pairs(path: str, text_column: str, pair: tuple[str, str]) -> tuple[list[str], list[str]]:
    """What a language model is to continue, and how: of a .txt file nothing, and its whole text; of a table without
    the columns `pair` nothing, and each text."""
    if Path(path).suffix.lower() == ".txt":
        texts = ["\n".join(_read(path, (), (".txt",))[0])]
    else:
        found = _read(path, pair, (*TABLES, ".txt"), instead=(text_column,))
        if len(found) == 2:
            prompts, completions = found
            return prompts, _filled(path, pair[1:], [completions])[0]
        [texts] = found
    return [""] * len(texts), _filled(path, (text_column,), [texts])[0]


def read_texts(path: str, text_column: str) -> list[str]:
    """The texts of a table, or the lines of a .txt file."""
    return _read(path, (text_column,), (*TABLES, ".txt"))[0]


def lines_of(data: bytes, name: str) -> list[str]:
    """One text a line, blank ones too. Lines end as in any text file, not at the separators that Unicode adds."""
    return _lines(_decoded(data, name))


def _lines(text: str) -> list[str]:
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def _decoded(data: bytes, name: str) -> str:
    """UTF-8 as text; what it seems to be if it is none."""
    try:
        text, place = data.decode("utf-8-sig"), data.find(b"\0")
        if data.count(b"\0") * 4 < max(len(data), 1):
            return text
    except UnicodeDecodeError as error:
        place = error.start
    seems = "UTF-16" if b"\0" in data or data[:2] in (b"\xff\xfe", b"\xfe\xff") else "Windows-1252"
    raise InputError(
        f"cannot read {name}: it is not UTF-8 (byte {place}); it seems to be {seems}, if you know of no other: "
        f"recode it, say with `iconv -f {seems} -t UTF-8`"
    )


def _filled(path: str, columns: tuple[str, ...], values: Any) -> Any:
    """`values`, a list for each column, if there are any and none is empty."""
    if not values[0]:
        raise InputError(f"{path} has no rows")
    for name, texts in zip(columns, values):
        for row, text in enumerate(texts, 1):
            if not text.strip():
                raise InputError(f"{path}: row {row} is empty in column {name!r}")
    return values


def _read(
    path: str, columns: tuple[str, ...], suffixes: tuple[str, ...], instead: tuple[str, ...] = ()
) -> list[list[str]]:
    """These columns of a table, or those that it may have instead, each a list of strings; of a .txt file its lines."""
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
        columns = instead if instead and not set(columns) <= set(frame.columns) else columns
        return [_texts(frame, column) for column in columns]
    except InputError:
        raise
    except ImportError:
        raise InputError("reading files needs pandas: pip install 'ptuning-fast[train]'") from None
    except Exception as error:  # for a damaged Parquet file, pandas and pyarrow raise whatever comes up
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        way_out = "" if type(error) is ValueError else f"; is it a whole {suffix} file? Write it again"
        raise InputError(f"cannot read {path}: {reason}{_separator(path, suffix) or way_out}") from None


def _separator(path: str, suffix: str) -> str:
    """What a table seems to have between its values, where that is not what its name promises."""
    promised = SEPARATORS.get(suffix)
    first = lines_of(Path(path).read_bytes(), path)[0] if promised else ""
    seems = max(";\t|,", key=first.count)
    if not promised or promised in first or seems not in first:
        return ""
    other = {separator: name for name, separator in SEPARATORS.items()}.get(seems)
    way_out = f"name it {other}" if other else f"write it with {promised!r}"
    return f"; its values seem to be separated by {seems!r}, and a {suffix} file has {promised!r} there: {way_out}"


def _frame(path: str, suffix: str) -> "pandas.DataFrame":
    """A table whose values are as they are written: 007 stays 007, NA is a text, no text becomes a date."""
    import pandas

    if suffix in (".parquet", ".pq"):
        frame = pandas.read_parquet(path)
        return frame.reset_index() if any(frame.index.names) else frame
    text = _decoded(Path(path).read_bytes(), path)
    if suffix in SEPARATORS:
        # pandas would rename columns that come twice, so their names are read as a row. Its default engine makes empty
        # texts of missing fields; the other reads with Python's csv, which refuses long texts unless told.
        csv.field_size_limit(2**31 - 1)
        exact: dict[str, Any] = {"header": None, "dtype": object, "na_filter": False, "skip_blank_lines": False}
        source = io.StringIO(text, newline="")
        frame = pandas.read_csv(source, engine="python", sep=SEPARATORS[suffix], **exact).dropna(how="all")
        short = frame.isna().any(axis=1)
        if short.any():
            raise ValueError(f"line {short.idxmax() + 1} has fewer fields than the first")
        return frame[1:].set_axis(frame[:1].to_numpy().ravel(), axis=1)
    if text.lstrip().startswith("["):
        places = [(f"item {number}", item) for number, item in enumerate(_json(text, "it is no JSON array"), 1)]
    else:
        lines = [(f"line {number}", line) for number, line in enumerate(_lines(text), 1) if line.strip()]
        places = [(place, _json(line, f"{place} is no JSON object")) for place, line in lines]
    for place, row in places:
        if not isinstance(row, dict):
            raise ValueError(f"{place} is no JSON object: it is a {type(row).__name__}")
    return pandas.DataFrame([row for _, row in places], dtype=object)


def _json(text: str, otherwise: str) -> Any:
    """Numbers as they are written: pandas.read_json would make 1.1 of 1.10 and refuse long ones."""
    try:
        return json.loads(text, parse_int=str, parse_float=str, parse_constant=lambda name: None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{otherwise}: {error}") from None


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
