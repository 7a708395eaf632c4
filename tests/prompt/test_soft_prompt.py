"""SoftPrompt on every architecture of the zoo: the same text alone, right-padded and left-padded."""

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
import zoo
from transformers import AutoTokenizer

from ptuning_fast import PromptedModel, SoftPrompt, reference

README = Path(__file__).parents[2] / "docs" / "models.md"
NAMES = [
    "BERT",
    "RoBERTa",
    "XLM-R",
    "CamemBERT",
    "DistilBERT",
    "ELECTRA",
    "ALBERT",
    "DeBERTa-v2",
    "ModernBERT",
    "MPNet",
    "GPT-2",
    "OPT",
] + ["Llama", "Qwen2", "Mistral", "Phi", "Gemma", "Gemma 2", "Gemma 3", "Bloom", "T5", "BART"]


@pytest.fixture
def silent():
    """No warning: the table was read by the fused op."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fused kernel.*")
        yield


def test_the_zoo_is_whole():
    assert list(zoo.ZOO) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_alone_and_padded_are_the_same(backend, silent, name):
    """Outputs and the prompt's gradient of a ragged batch are those of its texts alone, behind a prompt put by hand."""
    found = zoo.measured(name, backend)
    if name == "BART":
        assert "pad on the right" in found.pop("left")
    for difference, gradient in found.values():
        assert difference <= zoo.TOLERANCE
        assert gradient <= zoo.TOLERANCE


@pytest.mark.parametrize("name", ["RoBERTa", "ModernBERT", "Llama", "Mistral", "Gemma 3", "T5"])
def test_the_check_can_fail(name):
    """Prompt, padding, text in this order and nothing said of positions: what is measured above shows it."""
    model, rows = zoo.build(name), zoo.texts()
    prompt = torch.randn(zoo.M, model.get_input_embeddings().weight.shape[1])
    ids, mask = zoo.padded(rows, "left")
    weight = model.get_input_embeddings().weight * getattr(model.get_input_embeddings(), "embed_scale", 1.0)
    out = zoo.rows_out(model, reference.prepend_prompt(ids, mask, weight=weight, prompt=prompt))
    alone = zoo.by_hand(model, prompt, rows[0])
    text = out[0] if model.config.is_encoder_decoder else out[0, -len(rows[0]) :]
    assert (text - alone[-len(text) :]).abs().max() > 50 * zoo.TOLERANCE


def test_the_readmes_table():
    text = README.read_text(encoding="utf-8")
    assert zoo.readme_with(text) == text, "run: python tests/zoo.py"
    assert len(re.findall(r"^\| .* \| yes \|", text, re.MULTILINE)) == len(NAMES)


def test_real_weights(minilm, silent):
    """MiniLM's own weights on real texts, against each text alone by hand."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(minilm).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    words = ["Parse an XML document.", "Wait.", "Return the decimal number that is nearest to this float, rounded."]
    prompt = SoftPrompt(model, zoo.M)
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer(words, padding=True, return_tensors="pt")
        inputs = prompt(**batch)
        out = model(**inputs).last_hidden_state
        for row, text in enumerate(words):
            ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
            alone = zoo.by_hand(model, prompt.prompt_embeddings, ids)
            rows = zoo.real_rows(model, out, inputs, row)
            assert (rows - alone).abs().max() <= zoo.TOLERANCE


def test_it_returns_what_the_forward_takes():
    ids, mask = zoo.padded(zoo.texts(), "right")
    keys = {
        "BERT": {"inputs_embeds", "attention_mask", "token_type_ids", "position_ids"},
        "DistilBERT": {"inputs_embeds", "attention_mask", "position_ids"},
        "Llama": {"inputs_embeds", "attention_mask", "position_ids"},
        "Bloom": {"inputs_embeds", "attention_mask"},
        "T5": {"inputs_embeds", "attention_mask"},
    }
    for name, expected in keys.items():
        assert set(SoftPrompt(zoo.build(name), 2)(ids, mask, token_type_ids=torch.zeros_like(ids))) == expected
    prompt = SoftPrompt(zoo.build("Llama"), 2)
    assert set(prompt(ids)) == {"inputs_embeds"}
    assert set(prompt(ids, labels=ids)) == {"inputs_embeds", "labels"}


def test_nothing_but_the_prompt():
    """The model is no submodule, is not copied, and is not frozen behind the user's back."""
    model = zoo.build("Llama").requires_grad_(True)
    prompt = SoftPrompt(model, 3)
    assert list(prompt.state_dict()) == ["prompt_embeddings"]
    assert [name for name, _ in prompt.named_parameters()] == ["prompt_embeddings"]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert prompt.prompt_embeddings.dtype == torch.float32
    copied = copy.deepcopy(prompt)
    assert copied.model is model
    assert copied.prompt_embeddings is not prompt.prompt_embeddings
    assert torch.equal(copied.prompt_embeddings, prompt.prompt_embeddings)


