"""A probe leaves a model as it was."""

import contextlib
import sys
import threading
import warnings

import pytest
import sweep
import torch
import transformers
import zoo

from ptuning_fast import PromptedModel, SoftPrompt

KINDS = sweep.model_types()


def test_a_model_that_changes_itself_is_put_back(torch_backend):
    """BigBird, given a short text, attends fully from then on."""
    model = sweep.build("big_bird", KINDS["big_bird"], "eager")
    kinds = [type(module) for module in model.modules()]
    buffers = dict(model.named_buffers())
    assert model.bert.attention_type == "block_sparse"
    SoftPrompt(model, 3)(*zoo.padded(zoo.texts([30, 31]), "right"))
    assert model.bert.attention_type == "block_sparse"
    assert [type(module) for module in model.modules()] == kinds
    assert all(one is buffers[name] for name, one in model.named_buffers())
    model(torch.arange(10, 14)[None])  # and so it does by itself
    assert model.bert.attention_type == "original_full"


def test_ctrl_c_in_a_probe_leaves_a_model_in_training(torch_backend):
    """At whichever line of it, that which puts the model back among them."""
    ids, mask = zoo.padded(zoo.texts([3, 5]), "right")

    def first_call(at):
        """How many lines of the probe there were, until the one before which Ctrl-C came, and which modules train."""
        model, count = zoo.build("Llama").train(), 0

        def trace(frame, event, _):
            nonlocal count
            if not frame.f_code.co_filename.endswith("ptuning_fast/models/trial.py"):
                return None
            if event == "line":
                count += 1
                if count == at:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        prompted = PromptedModel(model, 3)
        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with contextlib.suppress(KeyboardInterrupt):
                prompted(ids, mask)
        finally:
            sys.settrace(before)
        return count, all(module.training for module in model.modules())

    lines, train = first_call(None)
    assert train and lines > 500
    for at in range(1, lines + 1, lines // 60):
        assert first_call(at) == (at, True)


@pytest.mark.parametrize("kind", ["phimoe", "qwen2_moe"])  # of which packed batches are refused
def test_ctrl_c_leaves_the_attention_implementation(kind, torch_backend):
    for at in range(1, 9):
        model, calls = sweep.build(kind, KINDS[kind], "sdpa"), 0

        def stop(module, args, out, at=at):
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt

        hook = model.register_forward_hook(stop)
        prompt = SoftPrompt(model, 3)
        with contextlib.suppress(KeyboardInterrupt, TypeError):
            prompt(*zoo.padded(zoo.texts([3, 5]), "right"), mode="packed")
        if calls == at:
            assert model.config._attn_implementation == "sdpa"
        hook.remove()
    assert calls < at  # the last had its way


@pytest.mark.parametrize("mode", ["prepend", "packed", "shared"])
def test_many_threads_leave_a_model_in_training(mode, torch_backend):
    for _ in range(3):
        model = zoo.build("Llama").train()
        prompt, start, errors = SoftPrompt(model, 3), threading.Barrier(6), []

        def use(prompt=prompt, start=start, errors=errors):
            start.wait()
            try:
                prompt(*zoo.padded(zoo.texts([3, 5]), "right"), mode=mode)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=use) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors and all(module.training for module in model.modules())


@pytest.mark.parametrize("kind", ["llama, dynamic RoPE", "phi3, longrope"])
def test_rotary_positions_depend_on_the_batch_without_a_prompt_too(kind, torch_backend):
    model = sweep.build(kind, KINDS[kind], "sdpa")
    ids, mask = zoo.padded(zoo.texts([10, 40]), "right")
    alone = sweep.run(model, {"input_ids": ids[:1, :10]}, 1)[0]
    beside = sweep.run(model, {"input_ids": ids, "attention_mask": mask}, 2)[0, :10]
    assert (alone - beside).abs().max() > 0.01 * alone.abs().max()
    prompt = SoftPrompt(model, 3)
    with pytest.warns(UserWarning, match="how long the longest text of the batch is, with a prompt or without"):
        prompt(ids, mask)


