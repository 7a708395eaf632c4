"""Texts of CSV, TSV, JSON, Parquet or plain text files, read and checked."""

import csv
import io
import json
import re
from argparse import Namespace
from collections.abc import Collection, Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

__all__ = ["InputError", "lines_of", "named_columns", "read_labelled", "read_pairs", "read_texts", "without_columns"]

SEPARATORS = {".csv": ",", ".tsv": "\t"}
TABLES = (*SEPARATORS, ".jsonl", ".json", ".ndjson", ".parquet", ".pq")


class InputError(ValueError):
    """Something that the user gave cannot be used; the message says what, and what to do."""


def named_columns(options: Namespace) -> dict[str, str]:
    """What the user calls columns, of those that were named: {"text": "review"} for `--text-column review`."""
    found = {key.removesuffix("_column"): name for key, name in vars(options).items() if key.endswith("_column")}
    return {column: name for column, name in found.items() if name is not None}


def read_labelled(path: str, named: dict[str, str]) -> tuple[list[str], list[str]]:
    """The texts and labels of a table, both as strings, none of them empty."""
    texts, labels = (_filled(path, *column) for column in _read(path, [("text", "label")], named, TABLES))
    return texts, labels


def read_pairs(path: str, named: dict[str, str]) -> tuple[list[str], list[str]]:
    """What a language model is to continue, and how: of a .txt file nothing, and its whole text; of a table without
    prompts and completions nothing, and each text."""
    *prompts, (column, texts) = _read(path, [("prompt", "completion"), ("text",)], named)
    texts = _filled(path, column or "text", texts if column else ["\n".join(texts)])
    return prompts[0][1] if prompts else [""] * len(texts), texts


def read_texts(path: str, named: dict[str, str], *instead: str) -> list[str]:
    """The texts of a table, in a column "text" or else one of these; or the lines of a .txt file."""
    return _read(path, [("text",), *((column,) for column in instead)], named)[0][1]


def without_columns(name: str, named: dict[str, str]) -> None:
    """InputError where the user named columns of what has none."""
    if named:
        raise InputError(f"{name} has no columns: leave {_options(named)} out, or give a table")


def _options(columns: Iterable[str]) -> str:
    return " and ".join(f"--{column}-column" for column in columns)


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


def _filled(path: str, column: str, texts: list[str]) -> list[str]:
    """The texts of a column, if there are any and none is empty."""
    if not texts:
        raise InputError(f"{path} has no rows")
    for row, text in enumerate(texts, 1):
        if not text.strip():
            raise InputError(f"{path}: row {row} is empty in column {column!r}")
    return texts


def _read(
    path: str, layouts: list[tuple[str, ...]], named: dict[str, str], suffixes: tuple[str, ...] = (*TABLES, ".txt")
) -> list[tuple[str, list[str]]]:
    """The first of the `layouts` that a table has, each column with its name; of a .txt file "" and its lines.

    Args:
        layouts: columns that go together; where the user `named` some, a layout with all of these.
    """
    wanted = [[named.get(column, column) for column in layout] for layout in layouts if named.keys() <= set(layout)]
    if not wanted:
        raise InputError(f"{_options(named)} do not go together: leave one out")
    if len(set(wanted[0])) < len(wanted[0]):
        raise InputError(f"{' and '.join(layouts[0])} cannot both be in the column {wanted[0][0]!r}")
    suffix = Path(path).suffix.lower()
    if suffix not in suffixes:
        raise InputError(f"{path}: the name must end in one of {', '.join(suffixes)}, which says how to read it")
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such file")
    try:
        if suffix == ".txt":
            without_columns(path, named)
            return [("", lines_of(Path(path).read_bytes(), path))]
        if Path(path).stat().st_size == 0:
            raise InputError(f"{path} is empty")
        frame = _frame(path, suffix)
        names = list(frame.columns)
        lacking = [[name for name in layout if name not in names] for layout in wanted]
        if all(lacking):
            said = ", nor ".join(" and ".join(map(repr, some)) for some in lacking)
            raise ValueError(f"it has no column {said}; it has {', '.join(map(repr, names)) or 'none'}")
        return [(name, _texts(frame, name)) for name in wanted[lacking.index([])]]
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
    first = next(iter(lines_of(Path(path).read_bytes(), path)), "") if promised else ""
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
        names, *rows = _rows(text, SEPARATORS[suffix]) or [[]]
        return pandas.DataFrame(rows, columns=names, dtype=object)
    if text.lstrip().startswith("["):
        places = [(f"item {number}", item) for number, item in enumerate(_json(text, "it is no JSON array"), 1)]
    else:
        lines = [(f"line {number}", line) for number, line in enumerate(_lines(text), 1) if line.strip()]
        places = [(place, _json(line, f"{place} is no JSON object")) for place, line in lines]
    for place, row in places:
        if not isinstance(row, dict):
            raise ValueError(f"{place} is no JSON object: it is a {type(row).__name__}")
        if isinstance(row, _Doubled):
            raise ValueError(f"{place} has a key twice, and the second would count: leave one of them")
    return pandas.DataFrame([row for _, row in places], dtype=object)


def _rows(text: str, separator: str) -> list[list[str]]:
    """The fields of each line that is not blank, as many in each."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows: list[list[str]] = []
    line = 1  # where a row begins, which may have line breaks in quotes
    try:
        for row in reader:
            if row and rows and len(row) != len(rows[0]):
                raise ValueError(f"line {line} has {len(row)} fields, and the first has {len(rows[0])}")
            rows += [row] if row else []
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {line}: {error}; in a quoted value, a quote is written twice") from None
    return rows


def _json(text: str, otherwise: str) -> Any:
    """Numbers as they are written: pandas.read_json would make 1.1 of 1.10 and refuse long ones."""
    try:
        return json.loads(
            text, parse_int=str, parse_float=str, parse_constant=lambda name: None, object_pairs_hook=_object
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{otherwise}: {error}") from None


class _Doubled(dict):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    held = dict(pairs)
    return held if len(held) == len(pairs) else _Doubled(held)


def _texts(frame: "pandas.DataFrame", name: str) -> list[str]:
    """The values of a column as strings, if each is one text."""
    names = list(frame.columns)
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