def test_half_precision_model(silent):
    """The usual case: an fp32 prompt before a bf16 model."""
    model = zoo.build("Llama").bfloat16()
    prompt = SoftPrompt(model, 3)
    ids, mask = zoo.padded(zoo.texts(), "left")
    out = model(**prompt(ids, mask, labels=ids))
    out.loss.backward()
    assert prompt.prompt_embeddings.dtype == prompt.prompt_embeddings.grad.dtype == torch.float32
    assert out.logits.dtype == torch.bfloat16


# Tasks.


@pytest.mark.parametrize("name", ["GPT-2", "OPT", "Llama", "Gemma 3", "Bloom"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_causal_lm_loss(name, side):
    """Labels are those of the tokens: the loss is the mean over the tokens of all texts alone."""
    model, rows = zoo.build(name), zoo.texts()
    prompt = SoftPrompt(model, zoo.M)
    ids, mask = zoo.padded(rows, side)
    loss = model(**prompt(ids, mask, labels=ids.masked_fill(mask == 0, -100))).loss
    summed = count = 0
    for text in rows:
        logits = zoo.by_hand(model, prompt.prompt_embeddings, text)[zoo.M - 1 : -1]
        summed += torch.nn.functional.cross_entropy(logits, text, reduction="sum")
        count += len(text)
    assert abs(loss - summed / count) <= zoo.TOLERANCE


CLASSIFIERS = {
    "BERT": "BertForSequenceClassification",
    "RoBERTa": "RobertaForSequenceClassification",
    "DistilBERT": "DistilBertForSequenceClassification",
    "GPT-2": "GPT2ForSequenceClassification",
    "OPT": "OPTForSequenceClassification",
    "Llama": "LlamaForSequenceClassification",
    "Gemma 3": "Gemma3TextForSequenceClassification",
    "Bloom": "BloomForSequenceClassification",
}


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_classification(name, side):
    """The row that is pooled is the one of the text alone, of no token, too: an encoder's first, a decoder's last."""
    model, rows = zoo.build(name, CLASSIFIERS[name], num_labels=3, pad_token_id=0), zoo.texts([*zoo.TEXTS, 0])
    prompt = SoftPrompt(model, zoo.M)
    ids, mask = zoo.padded(rows, side)
    labels = torch.tensor([0, 2, 1, 1, 2])
    out = model(**prompt(ids, mask, labels=labels))
    expected = torch.stack([zoo.by_hand(model, prompt.prompt_embeddings, text) for text in rows])
    assert (out.logits - expected).abs().max() <= zoo.TOLERANCE
    assert abs(out.loss - torch.nn.functional.cross_entropy(expected, labels)) <= zoo.TOLERANCE


def test_as_many_texts_as_tokens_and_labels():
    """Labels [B, n] of a classifier of several labels at once are not taken for labels of tokens."""
    model = zoo.build("BERT", "BertForSequenceClassification", num_labels=4, problem_type="multi_label_classification")
    ids = torch.randint(3, zoo.V, (2, 4))
    out = model(**SoftPrompt(model, 2)(ids, torch.ones_like(ids), labels=torch.rand(2, 4)))
    assert out.loss.isfinite()


@pytest.mark.parametrize("side", ["left", "right"])
def test_token_classification(side):
    model, rows = zoo.build("BERT", "BertForTokenClassification", num_labels=3), zoo.texts()
    prompt = SoftPrompt(model, zoo.M)
    ids, mask = zoo.padded(rows, side)
    out = model(**prompt(ids, mask, labels=(ids % 3).masked_fill(mask == 0, -100)))
    logits = out.logits[:, zoo.M :]  # the tokens' own, as the README says
    assert logits.shape[:2] == ids.shape
    summed = 0
    for row, text in enumerate(rows):
        alone = zoo.by_hand(model, prompt.prompt_embeddings, text)[zoo.M :]
        assert (logits[row][mask[row] == 1] - alone).abs().max() <= zoo.TOLERANCE
        summed += torch.nn.functional.cross_entropy(alone, text % 3, reduction="sum")
    assert abs(out.loss - summed / mask.sum()) <= zoo.TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
def test_question_answering(side):
    model, rows = zoo.build("BERT", "BertForQuestionAnswering"), zoo.texts()
    prompt = SoftPrompt(model, zoo.M)
    ids, mask = zoo.padded(rows, side)
    out = model(**prompt(ids, mask))
    for row, text in enumerate(rows):
        embeds = torch.cat([prompt.prompt_embeddings[None], model.get_input_embeddings()(text[None])], 1)
        alone = model(inputs_embeds=embeds).start_logits[0, zoo.M :]
        assert (out.start_logits[row, zoo.M :][mask[row] == 1] - alone).abs().max() <= zoo.TOLERANCE


GENERATION = {
    "greedy": {},
    "beam search": {"num_beams": 3},
    "sampling": {"do_sample": True},
    "static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("how", GENERATION)
@pytest.mark.parametrize("name", ["GPT-2", "OPT", "Llama", "Gemma 3", "Bloom", "T5"])
def test_generate(name, how):
    """Left-padded batches generate what each text alone does, its embeddings put together by hand."""
    if how == "static cache" and name in ("Bloom", "T5"):
        pytest.skip("the model itself has no static cache")
    model, rows = zoo.build(name), zoo.texts()
    prompt = SoftPrompt(model, zoo.M)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, **GENERATION[how]}
    if how == "sampling":
        rows = [rows[1]] * 3  # texts of one length, so that both sides draw the same numbers
    ids, mask = zoo.padded(rows, "left")
    torch.manual_seed(5)
    actual = model.generate(**prompt(ids, mask), **options)
    if how == "sampling":
        embeds = model.get_input_embeddings()(torch.stack(rows))
        embeds = torch.cat([prompt.prompt_embeddings.expand(len(rows), -1, -1), embeds], 1)
        torch.manual_seed(5)
        ones = torch.ones(embeds.shape[:2], dtype=torch.int64)
        expected = model.generate(inputs_embeds=embeds, attention_mask=ones, **options)
        assert torch.equal(actual, expected)
        return
    for row, text in enumerate(rows):
        embeds = torch.cat([prompt.prompt_embeddings[None], model.get_input_embeddings()(text[None])], 1)
        ones = torch.ones(embeds.shape[:2], dtype=torch.int64)
        expected = model.generate(inputs_embeds=embeds, attention_mask=ones, **options)
        assert torch.equal(actual[row, : expected.shape[1]], expected[0])


# Prompts.


def test_bank_of_prompts():
    """Tasks mixed in one batch: each row as with its own prompt alone, gradients to the entries that were used."""
    model, rows = zoo.build("Llama"), zoo.texts()
    bank = SoftPrompt(model, zoo.M, num_prompts=3)
    assert bank.prompt_embeddings.shape == (3, zoo.M, zoo.D)
    assert not torch.equal(bank.prompt_embeddings[0], bank.prompt_embeddings[1])
    ids, mask = zoo.padded(rows, "left")
    index = torch.tensor([2, 0, 2, 0])
    inputs = bank(ids, mask, prompt_index=index)
    out = model(**inputs).logits
    for row, text in enumerate(rows):
        alone = zoo.by_hand(model, bank.prompt_embeddings[index[row]], text)
        assert (zoo.real_rows(model, out, inputs, row) - alone).abs().max() <= zoo.TOLERANCE
    out[2:].square().sum().backward()
    gradient = bank.prompt_embeddings.grad.abs().sum((1, 2))
    assert (gradient > 0).tolist() == [True, False, True]
    with pytest.raises(ValueError, match="give one per row"):
        bank(ids, mask)
    with pytest.raises(ValueError, match="one prompt only"):
        SoftPrompt(model, 2)(ids, mask, prompt_index=index)


@pytest.mark.parametrize("num_prompts", [None, 2])
@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_prompt_encoder(kind, num_prompts):
    """P-tuning v1: trained through the network, and never what it was before a step."""
    model = zoo.build("Llama")
    prompt = SoftPrompt(model, 4, encoder=kind, encoder_hidden_size=24, num_prompts=num_prompts)
    ids, mask = zoo.padded(zoo.texts(), "right")
    index = None if num_prompts is None else torch.tensor([0, 1, 1, 0])
    out = model(**prompt(ids, mask, prompt_index=index))
    out.logits.square().mean().backward()
    for name, parameter in prompt.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name

    prompt.eval()
    for change in (prompt.prompt_embeddings, prompt.encoder.mlp_head[0].weight):  # whatever leaves no trace in a tensor
        before = prompt.embeddings()
        change.data.add_(1.0)
        assert not torch.equal(prompt.embeddings(), before)
    before = prompt.embeddings()
    torch.optim.AdamW(prompt.parameters(), lr=0.1, fused=True).step()
    assert not torch.equal(prompt.embeddings(), before)


def test_init(minilm):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(minilm)
    table = model.get_input_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    ids = tokenizer("Classify the text", add_special_tokens=False)["input_ids"]
    for give in (None, minilm, tokenizer):
        prompt = SoftPrompt(model, 7, init="Classify the text", tokenizer=give)
        assert torch.equal(prompt.prompt_embeddings, table[(ids * 7)[:7]])
    prompt = SoftPrompt(model, 7)
    assert all((table == row).all(1).any() for row in prompt.prompt_embeddings)
    assert not all((table == row).all(1).any() for row in SoftPrompt(model, 7, init="normal").prompt_embeddings)
    value = torch.randn(7, 384)
    assert torch.equal(SoftPrompt(model, 7, init=value).prompt_embeddings, value)
    with pytest.raises(ValueError, match=r"is neither .normal. nor .vocab., and a text needs .* give tokenizer="):
        SoftPrompt(zoo.build("Llama"), 3, init="a text")


def test_settings_that_cannot_be_trained():
    model = zoo.build("Llama")
    with pytest.raises(ValueError, match="not finite"):
        SoftPrompt(model, 3, init=torch.full((3, zoo.D), float("nan")))
    for options in ({"encoder_hidden_size": 0}, {"encoder_num_layers": 0}, {"encoder_dropout": 1.5}):
        with pytest.raises(ValueError, match="must be 1 or more"):
            SoftPrompt(model, 3, encoder="lstm", **options)


def test_init_of_a_scaled_embedding():
    """Sampled rows are as long as the rows that the model sees: those times the factor."""
    model = zoo.build("Gemma 3")
    seen = model.get_input_embeddings()(torch.arange(zoo.V))
    assert all((seen == row).all(1).any() for row in SoftPrompt(model, 5).prompt_embeddings)


# Refusals.


def test_too_many_rows():
    for name in ("BERT", "RoBERTa", "GPT-2", "OPT", "BART"):
        prompt = SoftPrompt(zoo.build(name), 20)
        most = {"RoBERTa": 62}.get(name, 64)
        ids = torch.randint(3, zoo.V, (2, most - 19))
        with pytest.raises(
            ValueError, match=rf"20 virtual tokens and {most - 19} tokens are {most + 1}.*has {most} pos"
        ):
            prompt(ids, torch.ones_like(ids))
        ids = ids[:, 1:]
        zoo.rows_out(prompt.model, prompt(ids, torch.ones_like(ids)))


def test_models_that_cannot_be_served():
    with pytest.raises(TypeError, match="not a transformers model"):
        SoftPrompt(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="finds the token that it classifies in the input_ids"):
        SoftPrompt(zoo.build("BART", "BartForSequenceClassification"))
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    settings = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32}
    settings |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "layer_types": ["full_attention"] * 2,
    }
    settings |= {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 50, "num_kv_shared_layers": 0}
    settings |= {"activation_sparsity_pattern": [0.0, 0.0]}
    with torch.device("meta"):
        model = Gemma3nForCausalLM(Gemma3nTextConfig(**settings))
    with pytest.raises(TypeError, match="embeds its tokens anew in every layer"):
        SoftPrompt(model)


