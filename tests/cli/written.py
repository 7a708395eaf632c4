"""Small tables in the files that the command line reads."""

import csv
import json

import pyarrow
import pyarrow.parquet


def write(path, rows, names=("text", "label")):
    """A CSV, TSV, JSON lines, JSON or Parquet file of these rows."""
    records = [dict(zip(names, row)) for row in rows]
    if path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, delimiter="," if path.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return str(path)
