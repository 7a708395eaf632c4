"""`accelerate`: a real PeftModel before it, under it and after it is undone."""

import copy
import importlib.util
import inspect
import pickle
import sys
import types
import warnings

import pytest
import torch
import transformers

from ptuning_fast import embedding, functional, peft_forward
from ptuning_fast.peft_forward import accelerate

peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install 'ptuning-fast[bench]'")

V, D, M = 99, 32, 4
ENCODER = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ENCODER |= {"initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER |= {"max_position_embeddings": 64, "num_labels": 3}
DECODER = ENCODER | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": V, "n_embd": D, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
GPT2 |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MODERN = ENCODER | {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}
T5 = {"vocab_size": V, "d_model": D, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
BART = {"vocab_size": V, "d_model": D, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
# Name: the config's class, its settings, the model's class, PEFT's task.
MODELS = {
    "Llama": ("LlamaConfig", DECODER, "LlamaForCausalLM", "CAUSAL_LM"),
    "GPT-2": ("GPT2Config", GPT2, "GPT2LMHeadModel", "CAUSAL_LM"),
    "BERT sequence": ("BertConfig", ENCODER, "BertForSequenceClassification", "SEQ_CLS"),
    "BERT token": ("BertConfig", ENCODER, "BertForTokenClassification", "TOKEN_CLS"),
    "BERT question": ("BertConfig", ENCODER | {"num_labels": 2}, "BertForQuestionAnswering", "QUESTION_ANS"),
    "BERT features": ("BertConfig", ENCODER, "BertModel", "FEATURE_EXTRACTION"),
}
OTHERS = {
    "Mistral": ("MistralConfig", DECODER | {"sliding_window": 7}, "MistralForCausalLM", "CAUSAL_LM"),
    "Bloom": (
        "BloomConfig",
        {"vocab_size": V, "hidden_size": D, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
        "BloomForCausalLM",
        "CAUSAL_LM",
    ),
    "Mistral sequence": (
        "MistralConfig",
        DECODER | {"sliding_window": 7},
        "MistralForSequenceClassification",
        "SEQ_CLS",
    ),
    "RoBERTa sequence": (
        "RobertaConfig",
        ENCODER | {"pad_token_id": 1, "bos_token_id": 0},
        "RobertaForSequenceClassification",
        "SEQ_CLS",
    ),
    "ModernBERT token": ("ModernBertConfig", MODERN, "ModernBertForTokenClassification", "TOKEN_CLS"),
    "ModernBERT sequence": ("ModernBertConfig", MODERN, "ModernBertForSequenceClassification", "SEQ_CLS"),
    "BART decoder": ("BartConfig", BART, "BartForCausalLM", "CAUSAL_LM"),
    "T5": ("T5Config", T5, "T5ForConditionalGeneration", "SEQ_2_SEQ_LM"),
}


def base(name, dtype=torch.float32):
    config, settings, model, _ = (MODELS | OTHERS)[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval().to(dtype)


def settings(name, kind=peft.PromptTuningConfig, **options):
    return kind(task_type=(MODELS | OTHERS)[name][-1], num_virtual_tokens=M, **options)


def build(name, kind=peft.PromptTuningConfig, dtype=torch.float32, **options):
    """The PeftModel in eval mode, without dropout, the same at every call."""
    return peft.get_peft_model(base(name, dtype), settings(name, kind, **options)).eval()


def batch(name, device="cpu"):
    """Three rows (one padded on the left, one on the right) with everything that the model's user might give."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, V, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, 5:] = 0
    task = (MODELS | OTHERS)[name][-1]
    given = {"input_ids": ids, "attention_mask": mask}
    if task == "CAUSAL_LM":
        given["labels"] = ids.masked_fill(mask == 0, -100)
    elif task == "SEQ_CLS":
        given |= {"labels": torch.tensor([0, 2, 1]), "token_type_ids": (ids % 2)}
    elif task == "TOKEN_CLS":
        # PEFT expects labels for the prompt's rows as well.
        given |= {"labels": torch.randint(3, (3, M + 7), generator=generator), "token_type_ids": (ids % 2)}
    elif task == "QUESTION_ANS":
        given |= {"start_positions": torch.tensor([5, 1, 3]), "end_positions": torch.tensor([6, 2, 9])}
    return {key: value.to(device) for key, value in given.items()}


def tensors(out):
    return {key: value for key, value in out.items() if isinstance(value, torch.Tensor)}


def run(model, given):
    """Every tensor of the output, and the gradients of all that is trained."""
    model.zero_grad()
    torch.manual_seed(2)
    out = tensors(model(**given))
    loss = out["loss"] if "loss" in out else out["last_hidden_state"].square().mean()
    loss.backward()
    gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    assert any(key.startswith("prompt_encoder") for key in gradients)
    return {key: value.detach() for key, value in out.items()}, gradients


def assert_same(one, other, **tolerance):
    """Outputs the same bits, gradients the same but for the order of their sums."""
    (outputs, gradients), (other_outputs, other_gradients) = one, other
    assert outputs.keys() == other_outputs.keys()
    for key, value in outputs.items():
        assert torch.equal(value, other_outputs[key]), key
    assert gradients.keys() == other_gradients.keys()
    for key, value in gradients.items():
        # The scores of all positions rise together with a bias, which no softmax over positions feels.
        assert value.abs().max() > 0 or ("qa_outputs" in key and key.endswith("bias")), key
        torch.testing.assert_close(value, other_gradients[key], **tolerance)


@pytest.fixture
def calls(monkeypatch):
    """How often the fused op ran, as a list that grows."""
    found = []

    def prepend_prompt(*args, **kwargs):
        found.append(kwargs)
        return functional.prepend_prompt(*args, **kwargs)

    monkeypatch.setattr(embedding, "prepend_prompt", prepend_prompt)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_outputs_loss_and_gradients_are_pefts(backend, name):
    model, given = build(name).to(backend), batch(name, backend)
    before = run(model, given)
    during = run(accelerate(model), given)
    after = run(accelerate(model), given)
    assert_same(before, during)
    assert_same(before, after)


@pytest.mark.parametrize("name", MODELS)
def test_the_fused_op_is_used_and_pefts_lookup_is_not(calls, monkeypatch, name):
    model, given = build(name), batch(name)
    prompts = []
    get_prompt = peft.PeftModel.get_prompt
    monkeypatch.setattr(peft.PeftModel, "get_prompt", lambda *args, **kw: prompts.append(1) or get_prompt(*args, **kw))
    for used in (0, 1, 0, 1):
        calls.clear(), prompts.clear()
        model(**given)
        assert (len(calls), len(prompts)) == (used, 1 - used)
        accelerate(model)


@pytest.mark.parametrize("fix", [False, True])
def test_only_this_instance_changes_and_undoing_leaves_nothing(fix):
    model, other = build("Llama"), build("Llama")
    kind, forward = type(model), peft.PeftModelForCausalLM.forward
    state, text, keys = dict(vars(model)), repr(model), list(model.state_dict())
    assert accelerate(model, fix_left_padding=fix) is model
    assert isinstance(model, kind)
    assert (repr(model), list(model.state_dict())) == (text, keys)
    assert inspect.signature(model.forward) == inspect.signature(other.forward)
    assert type(other) is kind and peft.PeftModelForCausalLM.forward is forward
    assert accelerate(model) is model
    assert type(model) is kind and vars(model) == state and model.forward.__func__ is forward


@pytest.mark.parametrize("name", MODELS)
def test_what_peft_makes_of_other_arguments(calls, name):
    """The same outputs, warnings and errors for what PEFT ignores, drops, extends and hands on to the base model."""
    model, given = build(name), batch(name)
    handed_on = []
    model.base_model.register_forward_pre_hook(lambda *args: handed_on.append(args[1:]), with_kwargs=True)
    ids, mask = given["input_ids"], given["attention_mask"]
    n = ids.shape[1]
    variants = [
        {"attention_mask": None},
        {"attention_mask": mask.bool()},
        {"attention_mask": mask.float()},
        {"position_ids": torch.arange(n).repeat(3, 1)},
        {"token_type_ids": ids % 2},
        {"token_type_ids": (ids % 2).int(), "input_ids": ids.int()},
        {"return_dict": False},
        {"output_hidden_states": True},
        {"task_ids": torch.tensor([0, 0, 0])},
        {"use_cache": False} if MODELS[name][-1] == "CAUSAL_LM" else {},
        {"labels": ids % 3},  # too few for token classification, too many for sequences
        {"labels": ids.int() % 3} if MODELS[name][-1] == "CAUSAL_LM" else {},
    ]
    outcomes = [[], []]
    for accelerated in (0, 1):
        for changed in variants:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    out = model(**given | changed)
                except ValueError as error:
                    out = str(error)
            messages = [str(each.message) for each in caught if "Ignoring" in str(each.message)]
            outcomes[accelerated].append((out, handed_on.pop(), messages))
        accelerate(model)
    assert len(calls) == len(variants)
    for changed, (before, taken, messages), (during, other_taken, other_messages) in zip(variants, *outcomes):
        assert messages == other_messages, changed
        same(before, during)
        masks = [kwargs.pop("attention_mask") for _, kwargs in (taken, other_taken)]
        if masks[0] is not None:  # PEFT makes a float of it
            masks[1] = masks[1].to(masks[0].dtype)
        same(*masks)
        same(taken, other_taken)
    assert any(messages for _, _, messages in outcomes[0]) is (name != "BERT question")
    assert any(isinstance(out, str) for out, _, _ in outcomes[0]) is (name in ("BERT token", "BERT sequence"))


def same(one, other):
    """The same bits and dtypes, in dicts, tuples, caches and errors too."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        same(list(one.values()), [other[key] for key in one])
    elif isinstance(one, (tuple, list)):
        assert len(one) == len(other)
        for each, its in zip(one, other):
            same(each, its)
    elif isinstance(one, transformers.Cache):
        same([(layer.keys, layer.values) for layer in one.layers], [(la.keys, la.values) for la in other.layers])
    else:
        assert one == other


def test_pefts_own_forward_serves_the_rest(calls):
    """inputs_embeds, a cache, a mask on another device, and misspelt calls go to PEFT unchanged."""
    model, given = build("Llama"), batch("Llama")
    ids, mask = given["input_ids"], given["attention_mask"]
    embeds = model.word_embeddings(ids) + 0.5
    cases = [
        lambda: model(inputs_embeds=embeds, attention_mask=mask),
        lambda: model(ids, mask, embeds),
        lambda: model(ids, past_key_values=transformers.DynamicCache()),
    ]
    expected = [case().logits for case in cases]
    accelerate(model)
    for case, logits in zip(cases, expected):
        assert torch.equal(case().logits, logits)
    for wrong in (
        lambda: model(ids, input_ids=ids),
        lambda: model(ids, *[None] * 8),
        lambda: model(ids, mask.to("meta")),
    ):
        accelerate(model)
        with pytest.raises((TypeError, NotImplementedError, RuntimeError)) as before:
            wrong()
        accelerate(model)
        with pytest.raises(before.type) as during:
            wrong()
        assert str(before.value) == str(during.value)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    assert not calls
    assert torch.equal(model(ids, mask, None, ids).loss, model(ids, mask, labels=ids).loss)
    assert len(calls) == 2


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
@pytest.mark.parametrize("name", ["Llama", "BERT sequence"])
def test_p_tuning(calls, name, kind):
    """The network that makes the prompt gets its gradient through the op; dropout draws as often as in PEFT."""
    options = {"encoder_reparameterization_type": kind, "encoder_hidden_size": 16}
    options |= {"encoder_num_layers": 2} if kind == "MLP" else {"encoder_dropout": 0.5}
    model = build(name, peft.PromptEncoderConfig, **options)
    model.prompt_encoder.train()
    before = run(model, batch(name))
    assert len([key for key in before[1] if key.startswith("prompt_encoder")]) > 6
    assert_same(before, run(accelerate(model), batch(name)))
    assert len(calls) == 1


def test_inference_mode(calls):
    """A loaded adapter holds the prompt itself: the network that made it is not run again."""
    model = build("Llama", peft.PromptEncoderConfig, encoder_hidden_size=16, inference_mode=True)
    given = batch("Llama")
    expected = model(**given).logits
    assert torch.equal(accelerate(model)(**given).logits, expected)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["Llama", "BERT sequence"])
def test_bf16_model_with_fp32_prompt(calls, name):
    model = build(name, dtype=torch.bfloat16)
    assert model.prompt_encoder["default"].embedding.weight.dtype == torch.float32
    before, during = run(model, batch(name)), run(accelerate(model), batch(name))
    assert len(calls) == 1
    assert_same(before, during, rtol=1e-5, atol=1e-7)
    (gradient,) = (value for key, value in during[1].items() if key.startswith("prompt_encoder"))
    assert gradient.dtype == torch.float32


def test_switching_adapters(calls):
    """The prompt is that of the adapter which is active at the call, P-tuned or with another number of rows."""
    model = peft.PeftModelForCausalLM(base("Llama"), settings("Llama")).eval()
    model.add_adapter("long", peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6))
    given = batch("Llama")

    def outputs():
        found = {}
        for name in ("long", "default", "long"):
            model.set_adapter(name)
            found[name] = model(**given).logits
        return found

    before = outputs()
    assert [value.shape[1] for value in before.values()] == [13, 11]
    accelerate(model)
    for name, logits in outputs().items():
        assert torch.equal(logits, before[name])
    assert len(calls) == 3
    # The type is looked up at each call too. (PEFT's own methods let no types be mixed in one model.)
    model.peft_config["long"].peft_type = peft.PeftType.MULTITASK_PROMPT_TUNING
    with pytest.raises(TypeError, match="positional argument"):  # from PEFT, which gives the encoder the task_ids
        model(**given)
    assert len(calls) == 3
    model.set_adapter("default")
    assert torch.equal(model(**given).logits, before["default"])


def test_disable_adapter(calls):
    model, given = build("Llama"), batch("Llama")
    state = set(vars(model))
    logits = model(**given).logits
    accelerate(model)
    with model.disable_adapter():
        assert torch.equal(model(**given).logits, model.base_model(**given).logits)
        assert not calls
        with pytest.raises(ValueError, match="disable_adapter"):
            accelerate(model)
    assert torch.equal(model(**given).logits, logits)
    assert len(calls) == 1
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))  # PEFT has left the forward on the instance
    assert copied.forward.__self__ is copied
    accelerate(model)
    assert set(vars(model)) - state == {"prepare_inputs_for_generation"}  # which is PEFT's doing
    assert torch.equal(model(**given).logits, logits)
    assert len(calls) == 1
    with model.disable_adapter():
        pass
    accelerate(model)(**given)
    assert len(calls) == 2


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "copy": copy.copy,
    "DataParallel": lambda model: model._replicate_for_data_parallel(),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("fix", [False, True])
def test_copies_are_accelerated_and_stand_alone(calls, how, fix):
    model, given = accelerate(build("Llama"), fix_left_padding=fix), batch("Llama")
    logits = model(**given).logits
    copied = COPIES[how](model)
    if how == "DataParallel":  # which puts the other device's modules in, one by one
        copied._modules = dict(copy.deepcopy(model)._modules)
    if how == "copy":
        copied._modules = copy.deepcopy(model._modules)
    assert copied.forward.__self__ is copied
    assert torch.equal(copied(**given).logits, logits)
    with torch.no_grad():
        copied.prompt_encoder["default"].embedding.weight.mul_(3)
    changed = copied(**given)
    assert not torch.equal(changed.logits, logits)
    assert torch.equal(model(**given).logits, logits)
    changed.loss.backward()
    assert model.prompt_encoder["default"].embedding.weight.grad is None
    assert copied.prompt_encoder["default"].embedding.weight.grad is not None
    assert len(calls) == 4
    assert type(accelerate(copied)) is peft.PeftModelForCausalLM
    copied(**given)
    assert len(calls) == 4
    model(**given)
    assert len(calls) == 5


def test_save_and_load(tmp_path):
    model, given = accelerate(build("Llama")), batch("Llama")
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(base("Llama"), tmp_path)
    assert torch.equal(accelerate(loaded)(**given).logits, model(**given).logits)


@pytest.mark.parametrize("fix", [False, True])
@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_generate_is_pefts(name, fix):
    model, given = build(name), batch(name)
    given["attention_mask"][1] = 1  # padding on the left alone, as generation has it
    given.pop("labels")
    options = given | {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**options)
    assert expected.shape == (3, 15)
    assert torch.equal(accelerate(model, fix_left_padding=fix).generate(**options), expected)
    assert torch.equal(accelerate(model).generate(**options), expected)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.normal_()
    assert not torch.equal(model.generate(**options), expected), "the prompt makes no difference: nothing was tested"


LEFT = ["Llama", "GPT-2", "Mistral", "Bloom", "BERT sequence", "BERT token", "BERT question", "BERT features"]
LEFT += ["Mistral sequence", "RoBERTa sequence", "ModernBERT token", "ModernBERT sequence"]


@pytest.mark.parametrize("name", LEFT)
def test_left_padding_fixed(calls, name):
    """A row of a left-padded batch gives on its own columns what it gives alone, and gives something else in PEFT."""
    model = build(name)
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, V, (length,), generator=generator) for length in (3, 12, 7)]
    ids, mask = torch.full((3, 12), 7), torch.zeros(3, 12, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, -len(text) :], mask[row, -len(text) :] = text, 1

    def outputs(input_ids, attention_mask):
        types = {"token_type_ids": input_ids % 2} if name in ("BERT sequence", "BERT token") else {}
        return rows(model(input_ids=input_ids, attention_mask=attention_mask, **types))

    def of_texts(batch):
        """The outputs, of the text's columns alone where they have columns: one list per row."""
        return [
            [out[row, -len(text) :] if out.shape[1] == M + 12 else out[row] for out in batch]
            for row, text in enumerate(texts)
        ]

    def gradient(by_row):
        model.zero_grad()
        sum(value.sin().sum() for values in by_row for value in values).backward()
        return model.prompt_encoder["default"].embedding.weight.grad

    alone = [[out[0] for out in outputs(text[None], torch.ones_like(text)[None])] for text in texts]
    alone = [[out[M:] if len(out) == M + len(text) else out for out in row] for row, text in zip(alone, texts)]
    pefts = of_texts(outputs(ids, mask))
    accelerate(model, fix_left_padding=True)
    fixed = of_texts(outputs(ids, mask))
    assert len(calls) == 1
    torch.testing.assert_close(fixed, alone, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(gradient(fixed), gradient(alone), rtol=1e-3, atol=1e-4)
    off = max((own - value).abs().max() for row, other in zip(pefts, alone) for own, value in zip(row, other))
    # (Bloom counts positions by the mask already, and is not broken by the other place of the prompt.)
    assert (off > 1e-3) == (name != "Bloom"), "there was nothing to be fixed"


def rows(out):
    """The outputs that belong to rows of the batch."""
    keys = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
    return [out[key] for key in keys if key in out]


def test_fix_without_padding_is_peft():
    """Also right-padded, where it makes no difference to the text, and without a mask."""
    model, given = build("Llama"), batch("Llama")
    given["attention_mask"][0] = 1
    expected, unmasked = model(**given), model(given["input_ids"])
    out = accelerate(model, fix_left_padding=True)(**given)
    real = torch.constant_pad_nd(given["attention_mask"], (M, 0), 1) != 0
    assert torch.equal(out.logits[real], expected.logits[real])
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(model(given["input_ids"]).logits, unmasked.logits)


def test_fix_that_cannot_be():
    """A decoder of BART counts columns, whatever they hold, and takes no position_ids."""
    model, given = build("BART decoder"), batch("BART decoder")
    expected = model(**given).logits
    accelerate(model, fix_left_padding=True)
    with pytest.raises(ValueError, match="BartForCausalLM counts padding on the left as positions"):
        model(**given)
    right = {key: value[1:] for key, value in given.items()}
    torch.testing.assert_close(model(**right).logits, expected[1:])


def test_fix_of_a_decoders_classifier():
    """It reads the last column, so that padding on the right, which PEFT lets it read, is moved out of its way too."""
    model, given = build("Mistral sequence"), batch("Mistral sequence")
    ids, mask = given["input_ids"][1:2], given["attention_mask"][1:2]
    alone, pefts = model(ids[:, :5]).logits, model(ids, mask).logits
    fixed = accelerate(model, fix_left_padding=True)(ids, mask).logits
    torch.testing.assert_close(fixed, alone, rtol=1e-4, atol=2e-5)
    assert (pefts - alone).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["Llama", "BERT sequence"])
