"""Adapters in PEFT's files, both ways, proved by outputs; and what PEFT cannot do: resume, banks, crashes."""

import copy
import json
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
import zoo
from same_outputs import assert_same_outputs

from ptuning_fast import FastPTuning, PromptedModel, SoftPrompt
from ptuning_fast.files import adapter

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")

MODELS = {
    "CAUSAL_LM": ("Llama", "LlamaForCausalLM"),
    "SEQ_CLS": ("BERT", "BertForSequenceClassification"),
    "TOKEN_CLS": ("DistilBERT", "DistilBertForTokenClassification"),
    "QUESTION_ANS": ("RoBERTa", "RobertaForQuestionAnswering"),
    "SEQ_2_SEQ_LM": ("T5", "T5ForConditionalGeneration"),
    "FEATURE_EXTRACTION": ("BERT", "BertModel"),
}

pytestmark = pytest.mark.usefixtures("torch_backend")


def build(task):
    """A model with a head that is not the one that seed 0 gives it, as after training."""
    model = zoo.build(*MODELS[task])
    if task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if not name.startswith(model.base_model_prefix):
                parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("task", MODELS)
@pytest.mark.parametrize("encoder", [None, "mlp", "lstm"])
def test_peft_loads_ours(tmp_path, task, encoder):
    prompt = SoftPrompt(build(task), zoo.M, encoder=encoder)
    prompt.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == task
    theirs = peft.PeftModel.from_pretrained(zoo.build(*MODELS[task]), tmp_path)
    assert_same_outputs(prompt, theirs, task)


@pytest.mark.parametrize("task", MODELS)
@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "MLP", "LSTM"])
def test_we_load_pefts(tmp_path, task, kind):
    sizes = {"token_dim": zoo.D, "num_layers": 3, "num_attention_heads": 4}  # PEFT does not find DistilBERT's
    options = {"task_type": task, "num_virtual_tokens": zoo.M, **sizes}
    if kind == "PROMPT_TUNING":
        settings = peft.PromptTuningConfig(**options)
    else:
        settings = peft.PromptEncoderConfig(**options, encoder_hidden_size=24, encoder_reparameterization_type=kind)
    torch.manual_seed(4)
    theirs = peft.get_peft_model(build(task), settings)
    for name, parameter in theirs.named_parameters():
        if "modules_to_save" in name:  # a head that was trained
            parameter.data.add_(0.1)
    theirs.save_pretrained(tmp_path)
    prompt = SoftPrompt.from_pretrained(zoo.build(*MODELS[task]), tmp_path)
    assert_same_outputs(prompt, theirs, task)


def test_files_are_as_peft_writes_them(tmp_path):
    """Names, shapes, dtypes and settings, beside those of an adapter that PEFT saved."""
    model = build("SEQ_CLS").bfloat16()
    SoftPrompt(model, zoo.M).save_pretrained(tmp_path / "ours")
    settings = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=zoo.M)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "theirs")
    files = [adapter.read(tmp_path / one / adapter.WEIGHTS)[0] for one in ("ours", "theirs")]
    ours, theirs = ({name: (value.shape, value.dtype) for name, value in file.items()} for file in files)
    assert ours == theirs
    ours, theirs = (json.loads((tmp_path / one / adapter.CONFIG).read_text()) for one in ("ours", "theirs"))
    assert set(theirs) - set(ours) <= {"peft_version"}
    for key in set(ours) - {"base_model_name_or_path", "modules_to_save"}:  # PEFT adds the second by the task
        assert ours[key] == theirs[key], key
    assert sorted(file.name for file in (tmp_path / "ours").iterdir()) == [
        adapter.CARD,
        adapter.CONFIG,
        adapter.WEIGHTS,
    ]


def train(prompt, optimizer, steps):
    ids, mask = zoo.padded(zoo.texts(), "left")
    for _ in range(steps):
        optimizer.zero_grad()
        prompt.model(**prompt(ids, mask, labels=ids.masked_fill(mask == 0, -100))).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"encoder": "mlp"}, {"encoder": "lstm", "encoder_dropout": 0.2}])
