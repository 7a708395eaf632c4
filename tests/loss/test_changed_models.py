"""The loss of a model that somebody has changed: another loss function, a forward, hooks, another head."""

import functools
import inspect
import warnings
from argparse import Namespace

import accelerate
import pytest
import sweep
import torch
import torch.nn.functional as F
import zoo
from causal import assert_same, batch, build, gradients

from ptuning_fast import PromptedModel, SoftPrompt
from ptuning_fast.loss.kinds import is_of_tokens


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
    expected = gradients(model(**prompt(ids, mask, labels=labels)).loss, prompt.prompt_embeddings)
    assert_same(gradients(prompt.loss(ids, mask, labels=labels), prompt.prompt_embeddings), expected)


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
@pytest.mark.parametrize(
    "way",
    [
        *("hook", "pre-hook", "backward hook", "backward pre-hook", "hook on every module"),
        *("forward", "forward, offloaded", "hook of Accelerate's"),
    ],
)
@pytest.mark.parametrize("kind", HEADS)
def test_what_somebody_has_put_around_a_head(kind, way, torch_backend, request):
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
    elif way == "backward hook":
        part.register_full_backward_hook(lambda module, before, after: (weighed(before[0]),))
    elif way == "backward pre-hook":
        part.register_full_backward_pre_hook(lambda module, after: (weighed(after[0]),))
    elif way == "hook on every module":
        everywhere = torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, out: weighed(out) if module is part else None
        )
        request.addfinalizer(everywhere.remove)
    elif way == "hook of Accelerate's":
        accelerate.hooks.add_hook_to_module(part, Mine())
    else:
        whole = part.forward
        part.forward = lambda rows: weighed(whole(rows))
        if way == "forward, offloaded":
            accelerate.hooks.add_hook_to_module(part, accelerate.hooks.AlignDevicesHook("cpu"))
    assert rows_of(ids % 2) == rows_of(None) == len(ids)


@pytest.mark.parametrize("kind", ["forward_hook", "full_backward_hook"])
@pytest.mark.parametrize("name", ["Llama", "BERT"])
def test_hooks_on_layers(name, kind, torch_backend):
    """As one that reads or patches a hidden state at a place: `"auto"` gives them the rows and columns of the batch."""
    model = zoo.build(name).eval()
    prompted = PromptedModel(model, 3)
    ids, mask, _ = batch("last")
    assert len(prompted.prompt(ids, mask, mode="auto")["inputs_embeds"]) == 1
    layer = next(one for one in model.modules() if isinstance(one, torch.nn.ModuleList))[1]
    seen = []

    def hook(module, *given):
        seen.append((given[-1] if torch.is_tensor(given[-1]) else given[-1][0]).shape[:2])

    handle = getattr(layer, f"register_{kind}")(hook)
    prompted(ids, mask)[0].sum().backward()
    assert seen == [(len(ids), 3 + ids.shape[1])]  # and nothing of trials
    handle.remove()
    assert len(prompted.prompt(ids, mask, mode="auto")["inputs_embeds"]) == 1


class Wrapped(torch.nn.Module):
    """A layer as representation engineering wraps it, with what is set later."""

    def __init__(self, block):
        super().__init__()
        self.block, self.patch = block, None

    def forward(self, *args, **kwargs):
        out = self.block(*args, **kwargs)
        return out if self.patch is None else self.patch(out)


def wrapped(layers):
    layers[1] = Wrapped(layers[1])
    return lambda patch: setattr(layers[1], "patch", patch)


def with_a_forward(layers):
    whole = layers[1].forward
    return lambda patch: setattr(layers[1], "forward", lambda *args, **kwargs: patch(whole(*args, **kwargs)))


def of_a_class(layers):
    kind = type(layers[1])

    class Mine(kind):
        patch = None

        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            return out if self.patch is None else self.patch(out)

    layers[1].__class__ = Mine
    return lambda patch: setattr(layers[1], "patch", patch)