def test_what_is_generated_may_cross_that_length_too(torch_backend):
    """Phi-3 then computes anew what it has cached, where it has the ids; embeddings it has but once."""
    model = sweep.build("phi3, longrope", KINDS["phi3, longrope"], "sdpa")
    prompt, steady = SoftPrompt(model, 3, init=model.get_input_embeddings()(torch.tensor([5, 6, 7]))), 24
    ids = zoo.texts([steady - 7])[0][None]
    alone = torch.cat([torch.tensor([[5, 6, 7]]), ids], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = prompt.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    expected = model.generate(alone, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected[:, alone.shape[1] :])
    for longer in ({"max_new_tokens": 5}, {"max_length": steady + 1}):
        with pytest.warns(UserWarning, match="up to 5 tokens are generated behind 20 columns: beyond 24 those of Phi3"):
            prompt.generate(ids, **longer)


SIZES = {"vocab_size": zoo.V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "pad_token_id": 1}


def test_a_head_that_is_zero_hides_nothing(torch_backend):
    """As a new one often is. ESM makes something else of embeddings than of ids."""
    model = transformers.EsmForTokenClassification(transformers.EsmConfig(**SIZES, mask_token_id=2)).eval()
    torch.nn.init.zeros_(model.classifier.weight)
    torch.nn.init.zeros_(model.classifier.bias)
    with pytest.raises(TypeError, match="makes something else of inputs_embeds"):
        SoftPrompt(model, 3)(*zoo.padded(zoo.texts([5, 9]), "right"))


@pytest.mark.parametrize("banned", [-1e4, torch.finfo(torch.float32).min])
def test_logits_that_are_banned_hide_nothing(banned, torch_backend):
    """PhiMoE's window is in its mask alone."""
    model = sweep.build("phimoe", KINDS["phimoe"], "sdpa")

    def ban(module, args, out):
        out[..., :2] = banned
        return out

    model.lm_head.register_forward_hook(ban)
    with pytest.raises(TypeError, match="a sliding window is in its mask alone"):
        SoftPrompt(model, 3)(*zoo.padded(zoo.texts([5, 9]), "right"), mode="packed")


def test_a_config_stays_as_it_was(torch_backend):
    """A classifier's keeps what kind of labels it was given first."""
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=3))
    prompted = PromptedModel(model, 3)
    assert not prompted.accepts_loss_kwargs and model.config.problem_type is None
    ids, mask = zoo.padded(zoo.texts([5, 9]), "right")
    assert prompted(ids, mask, labels=torch.rand(2, 3)).loss > 0  # several labels at once


def test_a_classifier_of_the_last_column(torch_backend):
    """XLNet's, whose texts are padded on the left; not what only its config says, as ELECTRA's."""
    electra = zoo.build("ELECTRA", "ElectraForSequenceClassification", summary_type="last")
    assert SoftPrompt(electra, 3).info.pooled == "left"
    sizes = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": zoo.V, "pad_token_id": 0}
    torch.manual_seed(0)
    config = transformers.XLNetConfig(**sizes, initializer_range=0.3, summary_type="last")
    model = transformers.XLNetForSequenceClassification(config).eval()
    prompt, texts = SoftPrompt(model, 3), zoo.texts([5, 9])
    for side in ("left", "right"):
        logits = model(**prompt(*zoo.padded(texts, side))).logits
        for row, text in zip(logits, texts):
            alone = model(inputs_embeds=torch.cat([prompt.embeddings(), model.get_input_embeddings()(text)])[None])
            assert (row - alone.logits[0]).abs().max() <= zoo.TOLERANCE


def test_other_calls_are_as_before_or_packed_is_refused(torch_backend):
    """GPT-2 goes by the name of its attention implementation to compute scores in fp32."""
    model = zoo.build("GPT-2", attn_implementation="eager", reorder_and_upcast_attn=True).half()
    ids, mask = zoo.padded(zoo.texts([5, 9]), "right")
    before = model(ids, attention_mask=mask).logits
    with pytest.raises(TypeError, match="computes otherwise where its attention implementation has another name"):
        SoftPrompt(model, 3)(ids, mask, mode="packed")
    assert model.config._attn_implementation == "eager" and torch.equal(model(ids, attention_mask=mask).logits, before)