def test_training_resumes(tmp_path, options):
    """Stopped, saved, loaded in another module: bit by bit the run that was never stopped."""
    model = zoo.build("Llama")
    torch.manual_seed(6)
    prompt = SoftPrompt(model, zoo.M, **options)
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=0.05)
    train(prompt, optimizer, 3)
    prompt.save_pretrained(tmp_path)
    kept, rng = copy.deepcopy(optimizer.state_dict()), torch.random.get_rng_state()
    train(prompt, optimizer, 3)

    resumed = SoftPrompt.from_pretrained(zoo.build("Llama"), tmp_path)
    assert not resumed.training  # as from_pretrained of transformers leaves a model
    resumed.train()
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=0.05)
    optimizer.load_state_dict(kept)
    torch.random.set_rng_state(rng)
    train(resumed, optimizer, 3)
    assert prompt.state_dict().keys() == resumed.state_dict().keys()
    for name, value in prompt.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


KINDS = {"plain": {}, "encoder": {"encoder": "mlp"}, "bank": {"num_prompts": 2}}


@pytest.mark.parametrize("old", KINDS)
@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("steps", range(5))
def test_a_crash_leaves_the_old_or_the_new(tmp_path, monkeypatch, old, new, steps):
    """Cut off after any number of files, what is loaded is one of the two, whole."""
    model = zoo.build("Llama")
    prompts = [SoftPrompt(model, zoo.M, **KINDS[kind]) for kind in (old, new)]
    prompts[0].save_pretrained(tmp_path)
    left = [steps]

    def replace(path, content, replace=adapter.replace):
        if not left[0]:
            raise OSError("the disk is full")
        left[0] -= 1
        replace(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(adapter, "replace", replace)
        try:
            prompts[1].save_pretrained(tmp_path)
        except OSError:
            pass
        else:
            prompts = prompts[1:]
    loaded = SoftPrompt.from_pretrained(model, tmp_path)
    # Saved and loaded again a bank or an encoder comes as it is, and so does what PEFT could read: the plain prompt.
    same = [
        loaded.state_dict().keys() == one.state_dict().keys()
        and all(torch.equal(value, one.state_dict()[name]) for name, value in loaded.state_dict().items())
        for one in prompts
    ]
    assert any(same)
    if steps == 0:
        assert same[0]


def test_killed_while_it_writes(tmp_path):
    """A process that is killed between two files, for real."""
    program = f"""
import os, sys
sys.path.insert(0, {str(zoo.Path(zoo.__file__).parent)!r})
import torch, zoo
from ptuning_fast import FastPTuning, SoftPrompt
from ptuning_fast.files import adapter
model = zoo.build("Llama")
prompt = SoftPrompt(model, zoo.M, encoder="mlp")
with torch.no_grad():
    prompt.prompt_embeddings.fill_(1.0)
prompt.save_pretrained({str(tmp_path)!r})
with torch.no_grad():
    prompt.prompt_embeddings.fill_(2.0)
write, written = adapter.replace, []
def replace(path, content):
    if written:
        os.kill(os.getpid(), 9)
    written.append(path)
    write(path, content)
adapter.replace = replace
prompt.save_pretrained({str(tmp_path)!r})
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == -9, run.stderr
    loaded = SoftPrompt.from_pretrained(zoo.build("Llama"), tmp_path)
    assert loaded.encoder is not None
    assert (loaded.prompt_embeddings == 2.0).all()  # its first file says it all


def test_a_later_adapter_of_pefts_counts(tmp_path):
    """What PEFT writes over an adapter of ours is what is loaded, with nothing left of what PEFT does not know."""
    SoftPrompt(zoo.build("Llama"), zoo.M, encoder="mlp").save_pretrained(tmp_path)
    assert any(name.startswith("ptuning_fast.encoder.") for name in adapter.load(tmp_path)[0])
    theirs = peft.get_peft_model(
        zoo.build("Llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=zoo.M)
    )
    theirs.save_pretrained(tmp_path)
    loaded = SoftPrompt.from_pretrained(zoo.build("Llama"), tmp_path)
    assert loaded.encoder is None
    assert_same_outputs(loaded, theirs, "CAUSAL_LM")


def test_errors(tmp_path):
    model = zoo.build("Llama")
    with pytest.raises(FileNotFoundError, match="no adapter in"):
        SoftPrompt.from_pretrained(model, tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="is a pickle"):
        SoftPrompt.from_pretrained(model, tmp_path)
    (tmp_path / adapter.WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        SoftPrompt.from_pretrained(model, tmp_path)
    peft.get_peft_model(zoo.build("Llama"), peft.LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    theirs = "lora holds a LORA adapter, which peft.PeftModel.from_pretrained loads"
    with pytest.raises(ValueError, match=f"{theirs}; a SoftPrompt is PROMPT_TUNING or P_TUNING"):
        SoftPrompt.from_pretrained(model, tmp_path / "lora")
    with pytest.raises(ValueError, match=f"{theirs}, and no FastPTuning adapter"):
        FastPTuning.from_pretrained(tmp_path / "lora")
    SoftPrompt(model, 2).save_pretrained(tmp_path / "soft")
    with pytest.raises(ValueError, match=r"soft holds a PROMPT_TUNING adapter, which SoftPrompt.from_pretrained"):
        FastPTuning.from_pretrained(tmp_path / "soft")
    FastPTuning(zoo.build("BERT"), 2).save_pretrained(tmp_path / "fast")
    with pytest.raises(ValueError, match=r"fast holds a FastPTuning adapter, which FastPTuning.from_pretrained"):
        SoftPrompt.from_pretrained(model, tmp_path / "fast")


def test_another_model(tmp_path):
    model = zoo.build("Llama")
    model.config._name_or_path = "some/llama"
    SoftPrompt(model, zoo.M).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is 32 wide and the embeddings of OPTForCausalLM are 16.*some/llama"):
        SoftPrompt.from_pretrained(zoo.build("OPT"), tmp_path)
    other = zoo.build("Llama")
    other.config._name_or_path = "another/model"
    with pytest.raises(ValueError, match="was trained on some/llama, and this is another/model"):
        SoftPrompt.from_pretrained(other, tmp_path)
    SoftPrompt.from_pretrained(other, tmp_path, any_base=True)
    PromptedModel.from_pretrained(other, tmp_path, any_base=True)
    other.config._name_or_path = "/a/folder/llama"  # the same model somewhere else
    SoftPrompt.from_pretrained(other, tmp_path)


def test_what_is_rounded_at_load(tmp_path):
    """A head or a classifier of more digits than the model that it is loaded for: somebody says so."""
    trained = build("SEQ_CLS")
    trained.classifier.double().weight.data += 1e-12
    SoftPrompt(trained, zoo.M).save_pretrained(tmp_path / "head")
    with pytest.warns(
        UserWarning, match=r"classifier.weight in .* is torch.float64, and is rounded to the torch.float32"
    ):
        SoftPrompt.from_pretrained(build("SEQ_CLS"), tmp_path / "head")
    fast = FastPTuning(zoo.build("BERT"), 3).double()
    fast.prompt_embeddings.data += 1e-12
    fast.save_pretrained(tmp_path / "fast")
    with pytest.warns(UserWarning, match=r"prompt_embeddings in .* is rounded to the torch.float32"):
        FastPTuning.from_pretrained(tmp_path / "fast", zoo.build("BERT"))


def test_saved_while_training(tmp_path):
    """Without the dropout of the step that happens to be: what eval mode gives."""
    prompt = SoftPrompt(zoo.build("Llama"), zoo.M, encoder="lstm", encoder_dropout=0.5).train()
    prompt.save_pretrained(tmp_path)
    assert prompt.encoder.training
    rows = adapter.load(tmp_path)[0]["prompt_embeddings"]
    assert (rows - prompt.eval().embeddings()).abs().max() <= 1e-6  # an LSTM rounds otherwise without gradients
    assert (rows - prompt.train().embeddings()).abs().max() > 1e-3


def test_another_kind_of_model(tmp_path):
    """Models without a name, and of one width."""
    SoftPrompt(zoo.build("Llama"), zoo.M).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was trained on a llama, and this is a gpt2"):
        SoftPrompt.from_pretrained(zoo.build("GPT-2"), tmp_path)
    FastPTuning(zoo.build("BERT"), 3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"was trained on a bert.*this is a roberta"):
        FastPTuning.from_pretrained(tmp_path, zoo.build("RoBERTa"))


def test_a_second_prompt_that_pefts_forward_uses(tmp_path):
    """Of a model that is no encoder-decoder: its rows are none to leave out."""
    settings = {"num_virtual_tokens": 3, "num_transformer_submodules": 2}
    peft.get_peft_model(zoo.build("Llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", **settings)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=r"its prompt is \[6, 32\], and its settings say num_virtual_tokens=3"):
        SoftPrompt.from_pretrained(zoo.build("Llama"), tmp_path)


def test_a_prompt_in_parts(tmp_path):
    """As FullyShardedDataParallel leaves it in each process."""
    for module in (SoftPrompt(zoo.build("Llama"), 3), FastPTuning(zoo.build("BERT"), 3)):
        module.prompt_embeddings.data = module.prompt_embeddings.data.flatten()[:7]
        with pytest.raises(ValueError, match="has the prompt in parts: save it inside of its summon_full_params"):
            module.save_pretrained(tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("kind", ["around", "into", "encoder"])
def test_a_prompt_trained_behind_a_lora(tmp_path, kind):
    """Whose model has none when it is loaded is warned of."""
    model = zoo.build("BERT" if kind == "encoder" else "Llama")
    settings = peft.LoraConfig(r=2, target_modules=["query" if kind == "encoder" else "q_proj"])
    if kind == "around":
        model = peft.get_peft_model(model, settings)
    else:
        try:
            model.add_adapter(settings)
        except ValueError as error:  # transformers 5.24 wants another PEFT for that
            pytest.skip(f"transformers puts no adapter in: {error}")
    made = FastPTuning(model, 3) if kind == "encoder" else SoftPrompt(model, 3)
    made.save_pretrained(tmp_path)
    load = (lambda model: FastPTuning.from_pretrained(tmp_path, model)) if kind == "encoder" else None
    load = load or (lambda model: SoftPrompt.from_pretrained(model, tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(model)
    if kind == "around":  # each prompt of a bank, too
        SoftPrompt(model, 3, num_prompts=2).save_pretrained(tmp_path / "bank")
        with pytest.warns(UserWarning, match="was trained on a model with an adapter"):
            SoftPrompt.from_pretrained(zoo.build("Llama"), tmp_path / "bank/1")
    with pytest.warns(UserWarning, match=r"was trained on a model with an adapter of PEFT's \(LoRA\), which this one"):
        load(zoo.build("BERT" if kind == "encoder" else "Llama"))
    made = SoftPrompt(zoo.build("Llama"), 3)
    made.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SoftPrompt.from_pretrained(made.model, tmp_path)


@pytest.mark.parametrize("wrong", [None, "5", 4, 7])
def test_damaged_settings(tmp_path, wrong):
    model = zoo.build("Llama")
    SoftPrompt(model, 5).save_pretrained(tmp_path)
    tensors, settings = adapter.load(tmp_path)
    adapter.save(tmp_path, tensors, settings | {"config": settings["config"] | {"num_virtual_tokens": wrong}})
    with pytest.raises(ValueError, match=r"is damaged: its prompt is \[5, 32\]"):
        SoftPrompt.from_pretrained(model, tmp_path)


def test_names_of_bases(tmp_path):
    """Hub ids are compared whole; a folder may have moved."""
    for ours, theirs, fits in (("a/bert", "b/bert", False), ("a/bert", "a/bert", True), ("/x/bert", "a/bert", True)):
        model = zoo.build("Llama")
        model.config._name_or_path = theirs
        SoftPrompt(model, 5).save_pretrained(tmp_path)
        model.config._name_or_path = ours
        if fits:
            SoftPrompt.from_pretrained(model, tmp_path)
        else:
            with pytest.raises(ValueError, match="was trained on b/bert, and this is a/bert"):
                SoftPrompt.from_pretrained(model, tmp_path)


def test_a_half_precision_prompt_comes_back_as_it_was(tmp_path):
    model = zoo.build("Llama")
    prompt = SoftPrompt(model, 5).to(torch.bfloat16)
    prompt.save_pretrained(tmp_path)
    loaded = SoftPrompt.from_pretrained(model, tmp_path)
    assert loaded.prompt_embeddings.dtype == torch.bfloat16
    assert torch.equal(loaded.prompt_embeddings, prompt.prompt_embeddings)


def test_peft_generates_behind_a_prompt_of_whatever_generates(tmp_path):
    """Its class for language models does, and no other. (The first token alone: behind any prompt PEFT 0.21 goes on
    otherwise with transformers 5.24, whose cache has another name.)
    """
    peft = pytest.importorskip("peft")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    config = transformers.BertGenerationConfig(vocab_size=zoo.V, **sizes, is_decoder=True, initializer_range=0.3)
    model = transformers.BertGenerationDecoder(config).eval()
    prompt = SoftPrompt(model, 4, init=torch.randn(4, 32))
    prompt.save_pretrained(tmp_path)
    ids, options = torch.stack(zoo.texts([5] * 6)), {"max_new_tokens": 1, "do_sample": False, "eos_token_id": None}
    expected = prompt.generate(ids, torch.ones_like(ids), **options)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path)
    found = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(found[:, -1:], expected)
    assert not torch.equal(model.generate(ids, **options)[:, -1:], expected)
