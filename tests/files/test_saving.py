"""Saves that are killed, that find the disk full, and that meet."""

import contextlib
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
import zoo
from torch.distributed.fsdp import fully_shard

from ptuning_fast import FastPTuning, PromptedModel, SoftPrompt
from ptuning_fast.files import adapter, classifier, peft

pytest.importorskip("fcntl", reason="folders are locked where the system can")

SAVER = """
import os, signal, sys
import torch
from ptuning_fast.files import adapter, peft

def save(folder, value, K=None):
    rows = torch.full((*([] if K is None else [K]), 3, 8), float(value))
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}
    peft.save(folder, peft.Saved({"prompt_embeddings": rows}, {}, config, {"num_prompts": K, "encoder": None}), rows)
"""
scope = {}
exec(SAVER, scope)
save = scope["save"]


def saver(program, folder, *arguments):
    """Another process with `save`, the folder and the arguments; it starts when it is sent a line, or at its end."""
    command = [sys.executable, "-c", SAVER + program, str(folder), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def values(folder):
    """The prompts that are in `folder`: a number each, as each is full of it."""
    rows = peft.load(folder).parameters["prompt_embeddings"]
    return [prompt.unique().item() for prompt in (rows if rows.dim() == 3 else [rows])]


def temporary(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob(".*"))


KILLED = """
fsync, left = os.fsync, [int(sys.argv[2])]
def killed(handle):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    fsync(handle)
os.fsync = killed
save(sys.argv[1], 1, 2)
"""


@pytest.mark.parametrize("files", [0, 4])
def test_what_a_killed_save_left_is_removed(tmp_path, files):
    """Its first file; of a bank the settings of its last prompt, also where that is no longer there."""
    save(tmp_path, 0, 2)
    assert saver(KILLED, tmp_path, files).wait() == -9
    assert len(temporary(tmp_path)) == 1
    (tmp_path / ".adapter_model.safetensors.mine").write_text("no name that is made up")
    save(tmp_path, 2, 1)
    assert temporary(tmp_path) == [".adapter_model.safetensors.mine"]
    assert values(tmp_path) == [2]
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_dir()) == ["0"]


SLOW = """
fsync = os.fsync
def slow(handle):
    print("writing", flush=True)
    input()
    os.fsync = fsync
    fsync(handle)
os.fsync = slow
save(sys.argv[1], 1)
"""


def test_what_a_live_save_writes_stays(tmp_path):
    """A second save waits for it, and counts, as it came later."""
    slow = saver(SLOW, tmp_path)
    assert slow.stdout.readline() == "writing\n"
    (written,) = temporary(tmp_path)
    second = threading.Thread(target=save, args=(tmp_path, 2))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    assert temporary(tmp_path) == [written]
    slow.communicate("\n")
    assert slow.returncode == 0
    second.join(10)
    assert not second.is_alive()
    assert values(tmp_path) == [2]
    assert temporary(tmp_path) == []


@contextlib.contextmanager
def files_of_at_most(size):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("new", ["plain", "bank", "classifier"])
@pytest.mark.parametrize("old", ["ours", "PEFT's"])
def test_no_room(tmp_path, old, new):
    """The adapter that was there is as it was, to the byte."""
    model = zoo.build("Llama" if new != "classifier" else "BERT")
    if old == "ours":
        SoftPrompt(model, 3).save_pretrained(tmp_path)
    else:
        theirs = pytest.importorskip("peft")
        task = {"task_type": "CAUSAL_LM" if new != "classifier" else "FEATURE_EXTRACTION"}
        theirs.get_peft_model(model, theirs.PromptTuningConfig(num_virtual_tokens=3, **task)).save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    fresh = zoo.build("BERT" if new == "classifier" else "Llama")
    options = {"num_prompts": 2} if new == "bank" else {}
    prompt = FastPTuning(fresh, 30) if new == "classifier" else SoftPrompt(fresh, 30, **options)
    with (
        files_of_at_most(2000),
        pytest.raises(OSError, match=r"cannot write .*safetensors, which is as it was before: "),
    ):
        prompt.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert SoftPrompt.from_pretrained(zoo.build("BERT" if new == "classifier" else "Llama"), tmp_path).length == 3


def unsaved(folder, module):
    """Why `module` is not saved in `folder`, where all is as it was."""
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match="another folder") as refusal:
        module.save_pretrained(folder)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    return str(refusal.value)


@pytest.fixture
def modules():
    """Whatever is saved as an adapter."""
    model = zoo.build("Llama")
    return [
        SoftPrompt(model, 3),
        SoftPrompt(model, 3, num_prompts=2),
        PromptedModel(model, 3),
        FastPTuning(zoo.build("BERT"), 3),
    ]


