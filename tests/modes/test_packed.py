"""Mode "packed" of SoftPrompt: no padding rows, and each text's outputs and gradients are those of the text alone."""

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
import transformers
import zoo
from savings import PACKABLE
from transformers import AutoTokenizer, DataCollatorWithFlattening

from ptuning_fast import FastPTuning, SoftPrompt, reference
from ptuning_fast.models.probe import Outcome

pytestmark = pytest.mark.usefixtures("torch_backend")


def texts_of(out, inputs):
    """The rows of each sequence, the prompt's included."""
    return [out[0, start:end] for start, end in pairwise(inputs["cu_seq_lens_q"].tolist())]


def assert_close(actual, expected):
    assert (actual - expected).abs().max() <= zoo.TOLERANCE * max(1, expected.abs().max())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PACKABLE)
def test_same_as_each_text_alone(name, side):
    model, rows = zoo.build(name), zoo.texts()
    torch.manual_seed(2)
    prompt = SoftPrompt(model, zoo.M)
    ids, mask = zoo.padded(rows, side)
    inputs = prompt(ids, mask, mode="packed")
    assert inputs["inputs_embeds"].shape[:2] == (1, len(rows) * zoo.M + mask.sum())
    outs = texts_of(zoo.rows_out(model, inputs), inputs)
    expected = [zoo.by_hand(model, prompt.prompt_embeddings, text) for text in rows]
    for one, other in zip(outs, expected):
        assert_close(one, other)
    weights = [torch.randn_like(one) for one in expected]
    grads = [
        torch.autograd.grad(sum((out * w).sum() for out, w in zip(each, weights)), prompt.prompt_embeddings)[0]
        for each in (outs, expected)
    ]
    assert_close(*grads)


@pytest.mark.parametrize("attention", [None, "eager"])
def test_softcap_as_the_model_applies_it(attention):
    """Small enough to be felt. SDPA knows none: older transformers leave it out there, and so must packed rows."""
    model, rows = zoo.build("Gemma 2", attn_logit_softcapping=0.02, query_pre_attn_scalar=1), zoo.texts()
    if attention is not None:
        model.set_attn_implementation(attention)
    prompt = SoftPrompt(model, zoo.M)
    inputs = prompt(*zoo.padded(rows, "right"), mode="packed")
    outs = texts_of(zoo.rows_out(model, inputs), inputs)
    expected = [zoo.by_hand(model, prompt.prompt_embeddings, text) for text in rows]
    for one, other in zip(outs, expected):
        assert_close(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PACKABLE)
def test_on_a_gpu(name, dtype):
    """Whatever the attention there; in bf16 as far from fp32 as a text alone is, times three."""
    model, rows = zoo.build(name).cuda(), [text.cuda() for text in zoo.texts()]
    prompt = SoftPrompt(model, zoo.M)
    truth = [zoo.by_hand(model, prompt.prompt_embeddings, text) for text in rows]
    model.to(dtype)
    alone = [zoo.by_hand(model, prompt.prompt_embeddings, text).float() for text in rows]
    inputs = prompt(*zoo.padded(rows, "left"), mode="packed")
    packed = [out.float() for out in texts_of(zoo.rows_out(model, inputs), inputs)]
    budget = 3 * max((one - other).abs().max() for one, other in zip(alone, truth)) + zoo.TOLERANCE
    assert max((one - other).abs().max() for one, other in zip(packed, truth)) <= budget


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "Gemma 2"])
def test_loss_and_labels(name):
    """The padded batch's loss: no sequence's last token predicts the next sequence's prompt."""
    model = zoo.build(name)
    prompt = SoftPrompt(model, zoo.M)
    ids, mask = zoo.padded(zoo.texts(), "right")
    labels = ids.masked_fill(mask == 0, -100)
    results = []
    for mode in ("prepend", "packed"):
        loss = model(**prompt(ids, mask, labels=labels, mode=mode)).loss
        results.append((loss, *torch.autograd.grad(loss, prompt.prompt_embeddings)))
    for one, other in zip(*results):
        assert_close(one, other)
    assert_close(model(**prompt(ids, mask, labels=labels, mode="packed", lengths=mask.sum(1))).loss, results[0][0])


