"""Files that are no longer what was written: each is refused, whichever bit it is, and says that it is damaged."""

import hashlib
import json
import os
import random

import pytest
import torch
import zoo

from ptuning_fast import FastPTuning, SoftPrompt
from ptuning_fast.files import adapter, peft, weights

KINDS = {"plain": {}, "encoder": {"encoder": "mlp"}, "bank": {"num_prompts": 2}}
SAMPLE = 500


@pytest.fixture(scope="module")
def model():
    model = zoo.build("Llama")
    model.config._name_or_path = "some/llama"
    return model


@pytest.fixture(params=[*KINDS, "classifier", "classifier's head"])
def saved(request, model, tmp_path, monkeypatch):
    """A folder with an adapter, and how to load it; of the model's numbers, which are all alike, it has the first."""
    whole = weights.numbers_of
    monkeypatch.setattr(weights, "numbers_of", lambda model: dict([*whole(model).items()][:2]))
    if request.param == "classifier":
        encoder = zoo.build("BERT")
        FastPTuning(encoder, 3, id2label={0: "ä", 1: "b"}).save_pretrained(tmp_path)
        return tmp_path, lambda: FastPTuning.from_pretrained(tmp_path, encoder)
    if request.param == "classifier's head":
        model = zoo.build("BERT", "BertForSequenceClassification")
    SoftPrompt(model, 3, **KINDS.get(request.param, {})).save_pretrained(tmp_path)
    return tmp_path, lambda: SoftPrompt.from_pretrained(model, tmp_path)


def assert_damaged(load):
    with pytest.raises(ValueError, match="is damaged"):
        load()