def test_fix_of_odd_batches(name):
    """No columns at all, rows of padding alone, and shapes that do not fit: the op's own answers."""
    model = accelerate(build(name), fix_left_padding=True)
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    assert model(nothing, nothing).logits.shape[0] == 2
    ids = torch.full((2, 5), 7)
    logits = model(ids, torch.tensor([[0] * 5, [1] * 5])).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[1], model(ids[1:]).logits[0])
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(ids, torch.ones(2, 4))


def test_an_embedding_with_hooks_is_called():
    """A hook that changes the rows; the results stay PEFT's, with one warning."""
    model, given = build("Llama"), batch("Llama")
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: 2 * out)
    before = run(model, given)
    with pytest.warns(UserWarning, match="is called, not read by the fused kernel: it has hooks"):
        during = run(accelerate(model), given)
    assert_same(before, during)


def test_gradient_checkpointings_hook_is_no_obstacle(calls):
    """It makes the rows require grad, as those behind a trainable prompt do anyway."""
    model, given = build("Llama"), batch("Llama")
    model.enable_input_require_grads()
    before = run(model, given)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fused kernel.*")
        during = run(accelerate(model), given)
    assert_same(before, during)
    assert len(calls) == 1


def test_ids_and_shapes_are_checked_by_the_op():
    model, given = accelerate(build("Llama")), batch("Llama")
    given["input_ids"][1, 2] = V
    with pytest.raises(IndexError, match=rf"input_ids\[1, 2\] is {V}, outside the embedding table"):
        model(**given)
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(batch("Llama")["input_ids"], torch.ones(3, 4))
    with pytest.raises(ValueError, match="labels must be"):
        model(batch("Llama")["input_ids"], labels=torch.ones(3, 4, dtype=torch.int64))


