"""DDP, FSDP2 and Accelerate on two real processes: losses and gradients of one process on the same batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

HERE = Path(__file__).parent
MODES = {"prompt": ("prepend", "packed", "shared"), "classifier": ("prepend", "packed")}
CASES = [
    f"{kind}_{of} {mode}"
    for of, kinds in (("prompt", ("ddp", "accelerate")), ("classifier", ("ddp", "fsdp", "accelerate")))
    for kind in kinds
    for mode in MODES[of]
]
CASES += [f"ddp_both {mode}" for mode in MODES["prompt"]]
CASES += [f"fsdp_{of} {mode}" for of in ("model", "base", "both") for mode in MODES["prompt"]]
CASES += ["fsdp_table prepend", "saved_by_fsdp prepend"]
TOLERANCE = 3e-5
"""Relative to the largest of its kind, in fp32 after three steps of AdamW; without an average, 0.1 and more."""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process found, of every case."""
    file = tmp_path_factory.mktemp("distributed") / "results.json"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", str(HERE / "worker.py"), str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    run = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(file.read_text())


def test_every_case_is_looked_at(results):
    assert all(sorted(found) == sorted(["by_itself prepend", *CASES]) for found in results)
    assert len(results) == 2


@pytest.mark.parametrize("case", CASES)
def test_as_one_process(results, case):
    for found in results:
        assert found[case].get("error") is None
        assert found[case]["apart"] <= TOLERANCE


def test_the_check_can_fail(results):
    assert all(found["by_itself prepend"]["apart"] > 0.1 for found in results)


@pytest.mark.parametrize("case", CASES)
def test_only_a_sharded_table_is_warned_of(results, case):
    sharded = case.startswith("fsdp") and "classifier" not in case  # there, the table is gathered with the rest
    for found in results:
        assert len(found[case]["warnings"]) == sharded
        assert all("is sharded: its table is gathered at every call" in line for line in found[case]["warnings"])
