"""Heads, and whatever else of a model goes with a prompt into PEFT's files, both ways."""

import copy
import json
import warnings

import pytest
import sweep
import torch
import transformers
import zoo

from ptuning_fast import PromptedModel, SoftPrompt
from ptuning_fast.files import adapter
from ptuning_fast.models import unwrapped
from ptuning_fast.serving import heads

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")

pytestmark = pytest.mark.usefixtures("torch_backend")


def classifier():
    """With a head that is not the one that seed 0 gives it, as after training."""
    model, generator = zoo.build("BERT", "BertForSequenceClassification"), torch.Generator().manual_seed(3)
    for parameter in model.classifier.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def test_another_head(tmp_path):
    SoftPrompt(classifier(), zoo.M).save_pretrained(tmp_path)
    model = zoo.build("BERT", "BertForSequenceClassification", num_labels=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"classifier.*\[2.*has \[5.*num_labels"):
        SoftPrompt.from_pretrained(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("error")
def test_a_head_that_has_run_away(tmp_path):
    """Saved and loaded as it is: NaN is neither rounded nor another's."""
    trained = classifier()
    trained.classifier.weight.data[0, 0] = torch.nan
    SoftPrompt(trained, zoo.M).save_pretrained(tmp_path)
    model = classifier()
    SoftPrompt.from_pretrained(model, tmp_path)
    torch.testing.assert_close(model.classifier.weight, trained.classifier.weight, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("before", "class_name", "modules"),
    [
        ("BertForMaskedLM", "BertForSequenceClassification", ["bert.pooler", "classifier"]),
        ("AlbertForMaskedLM", "AlbertForSequenceClassification", ["albert.pooler", "classifier"]),
        ("BertModel", "BertForSequenceClassification", ["classifier"]),
        ("BertModel", "BertForMultipleChoice", ["classifier"]),
    ],
)
def test_what_a_checkpoint_has_not_goes_with_the_prompt(tmp_path, before, class_name, modules):
    """A masked language model's has no pooler, and a new one is drawn at each load: kept, and trained as heads are."""
    zoo.build(before.partition("For")[0].removesuffix("Model").upper(), before).save_pretrained(tmp_path / "model")

    def load(seed):
        torch.manual_seed(seed)
        return getattr(transformers, class_name).from_pretrained(tmp_path / "model").eval()

    trained = PromptedModel(load(1), zoo.M).eval()
    of_model = {name for name, one in trained.model.named_parameters() if one.requires_grad}
    assert {name.rpartition(".")[0].removesuffix(".dense") for name in of_model} == set(modules)
    trained.save_pretrained(tmp_path / "prompt")
    assert json.loads((tmp_path / "prompt" / adapter.CONFIG).read_text())["modules_to_save"] == modules
    theirs = peft.PeftModel.from_pretrained(load(2), tmp_path / "prompt").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    again = [PromptedModel.from_pretrained(load(3), tmp_path / folder).eval() for folder in ("prompt", "theirs")]
    again.append(PromptedModel(load(4), zoo.M).eval())
    again[-1].load_state_dict(trained.state_dict())  # a Trainer's checkpoint, in another process
    ids, mask = zoo.padded(zoo.texts(), "right")

    def logits(model):
        if class_name != "BertForMultipleChoice":
            return model(input_ids=ids, attention_mask=mask).logits
        inputs = {name: value.unflatten(0, (2, 2)) for name, value in model.prompt(ids, mask).items()}
        return model.model(**inputs).logits

    assert all(torch.equal(logits(one), logits(trained)) for one in again)
    if class_name != "BertForMultipleChoice":
        assert (logits(theirs) - logits(trained)).abs().max() <= zoo.TOLERANCE


@pytest.mark.parametrize(
    "around", [copy.deepcopy, lambda model: torch.compile(model, backend="eager")], ids=["copied", "compiled"]
)
@pytest.mark.parametrize(
    ("before", "modules"), [("BertForMaskedLM", {"bert.pooler.dense", "classifier"}), ("BertModel", {"classifier"})]
)
def test_the_head_of_a_model_that_is_copied_or_compiled(tmp_path, before, modules, around):
    base = zoo.build("BERT", before)
    base.save_pretrained(tmp_path / "model")

    def load(seed):
        torch.manual_seed(seed)
        return transformers.BertForSequenceClassification.from_pretrained(tmp_path / "model").eval()

    prompted = PromptedModel(around(load(1)), zoo.M).eval()
    names = {name.removeprefix("_orig_mod.") for name, one in prompted.model.named_parameters() if one.requires_grad}
    assert {name.rpartition(".")[0] for name in names} == (modules if around is not copy.deepcopy else {"classifier"})
    with torch.no_grad():
        for parameter in prompted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    ids, mask = zoo.padded(zoo.texts(), "right")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        prompted.save_pretrained(tmp_path / "prompt")
        loaded = [PromptedModel.from_pretrained(one, tmp_path / "prompt") for one in (load(2), around(load(3)))]
    for again in loaded:
        assert torch.equal(again(ids, mask).logits, prompted(ids, mask).logits)


def test_a_frozen_classifier_and_its_copy_take_each_others_checkpoints(tmp_path):
    """Whether a copy's head is new nobody can tell, so it is written; the model's own is known not to be."""
    zoo.build("BERT", "BertForSequenceClassification").save_pretrained(tmp_path)
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path).requires_grad_(False).eval()
    with torch.no_grad():
        for one in (model.classifier, model.bert.pooler.dense):
            one.bias.fill_(0.5)  # in a copy, zeros are taken for new
    prompted, copied = PromptedModel(model, zoo.M), PromptedModel(copy.deepcopy(model), zoo.M)
    assert copied.state_dict().keys() - prompted.state_dict() == {"model.classifier.weight", "model.classifier.bias"}
    ids, mask = zoo.padded(zoo.texts(), "right")
    expected, other = prompted(ids, mask).logits, copied(ids, mask).logits
    checkpoints = copy.deepcopy(prompted.state_dict()), copy.deepcopy(copied.state_dict())
    assert not torch.equal(expected, other)
    copied.load_state_dict(checkpoints[0])
    prompted.load_state_dict(checkpoints[1])
    assert torch.equal(copied(ids, mask).logits, expected) and torch.equal(prompted(ids, mask).logits, other)
    with pytest.raises(RuntimeError, match="prompt_embeddings"):
        copied.load_state_dict({})


