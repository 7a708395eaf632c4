"""SoftPrompt.generate: the tokens of model.generate(**prompt(...)), with the prompt run through the model once."""

import copy
import inspect
import pickle
from types import SimpleNamespace

import pytest
import sweep
import torch
import transformers
import zoo
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ptuning_fast import PromptedModel, SoftPrompt

CAUSAL = ["GPT-2", "OPT", "Llama", "Qwen2", "Mistral", "Phi", "Gemma", "Gemma 2", "Gemma 3", "Bloom"]
OPTIONS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "two of three beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "penalty": {"repetition_penalty": 1.3},
    "no token twice": {"no_repeat_ngram_size": 1},
    "static cache": {"cache_implementation": "static"},
}


def rows_computed(model, call):
    """[(batch, rows)] of each time that the first layer ran. By no hook, behind one nothing is computed once."""
    seen, layers = [], next(one for one in model.modules() if isinstance(one, torch.nn.ModuleList))
    part = next(one for one in layers[0].modules() if not [*one.children()])
    whole = type(part).forward

    def counted(self, rows):
        if self is part:
            seen.append(tuple(rows.shape[:2]))
        return whole(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(part), "forward", counted)
        call()
    return seen


@pytest.mark.parametrize("side", ["left", "alone"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", CAUSAL)
def test_same_tokens(name, options, side, torch_backend):
    model = zoo.build(name)
    if options == "static cache" and name in ("Bloom", "GPT-2"):
        pytest.skip("the model itself has no static cache")
    prompt = SoftPrompt(model, zoo.M)
    ids, mask = zoo.padded(zoo.texts() if side == "left" else zoo.texts([17]), "left")
    found = []
    for call in (
        lambda **given: model.generate(input_ids=ids, **prompt(ids, mask), **given)[:, ids.shape[1] :],
        lambda **given: prompt.generate(ids, mask, **given),
    ):
        torch.manual_seed(0)
        found.append(call(max_new_tokens=6, **OPTIONS[options]))
    assert torch.equal(*found)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}, {"max_length": zoo.M + 17 + 3}])
def test_what_reads_the_tokens_so_far_sees_those_of_the_text(options, torch_backend):
    model, seen = zoo.build("Llama"), []
    prompt = SoftPrompt(model, zoo.M)
    ids, mask = zoo.padded(zoo.texts([17, 3]), "left")

    def processor(tokens, scores):
        seen.append(tokens.clone())
        return scores

    options = {"max_new_tokens": 3} | options if "max_length" not in options else options
    processors = transformers.LogitsProcessorList([processor])
    new = prompt.generate(ids, mask, logits_processor=processors, min_new_tokens=3, **options)
    assert new.shape == (2, 3)
    assert torch.equal(seen[0][:: options.get("num_beams", 1)], ids)
    if "num_beams" not in options:
        assert torch.equal(seen[-1], torch.cat([ids, new[:, :-1]], 1))
    assert torch.equal(new, model.generate(**prompt(ids, mask), min_new_tokens=3, **options))
    once = prompt.generate(ids, mask, no_repeat_ngram_size=1, max_new_tokens=8)
    for text, found in zip(ids, once):
        assert not set(found.tolist()) & set(text.tolist())


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("name", ["Llama", "GPT-2", "RoBERTa"])
def test_texts_without_a_mask(name, kept, torch_backend):
    settings = {"class_name": "RobertaForCausalLM", "is_decoder": True} if name == "RoBERTa" else {}
    model = zoo.build(name, **settings)
    prompt = SoftPrompt(model, zoo.M)
    ids, options = torch.stack(zoo.texts([5, 5])), {"max_new_tokens": 6, "use_cache": kept}
    expected = model.generate(**prompt(ids, torch.ones_like(ids)), **options)
    assert torch.equal(prompt.generate(ids, **options), expected)
    assert torch.equal(prompt.generate(ids, no_repeat_ngram_size=30, **options), expected)
    end, padding, *_ = (token for token in range(80, zoo.V) if token not in ids and token not in expected)
    padded = torch.cat([torch.full((2, 2), padding), ids], 1)
    for given in (
        {"pad_token_id": padding},
        {"generation_config": transformers.GenerationConfig(pad_token_id=padding)},
    ):
        assert torch.equal(prompt.generate(padded, eos_token_id=end, **given, **options), expected)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("name", ["assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens"])
