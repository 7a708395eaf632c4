"""SoftPrompt.loss: the model's own loss, in the mode with the fewest rows, with the head on labelled rows alone."""

import functools
import inspect
import warnings
from argparse import Namespace

import accelerate
import pytest
import sweep
import torch
import torch.nn.functional as F
import transformers
import zoo
from transformers import BambaConfig, BambaForCausalLM, FunnelConfig, FunnelModel

from ptuning_fast import PromptedModel, SoftPrompt
from ptuning_fast.loss.kinds import has_causal_loss, is_of_tokens, picks_by_mask
from ptuning_fast.loss.labelled import keeps_labelled_rows
from ptuning_fast.loss.model_loss import ModelLoss
from ptuning_fast.models import describe

CLASSES = sweep.model_types()
CAUSAL = ["llama", "qwen3", "gemma2", "gemma3_text", "cohere", "granite", "gpt2", "opt", "mixtral", "olmo2"]


def build(kind):
    return sweep.build(kind, CLASSES[kind], "eager" if kind == "gemma2" else "sdpa")


def batch(labelled, side="right"):
    ids, mask = zoo.padded(zoo.texts(), side)
    labels = ids.masked_fill(mask == 0, -100)
    if labelled == "last":  # of each text the last two tokens
        position = mask.cumsum(1)
        labels = labels.masked_fill(position <= mask.sum(1, keepdim=True) - 2, -100)
    return ids, mask, labels


def gradients(prompt, loss):
    return loss.detach(), *torch.autograd.grad(loss, prompt.prompt_embeddings)


def assert_same(actual, expected):
    for one, other in zip(actual, expected):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize(("labelled", "count"), [("all", None), ("last", None), ("last", 37)])