@pytest.mark.parametrize(
    ("name", "before", "class_name", "layer"),
    [
        ("BERT", "BertForMaskedLM", "BertForSequenceClassification", "query"),
        ("DeBERTa-v2", "DebertaV2Model", "DebertaV2ForSequenceClassification", "query_proj"),
        ("ModernBERT", "ModernBertModel", "ModernBertForSequenceClassification", "Wqkv"),
        ("BERT", "BertForMaskedLM", "BertForSequenceClassification", "all-linear"),
        ("DeBERTa-v2", "DebertaV2Model", "DebertaV2ForSequenceClassification", "all-linear"),
    ],
)
def test_a_new_pooler_behind_a_lora(tmp_path, name, before, class_name, layer):
    """PEFT keeps the classifier with the LoRA, and not what is drawn below it; an adapter without it is warned of."""
    zoo.build(name, before).save_pretrained(tmp_path / "model")

    def load(seed):
        torch.manual_seed(seed)
        return getattr(transformers, class_name).from_pretrained(tmp_path / "model").eval()

    lora = peft.get_peft_model(
        load(1), peft.LoraConfig(task_type="SEQ_CLS", target_modules=layer if layer == "all-linear" else [layer])
    )
    trained = PromptedModel(lora, zoo.M).eval()
    with pytest.warns(UserWarning, match="is trained, too"):
        trained.save_pretrained(tmp_path / "prompt")
    lora.save_pretrained(tmp_path / "lora")
    head = trained.prompt._kept()[0].head
    in_order = [name for name in unwrapped(lora).state_dict() if name in head]
    assert list(head) == in_order, "in which processes gather what FSDP2 has sharded, each with a hash of its own"
    again = PromptedModel.from_pretrained(
        peft.PeftModel.from_pretrained(load(2), tmp_path / "lora"), tmp_path / "prompt"
    ).eval()
    ids, mask = zoo.padded(zoo.texts(), "right")
    assert torch.equal(again(ids, mask).logits, trained(ids, mask).logits)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=layer if layer == "all-linear" else [layer])
    resumed = PromptedModel(peft.get_peft_model(load(3), config), zoo.M).eval()
    resumed.load_state_dict(trained.state_dict())  # a Trainer's checkpoint
    assert torch.equal(resumed(ids, mask).logits, trained(ids, mask).logits)
    copied = copy.deepcopy(load(1))
    copied.config._name_or_path = ""  # so nothing says that any of it was loaded
    SoftPrompt(copied, zoo.M).save_pretrained(tmp_path / "copied")
    if name == "BERT":
        merged = lora.merge_and_unload()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the LoRA, which is not there by that name
            SoftPrompt.from_pretrained(merged, tmp_path / "prompt")
        with pytest.warns(UserWarning, match=r"bert\.pooler.* is new, .*brings none: it is not what the prompt was"):
            SoftPrompt.from_pretrained(load(2), tmp_path / "copied")