def test_heads_per_token():
    for class_name, extra in (("BertForMaskedLM", {}), ("BertForTokenClassification", {"num_labels": 3})):
        model = zoo.build("BERT", class_name, **extra)
        prompt = SoftPrompt(model, zoo.M)
        ids, mask = zoo.padded(zoo.texts(), "right")
        labels = (ids % 3).masked_fill(mask == 0, -100)
        types = ids % 2
        losses = [model(**prompt(ids, mask, types, labels, mode=mode)).loss for mode in ("prepend", "packed")]
        assert_close(*losses)


def test_bank():
    model = zoo.build("Llama")
    bank = SoftPrompt(model, zoo.M, num_prompts=3)
    ids, mask = zoo.padded(zoo.texts(), "left")
    index = torch.tensor([2, 0, 2, 0])
    inputs = bank(ids, mask, prompt_index=index, mode="packed")
    outs = texts_of(model(**inputs).logits, inputs)
    for out, k, text in zip(outs, index, zoo.texts()):
        assert_close(out, zoo.by_hand(model, bank.prompt_embeddings[k], text))


@pytest.mark.parametrize("options", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}], ids=["", "ends"])
@pytest.mark.parametrize("mode", ["prepend", "packed", "shared"])
def test_padding_free_collators(mode, options):
    """transformers' own collator, and what it gives goes straight in, whatever the mode."""
    model, rows = zoo.build("Llama"), zoo.texts()
    prompt = SoftPrompt(model, zoo.M)
    batch = DataCollatorWithFlattening(**options)([{"input_ids": row.tolist()} for row in rows])
    ids, mask = zoo.padded(rows, "right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 0] = -100  # the collator's way to tell the sequences apart
    expected = model(**prompt(ids, mask, labels=labels)).loss
    assert_close(model(**prompt(**batch, mode=mode)).loss, expected)


def test_padding_free_batches_that_are_none():
    prompt = SoftPrompt(zoo.build("Llama"), zoo.M)
    ids = torch.arange(3, 9)[None]
    for wrong in ([0, 4], [1, 6], [0, 4, 3, 6], [0]):
        with pytest.raises(ValueError, match=r"must rise from 0 to 6"):
            prompt(ids, cu_seq_lens_q=torch.tensor(wrong, dtype=torch.int32), mode="packed")
    with pytest.raises(ValueError, match="attention_mask is for padded rows"):
        prompt(ids, torch.ones_like(ids), position_ids=torch.arange(6)[None])
    with pytest.raises(ValueError, match=r"is \[1, T\]"):
        prompt(ids.view(2, 3), position_ids=torch.arange(6)[None])
    with pytest.raises(ValueError, match=r"position_ids must be \[1, 6\]"):
        prompt(ids, position_ids=torch.arange(5)[None])
    with pytest.raises(TypeError, match="unknown arguments: token_types"):
        prompt(ids, token_types=ids)
    with pytest.raises(TypeError, match="needs position_ids or cu_seq_lens_q"):
        prompt(ids, max_length_q=6)


def test_other_calls_stay_as_they_were():
    """The model is handed packed batches and padded ones in turn; each is computed as it should be."""
    model = zoo.build("Mistral")
    prompt, rows = SoftPrompt(model, zoo.M), zoo.texts()
    ids, mask = zoo.padded(rows, "left")
    plain = model(**prompt(ids, mask)).logits
    generated = model.generate(**prompt(ids, mask), max_new_tokens=4, do_sample=False)
    inputs = prompt(ids, mask, mode="packed")
    first = model(**inputs).logits
    assert torch.equal(model(**prompt(ids, mask)).logits, plain)
    assert torch.equal(model.generate(**prompt(ids, mask), max_new_tokens=4, do_sample=False), generated)
    assert torch.equal(model(**inputs).logits, first)
    assert not model._forward_pre_hooks and not model._forward_hooks
    assert "ptuning_fast" not in model.config.to_json_string()
    # Inside another model, and in copies of both.
    inner = SoftPrompt(model.model, zoo.M, init=prompt.prompt_embeddings)
    hidden = model.model(**inner(ids, mask, mode="packed")).last_hidden_state
    assert_close(model.lm_head(hidden), first)
    assert torch.equal(model(**inputs).logits, first)
    twin = copy.deepcopy(model)
    copied = SoftPrompt(twin, zoo.M, init=prompt.prompt_embeddings)
    assert torch.equal(twin(**copied(ids, mask, mode="packed")).logits, first)


@pytest.mark.parametrize("name", ["BERT", "Llama"])
def test_another_attention_implementation_set_in_between(name):
    """Packed calls stay right, and padded ones get what was set."""
    model = zoo.build(name)
    prompt, (ids, mask) = SoftPrompt(model, zoo.M), zoo.padded(zoo.texts(), "right")
    expected = zoo.rows_out(model, prompt(ids, mask, mode="packed"))
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        assert_close(zoo.rows_out(model, prompt(ids, mask, mode="packed")), expected)
        assert model.config._attn_implementation == f"ptuning_fast_{attention}"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["BERT", "Llama"])