def of_a_class_within(layers):
    """Of the part that is left to the labelled rows."""
    kind = type(layers[-1].mlp)

    class Mine(kind):
        patch = None

        def forward(self, *args):
            out = super().forward(*args)
            return out if self.patch is None else self.patch(out)

    def set_to(patch):
        Mine.patch = staticmethod(patch)
        layers[-1].mlp.__class__ = Mine

    return set_to


def with_a_hook(layers):
    return lambda patch: layers[1].register_forward_hook(lambda module, args, out: patch(out))


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("put", [wrapped, with_a_forward, of_a_class, of_a_class_within, with_a_hook])
@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
def test_what_patches_rows_and_columns(name, put, early, torch_backend):
    """Set before the first call or after it: no probe finds a column that its texts do not have."""
    model = zoo.build(name).eval()
    layers = model.model.layers
    set_to = put(layers)
    prompted = PromptedModel(model, 3)
    ids, mask, labels = batch("last")
    labels = labels.masked_fill(mask.cumsum(1) == 1, -100)  # PromptedModel leaves them out
    labels[:, 3:-3] = -100  # few, for which the last layer's rows would be left to them

    def patch(out):
        scale = torch.ones(out.shape[:2])
        scale[1] = 1.5
        scale[:, 14:] *= 0.5
        return out * scale[..., None]

    if not early:
        prompted(ids, mask, labels=labels)
        prompted.prompt.loss(ids, mask, labels=labels)
    set_to(patch)
    expected = model(**prompted.prompt(ids, mask, labels=labels, mode="prepend")).loss
    embeds = torch.cat([prompted.prompt.embeddings().expand(len(ids), -1, -1), model.get_input_embeddings()(ids)], 1)
    given = {"inputs_embeds": embeds, "attention_mask": F.pad(mask, (3, 0), value=1)}
    plain = model(**given, labels=F.pad(labels.masked_fill(mask == 0, -100), (3, 0), value=-100)).loss
    assert torch.allclose(expected, plain, rtol=1e-5)
    assert torch.allclose(prompted(ids, mask, labels=labels).loss, expected, rtol=1e-5)
    assert torch.allclose(prompted.prompt.loss(ids, mask, labels=labels), expected, rtol=1e-5)


def test_what_is_no_change_of_somebodys_own(torch_backend):
    """Adapters, offloading, checkpointing and compiled layers leave `"auto"` its savings."""
    ids, mask, labels = batch("last")

    def rows(model):
        return len(SoftPrompt(model, 3)(ids, mask, labels=labels, mode="auto")["inputs_embeds"])

    peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install peft")
    lora = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    assert rows(peft.get_peft_model(zoo.build("Llama"), lora).eval()) == 1
    assert rows(accelerate.cpu_offload(zoo.build("Llama").eval())) == 1
    model = zoo.build("Llama").train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    assert rows(model) == 1
    for as_a_module in (True, False):
        model = zoo.build("Llama").eval()
        if as_a_module:
            model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
        else:
            model.model.layers[1].compile(backend="eager")
        assert rows(model) == 1
        model.model.layers[1].self_attn.register_forward_hook(lambda *_: None)
        assert rows(model) == len(ids)


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
    expected = gradients(of_texts(padded, F.pad(labels, (3, 0), value=-100)), prompt.prompt_embeddings)
    assert_same(gradients(prompt.loss(ids, mask, labels=labels), prompt.prompt_embeddings), expected)
    assert_same(
        gradients(model(**prompt(ids, mask, labels=labels, mode="auto")).loss, prompt.prompt_embeddings), expected
    )
    for mode in ("packed", "shared"):
        with pytest.warns(
            UserWarning, match="is not transformers' own, or a hook, forward or block of your own"
        ) as seen:
            SoftPrompt(model, 3)(ids, mask, labels=labels, mode=mode)
        assert len(seen) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            SoftPrompt(build("llama"), 3)(ids, mask, labels=labels, mode=mode)
            if change is not by_a_function:
                warnings.filterwarnings("ignore", message="the forward of .* is not transformers' own, or a hook")
            SoftPrompt(model, 3)(ids, mask, mode=mode)


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
