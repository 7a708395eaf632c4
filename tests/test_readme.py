"""The README's Python snippets run as they stand, one behind the other; its files and commands exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_snippets(tmp_path, minilm):
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) >= 3
    (tmp_path / "snippets.py").write_text("\n".join(snippets), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "snippets.py"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "my-adapter/adapter_model.safetensors").is_file()


def test_commands_are_understood():
    """Every `python -m ptuning_fast` line of the README has options that the parser knows."""
    from ptuning_fast.cli.main import parser

    lines = re.findall(r"python -m ptuning_fast ((?:train|predict)[^\n#`|]*)", README)
    assert len(lines) >= 4
    for line in lines:
        parser().parse_args(line.split())


def test_files_that_it_names_exist():
    for name in ("constraints.txt", "kernels/prompt_embedding/", "ptuning_fast/functional.py", "LICENSE"):
        assert (ROOT / name).exists(), name
