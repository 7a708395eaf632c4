"""SoftPrompt.loss: the model's own loss, in the mode with the fewest rows, with the head on labelled rows alone."""

import pytest
import torch
import torch.nn.functional as F
import transformers
import zoo
from causal import CAUSAL, assert_same, batch, build, gradients
from transformers import BambaConfig, BambaForCausalLM, FunnelConfig, FunnelModel

from ptuning_fast import PromptedModel, SoftPrompt
from ptuning_fast.loss.kinds import has_causal_loss, picks_by_mask
from ptuning_fast.loss.labelled import keeps_labelled_rows
from ptuning_fast.loss.model_loss import ModelLoss
from ptuning_fast.models import describe


@pytest.mark.parametrize(("labelled", "count"), [("all", None), ("last", None), ("last", 37)])
@pytest.mark.parametrize("mode", ["auto", "prepend", "packed"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_it_is_the_models_loss(kind, mode, labelled, count, torch_backend):
    model = build(kind)
    prompt = SoftPrompt(model, zoo.M)
    ids, mask, labels = batch(labelled, "left")
    more = {} if count is None else {"num_items_in_batch": count}
    expected = gradients(model(**prompt(ids, mask, labels=labels), **more).loss, prompt.prompt_embeddings)
    assert_same(gradients(prompt.loss(ids, mask, labels=labels, mode=mode, **more), prompt.prompt_embeddings), expected)


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
        expected = gradients(model(**prompt(ids, mask, labels=labels)).loss, prompt.prompt_embeddings)
        assert_same(
            gradients(prompt.loss(ids, mask, labels=labels, mode="prepend"), prompt.prompt_embeddings), expected
        )
        assert_same(gradients(prompt.loss(ids, mask, labels=labels), prompt.prompt_embeddings), expected)
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
        expected = gradients(model(**prompt(ids, mask, labels=given)).loss, prompt.prompt_embeddings)
        for mode in ("auto", "prepend"):
            assert_same(gradients(prompt.loss(ids, mask, labels=given, mode=mode), prompt.prompt_embeddings), expected)
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


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def test_a_loss_that_picks_its_labels_by_the_mask(torch_backend):
    """Not one of them would count in a packed batch."""
    config = transformers.XLMRobertaXLConfig(vocab_size=zoo.V, num_labels=3, **SIZES)
    model = transformers.XLMRobertaXLForTokenClassification(config).eval().requires_grad_(False)
    ids, mask, _ = batch("last")
    labels = (ids % 3).masked_fill(mask == 0, -100)
    prompt = SoftPrompt(model, 3)
    expected = gradients(model(**prompt(ids, mask, labels=labels)).loss, prompt.prompt_embeddings)
    assert expected[1].abs().max() > 0
    assert_same(gradients(prompt.loss(ids, mask, labels=labels), prompt.prompt_embeddings), expected)
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