def test_drafts_are_refused(name, own, torch_backend):
    """With embeddings they fail, or are others: from transformers 5.17, and later where a text is padded."""
    model = zoo.build("Llama")
    options = {name: model if name == "assistant_model" else 2}
    if own and name != "assistant_model":
        setattr(model.generation_config, name, options.pop(name))
    for one in (SoftPrompt(model, zoo.M), PromptedModel(model, zoo.M)):
        with pytest.raises(ValueError, match=f"{name}.* from ids, and a prompt is given as embeddings"):
            one.generate(torch.tensor([[5, 6, 7, 5, 6]]), **options)


@pytest.mark.parametrize("own", [True, False])
def test_a_prefill_in_chunks_is_refused(own, torch_backend):
    model = zoo.build("Llama")
    options = {"prefill_chunk_size": 2}
    if own:
        model.generation_config.prefill_chunk_size = options.pop("prefill_chunk_size")
    for one in (SoftPrompt(model, zoo.M), PromptedModel(model, zoo.M)):
        with pytest.raises(ValueError, match="prefill_chunk_size=2 is for ids"):
            one.generate(torch.tensor([[5, 6, 7]]), **options)


def test_an_activated_lora_is_refused(torch_backend):
    """PEFT finds its tokens by ids: behind embeddings, as in training, it is off."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["q_proj"], alora_invocation_tokens=[5], task_type="CAUSAL_LM")
    model = peft.get_peft_model(zoo.build("Llama"), lora)
    options = {"max_new_tokens": 2, "pad_token_id": 0}
    for one in (SoftPrompt(model, zoo.M), PromptedModel(model, zoo.M)):
        with pytest.raises(ValueError, match="alora_invocation_tokens finds its place by ids"):
            one.generate(torch.tensor([[5, 6, 7]]), **options)
        with model.disable_adapter():
            assert one.generate(torch.tensor([[5, 6, 7]]), **options).shape[0] == 1


def test_a_model_that_generates_nothing(torch_backend):
    model = transformers.BertModel(zoo.build("BERT").config)
    for one in (SoftPrompt(model, zoo.M), PromptedModel(model, zoo.M)):
        with pytest.raises(TypeError, match="BertModel generates nothing"):
            one.generate(torch.tensor([[5, 6, 7]]))


def test_the_prompt_runs_once_for_a_batch_and_nothing_is_kept(torch_backend):
    model = zoo.build("Llama")
    prompt = SoftPrompt(model, zoo.M)
    ids, mask = zoo.padded(zoo.texts([3, 9]), "left")

    def first():
        prompt.generate(ids, mask, max_new_tokens=1)

    first()
    assert rows_computed(model, first) == [(1, zoo.M), (2, 9)]
    prompt.prompt_embeddings.data.mul_(1.5)
    model.model.layers[0].self_attn.k_proj.weight.data.mul_(1.1)
    model.model.layers[1].register_forward_hook(lambda module, args, out: out + 0.5)
    expected = model.generate(**prompt(ids, mask), max_new_tokens=4)
    assert torch.equal(prompt.generate(ids, mask, max_new_tokens=4), expected)
    assert torch.equal(copy.deepcopy(prompt).generate(ids, mask, max_new_tokens=4), expected)


def by_a_hook(layer, patched):
    return layer.register_forward_hook(lambda module, args, out: patched(out))


def by_a_forward(layer, patched):
    whole = layer.forward
    layer.forward = lambda *args, **kwargs: patched(whole(*args, **kwargs))
    return SimpleNamespace(remove=lambda: vars(layer).pop("forward"))


def test_an_attention_of_ones_own(torch_backend):
    """Registered as transformers has it: in a prefill, as many queries as keys, each sees the last few alone."""
    prompt_and_text = []

    def sparse(module, query, key, value, mask, **kwargs):
        prompt_and_text.append(query.shape[2])
        if query.shape[2] == key.shape[2]:
            mask = torch.ones(2 * query.shape[2:3], dtype=torch.bool).tril().triu(-5)[None, None]
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    transformers.AttentionInterface.register("sparse_of_a_test", sparse)
    transformers.AttentionMaskInterface.register("sparse_of_a_test", sdpa_mask)
    model = zoo.build("Llama", attn_implementation="sparse_of_a_test").eval()
    prompt, ids = SoftPrompt(model, zoo.M), torch.stack(zoo.texts([17]))
    options = {"max_new_tokens": 1, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = model.generate(**prompt(ids), **options).logits[0]
    prompt_and_text.clear()
    assert torch.allclose(prompt.generate(ids, **options).logits[0], expected, atol=1e-6)
    assert set(prompt_and_text) == {zoo.M + 17}


@pytest.mark.parametrize("put", [by_a_hook, by_a_forward])
@pytest.mark.parametrize("keep_prompt", [False, True])
def test_what_counts_columns(keep_prompt, put, torch_backend):
    """As one that patches a hidden state at a place: it has the columns of all rows, as in `model.generate`."""
    model = zoo.build("Llama")
    prompt = SoftPrompt(model, zoo.M)
    ids, mask = zoo.padded(zoo.texts([9, 9]), "left")
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = prompt.generate(ids, mask, keep_prompt=keep_prompt, **options).logits[0]

    def patched(out):
        if out.shape[1] > 1:
            out = out.clone()
            out[:, 2] += 1
        return out

    hook = put(model.model.layers[1], patched)
    expected = model.generate(**prompt(ids, mask), **options)
    found = prompt.generate(ids, mask, keep_prompt=keep_prompt, **options)
    assert torch.equal(found.sequences[:, -4:], expected.sequences[:, -4:])
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(found.logits, expected.logits))
    assert not torch.allclose(found.logits[0], plain)
    hook.remove()
    again = prompt.generate(ids, mask, keep_prompt=keep_prompt, **options).logits[0]
    assert torch.allclose(again, plain, atol=1e-6)


@pytest.mark.parametrize("lengths", [[0, 3], [0]])
def test_texts_without_tokens(lengths, torch_backend):
    model = zoo.build("Llama")
    prompt = SoftPrompt(model, zoo.M)
    ids, mask = zoo.padded(zoo.texts(lengths), "left")
    options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
    expected, actual = (
        call(**options).logits[0]
        for call in (lambda **o: model.generate(**prompt(ids, mask), **o), lambda **o: prompt.generate(ids, mask, **o))
    )
    assert (actual - expected).abs().max() <= zoo.TOLERANCE


def test_token_types_a_config_of_the_callers_and_a_bank_without_an_index(torch_backend):
    model = zoo.build("GPT-2")
    prompt = SoftPrompt(model, zoo.M)
    ids, mask = zoo.padded(zoo.texts([3, 9]), "left")
    types, options = torch.ones_like(ids), {"max_new_tokens": 4}
    assert torch.equal(
        prompt.generate(ids, mask, types, **options), model.generate(**prompt(ids, mask, types), **options)
    )
    model.generation_config.num_beams = 2
    given = {"generation_config": transformers.GenerationConfig(**options)}
    assert torch.equal(prompt.generate(ids, mask, **given), model.generate(**prompt(ids, mask), **given))
    with pytest.raises(ValueError, match="give one per row"):
        SoftPrompt(model, zoo.M, num_prompts=3).generate(ids, mask)


@pytest.mark.parametrize("side", ["left", "alone"])
def test_a_next_call_goes_on_from_the_cache(side, torch_backend):
    """Of a conversation, as transformers has it: the prompt stands where the next call has it."""
    model = zoo.build("Llama")
    prompt = SoftPrompt(model, zoo.M)
    ids, mask = zoo.padded(zoo.texts([3, 9] if side == "left" else [9]), "left")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    first = prompt.generate(ids, mask, **options)
    ids, mask = torch.cat([ids, first.sequences, ids[:, -2:]], 1), torch.cat([mask, torch.ones(len(ids), 6).long()], 1)
    for call in (prompt.generate, lambda ids, mask, **given: model.generate(**prompt(ids, mask), **given)):
        cache = copy.deepcopy(first.past_key_values)
        found = call(ids, mask, past_key_values=cache, output_logits=True, **options).logits[0]
        for row, there, out in zip(ids, mask, found):
            alone = zoo.by_hand(model, prompt.prompt_embeddings, row[there != 0])
            assert (out - alone[-1]).abs().max() <= zoo.TOLERANCE


@pytest.mark.filterwarnings("error")
def test_a_cache_that_lacks_the_prompt_is_warned_of(torch_backend):
    """Those that it has filled are not: the caller's own, and what it gives back."""
    model = zoo.build("Llama")
    prompt, other = SoftPrompt(model, zoo.M), SoftPrompt(model, zoo.M)
    ids = torch.stack(zoo.texts([5]))
    options = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    name, cache = prompt.info.cache, transformers.DynamicCache(config=model.config)
    for _ in range(2):
        ids = torch.cat([ids, prompt.generate(ids, **{name: cache}, **options)], 1)
    given = prompt.generate(ids, return_dict_in_generate=True, **options)[name]
    plain = model.generate(ids, return_dict_in_generate=True, **options)[name]
    longer, loaded = torch.cat([ids, ids], 1), copy.deepcopy(prompt)
    loaded.generate(longer, **{name: copy.deepcopy(given)}, **options)
    with torch.no_grad():
        prompt.prompt_embeddings += 1
    for one, filled in ((loaded, plain), (other, given), (other, cache), (prompt, given)):
        with pytest.warns(UserWarning, match="the cache to go on from is not of generate behind this prompt as it is"):
            one.generate(longer, **{name: copy.deepcopy(filled)}, **options)


