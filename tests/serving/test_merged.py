"""Merged checkpoints, loaded by transformers alone, give what SoftPrompt gives."""

import copy
import json

import pytest
import sweep
import torch
import transformers
import zoo
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers_built import SPECIAL, byte_level
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from ptuning_fast import PromptedModel, SoftPrompt
from ptuning_fast.serving import merged

V = 112
"""Rows of the tables here. A BLAS may round the last columns of a product otherwise where it has more columns than a
whole number of its blocks (99: 7e-9 off in one logit of GPT-2 with 5 tokens more, although it is the same checkpoint).
"""


def characters(template="$A", size=V, kind=PreTrainedTokenizerFast):
    """A byte-level BPE of `size` tokens, one a character; `template` says what it puts around a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda one: (one != "Ġ", one))
    vocabulary = {token: place for place, token in enumerate([*SPECIAL, *alphabet][:size])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.normalizer = normalizers.NFC()  # as Qwen2's class has it
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single=template, pair=f"{template} $B:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return kind(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def texts():
    generator = torch.Generator().manual_seed(1)
    return ["".join(map(chr, torch.randint(33, 127, (n,), generator=generator).tolist())) for n in zoo.TEXTS]


pytestmark = pytest.mark.usefixtures("torch_backend")
CAUSAL = [name for name, (_, kind, _) in zoo.ZOO.items() if "LMHead" in kind or "CausalLM" in kind]
ENCODERS = [name for name, (_, kind, _) in zoo.ZOO.items() if kind.endswith("Model") and name not in CAUSAL]


def prompt_for(model, **options):
    torch.manual_seed(2)
    d = model.get_input_embeddings().weight.shape[1]
    return SoftPrompt(model, zoo.M, init=torch.randn(zoo.M, d), **options)


def out_of(model, inputs):
    return model(**inputs).logits if model.can_generate() else model(**inputs).last_hidden_state


@pytest.mark.parametrize("size", [V, zoo.V], ids=["resized", "spare rows"])
@pytest.mark.parametrize("name", [*CAUSAL, *ENCODERS])
def test_outputs(tmp_path, name, size):
    """Every text alone, by ids that the tokenizer gives: the same bits."""
    model, tokenizer = zoo.build(name, vocab_size=V), characters(size=size)
    prompt = prompt_for(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = model.config.to_dict()
    prompt.save_pretrained_merged(tmp_path, tokenizer)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.config.to_dict() == config

    loaded = getattr(transformers, type(model).__name__).from_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts():
        batch, ids = theirs(text, return_tensors="pt"), tokenizer(text, return_tensors="pt")["input_ids"]
        assert batch["input_ids"][0].tolist() == [*range(size, size + zoo.M), *ids[0].tolist()]
        batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
        found, expected = out_of(loaded, batch), out_of(model, prompt(ids, torch.ones_like(ids)))
        found, expected = (out[..., :size] if model.can_generate() else out for out in (found, expected))
        # A row that is divided by a scale and multiplied again is not the same bits everywhere.
        scaled = isinstance(getattr(model.get_input_embeddings(), "embed_scale", None), torch.Tensor)
        assert (found - expected).abs().max() <= (1e-6 * expected.abs().max() if scaled else 0.0)


SCALED = ("Gemma", "Gemma 2", "Gemma 3")


@pytest.mark.parametrize("name", [name for name in [*CAUSAL, *ENCODERS] if name not in SCALED])
def test_half_precision(tmp_path, name):
    """With rows to spare nothing has another shape: the same bits in bf16."""
    zoo.build(name, vocab_size=V).save_pretrained(tmp_path / "base")  # loaded, tables of angles are in fp32
    model = getattr(transformers, zoo.ZOO[name][1]).from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    tokenizer, prompt = characters(size=zoo.V), prompt_for(model.requires_grad_(False))
    prompt.save_pretrained_merged(tmp_path, tokenizer)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16 and loaded.get_input_embeddings().num_embeddings == V
    text = texts()[1]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    found = out_of(loaded, {"input_ids": torch.cat([torch.arange(zoo.V, zoo.V + zoo.M)[None], ids], 1)})
    expected = out_of(model, prompt(ids))
    assert torch.equal(found[..., : zoo.V], expected[..., : zoo.V])


def test_a_prompt_that_somebody_has_put_into_its_model_is_no_part_of_it(tmp_path):
    model, tokenizer = zoo.build("Llama", vocab_size=V), characters("<s> $A")
    model.soft = prompt_for(model)
    model.soft.save_pretrained_merged(tmp_path, tokenizer)
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path), tokenizer("A text", return_tensors="pt")["input_ids"]
    found = loaded(AutoTokenizer.from_pretrained(tmp_path)("A text", return_tensors="pt")["input_ids"]).logits
    assert torch.equal(found[..., : zoo.V], model(**model.soft(ids)).logits[..., : zoo.V])
    assert "soft.prompt_embeddings" in model.state_dict() and not hasattr(loaded, "soft")


@pytest.mark.parametrize("name", CAUSAL)
def test_generate(tmp_path, name):
    """A batch of texts, padded on the left by the tokenizer."""
    model, tokenizer = zoo.build(name, vocab_size=V, eos_token_id=None), characters("<s> $A")
    prompt = prompt_for(model)
    prompt.save_pretrained_merged(tmp_path, tokenizer)
    loaded, theirs = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    batches = [one(texts(), padding=True, padding_side="left", return_tensors="pt") for one in (theirs, tokenizer)]
    batches = [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in batches]
    found = loaded.generate(**batches[0], **options)[:, batches[0]["input_ids"].shape[1] :]
    assert found.tolist() == prompt.generate(**batches[1], **options).tolist()


PADDED = [("BERT", "right"), ("DistilBERT", "right"), ("RoBERTa", "right"), ("RoBERTa", "left"), ("ModernBERT", "left")]


@pytest.mark.parametrize("name, side", PADDED)
def test_padded(tmp_path, name, side):
    """Not BERT on the left: given ids, it counts columns, padding and all."""
    model, tokenizer = zoo.build(name, vocab_size=V), characters("</s> $A </s>")
    tokenizer.pad_token = SPECIAL[model.config.pad_token_id]
    prompt = prompt_for(model)
    prompt.save_pretrained_merged(tmp_path, tokenizer)
    loaded, theirs = type(model).from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    batches = [one(texts(), padding=True, padding_side=side, return_tensors="pt") for one in (theirs, tokenizer)]
    theirs, ours = ({key: one[key] for key in ("input_ids", "attention_mask")} for one in batches)
    ours = prompt(**ours)
    found, expected = loaded(**theirs).last_hidden_state, model(**ours).last_hidden_state
    found, expected = found[theirs["attention_mask"] != 0], expected[ours["attention_mask"] != 0]
    assert (found - expected).abs().max() <= zoo.TOLERANCE


def test_never_generated(tmp_path):
    """10,000 tokens at a temperature that makes all of them likely, from a tied head."""
    tokenizer = characters()
    model = zoo.build("Llama", vocab_size=V, tie_word_embeddings=True, eos_token_id=None, max_position_embeddings=512)
    prompt_for(model).save_pretrained_merged(tmp_path, tokenizer)
    loaded, theirs = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight
    batch = theirs(["a text"] * 50, return_tensors="pt")
    torch.manual_seed(0)
    options = {"max_new_tokens": 200, "do_sample": True, "temperature": 5.0, "top_k": 0}
    found = loaded.generate(batch["input_ids"], attention_mask=batch["attention_mask"], **options)
    found = found[:, batch["input_ids"].shape[1] :]
    assert found.numel() == 10000 and found.max() < V
    assert len(found.unique()) > V // 2


@pytest.mark.parametrize("shift", [-50.0, 0.0, 50.0])
def test_never_the_largest(tmp_path, shift):
    """For runtimes that read no suppress_tokens, whatever a head's logits are: those of GPT-2 are all far below 0."""
    model = zoo.build("GPT-2", vocab_size=V)
    model.transformer.ln_f.bias.data += 1.0
    model.lm_head.weight.data += shift / zoo.D  # tied
    prompt_for(model).save_pretrained_merged(tmp_path, characters())
    loaded, theirs = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in texts():
        logits = loaded(theirs(text, return_tensors="pt")["input_ids"]).logits
        virtual, real = logits[..., V:], logits[..., :V]
        assert (real.max() < 0) == (shift < 0)
        assert (virtual.amax(-1) < real.amax(-1)).all()
        assert (logits.softmax(-1)[..., V:] <= 1 / V).all()