def test_what_is_no_peft_model():
    for wrong in (base("Llama"), None, peft.PeftModel):
        with pytest.raises(TypeError, match="accelerate takes a PeftModel"):
            accelerate(wrong)


def test_models_with_nothing_to_accelerate():
    lora = peft.get_peft_model(base("Llama"), peft.LoraConfig(task_type="CAUSAL_LM", r=2))
    with pytest.raises(ValueError, match=r"no adapter of type PROMPT_TUNING or P_TUNING \(only LORA\)"):
        accelerate(lora)
    several = build("Llama", peft.MultitaskPromptTuningConfig, num_tasks=2)
    with pytest.raises(ValueError, match=r"only MULTITASK_PROMPT_TUNING"):
        accelerate(several)
    with pytest.raises(ValueError, match="PeftModelForSeq2SeqLM is not covered"):
        accelerate(build("T5"))
    plain = peft.PeftModel(base("Llama"), settings("Llama"))  # its forward does not look at the prompt
    with pytest.raises(ValueError, match="the forward of PeftModel is none that is covered"):
        accelerate(plain)

    class Own(peft.PeftModelForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    with pytest.raises(ValueError, match="the forward of Own is none that is covered"):
        accelerate(Own(base("Llama"), settings("Llama")))


def test_a_replaced_forward_is_respected(calls):
    """What others put around the forward is neither bypassed nor thrown away."""
    model, given = build("Llama"), batch("Llama")
    model.forward = types.MethodType(lambda self, **kw: type(self).forward(self, **kw), model)
    with pytest.raises(ValueError, match="something else has replaced the forward"):
        accelerate(model)
    del model.forward
    accelerate(model)
    model.forward = types.MethodType(lambda self, **kw: type(self).forward(self, **kw), model)
    model(**given)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="something else has replaced the forward"):
        accelerate(model)
    del model.forward
    model.__class__ = type("Sharded", (type(model),), {})  # as FSDP does
    with pytest.raises(ValueError, match="something else has replaced the forward"):
        accelerate(model)


def test_without_peft(monkeypatch):
    """The module imports; the function says what to install."""
    monkeypatch.setitem(sys.modules, "peft", None)
    spec = importlib.util.spec_from_file_location("ptuning_fast.again", peft_forward.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ImportError, match="pip install peft"):
        module.accelerate(None)