@pytest.mark.filterwarnings("error:the cache")
def test_a_cache_of_another_prompt_of_a_bank_is_warned_of(torch_backend):
    bank = SoftPrompt(zoo.build("Llama"), zoo.M, num_prompts=3)
    ids, index = torch.stack(zoo.texts([5, 5])), torch.tensor([2, 0])
    options = {"max_new_tokens": 2, "do_sample": False}
    out = bank.generate(ids, prompt_index=index, return_dict_in_generate=True, **options)
    longer, name = torch.cat([ids, ids], 1), bank.info.cache
    bank.generate(longer, prompt_index=index, **{name: copy.deepcopy(out[name])}, **options)
    with pytest.warns(UserWarning, match="the cache to go on from"):
        bank.generate(longer, prompt_index=index.flip(0), **{name: out[name]}, **options)


def test_a_way_to_generate_of_somebodys_own(torch_backend):
    """It gets the inputs, and what it returns comes back as it is."""
    prompt, ids = SoftPrompt(zoo.build("Llama"), zoo.M), torch.stack(zoo.texts([5]))

    def mine(model, inputs, inputs_embeds=None, **kwargs):
        return ["done", inputs_embeds.shape[1]]

    assert prompt.generate(ids, custom_generate=mine, max_new_tokens=2) == ["done", zoo.M + 5]