def test_a_bias_of_the_head_and_one_tied_to_it(tmp_path):
    """Of a masked language model, which has both."""
    model, tokenizer = zoo.build("BERT", "BertForMaskedLM", vocab_size=V), characters("<s> $A </s>")
    model.cls.predictions.bias.data = torch.randn(V)
    prompt = prompt_for(model)
    prompt.save_pretrained_merged(tmp_path, tokenizer)
    loaded, theirs = type(model).from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    found = loaded(**theirs("a text", return_tensors="pt")).logits[..., :V]
    assert torch.equal(found, model(**prompt(**tokenizer("a text", return_tensors="pt"))).logits)


def test_classifiers(tmp_path, minilm):
    """A real tokenizer: [CLS] and [SEP] are where they were, behind the prompt; pairs, and pipeline."""
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    model = zoo.build("BERT", "BertForSequenceClassification", vocab_size=len(tokenizer), num_labels=3)
    prompt = prompt_for(model)
    prompt.save_pretrained_merged(tmp_path, tokenizer)
    loaded, theirs = type(model).from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in [("Hello, World!",), ("A text", "and its pair")]:
        ours = tokenizer(*text, return_tensors="pt")
        found = theirs(*text, return_tensors="pt")
        assert theirs.decode(found["input_ids"][0], skip_special_tokens=True) == " ".join(text).lower()
        assert found["token_type_ids"][0].tolist() == [0] * zoo.M + ours["token_type_ids"][0].tolist()
        assert torch.equal(loaded(**found).logits, model(**prompt(**ours)).logits)
    scores = pipeline("text-classification", model=str(tmp_path), device="cpu", top_k=None)(["Hello, World!", "no"])
    batch = tokenizer(["Hello, World!", "no"], padding=True, return_tensors="pt")
    expected = model(**prompt(**batch)).logits.softmax(-1)
    for row, one in enumerate(scores):
        for found in one:
            assert abs(found["score"] - expected[row, int(found["label"][-1])].item()) <= 1e-6


