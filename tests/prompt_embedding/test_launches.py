"""The short way of launching, past Triton's argument binder, does what Triton's own does: launches.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def compared():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import stub_gpu
    finally:
        sys.path.pop(0)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: test_gpu.py launches for real")
    if stub_gpu.obstacle():
        pytest.skip(stub_gpu.obstacle())
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    program = [sys.executable, str(Path(__file__).with_name("launches.py"))]
    result = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_every_launch_arrives_as_triton_makes_it(compared):
    """The same compiled kernel, grid and arguments, at shapes that share kernels; hooks and odd arguments included."""
    assert compared["launches"] > 300
    assert len(compared["exceptions"]) == 4


def test_the_short_way_is_taken(compared):
    """By Triton 3.4 to 3.8. With another the launches are its own, until somebody has looked at how it makes them."""
    version = tuple(map(int, compared["triton"].split(".")[:2]))
    if (3, 4) <= version <= (3, 8):
        assert compared["short"] == compared["launches"] - 4
    else:
        assert compared["short"] == 0
