"""The loss in chunks of rows: the model's own, whatever its head does, and never more logits than one chunk's."""

import functools
import threading

import pytest
import sweep
import torch
import zoo
from causal import CAUSAL, assert_same, batch, build, gradients
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from ptuning_fast import SoftPrompt
from ptuning_fast.loss import chunks as of_chunks
from ptuning_fast.loss import model_loss

pytestmark = pytest.mark.usefixtures("torch_backend")
ROWS = 3  # of a chunk


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(of_chunks, "LOGITS", ROWS * sweep.V)


@pytest.fixture
def chunks(monkeypatch):
    """How many rows went through a head in chunks, one entry a loss."""
    counts, whole = [], of_chunks.in_chunks

    def counted(model, inputs, most=None):
        loss = whole(model, inputs, most)
        if most is None and loss is not None:
            counts.append(int((inputs["labels"] != -100).sum()))
        return loss

    monkeypatch.setattr(model_loss, "in_chunks", counted)
    return counts


@pytest.mark.parametrize(("mode", "labelled", "count"), [("auto", "all", None), ("prepend", "some", 37)])
@pytest.mark.parametrize("kind", CAUSAL)
def test_it_is_the_models_loss(kind, mode, labelled, count, chunks):
    model = build(kind)
    if kind == "gemma2":
        model.config.final_logit_softcapping = 0.5  # where it bends these logits
    if kind == "cohere":
        model.logit_scale = 3.0
    if kind == "granite":
        model.config.logits_scaling = 3.0
    prompt = SoftPrompt(model, zoo.M)
    ids, mask, labels = batch(labelled, "left")
    more = {} if count is None else {"num_items_in_batch": count}
    expected = gradients(model(**prompt(ids, mask, labels=labels), **more).loss, prompt.prompt_embeddings)
    assert_same(gradients(prompt.loss(ids, mask, labels=labels, mode=mode, **more), prompt.prompt_embeddings), expected)
    assert chunks == [int((labels != -100).sum())]


def test_a_tied_head_and_one_with_a_bias(chunks):
    ids, mask, labels = batch()
    for model in (zoo.build("Llama", tie_word_embeddings=True), zoo.build("Phi")):
        prompt = SoftPrompt(model, zoo.M)
        expected = gradients(model(**prompt(ids, mask, labels=labels)).loss, prompt.prompt_embeddings)
        assert_same(gradients(prompt.loss(ids, mask, labels=labels), prompt.prompt_embeddings), expected)
    assert len(chunks) == 2


