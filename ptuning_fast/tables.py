"""A user's texts: CSV, JSON lines, Parquet or plain text files, read and checked."""

import json
from pathlib import Path

__all__ = ["InputError", "lines_of", "read_labelled", "read_texts"]


class InputError(Exception):
    """Something that the user gave cannot be used; the message says what, and what to do."""


def read_labelled(path: str, text_column: str, label_column: str) -> tuple[list[str], list[str]]:
    """The texts and labels of a CSV, JSON lines or Parquet file, both as strings, none of them empty."""
    texts, labels = _read(path, (text_column, label_column))
    if not texts:
        raise InputError(f"{path} has no rows")
    for name, values in ((text_column, texts), (label_column, labels)):
        for row, value in enumerate(values):
            if not value.strip():
                raise InputError(f"{path}: row {row + 1} is empty in column {name!r}")
    return texts, labels


def read_texts(path: str, text_column: str) -> list[str]:
    """The texts of a CSV, JSON lines or Parquet file, or the lines of a .txt file."""
    if Path(path).suffix.lower() != ".txt":
        return _read(path, (text_column,), ", .txt")[0]
    try:
        return lines_of(Path(path).read_bytes(), path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def lines_of(data: bytes, name: str) -> list[str]:
    """One text a line, blank ones too. Lines end as in any text file, not at the separators that Unicode adds."""
    lines = _decode(data, name).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines if lines[-1] else lines[:-1]


def _read_csv(path, columns):
    from pyarrow import csv, string

    # Both columns are text, whatever they look like: a label 007 stays 007, and NA is no missing value.
    table = csv.read_csv(
        path,
        read_options=csv.ReadOptions(block_size=min(Path(path).stat().st_size + 1, 2**31 - 1)),
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(column_types=dict.fromkeys(columns, string()), strings_can_be_null=False),
    )
    return _columns_of(table, columns, path)


def _read_parquet(path, columns):
    from pyarrow import parquet

    return _columns_of(parquet.read_table(path), columns, path)


def _columns_of(table, columns, path):
    for name in columns:
        if table.column_names.count(name) > 1:
            raise InputError(f"{path} has {table.column_names.count(name)} columns {name!r}")
    _check_columns(table.column_names, columns, path)
    return [table.column(name).to_pylist() for name in columns]


def _read_json(path, columns):
    # Not pyarrow's: it turns texts that look like dates into dates. Numbers stay as they are written.
    values = [[] for _ in columns]
    for number, line in enumerate(lines_of(Path(path).read_bytes(), path)):
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_int=str, parse_float=str, parse_constant=lambda name: None)
        except (json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"cannot read {path}: line {number + 1} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"cannot read {path}: line {number + 1} is no JSON object")
        _check_columns(row, columns, f"{path}, line {number + 1},")
        for column, name in zip(values, columns):
            column.append(row[name])
    return values


_READERS = {".csv": _read_csv, ".jsonl": _read_json, ".json": _read_json, ".ndjson": _read_json}
_READERS |= {".parquet": _read_parquet, ".pq": _read_parquet}


def _read(path, columns, also=""):
    """The columns of a table, each a list of strings."""
    reader = _READERS.get(Path(path).suffix.lower())
    if reader is None:
        raise InputError(f"{path}: the name must end in one of {', '.join(_READERS)}{also}, which says how to read it")
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such file")
    if Path(path).stat().st_size == 0:
        raise InputError(f"{path} is empty")
    try:
        from pyarrow import ArrowException
    except ImportError:
        raise InputError("reading files needs pyarrow: pip install 'ptuning-fast[train]'") from None
    try:
        values = reader(path, columns)
    except (ArrowException, OSError, ValueError) as error:  # the last: bytes and times that Python has no value for
        raise InputError(f"cannot read {path}: {(str(error).strip().splitlines() or ['?'])[0]}") from None
    return [[_text(value, row, name, path) for row, value in enumerate(c)] for name, c in zip(columns, values)]


def _check_columns(names, wanted, path):
    for name in wanted:
        if name not in names:
            raise InputError(f"{path} has no column {name!r}; it has {', '.join(map(repr, names)) or 'none'}")


def _text(value, row, name, path):
    if value is None or value != value:
        raise InputError(f"{path}: row {row + 1} has no value in column {name!r}")
    if isinstance(value, (list, dict, bytes)):
        raise InputError(f"{path}: row {row + 1} of column {name!r} holds a {type(value).__name__}, not a text")
    text = str(value)
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"{path}: row {row + 1} of column {name!r} holds half a character (a lone surrogate)")
    return text


def _decode(data, name):
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"cannot read {name}: it is not UTF-8 (byte {error.start})") from None
