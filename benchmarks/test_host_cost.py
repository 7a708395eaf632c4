"""What an eager call costs the host, in a process of its own: host_cost.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import stub_gpu
import torch


def test_host_cost(benchmark):
    """Every launch of every case is made past Triton's binder, and there are no more than there should be."""
    if not torch.cuda.is_available() and stub_gpu.obstacle():
        pytest.skip(stub_gpu.obstacle())
    program = [
        sys.executable,
        str(Path(__file__).with_name("host_cost.py")),
        *(["--once"] if benchmark.disabled else []),
    ]
    left_out = ("TRITON_INTERPRET", "PYTHONSAFEPATH")  # the latter would keep the program from its neighbours
    environment = {key: value for key, value in os.environ.items() if key not in left_out}

    def run():
        return subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)

    result = benchmark.pedantic(run, rounds=1, iterations=1)
    assert result.returncode == 0, result.stderr[-4000:]
    cases = json.loads(result.stdout.splitlines()[-1])
    assert [case["launches"] for case in cases] == [1, 1, 2, 2, 3, 4, 1]
    benchmark.extra_info |= {
        "benchmark": "host cost",
        "device": "GPU" if torch.cuda.is_available() else "stub",
        "cases": cases,
    }
