"""Outputs of a PromptedModel: those of the text's columns, wherever they stand, and nothing else cut."""

import functools
import warnings
from typing import NamedTuple

import accelerate
import pytest
import torch
import transformers
import zoo

from ptuning_fast import PromptedModel, SoftPrompt
from ptuning_fast.models.families import has_own_forward

pytestmark = pytest.mark.usefixtures("torch_backend")


def test_pooled_outputs():
    """Of a packed batch there is none, and one that is as wide as a text is long is none per column."""
    model = zoo.build("BERT")
    ids, mask = zoo.padded(zoo.texts(), "right")
    assert PromptedModel(model, 3, mode="packed")(ids, mask).pooler_output is None
    prompted = PromptedModel(model, 3, mode="prepend").eval()
    for n in (4, zoo.D - 3, zoo.D):
        ids = torch.randint(5, 90, (2, n))
        assert prompted(ids).pooler_output.shape == (2, zoo.D)


@pytest.mark.parametrize("name", ["Llama", "BERT"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states_of_classifiers_stand_with_their_tokens(name, side):
    """Decoders are given their padding on the left, encoders on the right, whatever the batch has."""
    model = zoo.build(name, {"Llama": "LlamaForSequenceClassification", "BERT": "BertForSequenceClassification"}[name])
    prompted = PromptedModel(model, 3).eval()
    ids, mask = zoo.padded(zoo.texts(), side)
    found = prompted(ids, mask, output_hidden_states=True).hidden_states[-1]
    for row, text in enumerate(zoo.texts()):
        alone = prompted(text[None], torch.ones_like(text)[None], output_hidden_states=True).hidden_states[-1][0]
        assert zoo.same(found[row][mask[row] != 0], alone)


@pytest.mark.parametrize("kind", ["Llama", "BERT", "RoBERTa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_attentions_of_classifiers_are_in_the_order_of_the_batch(kind, side):
    """The virtual tokens are next to a decoder's text, and first in an encoder's row."""
    name = {"BERT": "Bert", "RoBERTa": "Roberta"}.get(kind, kind)
    model = zoo.build(kind, f"{name}ForSequenceClassification").eval()
    model.set_attn_implementation("eager")
    prompted = PromptedModel(model, 3).eval()
    ids, mask = zoo.padded(zoo.texts(), side)
    found = prompted(ids, mask, output_attentions=True).attentions
    for row, text in enumerate(zoo.texts()):
        alone = prompted(text[None], output_attentions=True).attentions
        tokens = mask[row].nonzero()[:, 0]
        first = int(tokens[0]) if kind == "Llama" else 0
        columns = torch.cat([torch.arange(first, first + 3), 3 + tokens])
        for one, expected in zip(found, alone):
            assert zoo.same(one[row][:, columns][:, :, columns], expected[0])


def test_an_encoder_whose_config_is_that_of_both():
    kind = transformers.UMT5ForTokenClassification
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "vocab_size": zoo.V}
    prompted = PromptedModel(kind(kind.config_class(**sizes)), 3).eval()
    assert prompted.config.is_encoder_decoder
    ids, mask = zoo.padded(zoo.texts(), "right")
    assert prompted(ids, mask).logits.shape[:2] == ids.shape


def test_encoder_states_have_no_rows_of_the_prompt():
    t5 = PromptedModel(zoo.build("T5"), 3).eval()
    ids, mask = zoo.padded(zoo.texts(), "right")
    out = t5(ids, mask, decoder_input_ids=ids[:, :2], output_hidden_states=True)
    assert out.encoder_last_hidden_state.shape[:2] == ids.shape
    assert out.encoder_hidden_states[0].shape[:2] == ids.shape and out.logits.shape[1] == 2


@pytest.mark.parametrize("class_name", ["BigBirdModel", "BigBirdForMaskedLM", "PegasusXModel"])
@pytest.mark.parametrize("n", [40, 41])
def test_inner_states_of_blocks_that_a_model_fills_up(class_name, n):
    """BigBird and Pegasus-X put columns behind the batch, and take them off what they return alone."""
    kind = getattr(transformers, class_name)
    sizes = {"vocab_size": zoo.V, "pad_token_id": 0}
    if class_name.startswith("BigBird"):
        sizes |= {"hidden_size": zoo.D, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        sizes |= {"block_size": 2, "num_random_blocks": 1}
    else:
        sizes |= {"d_model": zoo.D, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 48, "block_size": 4}
        sizes |= {"decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
        sizes |= {"num_global_tokens": 60}
    model = kind(kind.config_class(**sizes)).eval().requires_grad_(False)
    prompt = SoftPrompt(model, 3)
    ids = torch.randint(5, zoo.V, (2, n))
    options = {"decoder_input_ids": ids[:, :2]} if prompt.info.has_decoder else {}
    name = "encoder_hidden_states" if options else "hidden_states"

    def states(one, *args, **given):
        found = one(*args, **given, **options, output_hidden_states=True)[name]
        return [tensor for state in found for tensor in (state if isinstance(state, tuple) else (state,))]

    expected = states(model, **prompt(ids))
    assert any(one.shape[1] == 44 for one in expected)  # a whole number of blocks
    found = states(PromptedModel(model, prompt=prompt).eval(), ids)
    assert len(found) == len(expected) == 3 + bool(options)
    for one, other in zip(found, expected):
        assert zoo.same(one, other if other.shape[1] == 60 else other[:, 3 : n + 3])


@pytest.mark.parametrize("n", [5, 6, 9])
def test_regions_of_images_that_are_as_many_as_columns(n):
    """LXMERT's are 36 whatever the text: here 9, behind 3 virtual tokens."""
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 32, "visual_feat_dim": 8}
    config = transformers.LxmertConfig(vocab_size=zoo.V, l_layers=1, x_layers=1, r_layers=1, **sizes)
    model = transformers.LxmertModel(config).eval()
    (ids, mask), draw = zoo.padded(zoo.texts([n, n]), "right"), torch.Generator().manual_seed(0)
    regions = {name: torch.rand(2, 9, w, generator=draw) for name, w in (("visual_feats", 8), ("visual_pos", 4))}
    regions["visual_attention_mask"] = torch.ones(2, 9)
    with pytest.warns(UserWarning, match="could not be probed"):
        prompted = PromptedModel(model, 3).eval()
        out = prompted(ids, mask, **regions)
    expected = model(**prompted.prompt(ids, mask), **regions)
    assert zoo.same(out.vision_output, expected.vision_output)
    assert zoo.same(out.language_output, expected.language_output[:, 3:])


class Pair(NamedTuple):
    one: object
    other: list


class WithValues(transformers.LlamaForCausalLM):
    """A value of each token, as reinforcement learning has it, and nine classes, as many as the probe has columns."""

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, position_ids=None, labels=None, **kwargs
    ):
        given = {"inputs_embeds": inputs_embeds, "position_ids": position_ids, "labels": labels}
        out = super().forward(input_ids, attention_mask, **given, **kwargs)
        out["values"] = out.logits[..., 7]
        nested = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=out.logits)
        out["more"] = ({"values": out["values"], "two": out.logits}, Pair(nested, [out["values"]]))
        out["classes"] = self.lm_head.weight[:9].expand(len(out.logits), -1, -1)
        return out


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", ["auto", "prepend", "packed"])
@pytest.mark.filterwarnings("error::UserWarning", "ignore:the forward of WithValues is not transformers' own")
def test_a_number_for_each_token(mode, side):
    ids, mask = zoo.padded(zoo.texts(), side)
    torch.manual_seed(0)
    model = WithValues(zoo.build("Llama").config).eval().requires_grad_(False)
    out = PromptedModel(model, 3, mode=mode).eval()(ids, mask)
    for values in (out["values"], out["more"][0]["values"], out["more"][1].other[0]):
        assert values.shape == ids.shape
        assert torch.equal(values[mask != 0], out.logits[..., 7][mask != 0])
    assert torch.equal(out["more"][0]["two"], out.logits)
    assert torch.equal(out["more"][1].one.last_hidden_state, out.logits)
    for n in (5, 6, 7):  # behind three virtual tokens there are nine columns in one of these
        ids = torch.stack(zoo.texts([n, n]))
        assert PromptedModel(model, 3, mode="prepend").eval()(ids)["classes"].shape[1] == 9


class WithMore(transformers.LlamaForCausalLM):
    """Outputs that two short texts alone do not give."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        position_ids=None,
        labels=None,
        more=False,
        **kwargs,
    ):
        out = super().forward(
            input_ids, attention_mask, inputs_embeds=inputs_embeds, position_ids=position_ids, labels=labels, **kwargs
        )
        if more:
            out["values"] = out.logits[..., 7]
        return out


@pytest.mark.parametrize(("mode", "taken", "columns"), [("prepend", "no", 9), ("packed", "its", 6)])
def test_outputs_that_cannot_be_tried_are_warned_of(mode, taken, columns):
    ids = torch.stack(zoo.texts([6, 6]))
    prompted = PromptedModel(WithMore(zoo.build("Llama").config).eval().requires_grad_(False), 3, mode=mode).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="the forward of WithMore is not transformers' own")
        prompted(ids)
    with pytest.warns(
        UserWarning, match=f"values has a row for each column could not be tried.*{taken} rows on virtual"
    ):
        assert prompted(ids, more=True)["values"].shape == (2, columns)


class Joint(transformers.BertForTokenClassification):
    """Slots and the intent, and a loss that needs no labels."""

    def __init__(self, config):
        super().__init__(config)
        self.intent = torch.nn.Linear(config.hidden_size, 4)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, position_ids=None, **kwargs):
        given = {"inputs_embeds": inputs_embeds, "position_ids": position_ids, "output_hidden_states": True}
        out = super().forward(input_ids, attention_mask, **given, **kwargs)
        out["intent"] = self.intent(out.hidden_states[-1][:, 0])
        out["loss"] = out["intent"].softmax(-1).prod(0).sum()
        return out


def test_what_a_forward_of_ones_own_makes_of_each_text():
    """None of it is to be made of a packed batch, which is one row."""
    ids, mask = zoo.padded(zoo.texts(), "right")
    torch.manual_seed(0)
    model = Joint(zoo.build("BERT").config).eval().requires_grad_(False)
    prompts = {mode: PromptedModel(model, 3, mode=mode).eval() for mode in ("auto", "prepend", "packed")}
    for one in prompts.values():
        one.prompt.load_state_dict(prompts["auto"].prompt.state_dict())
    found, expected = prompts["auto"](ids, mask), prompts["prepend"](ids, mask)
    assert zoo.same(found.intent, expected.intent) and zoo.same(found.loss, expected.loss)
    for row, text in enumerate(zoo.texts()):
        alone = prompts["auto"](text[None], torch.ones_like(text)[None])
        assert zoo.same(found.intent[row], alone.intent[0])
    assert prompts["auto"].prompt(ids, mask, mode="auto")["inputs_embeds"].shape[0] == len(ids)
    with pytest.warns(UserWarning, match="the forward of Joint is not transformers' own.*: what it gives for each"):
        assert prompts["packed"](ids, mask).intent.shape == (1, 4)


def with_mean(out):
    out["mean"] = out.last_hidden_state.mean(1)
    return out


def by_a_forward(model):
    whole = model.forward

    @functools.wraps(whole)
    def forward(*args, **kwargs):
        return with_mean(whole(*args, **kwargs))

    model.forward = forward


def by_a_call(model):
    class Mine(type(model)):
        def __call__(self, *args, **kwargs):
            return with_mean(super().__call__(*args, **kwargs))

    model.__class__ = Mine


def by_a_hook(model):
    model.register_forward_hook(lambda module, args, out: with_mean(out))


def by_a_hook_of_accelerates(model):
    class Mine(accelerate.hooks.ModelHook):
        def post_forward(self, module, output):
            return with_mean(output)

    accelerate.hooks.add_hook_to_module(model, Mine())


def by_a_hook_that_looks_like_another(model):
    hook = functools.wraps(accelerate.cpu_offload)(lambda module, args, out: with_mean(out))
    model.register_forward_hook(hook)


def in_lower_precision(model):
    accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)


def offloaded(model):
    accelerate.cpu_offload(model, execution_device="cpu")


@pytest.mark.parametrize("around", [None, in_lower_precision])
@pytest.mark.parametrize(
    "change", [by_a_forward, by_a_call, by_a_hook, by_a_hook_of_accelerates, by_a_hook_that_looks_like_another]
)
def test_what_somebody_has_put_around_a_model(change, around):
    """Whatever Accelerate puts around that, too."""
    model = zoo.build("BERT")
    change(model)
    if around is not None:
        around(model)
    ids, mask = zoo.padded(zoo.texts(), "right")
    assert PromptedModel(model, 3).eval()(ids, mask)["mean"].shape == (len(ids), zoo.D)
    with pytest.warns(UserWarning, match="not transformers' own, or a hook, forward or block of your own"):
        out = PromptedModel(model, 3, mode="packed").eval()(ids, mask)
    assert out["mean"].shape == (1, zoo.D) and out.pooler_output is None and "pooler_output" not in out
    accelerate.state.AcceleratorState._reset_state()


@pytest.mark.parametrize("change", [in_lower_precision, offloaded])
def test_what_leaves_outputs_alone_costs_no_saving(change):
    model = zoo.build("BERT")
    change(model)
    ids, mask = zoo.padded(zoo.texts(), "right")
    assert len(SoftPrompt(model, 3)(ids, mask, mode="auto")["inputs_embeds"]) == 1
    accelerate.state.AcceleratorState._reset_state()
    model = zoo.build("BERT")
    model.forward = torch.compile(model.forward)
    assert not has_own_forward(model)


class ByFlag(transformers.LlamaModel):
    """One name, pooled or not; names that transformers has for other things; numbers that are no tensor."""

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, position_ids=None, pool=True, tags=False, **rest
    ):
        given = {"inputs_embeds": inputs_embeds, "position_ids": position_ids}
        out = super().forward(input_ids, attention_mask, **given, **rest)
        rows = out.last_hidden_state
        out["embeddings"] = rows.mean(1) if pool else rows
        for name in ("pool_attentions", "state", "image_scores"):
            out[name] = rows[..., 3]
        if tags:
            out["tags"] = rows.argmax(-1).tolist()
            out["array"] = rows[..., 0].numpy()
            out["names"] = [[str(one) for one in text] for text in out["tags"]]
        return out


def test_outputs_of_ones_own_go_by_no_name():
    ids = torch.stack(zoo.texts([6, 6]))
    torch.manual_seed(0)
    config = zoo.build("Llama", attn_implementation="eager").config
    prompted = PromptedModel(ByFlag(config).eval(), 3).eval()
    out = prompted(ids)
    assert out.embeddings.shape == (2, zoo.D)
    for name in ("pool_attentions", "state", "image_scores"):
        assert torch.equal(out[name], out.last_hidden_state[..., 3])
    with pytest.warns(UserWarning, match="whether embeddings has a row for each column could not be tried.*its rows"):
        out = prompted(ids, pool=False)
    assert torch.equal(out.embeddings, out.last_hidden_state)
    assert prompted(ids, output_attentions=True, pool=True).attentions[0].shape[-1] == 9


def test_numbers_that_are_no_tensor_are_warned_of():
    ids = torch.stack(zoo.texts([6, 6]))
    prompted = PromptedModel(ByFlag(zoo.build("Llama").config).eval().requires_grad_(False), 3).eval()
    with torch.no_grad(), pytest.warns(UserWarning, match="has what is no tensor: that of virtual") as seen:
        out = prompted(ids, tags=True)
    assert len(out["tags"][0]) == 9 and out["array"].shape == (2, 9)
    assert [str(one.message).split()[0] for one in seen if "no tensor" in str(one.message)] == [
        "array",
        "names",
        "tags",
    ]


class Tagged(transformers.T5ForConditionalGeneration):
    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, decoder_input_ids=None, labels=None, **kwargs
    ):
        given = {"inputs_embeds": inputs_embeds, "decoder_input_ids": decoder_input_ids, "labels": labels}
        out = super().forward(input_ids, attention_mask, **given, **kwargs)
        out["tags"] = out.encoder_last_hidden_state[..., :3]
        return out


@pytest.mark.parametrize("columns", [2, 9])
def test_an_encoder_decoder_of_ones_own(columns):
    ids = torch.stack(zoo.texts([6, 6]))
    torch.manual_seed(0)
    prompted = PromptedModel(Tagged(zoo.build("T5").config).eval(), 3).eval()
    out = prompted(ids, decoder_input_ids=torch.ones(2, columns).long(), output_hidden_states=True)
    assert torch.equal(out.tags, out.encoder_last_hidden_state[..., :3]) and out.tags.shape[1] == 6
    assert out.logits.shape[1] == out.decoder_hidden_states[0].shape[1] == columns


def test_a_known_model_is_not_called_for_its_outputs():
    """Whoever looks at its layers sees the call alone."""
    model, seen = zoo.build("Llama"), []
    prompted = PromptedModel(model, 3, mode="prepend").eval()
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    ids = torch.stack(zoo.texts([6, 6]))
    prompted(ids, output_hidden_states=True)
    assert seen == [1]


def test_logits_to_keep():
    """Of those that take it: the classes of classifiers are no columns."""
    ids, mask = zoo.padded(zoo.texts([6, 6]), "right")
    llama = PromptedModel(zoo.build("Llama"), 3).eval()
    whole = llama(ids, mask).logits
    for kept, columns in ((0, [0, 1, 2, 3, 4, 5]), (2, [4, 5]), (torch.tensor([1, 3]), [1, 3]), (slice(1, 3), [1, 2])):
        assert zoo.same(llama(ids, mask, logits_to_keep=kept).logits, whole[:, columns])
    bert = PromptedModel(zoo.build("BERT", "BertForSequenceClassification", num_labels=4), 3).eval()
    assert zoo.same(bert(ids, mask, logits_to_keep=2).logits, bert(ids, mask).logits)


def test_attention_weights_are_those_of_mode_prepend():
    prompted = PromptedModel(zoo.build("Llama", attn_implementation="eager"), 3).eval()
    ids, mask = zoo.padded(zoo.texts(), "right")
    out = prompted(ids, mask, output_attentions=True)
    assert out.attentions[0].shape[-1] == ids.shape[1] + 3 and out.logits.shape[1] == ids.shape[1]


def test_as_many_heads_as_columns():
    """Attentions are [B, heads, ...]: those of an encoder are not its columns."""
    model = zoo.build("BART")
    model.set_attn_implementation("eager")
    ids = torch.ones(2, 3, dtype=torch.int64)
    heads = model.config.num_attention_heads
    out = PromptedModel(model, heads - 3)(ids, decoder_input_ids=ids, output_attentions=True)
    assert out.encoder_attentions[0].shape == (2, heads, heads, heads)
    assert out.encoder_last_hidden_state.shape[1] == 3