def test_a_model_that_was_not_prepared_gives_no_result(name, attention):
    """A copy from before, or an attention set after the inputs were made: NaN, not texts that saw each other."""
    model = zoo.build(name)
    model.set_attn_implementation(attention)
    copied, prompt = copy.deepcopy(model), SoftPrompt(model, zoo.M)
    inputs = prompt(*zoo.padded(zoo.texts(), "right"), mode="packed")
    assert zoo.rows_out(model, inputs).isfinite().all()
    assert zoo.rows_out(copied, inputs).isnan().all()


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize("what", ["attention", "mask"])
def test_an_attention_of_somebodys_own(monkeypatch, name, what):
    """Registered by a known name: plain calls go on with it, of packed models, too; packed calls are refused."""
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def twice(*args, **kwargs):
        out, weights = sdpa_attention_forward(*args, **kwargs)
        return out * 2, weights

    def far(*args, **kwargs):
        kwargs["mask_function"] = lambda b, h, q, k: (q >= k) & (q - k < 2)
        return getattr(masking_utils, f"{name}_mask")(*args, **kwargs | {"allow_is_causal_skip": False})

    ids, mask = zoo.padded(zoo.texts(), "right")
    model, served = (zoo.build("Llama", attn_implementation=name) for _ in range(2))
    SoftPrompt(served, 2)(ids, mask, mode="packed")
    registry, function = {"attention": (AttentionInterface, twice), "mask": (AttentionMaskInterface, far)}[what]
    before = model(ids, mask).logits
    monkeypatch.setitem(registry._global_mapping, name, function)
    assert not torch.allclose(model(ids, mask).logits, before)
    assert torch.equal(served(ids, mask).logits, model(ids, mask).logits)
    for one in (model, served):
        prompt = SoftPrompt(one, 2)
        with pytest.raises(ValueError, match=f"of their own as '{name}'"):
            prompt(ids, mask, mode="packed")
        assert "attention_mask" in prompt(ids, mask, mode="auto")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_interruption(error):
    """There is nothing to put back: the next call, of whatever kind, finds the model as it was."""
    model = zoo.build("Llama")
    prompt, (ids, mask) = SoftPrompt(model, zoo.M), zoo.padded(zoo.texts(), "right")
    plain, packed = (model(**prompt(ids, mask, mode=mode)).logits for mode in ("prepend", "packed"))

    def interrupt(*args):
        raise error

    for mode, expected in (("prepend", plain), ("packed", packed)):
        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(error):
            model(**prompt(ids, mask, mode="packed"))
        hook.remove()
        assert torch.equal(model(**prompt(ids, mask, mode=mode)).logits, expected)