def test_every_bit(saved):
    """Each of the header, and some of the data; with another seed each time, others."""
    folder, load = saved
    path = folder / adapter.WEIGHTS
    whole = path.read_bytes()
    in_header = 8 * (8 + int.from_bytes(whole[:8], "little"))
    assert 8 * 400 < in_header < 8 * len(whole)
    seed = random.randrange(2**32)
    print("seed", seed)
    places = random.Random(seed).sample(range(in_header, 8 * len(whole)), SAMPLE)
    before = load().state_dict()
    with open(path, "r+b", buffering=0) as file:  # in place: a file that is written anew is forced to disk
        for bit in [*range(in_header), *places]:
            for flip in (1 << bit % 8, 0):
                file.seek(bit // 8)
                file.write(bytes([whole[bit // 8] ^ flip]))
                if flip:
                    assert_damaged(load)
    after = load().state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_every_length(saved):
    """Cut off anywhere in its header, at some places behind it, or longer than it was."""
    folder, load = saved
    path = folder / adapter.WEIGHTS
    whole = path.read_bytes()
    behind = range(int.from_bytes(whole[:8], "little") + 8, len(whole))
    os.truncate(path, len(whole) + 1)
    assert_damaged(load)
    for length in (len(whole) - 1, *behind[::-97], *reversed(range(behind.start))):
        os.truncate(path, length)
        assert_damaged(load)


def test_settings_beside_a_file_of_ours_do_not_count(saved):
    """adapter_config.json is for PEFT and for people: what is broken in it concerns them."""
    folder, load = saved
    before = load().state_dict()
    for text in ("", "{", "[]", json.dumps({"peft_type": "LORA", "num_virtual_tokens": 9})):
        (folder / adapter.CONFIG).write_text(text)
        after = load().state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())


def without_checksum(path):
    """The file as an earlier version wrote it."""
    content = path.read_bytes()
    header = json.loads(adapter._header(content))
    kept = {key: value for key, value in header["__metadata__"].items() if "sha256" not in key}
    assert len(kept) == len(header["__metadata__"]) - 2
    text = json.dumps(header | {"__metadata__": kept}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + len(adapter._header(content)) :])


def test_files_without_a_checksum_load(saved):
    folder, load = saved
    before = load().state_dict()
    without_checksum(folder / adapter.WEIGHTS)
    after = load().state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("kind", ["encoder", "bank"])
@pytest.mark.parametrize("lost", [b'"ptuning_fast"', b"ptuning_fast.prompt_embeddings"])
def test_an_earlier_file_that_lost_what_it_says_is_refused(model, tmp_path, kind, lost):
    """An encoder is no plain prompt."""
    SoftPrompt(model, 3, **KINDS[kind]).save_pretrained(tmp_path)
    path = tmp_path / adapter.WEIGHTS
    without_checksum(path)
    if kind == "bank":  # as if somebody had put it there
        (tmp_path / adapter.CONFIG).write_bytes((tmp_path / "0" / adapter.CONFIG).read_bytes())
    changed = lost[:-2] + bytes([lost[-2] ^ 1]) + lost[-1:]
    path.write_bytes(path.read_bytes().replace(lost, changed))
    assert_damaged(lambda: SoftPrompt.from_pretrained(model, tmp_path))


def test_both_checksums_damaged(saved):
    """Letters that no checksum has make it no file without one."""
    folder, load = saved
    path = folder / adapter.WEIGHTS
    content = path.read_bytes()
    places = [content.index(key) + len(key) for key in (b'sha256":"', b'sha256.copy":"')]
    path.write_bytes(bytes(ord("x") if place in places else byte for place, byte in enumerate(content)))
    assert_damaged(load)


def test_a_checksum_is_no_text_of_the_settings(tmp_path):
    """Settings that look like one."""
    text = '"ptuning_fast.sha256":"' + "1" * 64 + '"'
    adapter.save(tmp_path, {text: torch.ones(2)}, {text: text})
    tensors, settings = adapter.load(tmp_path)
    assert settings == {text: text}
    assert list(tensors) == [text]


def test_the_first_version_has_no_checksum_and_loads(model, tmp_path):
    """Its second file, bound to PEFT's by that one's digest."""
    prompt = SoftPrompt(model, 3, encoder="mlp")
    prompt.save_pretrained(tmp_path)
    saved = peft.load(tmp_path)
    weights = tmp_path / adapter.WEIGHTS
    without_checksum(weights)
    settings = saved.settings | {
        "config": saved.config,
        "belongs_to": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    (tmp_path / peft.FIRST_VERSION).write_bytes(adapter.as_bytes(saved.parameters, settings))
    without_checksum(tmp_path / peft.FIRST_VERSION)
    loaded = SoftPrompt.from_pretrained(model, tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in prompt.state_dict().items())


@pytest.mark.parametrize(
    "change",
    [
        {"num_prompts": 2.0},
        {"num_prompts": {}},
        {"num_prompts": 3},
        {"num_prompts": None},
        {"encoder": "mlp"},
        {"encoder": {"kind": "gru"}},
        {"encoder": {"kind": "mlp", "hidden_size": 10**9}},
        {"encoder": {"kind": "lstm", "num_layers": 10**12}},
        {"encoder": {"kind": "mlp", "dropout": "x"}},
        {"encoder": {"kind": "mlp", "more": 1}},
        {"encoder": {"kind": "lstm"}},
        {"encoder": None},
        {"config": []},
        {"config": {"peft_type": "PROMPT_TUNING"}},
        {"config": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": True}},
    ],
    ids=str,
)
def test_settings_that_are_not_those_of_the_tensors(model, tmp_path, change):
    """Written by somebody else: the checksum is right, and what is in the file is not."""
    SoftPrompt(model, 3, num_prompts=2, encoder="mlp").save_pretrained(tmp_path)
    tensors, settings = adapter.load(tmp_path)
    adapter.save(tmp_path, tensors, settings | change)
    (tmp_path / adapter.CONFIG).write_text("[]")
    assert_damaged(lambda: SoftPrompt.from_pretrained(model, tmp_path))
