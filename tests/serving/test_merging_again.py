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
from ptuning_fast.serving import checkpoint

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
    listed = json.loads((tmp_path / checkpoint.LIST).read_text())
    (tmp_path / checkpoint.LIST).write_text(json.dumps(listed | {"files": [*listed["files"], f"../{outside.name}"]}))
    merged(tmp_path)
    assert {"one/notes.txt", "model.gguf"} <= files(tmp_path) and outside.exists()
    assert not {one for one in files(tmp_path) if one.startswith(("one/tok", "two/"))}


@pytest.mark.parametrize("what", ["model", "tokenizer", "tokenizer of one"])
def test_a_model_of_somebody_elses_stays(tmp_path, what):
    """Its weights may be the only ones."""
    if what == "model":
        zoo.build("Llama", vocab_size=V).save_pretrained(tmp_path)
    else:
        byte_level().save_pretrained(tmp_path / "one" if what == "tokenizer of one" else tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    with pytest.raises(ValueError, match="that no save_pretrained_merged has written"):
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
    (place / f"{adapter.UNFINISHED}abcdefgh").mkdir()  # as a real kill leaves it
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
