"""A training that was killed goes on where it was, and nothing is written over unasked."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import accelerate
import pytest
import torch

from ptuning_fast.cli import output
from ptuning_fast.cli.fit import last_checkpoint
from ptuning_fast.cli.main import main
from ptuning_fast.files import adapter, card


@pytest.fixture
def command(rows_file, encoder_with_dropout):
    """60 steps, with dropout, a checkpoint after each 7."""
    options = ["--train-file", rows_file, "--model", encoder_with_dropout, "--epochs", "5", "--batch-size", "4"]
    return ["train", *options, "--prompt-length", "4", "--save-steps", "7"]


def killed(command, folder):
    """The command in a process of its own, killed when it has its second checkpoint or a later one."""
    program = [sys.executable, "-m", "ptuning_fast", *command, "--output", str(folder)]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline:
        if any(int(one.name.split("-")[1]) >= 14 for one in folder.glob("checkpoints/checkpoint-*")):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, out + err[-4000:]


def test_killed_and_resumed_is_undisturbed(command, tmp_path, capsys):
    """The same prompt and head, bit by bit; other options or texts are refused."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    killed(command, tmp_path / "killed")
    assert not (tmp_path / "killed" / adapter.WEIGHTS).exists()
    kept = tmp_path / "killed/checkpoints"
    size = sum(file.stat().st_size for file in kept.glob("checkpoint-*/model.safetensors"))
    assert 0 < size < 10_000, "of what is trained alone"

    resume = [*command, "--output", str(tmp_path / "killed"), "--resume"]
    for change, message in (
        ([], "a training in"),
        (["--resume", "--learning-rate", "0.1"], "--learning-rate was 0.005"),
        (["--resume", "--text-column", "label", "--label-column", "text"], ""),
    ):
        assert main([*command, "--output", str(tmp_path / "killed"), *change]) == 2
        assert message in capsys.readouterr().err

    (kept / "checkpoint-999").mkdir()  # one that was cut off when it was written
    (kept / "checkpoint-999/trainer_state.json").write_text("{")
    shutil.copytree(last_checkpoint(kept), kept / "checkpoint-998")  # and one that somebody took a part of away
    (kept / "checkpoint-998/optimizer.pt").unlink()
    for number, name in enumerate(("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"), 994):
        cut = shutil.copytree(last_checkpoint(kept), kept / f"checkpoint-{number}") / name  # or that a full disk cut
        os.truncate(cut, cut.stat().st_size - 9)
    (kept / "notes").mkdir()  # somebody's, which stays
    assert main(resume) == 0
    printed = capsys.readouterr().out
    assert "going on from" in printed and "checkpoint-99" not in printed
    assert [one.name for one in kept.iterdir()] == ["notes"]
    assert main([*command, "--output", str(tmp_path / "whole")]) == 0
    assert "60 steps" in printed and "60 steps" in capsys.readouterr().out
    torch.set_num_threads(threads)
    (tensors, settings), (expected, expected_settings) = (adapter.load(tmp_path / one) for one in ("killed", "whole"))
    assert settings == expected_settings
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


def test_a_checkpoint_is_whole_when_every_process_has_written(command, tmp_path, monkeypatch):
    """Each waits for the others before the first one writes the file by which it is known to be whole."""
    found, wait = [], accelerate.Accelerator.wait_for_everyone

    def waiting(self):
        checkpoints = list((tmp_path / "checkpoints").glob("checkpoint-*"))
        found.extend(sorted(file.name for file in one.iterdir()) for one in checkpoints)
        wait(self)

    monkeypatch.setattr(accelerate.Accelerator, "wait_for_everyone", waiting)
    assert main([*command, "--epochs", "0.6", "--save-steps", "3", "--output", str(tmp_path)]) == 0
    whole = [files for files in found if "rng_state.pth" in files and "trainer_state.json" not in files]
    assert len(whole) == 2 and "optimizer.pt" in whole[0]


