"""A folder that is merged into again: the one before or the new one, as a whole, and nothing of somebody else's."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch
import zoo
from tokenizers_built import CHAT, byte_level
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptuning_fast import SoftPrompt
from ptuning_fast.files import adapter

pytestmark = pytest.mark.usefixtures("torch_backend")
V = 440
"""Rows to spare, so that a tokenizer and weights of two merges would load together."""


def prompt_of(seed, m, K=None):
    """One for the same model, and another with each seed."""
    prompt = SoftPrompt(zoo.build("Llama", vocab_size=V), m, num_prompts=K)
    prompt.prompt_embeddings.data = torch.randn((K or 1, m, zoo.D), generator=torch.Generator().manual_seed(seed))
    prompt.prompt_embeddings.data = prompt.prompt_embeddings.data if K else prompt.prompt_embeddings.data[0]
    return prompt


def merged(folder, tokenizer=None, seed=0, m=3, names=None):
    prompt = prompt_of(seed, m, names and len(names))
    prompt.save_pretrained_merged(folder, tokenizer or byte_level(), names=names)


def files(folder):
    return {one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file()}


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model(**AutoTokenizer.from_pretrained(folder)("a text", return_tensors="pt")).logits


def test_the_files_of_the_one_before_are_gone(tmp_path):
    """The tokenizers of a bank, and chat templates, which would be loaded as the new one's."""
    templates = byte_level(chat={"default": CHAT, "tools": "tools: " + CHAT})
    for options in (
        {"names": ["one", "two"], "tokenizer": templates},
        {"names": ["two", "three"]},
        {"tokenizer": byte_level(chat="{{ messages[0].content }}")},
        {"tokenizer": byte_level(chat=None)},
    ):
        merged(tmp_path / "again", **options)
        merged(tmp_path / "fresh", **options)
        assert files(tmp_path / "again") == files(tmp_path / "fresh")
        assert torch.equal(logits(tmp_path / "again"), logits(tmp_path / "fresh"))
        for one in files(tmp_path / "fresh"):
            os.unlink(tmp_path / "fresh" / one)
    assert [one.name for one in (tmp_path / "again").iterdir() if one.is_dir()] == []


def test_what_somebody_else_has_put_there_stays(tmp_path):
    merged(tmp_path, names=["one", "two"])
    (tmp_path / "one" / "notes.txt").write_text("mine")
    (tmp_path / "model.gguf").write_text("mine, too")
    outside = tmp_path.parent / "outside.txt"
    outside.write_text("mine as well")
    listed = json.loads((tmp_path / adapter.MERGED).read_text())
    state = [outside.stat().st_size, outside.stat().st_mtime_ns]
    for name in (f"../{outside.name}", str(outside), ".", "", "one", "x" * 5000):
        listed["files"][name] = [state]
    (tmp_path / adapter.MERGED).write_text(json.dumps(listed))
    merged(tmp_path)
    assert {"one/notes.txt", "model.gguf"} <= files(tmp_path) and outside.exists()
    assert not {one for one in files(tmp_path) if one.startswith(("one/tok", "two/"))}


def train(folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    loaded.lm_head.weight.data += 1
    loaded.save_pretrained(folder)


@pytest.mark.parametrize(
    "put",
    [
        lambda folder: zoo.build("Llama", vocab_size=V).save_pretrained(folder),
        lambda folder: byte_level().save_pretrained(folder),
        lambda folder: byte_level().save_pretrained(folder / "one"),
        lambda folder: (folder / "tokenizer.json").write_text("mine"),
        lambda folder: (folder / "added_tokens.json").write_text("mine"),
        lambda folder: (folder / "pytorch_model.bin").write_text("mine"),
        lambda folder: (folder / "one").write_text("mine"),
        lambda folder: (folder / "one").symlink_to("nowhere"),
        lambda folder: [merged(folder), train(folder)],
        lambda folder: [merged(folder, names=["one", "two"]), byte_level(chat=None).save_pretrained(folder / "one")],
        lambda folder: [merged(folder, names=["three"]), (folder / "three/tokenizer.json").write_text("mine")],
    ],
)
def test_what_somebody_has_put_there_or_changed_is_not_replaced(tmp_path, put):
    """A model that was trained on may be the only one."""
    put(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    with pytest.raises((ValueError, OSError), match=r"none that save_pretrained_merged has written|no folder that can"):
        merged(tmp_path, names=["one", "two"])
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_a_merge_that_fails_changes_nothing(tmp_path, monkeypatch):
    merged(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(zoo.build("Llama")), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        merged(tmp_path, seed=1)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


class Killed(BaseException):
    pass


def test_killed_while_files_are_moved(tmp_path, monkeypatch):
    """At every rename and removal: what loads is the one before or the new one, and the next merge sees to the rest."""
    expected = []
    for seed, m in ((0, 3), (1, 5)):
        merged(tmp_path / str(seed), seed=seed, m=m)
        expected.append(logits(tmp_path / str(seed)))
    place, seen, left = tmp_path / "place", [], [0]

    def counted(function):
        def call(*args, **kwargs):
            if str(place) in str(args[0]):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            return function(*args, **kwargs)

        return call

    for moment in range(100):
        merged(place, seed=0, m=3)
        left[0] = moment
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", counted(os.replace))
            patched.setattr(Path, "unlink", counted(Path.unlink))
            try:
                merged(place, seed=1, m=5)
            except Killed:
                done = False
            else:
                done = True
        try:
            found = logits(place)
        except OSError:
            seen.append("none")
        else:
            same = [one.shape == found.shape and torch.equal(one, found) for one in expected]
            assert any(same), f"neither of the two, killed at moment {moment}"
            seen.append("old" if same[0] else "new")
        if done:
            break
    assert seen[0] == "old" and seen[-1] == "new" and "none" in seen
    (place / f"{adapter.UNFINISHED}abcdefgh").mkdir()  # as a real kill leaves them
    (place / f".{adapter.MERGED}.abcdefgh").write_text("half")
    merged(place, seed=0, m=3)
    assert files(place) == files(tmp_path / "0") and not list(place.glob(".*"))


def test_merges_that_meet(tmp_path):
    """Each is whole; the folder is that of one of them."""
    errors, prompts, tokenizer = [], [prompt_of(seed, 3 + 2 * seed) for seed in (0, 1)], byte_level()

    def merge(seed):
        try:
            prompts[seed].save_pretrained_merged(tmp_path / "both", tokenizer)
        except Exception as error:
            errors.append(error)

    for seed in (0, 1):
        prompts[seed].save_pretrained_merged(tmp_path / str(seed), tokenizer)
    threads = [threading.Thread(target=merge, args=(seed,)) for seed in (0, 1)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert not errors
    found, expected = logits(tmp_path / "both"), [logits(tmp_path / str(seed)) for seed in (0, 1)]
    assert any(one.shape == found.shape and torch.equal(one, found) for one in expected)