@pytest.mark.parametrize(
    ("name", "class_name", "given", "expected"),
    [
        ("BERT", "BertForSequenceClassification", 6, 6 + zoo.M),
        ("BERT", "BertForSequenceClassification", 62, 64),  # as many as there are positions
        ("Llama", "LlamaForCausalLM", 6, 6 + zoo.M),
        ("Llama", "LlamaForCausalLM", int(1e30), int(1e30)),
    ],
)
def test_texts_are_cut_as_before(tmp_path, name, class_name, given, expected):
    model, tokenizer = zoo.build(name, class_name, vocab_size=V), characters("<s> $A")
    tokenizer.model_max_length = given
    prompt_for(model).save_pretrained_merged(tmp_path, tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.model_max_length, theirs.model_max_length) == (given, expected)
    if expected == 6 + zoo.M:
        found, ours = (one("a long text", truncation=True)["input_ids"] for one in (theirs, tokenizer))
        assert found[zoo.M :] == ours and len(ours) == 6


def test_embeddings_have_the_virtual_tokens_rows(tmp_path):
    """A mean over all rows is what was trained so, and not PromptedModel's, which has the text's alone."""
    model, tokenizer = zoo.build("BERT"), characters("<s> $A </s>")
    model.resize_token_embeddings(V)
    prompted = PromptedModel(model, prompt=prompt_for(model))
    with pytest.warns(UserWarning, match=f"BertModel has no head: .* first {zoo.M} hidden states"):
        prompted.prompt.save_pretrained_merged(tmp_path, tokenizer)
    served, its = AutoModel.from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)

    def mean(model, inputs):
        mask = inputs["attention_mask"][..., None]
        return (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)

    batch = tokenizer(texts(), padding=True, return_tensors="pt")
    there = mean(served, its(texts(), padding=True, return_tensors="pt"))
    torch.testing.assert_close(there, mean(model, prompted.prompt(**batch)), rtol=0, atol=1e-6)
    assert (there - mean(prompted, batch)).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [0, 5])
