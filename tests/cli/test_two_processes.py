"""The command line under torchrun: of two processes comes what comes of one.

Trainings of a classifier and of a language model, one after another in the same two processes: imports take longer.
"""

import csv
import json
import os
import subprocess
import sys

import torch
import transformers
from packaging.version import Version

from ptuning_fast.cli import fit
from ptuning_fast.cli.main import main
from ptuning_fast.files import adapter

PROGRAM = """
import json
import os
import sys
from unittest import mock

from accelerate import PartialState

from ptuning_fast.cli.main import main

*before, last = json.loads(sys.argv[1])
with mock.patch.object(PartialState, "destroy_process_group"):  # the one after it goes on with the same
    statuses = [main(command) for command in before]
if os.environ["RANK"] == "0":
    print("second", flush=True)
sys.exit(max([*statuses, main(last)]))
"""
GOING_ON = Version(transformers.__version__) >= Version("5.23")
"""On CPUs the Trainer of transformers 5.17 cannot load an optimizer's state into two processes: there they begin."""


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def test_two_processes_are_one_training(rows, encoder, language_model, tmp_path, capsys, monkeypatch):
    """Every figure is that of one process, and is printed once; so is what is saved, up to rounding.

    The classifier has 48 texts to train on and 12 held out, so that the last batch of each has too few for both
    processes. The language model's texts have different lengths, and of its last batch one process has no text; there
    two processes go on with what one began, within an epoch, and have the other epoch from its beginning.
    """
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text, _ in rows[:51]))
    shape = ["--prompt-length", "4", "--learning-rate", "0.05"]
    classifier = ["train", "--train-file", str(tmp_path / "rows.csv"), "--model", encoder, *shape]
    classifier += ["--epochs", "3", "--batch-size", "44", "--output"]
    texts = ["train", "--task", "lm", "--train-file", str(tmp_path / "texts.jsonl"), "--model", language_model, *shape]
    texts += ["--epochs", "2", "--batch-size", "10", "--output"]

    expected = []
    for command, name in ((classifier, "classifier"), (texts, "texts")):
        assert main([*command, str(tmp_path / f"one-{name}")]) == 0
        expected.append(capsys.readouterr().out)
    assert "6 steps, loss" in expected[0] and "held-out accuracy" in expected[0]
    assert "41 texts to train on, 10 held out, whole texts;" in expected[1]
    if GOING_ON:
        with monkeypatch.context() as patch:
            patch.setattr(fit._LossInBar, "on_save", interrupted)
            assert main([*texts, str(tmp_path / "two-texts"), "--save-steps", "3"]) == 130

    (tmp_path / "program.py").write_text(PROGRAM)
    commands = [[*classifier, str(tmp_path / "two-classifier")]]
    commands += [[*texts, str(tmp_path / "two-texts"), *["--resume"] * GOING_ON]]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*torchrun, str(tmp_path / "program.py"), json.dumps(commands)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]

    def figures(printed):
        return [line for line in printed.replace("/one-", "/two-").splitlines() if "examples/s" not in line]

    first, second = run.stdout.split("second\n")
    assert figures(first) == figures(expected[0])
    goes_on = f"going on from {tmp_path / 'two-texts/checkpoints/checkpoint-3'}\n"
    assert (goes_on in second) == GOING_ON
    assert second.replace(goes_on, "") == expected[1].replace("/one-", "/two-")
    for name, tolerance in (("classifier", 1e-6), ("texts", 1e-5)):
        (tensors, settings), (others, other_settings) = (
            adapter.load(tmp_path / f"{number}-{name}") for number in ("two", "one")
        )
        assert settings == other_settings and tensors.keys() == others.keys()
        for key, tensor in others.items():
            torch.testing.assert_close(tensors[key], tensor, rtol=0, atol=tolerance)