@pytest.mark.parametrize(("option", "name"), [("--resume", "checkpoint-best"), ("--overwrite", "checkpoint-42-lr")])
def test_a_folder_that_would_pass_for_a_checkpoint(command, tmp_path, capsys, monkeypatch, option, name):
    """The Trainer takes it for one of its own, and removes it."""
    with monkeypatch.context() as patch:
        patch.setattr("transformers.Trainer.train", Mock(side_effect=KeyboardInterrupt))
        assert main([*command, "--output", str(tmp_path)]) == 130
    (tmp_path / "checkpoints" / name).mkdir()
    assert main([*command, "--output", str(tmp_path), option]) == 2
    said = f"checkpoints/{name} is none of the training's, and would pass for one: move it"
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_that_is_taken_away_while_it_is_claimed(tmp_path, monkeypatch):
    """By a training that ends: the one that is held is the one that is there."""
    folder, flock, calls = tmp_path / "checkpoints", output.fcntl.flock, []

    def slow(handle, how):
        calls.append(handle)
        if len(calls) == 1:
            folder.rmdir()
        flock(handle, how)

    monkeypatch.setattr(output.fcntl, "flock", slow)
    handle = output._locked(folder)
    assert len(calls) == 2 and os.path.samestat(os.fstat(handle), os.stat(folder))
    with pytest.raises(output.InputError, match="is running"):
        output._locked(folder)
    os.close(handle)


def test_killed_before_the_first_checkpoint(command, tmp_path, capsys, monkeypatch):
    (tmp_path / "a/checkpoints").mkdir(parents=True)
    assert main([*command, "--epochs", "0.2", "--output", str(tmp_path / "a"), "--resume"]) == 2
    assert "no training in" in capsys.readouterr().err

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("transformers.Trainer.train", interrupted)
        assert main([*command, "--epochs", "0.2", "--output", str(tmp_path / "a")]) == 130
    assert "the same command with --resume goes on" in capsys.readouterr().err
    assert json.loads((tmp_path / "a/checkpoints/options.json").read_text())["epochs"] == 0.2
    assert main([*command, "--epochs", "0.2", "--output", str(tmp_path / "a"), "--resume"]) == 0
    assert "there is no checkpoint yet" in capsys.readouterr().out


def test_killed_behind_the_last_step_of_a_part_of_an_epoch(command, tmp_path, capsys, monkeypatch):
    """There it goes on from before, as a Trainer that goes on from the last step would make one more."""
    given = [*command, "--epochs", "1.2", "--output"]
    with monkeypatch.context() as patch:
        patch.setattr("ptuning_fast.FastPTuning.save_pretrained", Mock(side_effect=KeyboardInterrupt))
        assert main([*given, str(tmp_path / "killed")]) == 130
    capsys.readouterr()
    assert main([*given, str(tmp_path / "killed"), "--resume"]) == 0
    printed = capsys.readouterr().out
    assert "checkpoint-14" in printed and "15 steps, loss" in printed
    assert main([*given, str(tmp_path / "whole")]) == 0
    (tensors, _), (expected, _) = (adapter.load(tmp_path / one) for one in ("killed", "whole"))
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_one_training_at_a_time(command, tmp_path, capsys, monkeypatch):
    """A second in the same folder is refused as long as the first runs; one that was refused leaves nothing behind."""
    given, told = [*command, "--epochs", "0.1", "--output", str(tmp_path / "a")], []
    calls: list = []
    ours = f"error: a training in {tmp_path / 'a'} is running: wait for it, or take another --output"

    def second(*args, **kwargs):
        calls.append(args)
        assert len(calls) <= 2, "a second was not refused"
        for change in ([], ["--overwrite"], ["--resume"]):
            assert main([*given, *change]) == 2
            told.append(capsys.readouterr().err.splitlines()[-1])
        raise KeyboardInterrupt

    for place in ("ptuning_fast.cli.tasks.Classify.build", "transformers.Trainer.train"):
        with monkeypatch.context() as patch:
            patch.setattr(place, second)
            assert main(given) == 130
        assert (tmp_path / "a/checkpoints").exists() == (place == "transformers.Trainer.train")
    assert told == [ours] * 6
    assert main([*given, "--overwrite", "--model", "./nowhere"]) == 2
    assert (tmp_path / "a/checkpoints/options.json").exists(), "the one that was cut off"
    assert main([*given, "--overwrite"]) == 0
    assert not (tmp_path / "a/checkpoints").exists()
    assert main([*command, "--model", "./nowhere", "--output", str(tmp_path / "b")]) == 2
    assert not list((tmp_path / "b").iterdir())