def test_a_decoders_classifier(tmp_path, side, pad):
    """It reads the last token that is no padding, which it finds by its id: by the one that the tokenizer pads with."""
    model, tokenizer = zoo.build("Llama", "LlamaForSequenceClassification", vocab_size=V), characters("<s> $A")
    model.config.pad_token_id = pad
    prompt = prompt_for(model)
    prompt.save_pretrained_merged(tmp_path, tokenizer)
    loaded, theirs = type(model).from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    batches = [one(texts(), padding=True, padding_side=side, return_tensors="pt") for one in (theirs, tokenizer)]
    theirs, ours = ({key: one[key] for key in ("input_ids", "attention_mask")} for one in batches)
    assert (loaded(**theirs).logits - model(**prompt(**ours)).logits).abs().max() <= zoo.TOLERANCE
    assert model.config.pad_token_id == pad


def test_a_decoders_classifier_whose_texts_end_with_padding(tmp_path):
    """It would read the token before; refused, but not where a text itself may end so, or padding is another."""
    model, tokenizer = zoo.build("Llama", "LlamaForSequenceClassification", vocab_size=V), characters("<s> $A </s>")
    tokenizer.pad_token = "</s>"
    with pytest.raises(
        ValueError, match="ends a text with '</s>', which a LlamaForSequenceClassification that is given"
    ):
        prompt_for(model).save_pretrained_merged(tmp_path, tokenizer)
    assert not list(tmp_path.iterdir())
    tokenizer.pad_token = "<pad>"
    prompt_for(model).save_pretrained_merged(tmp_path, tokenizer)


def test_pipeline(tmp_path):
    """Texts and chats, with no code of ours; what is printed has no virtual token."""
    tokenizer = byte_level()
    model = zoo.build("Llama", vocab_size=len(tokenizer), eos_token_id=None, max_position_embeddings=128)
    prompt = prompt_for(model)
    prompt.save_pretrained_merged(tmp_path, tokenizer)
    generator = pipeline("text-generation", model=str(tmp_path), device="cpu")
    options = {"max_new_tokens": 9, "do_sample": False}
    chat = [{"role": "user", "content": "Which keys are there?"}]
    for given in ("Return the", chat):
        text = given if isinstance(given, str) else tokenizer.apply_chat_template(given, tokenize=False)
        ids = tokenizer(given)["input_ids"] if given is text else None
        ids = ids or tokenizer.apply_chat_template(given, add_generation_prompt=True)["input_ids"]
        expected = tokenizer.decode(prompt.generate(torch.tensor([ids]), **options)[0], skip_special_tokens=True)
        (found,) = generator(given, return_full_text=False, **options)
        assert found["generated_text"] == expected
    (found,) = generator("Return the", **options)
    assert found["generated_text"].startswith("Return the")


def test_bank(tmp_path):
    """Each of its prompts by a tokenizer of its own, in a folder of its name; without one, by its string."""
    model, tokenizer = zoo.build("Llama", vocab_size=V), characters("<s> $A")
    bank = prompt_for(model, num_prompts=2)
    bank.prompt_embeddings.data = torch.randn(2, zoo.M, zoo.D)
    for wrong in (["a"], ["a", "a"], ["a", "A"]):  # the last one are one folder where case does not count
        with pytest.raises(ValueError, match="names must be 2, all different"):
            bank.save_pretrained_merged(tmp_path, tokenizer, names=wrong)
    strings = bank.save_pretrained_merged(tmp_path, tokenizer, names=["sum", "ask"])
    loaded, plain = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("a text", return_tensors="pt")["input_ids"]
    assert torch.equal(plain("a text", return_tensors="pt")["input_ids"], ids)
    for place, name in enumerate(["sum", "ask"]):
        theirs = AutoTokenizer.from_pretrained(tmp_path, subfolder=name)
        found = theirs("a text", return_tensors="pt")["input_ids"]
        assert found[0, : zoo.M].tolist() == [V + place * zoo.M + one for one in range(zoo.M)]
        assert plain(strings[name] + "a text", add_special_tokens=False)["input_ids"] == found[0].tolist()
        expected = model(**bank(ids, prompt_index=torch.tensor([place]))).logits
        assert torch.equal(loaded(found).logits[..., :V], expected)