def test_arguments():
    model = zoo.build("BERT")
    with torch.device("meta"), pytest.raises(ValueError, match="make it of the model when that is loaded"):
        SoftPrompt(model, 2, init=torch.zeros(2, zoo.D, device="cpu"))
    with pytest.raises(ValueError, match="they are -1 and None"):
        SoftPrompt(model, -1)
    with pytest.raises(ValueError, match="'mlp' or 'lstm'; it is 'cnn'"):
        SoftPrompt(model, 2, encoder="cnn")
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="mode must be one of auto, prepend, packed, shared; it is"):
        SoftPrompt(model, 2)(ids, mode="fast")
    with pytest.raises(IndexError, match=r"input_ids\[0, 1\] is 99"):
        SoftPrompt(model, 2)(torch.tensor([[1, 99]]))


def test_wrapped_models():
    """What is known of a model is known of it inside PEFT's LoRA and torch.compile, too."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    ids, mask = zoo.padded(zoo.texts(), "right")
    model = zoo.build("Llama", CLASSIFIERS["Llama"], num_labels=3, pad_token_id=0)
    prompt = SoftPrompt(model, zoo.M)
    expected = model(**prompt(ids, mask)).logits
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(SoftPrompt(compiled, zoo.M, init=prompt.prompt_embeddings)(ids, mask)["inputs_embeds"],
                       prompt(ids, mask)["inputs_embeds"])  # fmt: skip
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="SEQ_CLS"))  # which starts as the model itself
    wrapped = SoftPrompt(adapted, zoo.M, init=prompt.prompt_embeddings)
    assert "position_ids" in wrapped(ids, mask)
    assert (adapted.eval()(**wrapped(ids, mask)).logits - expected).abs().max() <= zoo.TOLERANCE


def test_copies_of_what_holds_both():
    """The copied prompt is one for the copied model."""
    both = torch.nn.Module()
    both.model = zoo.build("Llama")
    both.prompt = SoftPrompt(both.model, zoo.M)
    copied = copy.deepcopy(both)
    assert copied.model is not both.model
    assert copied.prompt.model is copied.model
    ids, mask = zoo.padded(zoo.texts(), "right")
    assert copied.bfloat16().prompt(ids, mask)["inputs_embeds"].dtype == torch.bfloat16


def test_a_cached_prompt_does_not_outlive_training():
    prompt = SoftPrompt(zoo.build("Llama"), 4, encoder="mlp").eval()
    with torch.no_grad():
        before = prompt.embeddings()
        prompt.train()
        for parameter in prompt.parameters():
            parameter.data.mul_(2)  # which leaves no trace in its version
        assert not torch.equal(prompt.eval().embeddings(), before)
        whole = prompt.embeddings()
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(prompt.embeddings(), whole)
        assert torch.equal(prompt.embeddings(), whole)


@pytest.mark.parametrize("prompt_first", [True, False])
def test_a_copy_of_what_holds_both_is_whole(prompt_first, torch_backend):
    model = zoo.build("Llama")
    both = torch.nn.Module()
    for name in ("prompt", "model") if prompt_first else ("model", "prompt"):
        setattr(both, name, SoftPrompt(model, zoo.M) if name == "prompt" else model)
    copied = copy.deepcopy(both)
    assert copied.prompt.model is copied.model is not model
    assert copy.deepcopy(both.prompt).model is model


def test_what_is_given_in_the_place_of_something_else(tmp_path):
    """What to give instead is said."""
    model = zoo.build("Llama")
    with pytest.raises(TypeError, match=r"not BatchEncoding: give its parts, \*\*batch"):
        SoftPrompt(model, 2)(transformers.BatchEncoding({"input_ids": torch.ones(1, 2).long()}))
    for make in (PromptedModel, SoftPrompt):
        with pytest.raises(TypeError, match="a str is not a transformers model: load one"):
            make("some/model", 2)
    with pytest.raises(TypeError, match="the model comes first, and then the folder"):
        SoftPrompt.from_pretrained(str(tmp_path), model)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        SoftPrompt.from_pretrained(model, tmp_path / "nowhere")