@pytest.mark.parametrize("mode", ["auto", "prepend", "packed"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_it_is_the_models_loss(kind, mode, labelled, count, torch_backend):
    model = build(kind)
    prompt = SoftPrompt(model, zoo.M)
    ids, mask, labels = batch(labelled, "left")
    more = {} if count is None else {"num_items_in_batch": count}
    expected = gradients(prompt, model(**prompt(ids, mask, labels=labels), **more).loss)
    assert_same(gradients(prompt, prompt.loss(ids, mask, labels=labels, mode=mode, **more)), expected)


@pytest.mark.parametrize("mode", ["auto", "prepend"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere"])
def test_the_head_sees_rows_that_predict_a_label_alone(kind, mode, torch_backend, monkeypatch):
    model = build(kind)
    prompt = SoftPrompt(model, zoo.M)
    ids, mask, labels = batch("last")
    prompt.loss(ids, mask, labels=labels, mode=mode)
    rows = []
    head = model.get_output_embeddings().weight
    linear = torch.nn.functional.linear

    def counted(given, weight, bias=None):
        if weight is head:
            rows.append(given.shape[:2])
        return linear(given, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)  # a hook on the head would have all rows
    prompt.loss(ids, mask, labels=labels, mode=mode)
    labelled = int((labels != -100).sum())
    columns = int((labels != -100).any(0).sum())
    assert rows == [(1, labelled) if mode == "auto" else (len(ids), columns)]


def test_a_head_that_cannot_be_told_has_all_rows(torch_backend):
    """One with a loss of its own, which takes both arguments and heeds neither."""

    class OwnLoss(type(zoo.build("Llama"))):
        def forward(self, input_ids=None, inputs_embeds=None, shift_labels=None, logits_to_keep=0, **kwargs):
            out = super().forward(input_ids, inputs_embeds=inputs_embeds, **kwargs)
            return out if out.loss is None else type(out)(loss=2 * out.loss, logits=out.logits)

    model = OwnLoss(zoo.build("Llama").config).eval().requires_grad_(False)
    model.loss_type = "ForCausalLM"
    prompt = SoftPrompt(model, zoo.M)
    ids, mask, labels = batch("last")
    expected = model(**prompt(ids, mask, labels=labels)).loss
    torch.testing.assert_close(prompt.loss(ids, mask, labels=labels), expected, rtol=1e-5, atol=0)


class LooksBack(torch.nn.Module):
    """What stands behind the attention, given a sum of two rows."""

    def __init__(self, inner, rows):
        super().__init__()
        self.inner, self.rows = inner, rows
        self.weight = getattr(inner, "weight", None)

    def forward(self, hidden):
        return self.inner(hidden + 0.5 * F.pad(hidden, (0, 0, self.rows, 0))[:, : -self.rows])


@pytest.mark.parametrize("rows", [1, 2, 6, 12])
@pytest.mark.parametrize("part", ["head", "norm", "feed-forward"])
@pytest.mark.parametrize("kind", ["Llama", "GPT-2"])
def test_rows_that_see_others_behind_the_attention(kind, part, rows, torch_backend):
    """Neither of a text before in a packed batch, nor of whichever rows are labelled."""
    model = zoo.build(kind).eval()
    body = model.base_model
    norm, layer = ("norm", body.layers[-1]) if kind == "Llama" else ("ln_f", body.h[-1])
    place, name = {"head": (model, "lm_head"), "norm": (body, norm), "feed-forward": (layer, "mlp")}[part]
    setattr(place, name, LooksBack(getattr(place, name), rows))
    ids = torch.randint(3, 97, (2, 30), generator=torch.Generator().manual_seed(3))
    mask, place = torch.ones_like(ids), torch.arange(30)
    labels = ids.masked_fill((place < 20) | (place > 23), -100)
    for m in (1, 4):
        prompt = SoftPrompt(model, m)
        expected = gradients(prompt, model(**prompt(ids, mask, labels=labels)).loss)
        assert_same(gradients(prompt, prompt.loss(ids, mask, labels=labels, mode="prepend")), expected)
        assert_same(gradients(prompt, prompt.loss(ids, mask, labels=labels)), expected)
        for mode in ("packed", "shared"):
            with pytest.raises(TypeError, match="cannot be given a packed batch"):
                prompt(ids, mask, mode=mode)


def test_a_loss_over_all_logits_has_all_rows(torch_backend):
    """Bamba's z-loss is too small for the loss of a short text to show it."""
    sizes = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "attn_layer_indices": [1]}
    sizes |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    for weight in (0.0, 1e-4):
        config = BambaConfig(vocab_size=zoo.V, num_key_value_heads=2, z_loss_coefficient=weight, **sizes)
        model = BambaForCausalLM(config).eval().requires_grad_(False)
        assert keeps_labelled_rows(model, describe(model)) == (weight == 0)


def test_models_without_a_causal_loss(torch_backend):
    ids, mask, labels = batch("all")
    for name, class_name, given in (
        ("BERT", "BertForMaskedLM", labels),
        ("BERT", "BertForSequenceClassification", torch.tensor([0, 1, 1, 0])),
        ("Llama", "LlamaForSequenceClassification", torch.tensor([0, 1, 1, 0])),
        ("BERT", "BertForTokenClassification", labels.clamp(max=1)),
    ):
        model = zoo.build(name, class_name)
        prompt = SoftPrompt(model, zoo.M)
        expected = gradients(prompt, model(**prompt(ids, mask, labels=given)).loss)
        for mode in ("auto", "prepend"):
            assert_same(gradients(prompt, prompt.loss(ids, mask, labels=given, mode=mode)), expected)
    with pytest.raises(ValueError, match="needs labels"):
        prompt.loss(ids, mask)


def test_nothing_labelled_is_what_the_model_says_of_it(torch_backend):
    model = build("llama")
    prompt = SoftPrompt(model, zoo.M)
    ids, mask, labels = batch("all")
    labels = torch.full_like(labels, -100)
    assert model(**prompt(ids, mask, labels=labels)).loss.isnan() and prompt.loss(ids, mask, labels=labels).isnan()


def test_auto_takes_the_fewest_rows_that_are_exact_as_the_model_stands(torch_backend):
    ids, mask, labels = batch("all")
    columns = {"prepend": zoo.M + ids.shape[1], "packed": int(mask.sum()) + zoo.M * len(ids)}
    columns["shared"] = int(mask.sum()) + len(ids) + zoo.M - 1

    def taken(prompt, **options):
        return prompt(ids, mask, labels=labels, mode="auto", **options)["inputs_embeds"].shape[1]

    model = zoo.build("Llama")
    assert taken(SoftPrompt(model, zoo.M)) == columns["shared"]
    model.gradient_checkpointing_enable()
    assert taken(SoftPrompt(model.train(), zoo.M)) == columns["shared"]
    bank = SoftPrompt(model, zoo.M, num_prompts=2)
    assert taken(bank, prompt_index=torch.tensor([0, 1, 1, 0])) == columns["packed"]
    gpt2 = zoo.build("GPT-2")
    prompt = SoftPrompt(gpt2, zoo.M)
    assert taken(prompt) == columns["shared"]
    gpt2.train()  # with dropout
    assert taken(prompt) == columns["packed"]
    assert taken(SoftPrompt(zoo.build("BERT"), zoo.M)) == columns["packed"]
    assert taken(SoftPrompt(zoo.build("Bloom"), zoo.M)) == columns["prepend"]
    funnel = FunnelModel(FunnelConfig(vocab_size=1000, d_model=zoo.D, n_head=4, d_head=8, d_inner=64))
    # Its own forward fails on two tokens, as the probe gives it.
    assert SoftPrompt(funnel, zoo.M)(ids, mask, mode="auto")["inputs_embeds"].shape[1] == columns["prepend"]
    # Of as many rows, those without ado: one text has nothing to share, and no padding.
    inputs = SoftPrompt(model, zoo.M)(ids[3:], mask[3:], mode="auto")
    assert "cu_seq_lens_q" not in inputs


def test_auto_falls_back_when_a_model_is_changed(torch_backend):
    """What stands against a mode is looked for at each call, not at the first alone."""
    ids, mask = zoo.padded(zoo.texts(), "right")
    mixture = build("mixtral")
    prompt = SoftPrompt(mixture, 3)
    assert prompt(ids, mask, mode="auto")["inputs_embeds"].shape[0] == 1
    mixture.config.output_router_logits = True
    assert prompt(ids, mask, mode="auto")["inputs_embeds"].shape[0] == len(ids)
    model = build("llama")
    prompt = SoftPrompt(model, 3)
    assert "prefix_length" in prompt(ids, mask, mode="auto")
    prompt(ids, mask, mode="packed")  # probed, which flash attention cannot be here
    model.config._attn_implementation = "flash_attention_2"  # as where it is installed
    inputs = prompt(ids, mask, mode="auto")
    assert "prefix_length" not in inputs and inputs["inputs_embeds"].shape[0] == 1
    model.set_attn_implementation("flex_attention")
    assert prompt(ids, mask, mode="auto")["inputs_embeds"].shape[0] == len(ids)


def test_a_loss_that_counts_what_has_no_label(torch_backend, recwarn):
    """As ELECTRA's of replaced tokens, which goes by the mask; it is warned of once."""
    ids, mask, labels = batch("all")
    for kind, class_name in (("BERT", "BertForTokenClassification"), ("Llama", None)):
        model = zoo.build(kind, class_name)
        SoftPrompt(model, 3)(ids, mask, labels=labels % 2 if class_name else labels)
    assert not recwarn.list
    prompt = SoftPrompt(zoo.build("ELECTRA", "ElectraForPreTraining"), 3)
    with pytest.warns(UserWarning, match="ElectraForPreTraining counts rows whose label is -100"):
        prompt(ids, mask, labels=labels % 2)
    recwarn.clear()
    prompt(ids, mask, labels=labels % 2)
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_model_that_accelerate_has_prepared(kind, torch_backend):
    """Its forward is then one under autocast: as exact as that is, and no less is saved."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    ids, mask, labels = batch("last")
    model = build(kind).requires_grad_(False)
    start = torch.randn(3, zoo.D, generator=torch.Generator().manual_seed(8)) / 4
    expected = PromptedModel(model, prompt=SoftPrompt(model, 3, init=start))(ids, mask, labels=labels).loss
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # another test's
    prepared = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model, evaluation_mode=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert prepared is model and "forward" in vars(model)
    prompt = SoftPrompt(model, 3, init=start)
    for mode in ("prepend", "packed", "shared", "auto"):
        assert (PromptedModel(model, prompt=prompt, mode=mode)(ids, mask, labels=labels).loss - expected).abs() < 0.03
    inputs = prompt(ids, mask, labels=labels, mode="auto")
    assert "prefix_length" in inputs and prompt.has_causal_loss

    def theirs(*args, **kwargs):
        return forward(*args, **kwargs)

    theirs.__signature__ = inspect.signature(model.forward)
    forward, model.forward = model.forward, theirs
    assert "prefix_length" not in SoftPrompt(model, 3)(ids, mask, labels=labels, mode="auto")


def test_a_loss_function_that_is_replaced(torch_backend):
    """One that knows nothing of kept rows has all of them."""
    model = build("llama")
    prompt = SoftPrompt(model, 3)
    ids, mask, labels = batch("last")
    prompt.loss(ids, mask, labels=labels)

    def squares(logits, labels, vocab_size, **kwargs):
        assert logits.shape[1] == labels.shape[1]
        return logits.square().mean()

    model.loss_function = squares
    expected = model(**prompt(ids, mask, labels=labels)).loss
    assert_same([prompt.loss(ids, mask, labels=labels, mode="prepend")], [expected])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("BERT", "BertForMaskedLM"),
        ("BERT", "BertForTokenClassification"),
        ("BERT", "BertForSequenceClassification"),
        ("T5", "T5ForConditionalGeneration"),
        ("BART", "BartForConditionalGeneration"),
    ],
)
def test_losses_that_do_not_go_by_the_number_of_items_say_so(name, kind, torch_backend):
    model = zoo.build(name, kind)
    prompt = SoftPrompt(model, 3)
    ids, mask = zoo.padded(zoo.texts(), "right")
    labels = torch.tensor([0, 1, 1, 0]) if "Sequence" in kind else (ids % 2).masked_fill(mask == 0, -100)
    prompt.loss(ids, mask, labels=labels)
    with pytest.raises(ValueError, match=f"the loss of {kind} does not go by num_items_in_batch"):
        prompt.loss(ids, mask, labels=labels, num_items_in_batch=7)


def of_texts(out, labels):
    """The mean over texts, not over tokens; [B, S, V] logits have the label of the next column."""
    losses = F.cross_entropy(out.logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none")
    return (losses.sum(1) / (labels[:, 1:] != -100).sum(1)).mean()


def by_a_class(model):
    """`functools.wraps` hands on the module that the forward says it is of."""

    class Mine(type(model)):
        @functools.wraps(type(model).forward)
        def forward(self, *args, labels=None, **kwargs):
            out = super().forward(*args, **kwargs)
            out.loss = None if labels is None else of_texts(out, labels)
            return out

    model.__class__ = Mine


def by_a_hook(model):
    def hook(module, args, kwargs, out):
        if kwargs.get("labels") is not None:
            out.loss = of_texts(out, kwargs["labels"])
        return out

    model.register_forward_hook(hook, with_kwargs=True)


def by_a_function(model):
    whole = model.loss_function

    @functools.wraps(whole)
    def mine(logits, labels, vocab_size, **kwargs):
        return of_texts(Namespace(logits=logits), labels)

    model.loss_function = mine


HEADS = {
    ("bert", "BertForTokenClassification"): "classifier",
    ("llama", "LlamaForTokenClassification"): "score",
    ("llama", "LlamaForCausalLM"): "lm_head",
    ("mllama_text_model", "MllamaForCausalLM"): "lm_head",  # whose base_model is itself
}


@pytest.mark.filterwarnings("ignore:.*could not be probed")
@pytest.mark.parametrize("way", ["hook", "pre-hook", "forward", "forward, offloaded", "hook of Accelerate's"])
@pytest.mark.parametrize("kind", HEADS)
def test_what_somebody_has_put_around_a_head(kind, way, torch_backend):
    """It may weigh rows: a packed batch is one."""
    model = sweep.build(*kind, "sdpa").eval()
    ids, mask, _ = batch("last")

    def rows_of(labels):
        return len(SoftPrompt(model, 3)(ids, mask, labels=labels, mode="auto")["inputs_embeds"])

    assert rows_of(ids % 2) == 1

    def weighed(rows):
        return rows * torch.linspace(0.5, 1.5, len(rows))[:, None, None]

    class Mine(accelerate.hooks.ModelHook):
        def post_forward(self, module, output):
            return weighed(output)

    part = getattr(model, HEADS[kind])
    if way == "hook":
        part.register_forward_hook(lambda module, args, out: weighed(out))
    elif way == "pre-hook":
        part.register_forward_pre_hook(lambda module, args: (weighed(args[0]),))
    elif way == "hook of Accelerate's":
        accelerate.hooks.add_hook_to_module(part, Mine())
    else:
        whole = part.forward
        part.forward = lambda rows: weighed(whole(rows))
        if way == "forward, offloaded":
            accelerate.hooks.add_hook_to_module(part, accelerate.hooks.AlignDevicesHook("cpu"))
    assert rows_of(ids % 2) == rows_of(None) == len(ids)


class InFp32(torch.nn.Sequential):
    """As PEFT's examples have it around a head."""

    def forward(self, rows):
        return super().forward(rows).float()


@pytest.mark.parametrize("head", [InFp32, lambda head: torch.nn.Linear(zoo.D, zoo.V)])
def test_another_head_than_transformers_looks_for(head, torch_backend):
    """Its output embeddings are then nowhere, to transformers."""
    model = zoo.build("BERT", "BertForMaskedLM")
    model.cls = head(model.cls).requires_grad_(False)
    prompted, expected = PromptedModel(model, 3), PromptedModel(model, 3, mode="prepend")
    expected.load_state_dict(prompted.state_dict())
    ids, mask, labels = batch("last")
    losses = [one(ids, mask, labels=labels).loss for one in (prompted, expected)]
    losses.append(prompted.prompt.loss(ids, mask, labels=labels))
    logits, table = [], model.get_input_embeddings()
    for text in (row[there != 0] for row, there in zip(ids, mask)):
        rows = torch.cat([prompted.prompt.embeddings(), table(text)])[None]
        logits.append(model(inputs_embeds=rows).logits[0, 3:])
    right = F.cross_entropy(torch.cat(logits), labels[mask != 0])
    assert all(torch.allclose(loss, right, rtol=1e-4) for loss in losses)


def test_a_partial_of_transformers_loss_is_another_loss(torch_backend):
    model = build("llama")
    assert is_of_tokens(model)
    model.loss_function = functools.partial(model.loss_function, ignore_index=7)
    assert not is_of_tokens(model)


@pytest.mark.parametrize("change", [by_a_class, by_a_hook, by_a_function])
def test_what_looks_like_the_models_own_loss_and_is_not(change, torch_backend):
    ids, mask, _ = batch("last")
    labels = ids.masked_fill(mask == 0, -100)
    model = build("llama")
    change(model)
    prompt = SoftPrompt(model, 3)
    padded = model(**prompt(ids, mask, labels=labels, mode="prepend"))
    expected = gradients(prompt, of_texts(padded, F.pad(labels, (3, 0), value=-100)))
    assert_same(gradients(prompt, prompt.loss(ids, mask, labels=labels)), expected)
    assert_same(gradients(prompt, model(**prompt(ids, mask, labels=labels, mode="auto")).loss), expected)
    for mode in ("packed", "shared"):
        with pytest.warns(UserWarning, match="is not transformers' own, or a hook is on the model") as seen:
            SoftPrompt(model, 3)(ids, mask, labels=labels, mode=mode)
        assert len(seen) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            SoftPrompt(build("llama"), 3)(ids, mask, labels=labels, mode=mode)
            if change is not by_a_function:
                warnings.filterwarnings("ignore", message="the forward of .* is not transformers' own, or a hook")
            SoftPrompt(model, 3)(ids, mask, mode=mode)


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def test_a_loss_that_picks_its_labels_by_the_mask(torch_backend):
    """Not one of them would count in a packed batch."""
    config = transformers.XLMRobertaXLConfig(vocab_size=zoo.V, num_labels=3, **SIZES)
    model = transformers.XLMRobertaXLForTokenClassification(config).eval().requires_grad_(False)
    ids, mask, _ = batch("last")
    labels = (ids % 3).masked_fill(mask == 0, -100)
    prompt = SoftPrompt(model, 3)
    expected = gradients(prompt, model(**prompt(ids, mask, labels=labels)).loss)
    assert expected[1].abs().max() > 0
    assert_same(gradients(prompt, prompt.loss(ids, mask, labels=labels)), expected)
    with pytest.raises(ValueError, match="picks labels by attention_mask, which a packed batch has not"):
        prompt.loss(ids, mask, labels=labels, mode="packed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kinds_of_losses_in_half_precision(dtype):
    """In which the means over two sets of labels may be the same number."""
    decoder = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "n_layer": 1}
    for class_name, picks, causal in (
        ("BertForTokenClassification", False, False),
        ("BertForMaskedLM", False, False),
        ("ElectraForPreTraining", True, False),
        ("XLMRobertaXLForTokenClassification", True, False),
        ("BartForCausalLM", False, False),
        ("XLNetLMHeadModel", False, False),
        ("LlamaForCausalLM", False, True),
    ):
        kind = getattr(transformers, class_name)
        sizes = {**decoder, "n_head": 4, "d_inner": 48} if class_name.startswith(("Bart", "XLNet")) else SIZES
        for seed in range(4):
            torch.manual_seed(seed)
            model = kind(kind.config_class(vocab_size=2000, pad_token_id=0, **sizes)).to(dtype).eval()
            info = describe(model)
            found = picks_by_mask(model, info), has_causal_loss(model, info)
            assert found == (picks, causal), (class_name, seed)


def test_what_is_taken_for_granted_where_a_loss_cannot_be_probed(monkeypatch, torch_backend):
    """Under torch.compile, where nothing has been found out before."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    exact = {}
    for kind in ("xlm-roberta-xl", "roberta"):
        config = transformers.AutoConfig.for_model(kind, vocab_size=zoo.V, **SIZES)
        model = transformers.AutoModelForTokenClassification.from_config(config)
        exact[kind] = ModelLoss(describe(model)).is_exact_in_one_row(model, torch.zeros(1, 6).long(), True)
    assert exact == {"xlm-roberta-xl": False, "roberta": True}


def test_losses_that_weigh_tokens_or_rows(torch_backend):
    """Of a replaced loss nothing is known: all rows go through the head, in the layout of the model."""

    def weighted(logits, labels, vocab_size, num_items_in_batch=None, shift_labels=None, **kwargs):
        targets = F.pad(labels, (0, 1), value=-100)[:, 1:] if shift_labels is None else shift_labels
        weight = torch.ones(vocab_size).index_fill(0, torch.tensor([3]), 0.1)
        losses = F.cross_entropy(logits.transpose(1, 2).float(), targets, weight=weight, reduction="none")
        return (losses.sum(1) / (targets != -100).sum(1)).mean()

    ids, mask, labels = batch("last")
    labels[:, -1:] = labels[:, -1:].masked_fill(labels[:, -1:] != -100, 3)
    model = build("llama")
    model.loss_function = weighted
    prompt = SoftPrompt(model, 3)
    expected = gradients(prompt, model(**prompt(ids, mask, labels=labels)).loss)
    assert_same(gradients(prompt, prompt.loss(ids, mask, labels=labels)), expected)


def test_a_model_that_needs_more_than_ids_has_the_loss_of_its_kind(torch_backend):
    """LXMERT's is of masked tokens, whatever loss function transformers gives a class that it does not know."""
    settings = {"vocab_size": zoo.V, "hidden_size": zoo.D, "intermediate_size": 48, "num_attention_heads": 4}
    settings |= {"l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 16, "num_qa_labels": 3}
    torch.manual_seed(0)
    model = transformers.LxmertForPreTraining(transformers.LxmertConfig(**settings)).eval()
    prompted = PromptedModel(model, 3).eval()
    ids = torch.randint(5, 90, (2, 6))
    image = {"visual_feats": torch.randn(2, 4, 16), "visual_pos": torch.rand(2, 4, 4)}
    first = torch.cat([ids[:, :1], torch.full_like(ids[:, 1:], -100)], 1)
    assert torch.isfinite(prompted(ids, torch.ones_like(ids), labels=first, **image).loss)