def test_labels_of_a_decoder_may_have_the_shape_of_the_encoders_mask(torch_backend):
    prompted = PromptedModel(sweep.build("t5gemma", KINDS["t5gemma"], "eager"), 3)
    ids, mask = zoo.padded(zoo.texts([5, 9]), "right")
    assert prompted(ids, mask, labels=ids, num_items_in_batch=18).loss > 0


class Subclass(torch.nn.Parameter):
    """As quantisation libraries make of a table."""


def _offloaded(model):
    pytest.importorskip("accelerate").cpu_offload(model, execution_device="cpu")


def _of_a_subclass(model):
    table = model.get_input_embeddings()
    table.weight = Subclass(table.weight.data, requires_grad=False)


def _of_tuples(model):
    model.config.return_dict = False


@pytest.mark.parametrize("change", [_offloaded, _of_a_subclass, _of_tuples])
@pytest.mark.parametrize(
    ("kind", "mode", "message"),
    [("rwkv", "prepend", "counts padding on the left"), ("qwen2_moe", "packed", "a sliding window is in its mask")],
)
def test_wherever_the_table_is_and_whatever_outputs_are(kind, mode, message, change, torch_backend):
    model = sweep.build(kind, KINDS[kind], "eager" if kind == "rwkv" else "sdpa")
    change(model)
    prompt = SoftPrompt(model, 3)
    with pytest.raises((TypeError, ValueError), match=message):
        prompt(*zoo.padded(zoo.texts([30, 12]), "left"), mode=mode)
    assert (getattr(model.config, "return_dict", True) is False) == (change is _of_tuples)


def test_token_types_that_are_in_a_mask(torch_backend):
    """HrmText's, whose prefixes attend in both directions: it is given no packed batch."""
    with pytest.raises(TypeError, match="HrmTextForCausalLM, probed, cannot be given a packed batch"):
        SoftPrompt(sweep.build("hrm_text", KINDS["hrm_text"], "sdpa"), 3)(
            *zoo.padded(zoo.texts(), "right"), mode="packed"
        )


def test_token_types_of_another_shape_are_no_obstacle(torch_backend, recwarn):
    """TAPAS has seven a token."""
    tapas = transformers.TapasModel(transformers.TapasConfig(**SIZES, max_position_embeddings=64)).eval()
    SoftPrompt(tapas, 3)(*zoo.padded(zoo.texts(), "right"))
    assert not any("could not be probed" in str(one.message) for one in recwarn)


def test_a_block_that_is_all_that_a_model_takes(torch_backend, recwarn):
    """nanoGPT's name for its positions: nothing stands against a packed batch."""

    class Own(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, **kwargs):
            rows = input_ids if inputs_embeds is None else inputs_embeds
            assert rows.shape[1] <= 40 if position_ids is None else position_ids.max() < 40
            return super().forward(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, **kwargs)

    config = zoo.build("Llama").config
    config.block_size = 40
    inputs = SoftPrompt(Own(config).eval(), 3)(*zoo.padded(zoo.texts(), "right"), mode="packed")
    assert inputs["inputs_embeds"].shape[0] == 1 and not any("probed" in str(one.message) for one in recwarn)