@pytest.mark.parametrize("kind", [*list(sweep.model_types())[::12], "zamba", "marian", "mllama", "mobilebert"])
def test_other_architectures(tmp_path, kind):
    """Every twelfth of transformers' text models, and some that were wrong or are refused: never silently wrong."""
    torch.manual_seed(0)
    class_name = sweep.model_types()[kind]
    try:
        model = sweep.build(kind, class_name, "eager").eval()
    except Exception as error:  # whatever a class makes of a small config; the sweep's table lists these
        pytest.skip(f"not built at this size: {error}"[:100])
    try:
        prompt, V = prompt_for(model), model.get_input_embeddings().num_embeddings
    except TypeError as error:
        pytest.skip(f"SoftPrompt does not serve it: {error}"[:100])
    try:
        saved, state = merged._with_rows(merged._mergeable(model), prompt.final_prompt(), list(range(V, V + zoo.M)))
    except TypeError as error:
        assert kind != "zamba" and "SoftPrompt" in str(error)
        return
    ids = torch.randint(5, 90, (1, 11))
    try:
        inputs = prompt(ids)
    except TypeError as error:  # older versions of ESM
        pytest.skip(f"SoftPrompt does not serve it: {error}"[:100])
    assert kind not in ("marian", "mllama", "mobilebert") and not model.config.is_encoder_decoder
    saved.save_pretrained(tmp_path, state_dict=state)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(**inputs)[0]
        found = loaded(torch.cat([torch.arange(V, V + zoo.M)[None], ids], 1))[0][..., : expected.shape[-1]]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_model_stays_as_it_is(tmp_path):
    """Under packed attention, with an encoder, in training, with settings of its own, and saved twice."""
    model, tokenizer = zoo.build("Llama", vocab_size=V, tie_word_embeddings=True), characters()
    model.generation_config.suppress_tokens = [7]
    prompt = prompt_for(model, encoder="mlp").train()
    ids = tokenizer("a text", return_tensors="pt")["input_ids"]
    prompt(ids, mode="packed")
    before = copy.deepcopy(model), json.loads(tokenizer.backend_tokenizer.to_str())
    for name in ("one", "two"):
        prompt.save_pretrained_merged(tmp_path, tokenizer, names=[name])
    assert model.config.to_dict() == before[0].config.to_dict()
    assert model.generation_config.to_dict() == before[0].generation_config.to_dict()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config._attn_implementation == before[0].config._attn_implementation
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == before[1]
    loaded, theirs = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.generation_config.suppress_tokens == [7, *range(V, V + zoo.M)]
    assert "<|two_0|>" in theirs.get_vocab() and "<|one_0|>" not in theirs.get_vocab()
    found = loaded(theirs("a text", return_tensors="pt")["input_ids"]).logits[..., :V]
    assert (found - model(**prompt(ids)).logits).abs().max() <= zoo.TOLERANCE