def test_a_new_pooler_that_a_head_of_somebodys_own_reads(tmp_path):
    """It is in the checkpoints of the whole, frozen, and not with the prompt, which most have without reading it."""
    zoo.build("BERT", "BertForMaskedLM").save_pretrained(tmp_path / "model")

    def made(seed):
        torch.manual_seed(seed)
        base = transformers.BertModel.from_pretrained(tmp_path / "model").eval()
        return torch.nn.ModuleDict(
            {"behind": PromptedModel(base, zoo.M, mode="prepend"), "head": torch.nn.Linear(zoo.D, 2)}
        )

    ours, again = made(1), made(2)
    assert not any(one.requires_grad for one in ours["behind"].model.parameters())
    again.load_state_dict(ours.state_dict())
    ids, mask = zoo.padded(zoo.texts(), "right")
    rows = [one["behind"](ids, mask).pooler_output for one in (ours, again)]
    assert torch.equal(*rows) and torch.equal(ours["head"](rows[0]), again["head"](rows[1]))
    ours["behind"].save_pretrained(tmp_path / "prompt")
    assert not [name for name in adapter.load(tmp_path / "prompt")[0] if "pooler" in name]


@pytest.mark.parametrize("how", ["frozen", "lora", "lora with the head"])
def test_a_checkpoint_has_the_head_of_a_copy(tmp_path, how):
    """A decoder's has no bias, so nobody knows whether it is new; where PEFT keeps it, it is trained."""
    zoo.build("Llama").save_pretrained(tmp_path / "model")

    def load(seed):
        torch.manual_seed(seed)
        model = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "model")
        model = copy.deepcopy(model).requires_grad_(False)
        if how != "frozen":
            task = "SEQ_CLS" if how == "lora with the head" else None
            model = peft.get_peft_model(model, peft.LoraConfig(task_type=task, target_modules=["q_proj"]))
        return PromptedModel(model, zoo.M).eval()

    trained, again = load(1), load(2)
    again.load_state_dict(trained.state_dict())
    ids, mask = zoo.padded(zoo.texts(), "left")
    assert torch.equal(again(ids, mask).logits, trained(ids, mask).logits)
    if how != "lora with the head":
        assert not any("score" in name for name, one in trained.named_parameters() if one.requires_grad)
        trained.prompt.save_pretrained(tmp_path / "prompt")
        loaded = PromptedModel.from_pretrained(load(3).model, tmp_path / "prompt")
        assert torch.equal(loaded(ids, mask).logits, trained(ids, mask).logits)


@pytest.mark.parametrize("class_name", ["BertForSequenceClassification", "BertModel"])
def test_a_copy_trains_what_the_model_does(tmp_path, class_name):
    """Also where the checkpoint has a pooler with a bias of zeros, as MiniLM's has, which is not new."""
    zoo.build("BERT", "BertModel").save_pretrained(tmp_path)

    def load():
        torch.manual_seed(0)
        return getattr(transformers, class_name).from_pretrained(tmp_path).eval()

    model, copied = PromptedModel(load(), zoo.M), PromptedModel(copy.deepcopy(load()), zoo.M)
    names = [{name for name, one in each.named_parameters() if one.requires_grad} for each in (model, copied)]
    assert names[0] == names[1] and not any("pooler" in name for name in names[0])
    copied.load_state_dict(model.state_dict())
    model.load_state_dict(copied.state_dict())
    model.save_pretrained(tmp_path / "prompt")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        PromptedModel.from_pretrained(copy.deepcopy(load()), tmp_path / "prompt")