def test_what_is_not_ours_stays(command, tmp_path, capsys):
    """A folder "checkpoints" of somebody else's is refused, and of a training's no more is removed than it wrote."""
    given, kept = [*command, "--epochs", "0.1", "--output", str(tmp_path)], tmp_path / "checkpoints"
    (kept / "checkpoint-1").mkdir(parents=True)
    (kept / "checkpoint-1/model.bin").write_text("mine")
    for change in ([], ["--overwrite"], ["--resume"], ["--model", "./nowhere"]):
        assert main([*given, *change]) == 2
        assert f"{kept} holds something else than a training: move it" in capsys.readouterr().err.splitlines()[-1]
    (kept / "options.json").write_text('{"lr": 1}')
    assert main([*given, "--overwrite"]) == 2
    assert (kept / "checkpoint-1/model.bin").read_text() == "mine"
    (kept / "options.json").write_text('{"texts": ""}')
    (kept / "notes.txt").write_text("mine")
    assert main([*given, "--overwrite"]) == 0
    assert [file.name for file in kept.iterdir()] == ["notes.txt"]

    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b/checkpoints").symlink_to(tmp_path / "elsewhere")
    assert main([*given, "--output", str(tmp_path / "b")]) == 0
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_full_disk(command, tmp_path, capsys, monkeypatch):
    """One line, wherever it shows; a checkpoint is written by libraries with errors of their own."""
    given = [*command, "--epochs", "0.1", "--save-steps", "1", "--output", str(tmp_path / "a"), "--overwrite"]
    full, save = OSError(28, "No space left on device"), "transformers.Trainer._save_checkpoint"
    for place, error, message in (
        ("ptuning_fast.files.adapter.replace", full, "cannot write to the folder"),
        (save, RuntimeError("no space\nin detail"), "no space; once it can be, the same command with --resume goes on"),
        (save, Exception("no space"), "cannot save a checkpoint in"),
        ("ptuning_fast.FastPTuning.save_pretrained", full, "cannot save the adapter in"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, Mock(side_effect=error))
            assert main(given) == 2, place
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("error: ") and message in last
    write = card.write_classifier
    monkeypatch.setattr(card, "write_classifier", Mock(side_effect=[write, full]))
    assert main(given) == 2
    assert "once more, with its figures: No space left on device" in capsys.readouterr().err.splitlines()[-1]


def test_an_adapter_is_not_written_over(command, tmp_path, capsys):
    options = [*command, "--epochs", "0.1", "--output", str(tmp_path)]
    (tmp_path / adapter.WEIGHTS).write_text("the old one")
    assert main(options) == 2
    assert f"there is an adapter in {tmp_path}: --overwrite replaces it" in capsys.readouterr().err
    assert (tmp_path / adapter.WEIGHTS).read_text() == "the old one"
    assert main([*options, "--overwrite"]) == 0
    adapter.load(tmp_path)


@pytest.mark.parametrize(("error", "status"), [(Exception("Missing [UNK] token"), 2), (ZeroDivisionError(), None)])
def test_errors_that_tokenizers_raise(error, status, monkeypatch, capsys):
    """They have no class of their own; any other error is one of ours, and is shown as such."""

    def run(options):
        raise error

    monkeypatch.setattr("ptuning_fast.cli.predict.run", run)
    if status is None:
        with pytest.raises(type(error)):
            main(["predict", "--adapter", "x", "--text", "x"])
    else:
        assert main(["predict", "--adapter", "x", "--text", "x"]) == status
        assert capsys.readouterr().err == "error: Missing [UNK] token\n"