def test_layers_that_compute_attention_by_themselves():
    """Whatever the model's name promises: each model is probed before it is given a packed batch."""
    model = zoo.build("Llama")
    before = model.config._attn_implementation
    attend = model.model.layers[1].self_attn.forward
    model.model.layers[1].self_attn.forward = lambda *args, **kwargs: attend(
        *args, **{key: value for key, value in kwargs.items() if not key.startswith("cu_seq_lens")}
    )
    with pytest.raises(TypeError, match="probed, cannot be given a packed batch"):
        SoftPrompt(model, zoo.M)(*zoo.padded(zoo.texts(), "right"), mode="packed")
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("prune", [False, True])
def test_threads(prune):
    """One model, several threads with packed batches of their own."""
    model, rows = zoo.build("BERT").eval(), zoo.texts()
    fast = FastPTuning(model, 3, pooling="cls", mode="packed", prune=prune).eval()
    prompt = SoftPrompt(model, 3)
    batches = [zoo.padded(some, "right") for some in (rows, rows[::-1], rows[:2], rows[1:])]

    def outputs(batch):
        with torch.no_grad():
            return fast(*batch), model(**prompt(*batch, mode="packed")).last_hidden_state

    expected = [outputs(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(outputs, batches * 30))
    assert all(torch.equal(a, b) for one, other in zip(found, expected * 30) for a, b in zip(one, other))


def test_a_plain_call_in_the_middle_of_a_packed_one():
    """By a model with the same config object: each has what it should."""
    model = zoo.build("Llama")
    other = type(model)(model.config).eval()
    prompt, (ids, mask) = SoftPrompt(model, zoo.M), zoo.padded(zoo.texts(), "right")
    inputs = prompt(ids, mask, mode="packed")
    expected, plain, seen = model(**inputs).logits, other(input_ids=ids).logits, []
    hook = model.model.layers[1].register_forward_pre_hook(lambda *args: seen.append(other(input_ids=ids).logits))
    assert torch.equal(model(**inputs).logits, expected)
    hook.remove()
    assert torch.equal(seen[0], plain)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Gemma 2", "BERT", "ModernBERT"])
def test_gradient_checkpointing(name, reentrant):
    """The same loss and gradient, bit by bit: layers that are computed again find the batch as it was."""
    results = []
    for checkpointed in (False, True):
        model = zoo.build(name).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(2)
        prompt = SoftPrompt(model, zoo.M)
        inputs = prompt(*zoo.padded(zoo.texts(), "right"), mode="packed")
        out = zoo.rows_out(model, inputs)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
        (out * weight).sum().backward()
        results.append((out, prompt.prompt_embeddings.grad))
    for one, other in zip(*results):
        assert torch.equal(one, other)


def test_flash_attention_is_left_to_transformers(monkeypatch):
    """It takes cu_seq_lens by itself: the model keeps it, and is handed them, and no mask."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, seen = zoo.build("Llama"), []

    def flash(module, query, key, value, attention_mask, **kwargs):
        seen.append((attention_mask, kwargs))
        return query.transpose(1, 2).contiguous(), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    monkeypatch.setattr("ptuning_fast.modes.packed.Packed.probe_always", lambda *_: Outcome(0.0, 0.0, 0.0, None, 0.0))
    model.config._attn_implementation_internal = "flash_attention_2"
    inputs = SoftPrompt(model, zoo.M)(*zoo.padded(zoo.texts(), "right"), mode="packed")
    assert "attention_mask" not in inputs
    model(**inputs)
    assert model.config._attn_implementation == "flash_attention_2"
    for mask, kwargs in seen:
        assert mask is None
        assert torch.equal(kwargs["cu_seq_lens_q"], inputs["cu_seq_lens_q"])
        assert kwargs["max_length_q"] == inputs["max_length_q"]
    assert len(seen) == model.config.num_hidden_layers


def test_unknown_architectures_are_tried_out():
    """MobileBERT looks at a row's neighbours before its attention; mixtures of experts are as any decoder."""
    from transformers import MixtralConfig, MixtralForCausalLM, MobileBertConfig, MobileBertModel

    sizes = {"vocab_size": zoo.V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    leaky = MobileBertModel(
        MobileBertConfig(**sizes, intermediate_size=32, embedding_size=16, intra_bottleneck_size=16)
    )
    ids, mask = zoo.padded(zoo.texts(), "right")
    before = leaky.config._attn_implementation
    for build in (lambda: SoftPrompt(leaky, 3)(ids, mask, mode="packed"), lambda: FastPTuning(leaky, 3, mode="packed")):
        with pytest.raises(TypeError, match=r"texts in one see each other.*mode='prepend'"):
            build()
    assert leaky.config._attn_implementation == before and leaky.training
    experts = MixtralForCausalLM(
        MixtralConfig(**sizes, intermediate_size=32, num_key_value_heads=2, num_local_experts=2, pad_token_id=0)
    ).eval()
    prompt = SoftPrompt(experts, 3)
    inputs = prompt(ids, mask, mode="packed")
    outs = texts_of(experts(**inputs).logits, inputs)
    padded = experts(**prompt(ids, mask)).logits
    for out, of_row in zip(outs, padded):
        assert_close(out, of_row[: len(out)])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("window", [3, 8, 100])
def test_windows_that_are_seen_both_ways(attention, window):
    """By transformers' masks, a row as far away as the window: ModernBERT tells its attention, Mistral does not."""
    sizes = {"local_attention": 2 * window} | dict.fromkeys(("cls_token_id", "sep_token_id", "bos_token_id"), 1)
    model = zoo.build("ModernBERT", attn_implementation=attention, **sizes)
    prompt, (ids, mask) = SoftPrompt(model, zoo.M), zoo.padded(zoo.texts([30, 9]), "right")
    inputs = prompt(ids, mask, mode="packed")
    for out, text in zip(texts_of(zoo.rows_out(model, inputs), inputs), zoo.texts([30, 9])):
        assert_close(out, zoo.by_hand(model, prompt.prompt_embeddings, text))

    settings = {"is_causal": False, "sliding_window": window}
    model = zoo.build("Mistral", attn_implementation=attention, **settings)
    prompt, given = SoftPrompt(model, zoo.M), zoo.padded(zoo.texts([30, 9]), "right")
    with pytest.raises(TypeError, match="or a sliding window is in its mask alone"):
        prompt(*given, mode="packed")
    assert prompt(*given, mode="auto")["inputs_embeds"].shape[0] == 2


def test_refusals():
    ids, mask = zoo.padded(zoo.texts(), "right")
    for name in ("DeBERTa-v2", "MPNet", "Bloom", "T5", "BART"):
        with pytest.raises(TypeError, match="mode='prepend'"):
            SoftPrompt(zoo.build(name), 3)(ids, mask, mode="packed")
    for class_name in ("BertForSequenceClassification", "BertForQuestionAnswering", "BertForPreTraining"):
        with pytest.raises(TypeError, match="other outputs than one per token"):
            SoftPrompt(zoo.build("BERT", class_name), 3)(ids, mask, mode="packed")
    model = zoo.build("Llama")
    prompt = SoftPrompt(model, 3)
    with pytest.raises(ValueError, match="one per token"):
        prompt(ids, mask, labels=ids[:, 0], mode="packed")
    with pytest.raises(ValueError, match="lengths is for mode='packed'"):
        prompt(ids, mask, lengths=mask.sum(1))
    inputs = prompt(ids, mask, mode="packed")
    with pytest.raises(RuntimeError):  # generate has no use for a 4-D mask
        model.generate(**inputs, max_new_tokens=2)
    cache = transformers.DynamicCache(config=model.config)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    model(**inputs, **{name: cache})
    with pytest.raises(ValueError, match="without a cache: for generate take"):
        model(**inputs, **{name: cache})


def test_real_weights_and_text(minilm):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(minilm).requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    texts = ["a text", "another one, which is longer than the first", "and a third"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    prompt = SoftPrompt(model, 10)
    inputs = prompt(**batch, mode="packed")
    outs = texts_of(model(**inputs).last_hidden_state, inputs)
    for out, text in zip(outs, texts):
        one = tokenizer([text], return_tensors="pt")
        by_hand = reference.prepend_prompt(
            one["input_ids"],
            one["attention_mask"],
            weight=model.embeddings.word_embeddings.weight,
            prompt=prompt.prompt_embeddings,
        )
        expected = model(**by_hand).last_hidden_state[0]
        assert (out - expected).abs().max() <= 1e-5  # of values up to about 2, through six layers of fp32


def test_compiled():
    model = zoo.build("Llama")
    prompt = SoftPrompt(model, zoo.M)
    inputs = prompt(*zoo.padded(zoo.texts(), "right"), mode="packed")
    expected = model(**inputs).logits
    compiled = torch.compile(model, backend="eager")
    assert_close(compiled(**inputs).logits, expected)
    theirs = SoftPrompt(compiled, zoo.M, init=prompt.prompt_embeddings)
    assert_close(compiled(**theirs(*zoo.padded(zoo.texts(), "right"), mode="packed")).logits, expected)
    ids, mask = zoo.padded(zoo.texts(), "right")
    assert_close(compiled(**prompt(ids, mask)).logits[:, : zoo.M], model(**prompt(ids, mask)).logits[:, : zoo.M])