@pytest.mark.parametrize("trained", [False, True])
def test_lora_in_layers_and_head(trained, chunks):
    """Where the head itself is trained all rows go through it at once."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(zoo.build("Llama"), settings).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name and (trained or "lm_head" not in name))
    prompt = SoftPrompt(model, zoo.M)
    parameters = [one for one in (*prompt.parameters(), *model.parameters()) if one.requires_grad]
    ids, mask, labels = batch("some")
    expected = gradients(model(**prompt(ids, mask, labels=labels)).loss, *parameters)
    assert_same(gradients(prompt.loss(ids, mask, labels=labels), *parameters), expected)
    assert bool(chunks) != trained
    with torch.no_grad():
        torch.testing.assert_close(prompt.loss(ids, mask, labels=labels), expected[0], rtol=1e-6, atol=0)
    assert chunks


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation makes, and is not a view of what it was given."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        there = {one.data_ptr() for one in args if torch.is_tensor(one)}
        for one in out if isinstance(out, (tuple, list)) else [out]:
            made = torch.is_tensor(one) and one.data_ptr() not in there
            self.elements = max(self.elements, one.numel() if made else 0)
        return out


@pytest.mark.parametrize("mode", ["auto", "prepend"])
def test_no_more_logits_than_a_chunks(mode, monkeypatch):
    rows, V = 8, 5000
    monkeypatch.setattr(of_chunks, "LOGITS", rows * V)
    prompt = SoftPrompt(zoo.build("Llama", vocab_size=V), zoo.M)
    ids, mask, labels = batch()
    prompt.loss(ids, mask, labels=labels, mode=mode)
    sizes = {}
    for name, call in (
        ("chunks", lambda: prompt.loss(ids, mask, labels=labels, mode=mode)),
        ("whole", lambda: prompt.model(**prompt(ids, mask, labels=labels, mode=mode)).loss),
    ):
        with Largest() as largest:  # the gradient of a chunk runs in the forward, under this mode
            call()
        sizes[name] = largest.elements
    labelled = int((labels != -100).sum())
    assert sizes["chunks"] <= rows * V < labelled * V <= sizes["whole"]


def test_under_checkpointing_autocast_and_bf16(chunks):
    ids, mask, labels = batch()
    model = zoo.build("Llama").train()
    prompt = SoftPrompt(model, zoo.M)

    def both(most):
        expected = gradients(model(**prompt(ids, mask, labels=labels)).loss, prompt.prompt_embeddings)
        actual = gradients(prompt.loss(ids, mask, labels=labels, mode="prepend"), prompt.prompt_embeddings)
        assert_same(actual, expected, *most)

    model.gradient_checkpointing_enable()
    both((1e-6, 1e-5))
    model.gradient_checkpointing_disable()
    half = (1e-3, 2**-6)  # a few roundings to 8 bits, of rows whose sums are taken in another order
    with torch.autocast("cpu", torch.bfloat16):
        both(half)
    model.bfloat16()
    both(half)
    assert len(chunks) == 3


def test_nothing_labelled(chunks):
    model = build("llama")
    prompt = SoftPrompt(model, zoo.M)
    ids, mask, labels = batch()
    nothing = torch.full_like(labels, -100)
    expected = gradients(model(**prompt(ids, mask, labels=nothing)).loss, prompt.prompt_embeddings)
    actual = gradients(prompt.loss(ids, mask, labels=nothing), prompt.prompt_embeddings)
    assert chunks == [0] and actual[0].isnan() and expected[0].isnan() and torch.equal(actual[1], expected[1])
    assert prompt.loss(ids, mask, labels=nothing, num_items_in_batch=torch.tensor(5)) == 0


def test_second_derivatives(chunks):
    model = build("llama")
    prompt = SoftPrompt(model, zoo.M)
    ids, mask, labels = batch()
    results = []
    with sdpa_kernel(SDPBackend.MATH):
        for loss in (
            prompt.loss(ids, mask, labels=labels, mode="prepend"),
            model(**prompt(ids, mask, labels=labels)).loss,
        ):
            (gradient,) = torch.autograd.grad(loss, prompt.prompt_embeddings, create_graph=True)
            results.append(gradients(gradient.square().sum(), prompt.prompt_embeddings))
    assert_same(*results, 1e-5, 1e-4)
    assert chunks


def test_a_small_gradient_of_a_scaled_loss_is_kept_in_half_precision(chunks):
    """It is scaled after it is computed; of the mean over many labels it would be below what fp16 holds."""
    model = zoo.build("Llama").half()
    prompt = SoftPrompt(model, zoo.M)
    ids, mask, labels = batch()
    found = [
        gradients(2.0**16 * one, prompt.prompt_embeddings)
        for one in (
            prompt.loss(ids, mask, labels=labels, mode="prepend", num_items_in_batch=10**6),
            model(**prompt(ids, mask, labels=labels), num_items_in_batch=10**6).loss,
        )
    ]
    assert_same(*found, 1e-3, 1e-2)
    assert chunks and found[0][1].any()


def assert_served(model):
    prompt = SoftPrompt(model, zoo.M)
    ids, mask, labels = batch()
    expected = gradients(model(**prompt(ids, mask, labels=labels)).loss, prompt.prompt_embeddings)
    assert_same(gradients(prompt.loss(ids, mask, labels=labels, mode="prepend"), prompt.prompt_embeddings), expected)


def test_whole_where_calling_the_model_does_more(chunks):
    seen = []
    hooked = build("llama")
    hooked.register_forward_hook(lambda module, args, out: seen.append(out.logits.shape[1]))
    replaced = build("llama")
    replaced.forward = functools.wraps(replaced.forward)(
        lambda *args, forward=replaced.forward, **more: forward(*args, **more)
    )
    for model in (hooked, replaced, torch.compile(build("llama"), backend="eager")):
        assert_served(model)
    assert not chunks and seen


def test_a_loss_over_the_routers_choices_that_is_asked_for_later(chunks):
    model = build("mixtral")
    prompt = SoftPrompt(model, zoo.M)
    ids, mask, labels = batch()
    prompt.loss(ids, mask, labels=labels)
    model.config.output_router_logits = True
    expected = model(**prompt(ids, mask, labels=labels)).loss
    torch.testing.assert_close(prompt.loss(ids, mask, labels=labels, mode="prepend"), expected)
    assert len(chunks) == 1


def test_losses_of_ones_own(chunks):
    """One that is no sum over labels, and one that the model is given between two calls."""
    model = build("llama")
    prompt = SoftPrompt(model, zoo.M)
    ids, mask, labels = batch()
    prompt.loss(ids, mask, labels=labels)
    assert len(chunks) == 1

    def own(logits, labels, vocab_size, shift_labels=None, **kwargs):
        return logits.float().square().mean()

    model.loss_function = own
    expected = model(**prompt(ids, mask, labels=labels)).loss
    torch.testing.assert_close(prompt.loss(ids, mask, labels=labels, mode="prepend"), expected)
    assert len(chunks) == 1


@pytest.mark.parametrize("change", ["its class", "the forward of its class", "a hook on its head", "its head's class"])
def test_a_model_that_is_changed_between_two_calls(chunks, monkeypatch, change):
    model = build("llama")
    prompt = SoftPrompt(model, zoo.M)
    ids, mask, labels = batch()
    prompt.loss(ids, mask, labels=labels)
    kind, forward = type(model), type(model).forward

    @functools.wraps(forward)
    def own(self, *args, labels=None, **kwargs):
        out = forward(self, *args, **kwargs)
        out.loss = out.logits.square().mean()
        return out

    if change == "its class":
        model.__class__ = type(kind.__name__, (kind,), {"forward": own, "__module__": kind.__module__})
    elif change == "the forward of its class":
        monkeypatch.setattr(kind, "forward", own)
    elif change == "a hook on its head":
        model.lm_head.register_forward_hook(lambda module, args, logits: logits - logits.mean(1, keepdim=True))
    else:

        class Mine(torch.nn.Linear):
            def forward(self, hidden):
                return super().forward(hidden) - super().forward(hidden).mean(1, keepdim=True)

        model.lm_head.__class__ = Mine
    expected = model(**prompt(ids, mask, labels=labels)).loss
    for mode in ("prepend",) if change == "its head's class" else ("prepend", "auto"):  # a layer, in packed batches
        torch.testing.assert_close(prompt.loss(ids, mask, labels=labels, mode=mode), expected)
    assert len(chunks) == 1


def test_a_model_is_as_it_was_and_threads_may_share_it(chunks):
    model = build("llama")
    before = [(module, dict(vars(module))) for module in model.modules()]
    ids, mask, labels = batch()
    prompt = SoftPrompt(model, zoo.M)
    expected = prompt.loss(ids, mask, labels=labels, mode="prepend").item()
    assert all(vars(module) == held for module, held in before)
    losses = []
    threads = [
        threading.Thread(target=lambda: losses.append(prompt.loss(ids, mask, labels=labels, mode="prepend").item()))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert losses == [expected] * 8
