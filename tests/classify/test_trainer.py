"""FastPTuning in `transformers.Trainer`, killed and resumed: tests/classify/kill_and_resume.py, with fewer kills."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")


def test_killed_and_resumed_is_undisturbed():
    """Losses, gradient norms, evaluations and the adapter, bit by bit."""
    command = [sys.executable, str(Path(__file__).parent / "kill_and_resume.py"), "--kills", "1"]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
    assert "killed 1 times" in run.stdout
    assert "0 differ, 0 are missing; the adapter is the same" in run.stdout
