"""A user's texts: CSV, JSON lines, Parquet or plain text files, read with pyarrow and checked."""

from pathlib import Path

__all__ = ["InputError", "read_labelled", "read_texts"]


class InputError(Exception):
    """Something that the user gave cannot be used; the message says what, and what to do."""


def read_labelled(path: str, text_column: str, label_column: str) -> tuple[list[str], list[str]]:
    """The texts and labels of a CSV, JSON lines or Parquet file, both as strings."""
    table = _read(path, (text_column, label_column))
    texts, labels = _column(table, text_column, path), _column(table, label_column, path)
    if not texts:
        raise InputError(f"{path} has no rows")
    return texts, labels


def read_texts(path: str, text_column: str) -> list[str]:
    """The texts of a CSV, JSON lines or Parquet file, or the lines of any other file."""
    if Path(path).suffix.lower() in _READERS:
        return _column(_read(path, (text_column,)), text_column, path)
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {_reason(error)}") from None


def _read_csv(path, columns):
    from pyarrow import csv, string

    # Both columns are text, whatever they look like: a label 007 stays 007, and NA is no missing value.
    convert = csv.ConvertOptions(column_types=dict.fromkeys(columns, string()), strings_can_be_null=False)
    return csv.read_csv(path, parse_options=csv.ParseOptions(newlines_in_values=True), convert_options=convert)


def _read_json(path, columns):
    from pyarrow import json

    return json.read_json(path)


def _read_parquet(path, columns):
    from pyarrow import parquet

    return parquet.read_table(path)


_READERS = {".csv": _read_csv, ".jsonl": _read_json, ".json": _read_json, ".ndjson": _read_json}
_READERS |= {".parquet": _read_parquet, ".pq": _read_parquet}


def _read(path, columns):
    reader = _READERS.get(Path(path).suffix.lower())
    if reader is None:
        raise InputError(f"{path}: the name must end in one of {', '.join(_READERS)}, which says how to read it")
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such file")
    if Path(path).stat().st_size == 0:
        raise InputError(f"{path} is empty")
    try:
        from pyarrow import ArrowException
    except ImportError:
        raise InputError("reading files needs pyarrow: pip install 'ptuning-fast[train]'") from None
    try:
        return reader(path, columns)
    except (ArrowException, OSError) as error:
        raise InputError(f"cannot read {path}: {_reason(error)}") from None


def _column(table, name, path):
    if name not in table.column_names:
        raise InputError(f"{path} has no column {name!r}; it has {', '.join(map(repr, table.column_names)) or 'none'}")
    values = table.column(name).to_pylist()
    for row, value in enumerate(values):
        if value is None:
            raise InputError(f"{path}: row {row + 1} has no value in column {name!r}")
        if isinstance(value, (list, dict)):
            raise InputError(f"{path}: row {row + 1} of column {name!r} holds a {type(value).__name__}, not a text")
    return [str(value) for value in values]


def _reason(error):
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]
