"""Banks of prompts in files: each prompt for PEFT in a numbered folder, and what is somebody else's there stays."""

import pytest
import torch
import zoo
from same_outputs import assert_same_outputs

from ptuning_fast import FastPTuning, SoftPrompt
from ptuning_fast.files import adapter

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")


def test_bank(tmp_path):
    """All of it for us, and each prompt for PEFT; a smaller bank in its place leaves nothing of the larger."""
    model = zoo.build("Llama")
    SoftPrompt(model, zoo.M).save_pretrained(tmp_path)
    SoftPrompt(model, zoo.M, num_prompts=4).save_pretrained(tmp_path)
    bank = SoftPrompt(model, zoo.M, num_prompts=3, encoder="mlp")
    bank.save_pretrained(tmp_path)
    loaded = SoftPrompt.from_pretrained(model, tmp_path)
    assert loaded.num_prompts == 3
    assert torch.equal(loaded.embeddings(), bank.embeddings())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["0", "1", "2", adapter.CARD, adapter.WEIGHTS]
    for place in range(3):
        single = SoftPrompt(model, zoo.M, init=bank.embeddings()[place])
        theirs = peft.PeftModel.from_pretrained(zoo.build("Llama"), tmp_path / str(place))
        assert_same_outputs(single, theirs, "CAUSAL_LM")
    SoftPrompt(model, zoo.M).save_pretrained(tmp_path)
    assert SoftPrompt.from_pretrained(model, tmp_path).num_prompts is None
    assert sorted(file.name for file in tmp_path.iterdir()) == [adapter.CARD, adapter.CONFIG, adapter.WEIGHTS]


@pytest.mark.parametrize("kind", ["ours", "PEFT's", "PEFT's, pickled", "a bank", "a link"])
def test_what_has_come_into_a_banks_folders_since(tmp_path, kind):
    """It is somebody's, and neither replaced nor taken away; the rest of the bank goes as ever."""
    model = zoo.build("Llama")
    bank, single = SoftPrompt(model, zoo.M, num_prompts=2), SoftPrompt(model, zoo.M)
    bank.save_pretrained(tmp_path / "bank")
    place = tmp_path / "bank/1"
    if kind.startswith("PEFT's"):
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        if "pickled" in kind:
            (place / adapter.WEIGHTS).unlink()
        options = {"safe_serialization": "pickled" not in kind}
        peft.get_peft_model(zoo.build("Llama"), config).save_pretrained(place, **options)
    elif kind == "a link":
        place.rename(tmp_path / "elsewhere")
        place.symlink_to(tmp_path / "elsewhere")
    else:
        (bank if kind == "a bank" else single).save_pretrained(place)
    before = {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=r"bank/1 (holds an adapter that is none of a bank's|is a link or a file)"):
        bank.save_pretrained(tmp_path / "bank")
    single.save_pretrained(tmp_path / "bank")
    assert {file: file.read_bytes() for file in place.rglob("*") if file.is_file()} == before and len(before) > 1
    assert not (tmp_path / "bank/0").exists()


@pytest.mark.parametrize("put", [lambda place: place.write_text("mine"), lambda place: place.symlink_to("0")])
def test_where_a_bank_cannot_have_a_folder(tmp_path, put):
    single = SoftPrompt(zoo.build("Llama"), zoo.M)
    single.save_pretrained(tmp_path)
    put(tmp_path / "1")
    with pytest.raises(ValueError, match="1 is a link or a file"):
        SoftPrompt(zoo.build("Llama"), zoo.M, num_prompts=2).save_pretrained(tmp_path)
    loaded = SoftPrompt.from_pretrained(zoo.build("Llama"), tmp_path)
    assert torch.equal(loaded.prompt_embeddings, single.prompt_embeddings)


def test_a_classifier_in_the_place_of_a_bank(tmp_path):
    SoftPrompt(zoo.build("BERT"), zoo.M, num_prompts=2).save_pretrained(tmp_path)
    FastPTuning(zoo.build("BERT"), 3).save_pretrained(tmp_path)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["README.md", adapter.CONFIG, adapter.WEIGHTS]


def test_what_is_not_ours_stays(tmp_path):
    """A bank that shrinks takes its own files away, and nothing else."""
    model = zoo.build("Llama")
    SoftPrompt(model, 5, num_prompts=4).save_pretrained(tmp_path)
    (tmp_path / "3" / "notes.txt").write_text("mine")
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "adapter_model.safetensors").write_text("somebody else's")
    SoftPrompt(model, 5, num_prompts=2).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["0", "1", "3", "7"]
    assert [path.name for path in (tmp_path / "3").iterdir()] == ["notes.txt"]
    assert (tmp_path / "7" / "adapter_model.safetensors").read_text() == "somebody else's"


def test_a_bank_whose_save_is_cut_off(tmp_path, monkeypatch):
    """The next one leaves nothing of the larger one before."""
    model, replace = zoo.build("Llama"), adapter.replace
    SoftPrompt(model, 5, num_prompts=4).save_pretrained(tmp_path)

    def full(path, content):
        if path.parent.name == "0":
            raise OSError("disk full")
        replace(path, content)

    bank = SoftPrompt(model, 5, num_prompts=2)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(adapter, "replace", full)
        bank.save_pretrained(tmp_path)
    assert torch.equal(SoftPrompt.from_pretrained(model, tmp_path).prompt_embeddings, bank.prompt_embeddings)
    bank.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["0", "1"]


def test_adapters_where_a_bank_has_its_own(tmp_path):
    """Somebody's adapters in folders of these names are neither replaced nor taken away."""
    model = zoo.build("Llama")
    prompt, bank = SoftPrompt(model, 5), SoftPrompt(model, 5, num_prompts=3)
    prompt.save_pretrained(tmp_path / "runs/1")
    with pytest.raises(ValueError, match="runs/1 holds an adapter that is none of a bank's"):
        bank.save_pretrained(tmp_path / "runs")
    assert torch.equal(SoftPrompt.from_pretrained(model, tmp_path / "runs/1").prompt_embeddings, prompt.final_prompt())
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["1"]
    bank.save_pretrained(tmp_path / "bank")
    bank.save_pretrained(tmp_path / "bank")
    FastPTuning(zoo.build("BERT"), 3).save_pretrained(tmp_path / "bank/2")
    SoftPrompt(model, 5, num_prompts=2).save_pretrained(tmp_path / "bank")
    FastPTuning.from_pretrained(tmp_path / "bank/2", zoo.build("BERT"))