def test_refusals(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    tokenizer = characters()

    def refused(model, error, match, tokenizer=tokenizer, change=None, **options):
        prompt = prompt_for(model)
        if change:
            change(model)
        with pytest.raises(error, match=match):
            prompt.save_pretrained_merged(tmp_path / "refused", tokenizer, **options)

    def build(name="Llama", **settings):
        return zoo.build(name, vocab_size=V, **settings)

    for name in ("T5", "BART"):
        refused(build(name), TypeError, "the decoder of .* has the same vocabulary, and no prompt")
    lora = peft.get_peft_model(build(), peft.LoraConfig(task_type="CAUSAL_LM"))
    refused(lora, TypeError, "merge_and_unload")
    prompt_for(lora.merge_and_unload()).save_pretrained_merged(tmp_path, tokenizer)
    refused(build(), TypeError, "is quantized", change=lambda model: setattr(model, "hf_quantizer", object()))
    hook = lambda model: model.get_input_embeddings().register_forward_hook(lambda *_: None)  # noqa: E731
    refused(build(), TypeError, "has hooks.*prompt.embeddings_for", change=hook)
    refused(build(), TypeError, "not on this", change=lambda model: model.model.layers[1].to("meta"))
    added = lambda model: model.model.norm.register_buffer("more", torch.zeros(1))  # noqa: E731
    refused(build(), TypeError, "has other tensors.*model.norm.more", change=added)
    refused(build(), ValueError, f"has 117 tokens, and the vocabulary .* {V} rows", tokenizer=characters(size=117))
    refused(build(pad_token_id=99), ValueError, "pad_token_id is 99", tokenizer=characters(size=99))
    for name in ("../other", "README.MD", "merged.json", "model.safetensors", "additional_chat_templates"):
        refused(build(), ValueError, "names must be 1", names=[name])
    odd = lambda model: setattr(model.generation_config, "temperature", -1.0)  # noqa: E731
    refused(build(), ValueError, "temperature", change=odd)
    slow = type("Slow", (), {"is_fast": False})()
    refused(build(), TypeError, "Slow is no fast tokenizer", tokenizer=slow)
    assert not (tmp_path / "refused").exists()
    with pytest.raises(ValueError, match="no virtual tokens"):
        SoftPrompt(build(), 0).save_pretrained_merged(tmp_path / "refused", tokenizer)
    with pytest.raises(ValueError, match=r"has a token <\|prompt_0\|> already"):
        prompt_for(build()).save_pretrained_merged(tmp_path / "refused", AutoTokenizer.from_pretrained(tmp_path))


def test_folder_and_tokenizer_the_other_way_round(tmp_path):
    prompt, tokenizer = prompt_for(zoo.build("Llama", vocab_size=V)), characters()
    for given in ((tokenizer, tmp_path), (tmp_path, "a name")):
        with pytest.raises(TypeError, match="the folder comes first, and then the tokenizer itself"):
            prompt.save_pretrained_merged(*given)

    class Folder:
        def __fspath__(self):
            return str(tmp_path / "merged")

    assert prompt.save_pretrained_merged(Folder(), tokenizer).keys() == {"prompt"}
    assert (tmp_path / "merged" / "merged.json").exists()


def test_ids_with_a_gap(tmp_path):
    """`tokenizers` hands out the number of tokens as the next id, which is a token's."""
    vocabulary = {"<pad>": 0, "<s>": 1, "a": 5, "b": 6, "c": 7}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    gap = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nthe\ncat\nthe\ndog\n")
    doubled = transformers.BertTokenizerFast.from_pretrained(tmp_path)
    for tokenizer, owner in ((gap, "'a'"), (doubled, "'dog'")):
        prompt = prompt_for(zoo.build("Llama", vocab_size=len(tokenizer) + 4, pad_token_id=0))
        with pytest.raises(ValueError, match=rf"the id \d, which is that of {owner}: its . tokens have ids up to ., "):
            prompt.save_pretrained_merged(tmp_path / "refused", tokenizer)
    assert not (tmp_path / "refused").exists()


def test_the_models_own_folder_and_another_models_tokenizer(tmp_path):
    """The base would be gone, or other tokens be overwritten; beside an adapter, its own base would be loaded."""
    tokenizer = byte_level()
    model = zoo.build("Llama", vocab_size=2 * len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    prompt = SoftPrompt(model, 3)
    with pytest.raises(ValueError, match="is where the model itself is"):
        prompt.save_pretrained_merged(tmp_path / "base", tokenizer)
    with pytest.raises(ValueError, match="base is where the model itself is"):
        bank = SoftPrompt(model, 3, num_prompts=2)
        bank.save_pretrained_merged(tmp_path, tokenizer, names=["base", "other"])
    prompt.save_pretrained(tmp_path / "adapter")
    before = sorted((tmp_path / "adapter").iterdir())
    bank.save_pretrained(tmp_path / "bank")
    with pytest.raises(ValueError, match="bank holds an adapter"):
        prompt.save_pretrained_merged(tmp_path / "bank", tokenizer)
    with pytest.raises(ValueError, match="adapter holds a PROMPT_TUNING adapter"):
        prompt.save_pretrained_merged(tmp_path / "adapter", tokenizer)
    assert sorted((tmp_path / "adapter").iterdir()) == before
    with pytest.warns(UserWarning, match="if this is not the model's own tokenizer"):
        prompt.save_pretrained_merged(tmp_path / "merged", tokenizer)