@pytest.mark.filterwarnings("error:the cache")
def test_a_cache_that_counts_no_columns(torch_backend):
    config = {"vocab_size": zoo.V, "hidden_size": zoo.D, "num_hidden_layers": 2, "state_size": 8, "pad_token_id": 0}
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**config, initializer_range=0.3)).eval()
    prompt, ids = SoftPrompt(model, zoo.M), torch.stack(zoo.texts([5]))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    out = prompt.generate(ids, return_dict_in_generate=True, **options)
    plain = model.generate(ids, return_dict_in_generate=True, **options)
    longer = torch.cat([ids, out.sequences, ids[:, :3]], 1)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "cache_params"
    cache, other = (next(one[key] for key in ("past_key_values", "cache") if key in one) for one in (out, plain))
    found = prompt.generate(longer, **{name: cache}, **options)
    assert torch.equal(found, prompt.generate(longer, **options))
    with pytest.warns(UserWarning, match="the cache to go on from"):
        prompt.generate(longer, **{name: other}, **options)


@pytest.mark.parametrize(("name", "train"), [("Mistral", False), ("Llama", True)])
def test_padding_that_would_shift_a_window_and_training_are_left_to_the_model(name, train, torch_backend):
    model = zoo.build(name).train(train)
    prompt = SoftPrompt(model, zoo.M)
    ids, mask = zoo.padded(zoo.texts([3, 9]), "left")
    assert rows_computed(model, lambda: prompt.generate(ids, mask, max_new_tokens=1))[-1:] == [(2, zoo.M + 9)]


@pytest.mark.parametrize("kind", ["gemma3", "bamba", "falcon_h1"])
def test_embeddings_that_a_model_hands_on_without_naming_them(kind, torch_backend):
    """transformers' generate asks for the name; PromptedModel goes the same way, and the model stays as it was."""
    model = sweep.build(kind, sweep.model_types()[kind], "eager")
    first, *texts = zoo.texts([zoo.M, 9, 4])
    prompted = PromptedModel(model, zoo.M, init=model.get_input_embeddings()(first))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ids, mask = zoo.padded(texts, "left")
    found = prompted.generate(ids, mask, **options)[:, ids.shape[1] :]
    for row, text in enumerate(texts):
        alone = torch.cat([first, text])[None]
        assert torch.equal(found[row], model.generate(alone, **options)[0, alone.shape[1] :])
    assert "prepare_inputs_for_generation" not in vars(model)


