"""What is not computed in the last layer, and that nothing else changes."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import zoo
from savings import PRUNABLE, assert_same, base, build, logits_and_gradients

from ptuning_fast import FastPTuning
from ptuning_fast.classify import last_layer
from ptuning_fast.classify.last_layer import prunable

pytestmark = pytest.mark.usefixtures("torch_backend", "no_dropout")


@pytest.mark.parametrize("pooling", ["first", "cls", "last"])
@pytest.mark.parametrize("name", PRUNABLE)
def test_pruned(name, pooling):
    ids, mask = zoo.padded(zoo.texts(), "right")
    pruned, plain = build(name, prune=True, pooling=pooling), build(name, pooling=pooling)
    assert pruned.prune and not plain.prune
    assert_same(logits_and_gradients(pruned, ids, mask), logits_and_gradients(plain, ids, mask))
    rows = []
    last = pruned.bert.register_forward_hook(lambda module, args, out: rows.append(out.last_hidden_state.shape[1]))
    pruned(ids, mask)
    assert rows == [1]
    last.remove()


def test_what_is_not_recognised_runs_in_full():
    for name in set(zoo.ZOO) - set(PRUNABLE) - {"T5", "BART"}:
        assert not prunable(base(name))
    assert not build("ALBERT", prune=True).prune
    assert not build("BERT", prune=True, pooling="mean").prune


@pytest.mark.parametrize("mode", ["prepend", "packed"])
def test_an_encoder_that_gives_hidden_states_gives_as_many_later(mode):
    """transformers catches them by hooks, of which it keeps account in the module."""
    ids, mask = zoo.padded(zoo.texts(), "right")
    assert not FastPTuning(zoo.build("BERT", output_hidden_states=True), 3, mode=mode, prune=True).prune
    model = zoo.build("BERT")
    fast = FastPTuning(model, 3, mode=mode, prune=True)
    whole = FastPTuning(model, 3, mode=mode, prune=False)
    whole.load_state_dict(fast.state_dict())
    assert fast.prune and not whole.prune
    model.config.output_hidden_states = True
    for _ in range(2):
        torch.testing.assert_close(fast(ids, mask), whole(ids, mask))
    assert len(model(ids).hidden_states) == model.config.num_hidden_layers + 1


def test_a_changed_architecture_is_not_pruned():
    """The probe finds out what the name does not say: here a layer that mixes the rows behind the attention."""

    class Mixed(torch.nn.Module):
        def __init__(self, inside):
            super().__init__()
            self.inside = inside

        def forward(self, *args):
            out = self.inside(*args)
            return out + out.mean(1, keepdim=True)

    model = base("BERT")
    assert prunable(model)
    model.encoder.layer[-1].output = Mixed(model.encoder.layer[-1].output)
    assert not prunable(model)


@pytest.mark.parametrize("mode", ["prepend", "packed"])
def test_hooks_on_layers_have_all_rows(mode):
    """Those that come later, too, as ones that patch or keep hidden states do."""
    model = base("BERT")
    fast, whole = (FastPTuning(model, zoo.M, 3, mode=mode, prune=prune).eval() for prune in (True, False))
    whole.load_state_dict(fast.state_dict())
    ids, mask = zoo.padded(zoo.texts(), "right")
    before, seen = fast(ids, mask), []

    def patch(module, args, out):
        seen.append(out.shape[:2].numel())
        return out + out[:, 1:2]

    for name in ("output", "intermediate"):
        hook = getattr(model.encoder.layer[-1], name).register_forward_hook(patch)
        patched = fast(ids, mask)
        assert torch.allclose(patched, whole(ids, mask), atol=1e-5) and not torch.allclose(patched, before)
        assert seen[-2] == seen[-1] >= mask.sum() + len(ids) * zoo.M
        hook.remove()
    assert torch.allclose(fast(ids, mask), before)


@pytest.mark.parametrize("prune", [False, True])
def test_hooks_have_the_texts_in_the_order_of_the_batch(prune):
    """Packed texts are sorted by length where nobody looks; a hook on the embeddings is given the batch itself."""
    model, seen = base("BERT"), []
    fast = FastPTuning(model, zoo.M, 3, mode="packed", prune=prune).eval()
    ids, mask = zoo.padded(zoo.texts([3, 9, 5, 9]), "right")
    before = fast(ids, mask)

    def noise(module, args, out):
        seen.append(args[0])
        return out * torch.tensor([1.0, -1, 1, 1])[:, None, None]

    model.get_input_embeddings().register_forward_hook(noise)
    changed = (fast(ids, mask) - before).abs().amax(1) > 1e-3
    assert changed.tolist() == [False, True, False, False] and torch.equal(seen[-1], ids)


@pytest.mark.parametrize("mode", ["prepend", "packed"])
def test_dropout_of_the_pooled_row(monkeypatch, mode):
    """Whatever dropout makes of the weights, values are summed up with that, their bias included."""
    functions = SimpleNamespace(linear=F.linear, dropout=lambda weights, p: weights * (1 + p))
    monkeypatch.setattr(last_layer, "F", functions)
    model = zoo.build("BERT", attention_probs_dropout_prob=0.25).train()
    for dropout in (one for one in model.modules() if isinstance(one, torch.nn.Dropout)):
        dropout.p = 0.0
    last = model.encoder.layer[-1].attention.self
    last.dropout.p = 0.25
    torch.nn.init.normal_(last.value.bias)
    doubled = copy.deepcopy(model)
    doubled.encoder.layer[-1].attention.self.dropout.p = 0.0
    for one in (
        doubled.encoder.layer[-1].attention.self.value.weight,
        doubled.encoder.layer[-1].attention.self.value.bias,
    ):
        one.mul_(1.25)
    prompt = torch.randn(zoo.M, zoo.D)
    fast, expected = (FastPTuning(one, zoo.M, 3, init=prompt, mode=mode, prune=True) for one in (model, doubled))
    expected.load_state_dict(
        {key: value for key, value in fast.state_dict().items() if "bert." not in key}, strict=False
    )
    ids, mask = zoo.padded(zoo.texts(), "right")
    assert_same([fast(ids, mask)], [expected(ids, mask)])


@pytest.mark.parametrize("how", ["hook", "backward hook", "lora", "forward"])
def test_attention_that_is_more_than_its_weights(how):
    """Then its own forward is called, keys and values and all."""
    plain = build("BERT", mode="packed", prune=False)
    changed = build("BERT", mode="packed")
    value = changed.bert.encoder.layer[-1].attention.self.value, plain.bert.encoder.layer[-1].attention.self.value
    for one in value:
        if how == "hook":
            one.register_forward_hook(lambda module, args, out: out * 2)
        elif how == "backward hook":
            one.register_full_backward_hook(lambda module, of_input, of_output: (of_input[0] * 2,))
        elif how == "forward":
            one.forward = lambda x, one=one: F.linear(x, one.weight * 2, one.bias)
        else:
            one.__class__ = type(
                "LoraLinear", (torch.nn.Linear,), {"forward": lambda self, x: F.linear(x, self.weight) * 2}
            )
    ids, mask = zoo.padded(zoo.texts(), "right")
    assert changed.prune
    results = []
    for model in (changed, plain):
        logits = model(ids, mask)
        results.append((logits, *torch.autograd.grad(logits.square().sum(), model.prompt_embeddings)))
    assert_same(*results)