@pytest.mark.parametrize("frozen", ["", "bert"])
def test_a_checkpoint_has_what_is_new_also_where_it_is_frozen(tmp_path, frozen):
    """By the user, before: the next process draws others."""
    zoo.build("BERT", "BertForMaskedLM").save_pretrained(tmp_path / "model")

    def load(seed):
        torch.manual_seed(seed)
        model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "model")
        model.get_submodule(frozen).requires_grad_(False)
        return PromptedModel(model, zoo.M).eval()

    trained, again = load(1), load(2)
    again.load_state_dict(trained.state_dict())
    ids, mask = zoo.padded(zoo.texts(), "right")
    assert torch.equal(again(ids, mask).logits, trained(ids, mask).logits)


def test_the_heads_of_two_adapters(tmp_path):
    """A model has one head: that of the first is gone, and somebody says so; the same again says nothing."""
    folders = [tmp_path / "one", tmp_path / "other"]
    for seed, folder in enumerate(folders):
        trained = classifier()
        trained.classifier.weight.data += seed
        SoftPrompt(trained, zoo.M).save_pretrained(folder)
    model = classifier()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            SoftPrompt.from_pretrained(model, folders[0])
    with pytest.warns(UserWarning, match=r"came with the adapter in .*one, and is now that of .*other"):
        SoftPrompt.from_pretrained(model, folders[1])


def test_a_compiled_classifier_keeps_its_head(tmp_path):
    model = zoo.build("BERT", "BertForSequenceClassification", num_labels=3)
    SoftPrompt(torch.compile(model), 5).save_pretrained(tmp_path)
    tensors, settings = adapter.load(tmp_path)
    assert settings["config"]["task_type"] == "SEQ_CLS"
    assert "base_model.classifier.weight" in tensors
    SoftPrompt.from_pretrained(torch.compile(model), tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_came_with_a_prompt_is_saved_with_it(tmp_path):
    """PEFT keeps a head of a language model where it is told to."""
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, modules_to_save=["lm_head"])
    theirs = peft.get_peft_model(zoo.build("Llama"), settings)
    torch.nn.init.normal_(theirs.get_output_embeddings().modules_to_save["default"].weight)
    theirs.save_pretrained(tmp_path / "theirs")
    one = SoftPrompt.from_pretrained(zoo.build("Llama"), tmp_path / "theirs")
    one.save_pretrained(tmp_path / "ours")
    again = SoftPrompt.from_pretrained(zoo.build("Llama"), tmp_path / "ours")
    assert not torch.equal(one.model.lm_head.weight, zoo.build("Llama").lm_head.weight)
    assert torch.equal(again.model.lm_head.weight, one.model.lm_head.weight)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "class_name"),
    [("deberta-v2", "DebertaV2"), ("modernbert", "ModernBert"), ("xlnet", "XLNet"), ("distilbert", "DistilBert")],
)
def test_a_head_of_several_modules_goes_through_pefts_hands(tmp_path, kind, class_name):
    """PEFT saves again what it is told to, beside the modules that it knows by name."""
    trained = sweep.build(kind, f"{class_name}ForSequenceClassification", "eager")
    SoftPrompt(trained, 3).save_pretrained(tmp_path / "ours")
    expected, _ = adapter.read(tmp_path / "ours" / adapter.WEIGHTS)
    other = copy.deepcopy(trained)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if f"base_model.{name}" in expected:
                parameter.add_(1)
    peft.PeftModel.from_pretrained(other, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    found, _ = adapter.read(tmp_path / "theirs" / adapter.WEIGHTS)
    assert len(expected) > 3 and found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rows_that_came_with_a_prompt_of_a_tied_model(tmp_path):
    """Both are in PEFT's file, and in ours."""
    zoo.build("GPT-2").save_pretrained(tmp_path / "base")

    def resized():
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(zoo.V + 5)
        return model

    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(resized(), settings).save_pretrained(tmp_path / "theirs")
    SoftPrompt.from_pretrained(resized(), tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    theirs, ours = (adapter.read(tmp_path / name / adapter.WEIGHTS)[0] for name in ("theirs", "ours"))
    assert len(theirs) == 3 and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["GPT-2", "Gemma"])
def test_a_head_of_its_own_for_a_tied_model(tmp_path, name):
    """PEFT trains a copy, and leaves the table as it is; here it would be written into both."""
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, modules_to_save=["lm_head"])
    theirs = peft.get_peft_model(zoo.build(name), settings).eval()
    torch.nn.init.normal_(theirs.get_output_embeddings().modules_to_save["default"].weight)
    theirs.save_pretrained(tmp_path)
    model = zoo.build(name)
    before = model.get_input_embeddings().weight.clone()
    with pytest.raises(ValueError, match=r"lm_head.weight of .* is tied to .*: load the model with tie_word"):
        SoftPrompt.from_pretrained(model, tmp_path)
    assert torch.equal(model.get_input_embeddings().weight, before)
    model.save_pretrained(tmp_path / "base")
    untied = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", tie_word_embeddings=False)
    prompt = SoftPrompt.from_pretrained(untied, tmp_path)
    ids = zoo.texts([7])[0][None]
    mask = torch.ones_like(ids)
    found, expected = untied(**prompt(ids, mask)).logits, theirs(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ["T5", "BART"])