def test_embeddings_that_a_model_does_not_hand_on(torch_backend):
    model = sweep.build("openai-gpt", "OpenAIGPTLMHeadModel", "eager")
    with pytest.raises(ValueError, match="doesn't have its forwarding implemented"):
        SoftPrompt(model, zoo.M).generate(zoo.texts([9])[0][None], max_new_tokens=2)
    assert "prepare_inputs_for_generation" not in vars(model)


def test_a_model_that_writes_into_what_it_is_given(torch_backend):
    """GIT adds its positions in place: to a copy of the prompt, and not to the prompt."""
    model = sweep.build("git", "GitForCausalLM", "eager")
    prompt = SoftPrompt(model, zoo.M)
    before = prompt.prompt_embeddings.clone()
    prompt.generate(zoo.texts([9])[0][None], max_new_tokens=2)
    assert torch.equal(prompt.prompt_embeddings, before)


def test_an_encoder_decoder_and_a_bank(torch_backend):
    ids, mask = zoo.padded(zoo.texts([3, 9]), "right")
    model = zoo.build("T5")
    prompt = SoftPrompt(model, zoo.M)
    assert torch.equal(
        prompt.generate(ids, mask, max_new_tokens=4), model.generate(**prompt(ids, mask), max_new_tokens=4)
    )
    assert torch.equal(prompt.generate(ids, max_new_tokens=4), model.generate(**prompt(ids), max_new_tokens=4))
    model = zoo.build("Llama")
    bank, index = SoftPrompt(model, zoo.M, num_prompts=2), torch.tensor([1, 0])
    ids, mask = zoo.padded(zoo.texts([3, 9]), "left")
    expected = model.generate(**bank(ids, mask, prompt_index=index), max_new_tokens=4)
    assert torch.equal(bank.generate(ids, mask, prompt_index=index, max_new_tokens=4), expected)


def test_a_prompt_that_is_kept(torch_backend):
    """Computed once while it is the same, by its values; what a caller does not ask for is not kept."""
    model = zoo.build("Llama")
    prompt = SoftPrompt(model, 5)
    ids, mask = zoo.padded(zoo.texts([6, 4]), "left")

    def generated(**options):
        found = []
        options |= {"max_new_tokens": 3, "do_sample": False}
        runs = rows_computed(model, lambda: found.append(prompt.generate(ids, mask, **options)))
        alone = runs.count((1, 5))
        expected = model.generate(**prompt(ids, mask), max_new_tokens=3, do_sample=False)
        assert torch.equal(found[0], expected)
        return alone

    generated()  # which is also when the model is probed
    assert [generated(), generated()] == [1, 1]
    assert [generated(keep_prompt=True), generated(keep_prompt=True), generated(keep_prompt=True)] == [1, 0, 0]
    prompt.prompt_embeddings.data.mul_(-1)
    assert [generated(keep_prompt=True), generated(keep_prompt=True)] == [1, 0]
    assert [generated(), generated(keep_prompt=True)] == [1, 1]
    with torch.autocast("cpu", torch.bfloat16):
        prompt.generate(ids, mask, max_new_tokens=1, keep_prompt=True)
    assert [generated(keep_prompt=True), generated(keep_prompt=True)] == [1, 0]
    assert len(pickle.dumps(prompt._cached)) < 5000


@pytest.mark.parametrize("keep_prompt", [False, True])
def test_a_model_that_keeps_something_of_a_text_for_the_next_call(keep_prompt, torch_backend):
    """Qwen2-VL: how far an image moved the positions of what comes behind it, in each row of that batch."""
    model, options = zoo.qwen2_vl(), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    prompt, fresh = SoftPrompt(model, 4), copy.deepcopy(model)

    def check(*lengths):
        ids, mask = zoo.padded(zoo.texts(lengths), "left")
        found = prompt.generate(ids, mask, keep_prompt=keep_prompt, **options)
        assert torch.equal(found, copy.deepcopy(fresh).generate(**prompt(ids, mask), **options))

    check(6, 4)
    check(5, 7)
    check(3, 4, 6)
    ids = torch.tensor([[5, 91, 90, 90, 90, 90, 92, 7]])
    image = {"pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    image |= {"attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == 90).long()}
    model.generate(ids, **image, **options)
    assert model.model.rope_deltas.item() == -2
    check(6)
    check(6, 4)