def test_attention_by_blocks_that_are_longer_than_a_short_text(torch_backend):
    """LongT5's global ones, of 16 tokens: padding on the left moves them."""
    sizes = {"d_model": zoo.D, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    config = transformers.LongT5Config(vocab_size=zoo.V, **sizes, encoder_attention_type="transient-global")
    torch.manual_seed(0)
    prompt = SoftPrompt(transformers.LongT5ForConditionalGeneration(config).eval(), 3)
    with pytest.raises(ValueError, match="counts padding on the left"):
        prompt(*zoo.padded(zoo.texts([60, 49]), "left"))


def test_what_may_be_otherwise_later_is_said_before_anything_is_run(torch_backend, monkeypatch):
    """Processes that share a sharded model would wait for each other: each tries again when it has such a batch."""
    model = sweep.build("mixtral", KINDS["mixtral"], "sdpa")
    model.config.output_router_logits = True
    prompt = SoftPrompt(model, 3)
    monkeypatch.setattr("ptuning_fast.models.probe.call", None)
    for mode in ("packed", "shared"):
        with pytest.raises(ValueError, match="output_router_logits"):
            prompt._mode(mode)


def test_a_model_that_cannot_be_probed(torch_backend):
    """Nothing is known of it: that is said, and it is given no packed batch."""

    class NeedsMore(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, *, scale, **kwargs):
            return super().forward(input_ids, attention_mask, inputs_embeds=inputs_embeds, **kwargs)

    model = NeedsMore(zoo.build("Llama").config).eval()
    ids, mask = zoo.padded(zoo.texts(), "right")
    with pytest.warns(UserWarning, match=r"could not be probed \(it cannot be called with ids alone: .*'scale'"):
        inputs = SoftPrompt(model, 3)(ids, mask, mode="auto")
    assert inputs["inputs_embeds"].shape[0] == len(ids)
    with pytest.raises(TypeError, match=r"cannot be given a packed batch .it cannot be called with ids alone"):
        SoftPrompt(model, 3)(ids, mask, mode="packed")


class First(transformers.BertPreTrainedModel):
    """A head of one's own on the first column, and no pooler by which that could be known."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.head = torch.nn.Linear(config.hidden_size, 4)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, position_ids=None):
        given = {"inputs_embeds": inputs_embeds, "position_ids": position_ids}
        out = self.bert(input_ids, attention_mask, **given)
        return transformers.modeling_outputs.ModelOutput(logits=self.head(out.last_hidden_state[:, 0]))


def test_a_head_that_reads_the_first_column(torch_backend):
    """Padding on the left takes it."""
    torch.manual_seed(0)
    prompt = SoftPrompt(First(zoo.build("BERT").config).eval(), 3)
    with pytest.raises(ValueError, match="padding on the left"):
        prompt(*zoo.padded(zoo.texts(), "left"))
    assert len(prompt(*zoo.padded(zoo.texts(), "right"))["inputs_embeds"]) == len(zoo.texts())


def test_a_forward_on_a_model_of_the_table_is_probed(torch_backend):
    model = zoo.build("BERT")
    whole = model.forward

    def forward(*args, inputs_embeds=None, position_ids=None, **kwargs):
        out = whole(*args, inputs_embeds=inputs_embeds, position_ids=position_ids, **kwargs)
        out["last"] = out.last_hidden_state[:, -1]
        return out

    model.forward = forward
    with pytest.warns(UserWarning, match="depend on the padding beside a text"):
        SoftPrompt(model, 3)(*zoo.padded(zoo.texts(), "right"))


@pytest.mark.parametrize("kind", ["ernie", "longformer"])
def test_a_pooler_that_reads_the_first_column(kind, torch_backend):
    """A call warns of it, and serves the hidden states."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    sizes |= {"attention_window": [8, 8]} if kind == "longformer" else {}
    config = transformers.AutoConfig.for_model(kind, vocab_size=zoo.V, **sizes)
    model = transformers.AutoModel.from_config(config).eval().requires_grad_(False)
    prompt = SoftPrompt(model, 3)
    ids, mask = zoo.padded(zoo.texts(), "left")
    with pytest.warns(UserWarning, match="the pooler_output of .* reads the first column"):
        rows = model(**prompt(ids, mask)).last_hidden_state[:, 3:]
    for row, text in enumerate(zoo.texts()):
        alone = model(**prompt(text[None], torch.ones_like(text)[None])).last_hidden_state[0, 3:]
        assert zoo.same(rows[row][mask[row] != 0], alone)