def test_a_decoder_of_its_own_has_a_table_in_it(tmp_path, name):
    """Which the encoder has, too."""
    settings = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, modules_to_save=["decoder"])
    theirs = peft.get_peft_model(zoo.build(name), settings)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    theirs.save_pretrained(tmp_path)
    model = zoo.build(name)
    before = model.get_input_embeddings().weight.clone()
    with pytest.raises(ValueError, match=r"decoder.embed_tokens.weight of .* is tied to .* leave the adapter to PEFT"):
        SoftPrompt.from_pretrained(model, tmp_path)
    assert torch.equal(model.get_input_embeddings().weight, before)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_an_adapter_brought_that_was_loaded_before(tmp_path):
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, modules_to_save=["lm_head"])
    peft.get_peft_model(zoo.build("Llama"), settings).save_pretrained(tmp_path / "one")
    SoftPrompt(zoo.build("Llama"), 3).save_pretrained(tmp_path / "other")
    model = zoo.build("Llama")
    SoftPrompt.from_pretrained(model, tmp_path / "one")
    with pytest.warns(UserWarning, match="lm_head.weight of .* came with the adapter in .*one, and the one in .*other"):
        SoftPrompt.from_pretrained(model, tmp_path / "other")


def test_modules_that_peft_would_take_others_for():
    """It goes by the ends of names: an image encoder's head, beside that of the whole."""
    part = torch.nn.Linear(2, 2)
    model = torch.nn.ModuleDict({"vision": torch.nn.ModuleDict({"head": part}), "head": part, "pre_score": part})
    model["score"], model.base_model_prefix = part, "vision"
    head = dict.fromkeys(("head.weight", "score.weight", "pre_score.weight"), part.weight)
    assert heads.modules_of(model, head) == {"score", "pre_score"}


@pytest.mark.parametrize("modules", ["score", [1], {"score": 1}])
def test_modules_that_are_no_names(tmp_path, modules):
    model = zoo.build("Llama")
    SoftPrompt(model, 5).save_pretrained(tmp_path)
    tensors, settings = adapter.load(tmp_path)
    adapter.save(tmp_path, tensors, settings | {"config": settings["config"] | {"modules_to_save": modules}})
    with pytest.raises(ValueError, match="is damaged: its modules_to_save are"):
        SoftPrompt.from_pretrained(model, tmp_path)


def test_a_head_that_cannot_be_brought(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    SoftPrompt(classifier(), 3).save_pretrained(tmp_path)
    model = accelerate.cpu_offload(classifier(), execution_device="cpu")
    with pytest.raises(ValueError, match=r"is offloaded or sharded, and the adapter in .* load the adapter before"):
        SoftPrompt.from_pretrained(model, tmp_path)


def test_a_head_with_pefts_copy_in_its_place_is_refused(tmp_path):
    """Of an adapter that was put around the prompt; below it PEFT's copy is left to PEFT."""
    prompted = PromptedModel(classifier(), 3)
    around = peft.get_peft_model(prompted, peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"]))
    with pytest.raises(ValueError, match=r"has a copy in its place \(PEFT's modules_to_save\)"):
        prompted.save_pretrained(tmp_path / "prompt")
    assert not (tmp_path / "prompt").exists()
    around.unload()
    prompted.save_pretrained(tmp_path / "prompt")