def test_an_adapter_of_another_kind_stays(tmp_path, modules):
    """Its files have the names of ours."""
    theirs = pytest.importorskip("peft")
    lora = theirs.get_peft_model(zoo.build("Llama"), theirs.LoraConfig(task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path / "lora")
    for module in modules:
        assert unsaved(tmp_path / "lora", module).startswith(f"{tmp_path / 'lora'} holds a LORA adapter, which would")
    lora.save_pretrained(tmp_path / "bank" / "1")
    assert "bank/1 holds a LORA adapter" in unsaved(tmp_path / "bank", modules[1])
    modules[0].save_pretrained(tmp_path / "bank")
    for module in modules:  # what was ours is replaced
        module.save_pretrained(tmp_path / "ours")
    tuned = theirs.get_peft_model(zoo.build("Llama"), theirs.PromptEncoderConfig("CAUSAL_LM", num_virtual_tokens=3))
    tuned.save_pretrained(tmp_path / "theirs")
    SoftPrompt.from_pretrained(zoo.build("Llama"), tmp_path / "theirs").save_pretrained(tmp_path / "theirs")


def test_a_model_stays_loadable(tmp_path, modules):
    zoo.build("Llama").save_pretrained(tmp_path)
    for module in modules:
        assert unsaved(tmp_path, module).startswith(f"{tmp_path} holds a model (config.json), which would not load")
    with pytest.raises(OSError, match=r"holds a model \(config.json\)"):
        adapter.check_writable(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text('{"learning_rate": 0.1}')
    modules[0].save_pretrained(tmp_path / "mine")


@pytest.fixture
def one_process(tmp_path):
    """A group of one; two are in tests/distributed."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"num_prompts": 2}, {"encoder": "mlp"}, {"encoder": "lstm"}])
@pytest.mark.parametrize("whole", [False, True])
def test_a_sharded_prompt(tmp_path, one_process, torch_backend, options, whole):
    """By itself, and with its model."""
    model = zoo.build("Llama", "LlamaForSequenceClassification").requires_grad_(True)
    prompted = PromptedModel(model, 3, **options)
    before = {name: value.clone() for name, value in prompted.prompt.state_dict().items()}
    fully_shard(prompted if whole else prompted.prompt)
    ids, mask = zoo.padded(zoo.texts(), "right")
    if whole:  # which leaves its parameters as one for the backward
        prompted(ids, mask, prompt_index=torch.tensor([0, 1, 0, 1]) if "num_prompts" in options else None)
    prompted.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    prompted.save_pretrained(tmp_path)
    other = zoo.build("Llama", "LlamaForSequenceClassification")
    other.score.weight.data.zero_()
    loaded = SoftPrompt.from_pretrained(other, tmp_path)
    assert before.keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())
    assert other.score.weight.any()
    assert "import LlamaForSequenceClassification" in (tmp_path / "README.md").read_text()


def test_a_sharded_classifier(tmp_path, one_process):
    fast = FastPTuning(zoo.build("BERT"), 3)
    before = {name: fast.get_parameter(name).detach().clone() for name in classifier.TENSORS}
    fully_shard(fast).save_pretrained(tmp_path)
    tensors, _ = adapter.load(tmp_path)
    assert all(torch.equal(tensors[name], before[name]) for name in before)


MANY = """
os.fsync = lambda handle: None  # what a crash of the machine needs takes the time in which they would meet
print("ready", flush=True)
input()
for number in range(int(sys.argv[3])):
    save(sys.argv[1], int(sys.argv[2]) + number, [4, None, 2][number % 3])
"""
SAVES = 20


def test_saves_that_meet(tmp_path):
    """Two processes that save banks and plain prompts, and one that loads all the while: one of theirs, whole."""
    save(tmp_path, 0)
    others = [saver(MANY, tmp_path, first, SAVES) for first in (300, 600)]
    assert [other.stdout.readline() for other in others] == ["ready\n"] * 2
    for other in others:
        other.stdin.write("\n")
        other.stdin.close()
    found, until = set(), time.monotonic() + 60
    while any(other.poll() is None for other in others):
        assert time.monotonic() < until
        value, *rest = values(tmp_path)
        assert set(rest) <= {value}
        assert value == 0 or len(rest) + 1 == [4, 1, 2][int(value) % 3]
        found.add(value)
        time.sleep(0.001)
    assert [other.returncode for other in others] == [0, 0]
    assert len(found) > 3, "they did not meet"
    (value, *_), last = values(tmp_path), SAVES - 1
    assert value in (300 + last, 600 + last)
    K = [4, None, 2][last % 3]
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_dir()) == [str(k) for k in range(K or 0)]
    assert all(values(tmp_path / str(k)) == [value] for k in range(K or 0))
    assert (tmp_path / adapter.CONFIG).exists() == (K is None)
    assert temporary(tmp_path) == []


def test_saves_of_classifiers_meet_too(tmp_path):
    """They share the lock."""
    with adapter.saving(tmp_path):
        thread = threading.Thread(target=adapter.save, args=(tmp_path, {"a": torch.ones(1)}, {}))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
    thread.join(10)
    assert adapter.load(tmp_path)[0].keys() == {"a"}
