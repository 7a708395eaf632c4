"""Masks as attention adds them: the same logits and gradients, and nothing is asked of them."""

import pytest
import torch
import torch.nn.functional as F
import zoo
from savings import FULL, assert_same, base, build, logits_and_gradients, seen_in
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ptuning_fast.models.probe import takes_additive_mask

pytestmark = pytest.mark.usefixtures("torch_backend", "no_dropout")


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FULL)
def test_additive_mask(name, side, prune):
    ids, mask = zoo.padded(zoo.texts(), side)
    added, plain = build(name, additive_mask=True, prune=prune), build(name)
    assert added.additive_mask and not plain.additive_mask
    assert_same(logits_and_gradients(added, ids, mask), logits_and_gradients(plain, ids, mask))
    assert_same(added(ids[1:2, :3]), plain(ids[1:2, :3]))
    with torch.autocast("cpu", torch.bfloat16):
        logits, expected = added(ids, mask), plain(ids, mask)
    assert (logits - expected).abs().max() <= 0.1 * expected.abs().max()  # three layers of bf16
    eager = build(name, additive_mask=True)
    eager.bert.set_attn_implementation("eager")
    assert_same(logits_and_gradients(eager, ids, mask), logits_and_gradients(plain, ids, mask))


class Asked(TorchDispatchMode):
    """The operations that ask a tensor for its value, for which a host waits, and those that make or turn masks."""

    def __init__(self):
        super().__init__()
        self.syncs, self.masks = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = str(function)
        if name in ("aten._local_scalar_dense.default", "aten.equal.default", "aten.nonzero.default"):
            self.syncs.append(name)
        found = [one for one in pytree.tree_leaves((args, kwargs, out)) if torch.is_tensor(one)]
        if any(one.dtype == torch.bool for one in found):
            self.masks.append(name)
        return out


@pytest.mark.parametrize("name", FULL)
def test_nothing_is_asked_of_the_mask(name):
    """In a step of the encoder, forward and backward: no value is waited for, no mask is made. Else both happen."""
    ids, mask = zoo.padded(zoo.texts(), "right")
    counts = []
    for additive_mask in (True, False):
        fast = build(name, additive_mask=additive_mask)
        inputs = seen_in(fast, ids, mask)["inputs"]
        with Asked() as asked:
            out = fast.bert(**inputs).last_hidden_state
            torch.autograd.grad(out.sum(), inputs["inputs_embeds"])
        counts.append((len(asked.syncs), len(asked.masks)))
    assert counts[0] == (0, 0)
    assert counts[1][0] >= 1
    assert counts[1][1] > 3


def test_additive_masks_are_for_architectures_that_are_known():
    """Others would take such a mask and be silently wrong, or are given it by no one."""
    for name in set(zoo.ZOO) - set(FULL) - {"T5", "BART"}:
        assert not takes_additive_mask(base(name))
    assert not build("BERT", mode="packed", additive_mask=True).additive_mask
    model = base("BERT")
    model.config._attn_implementation = "flash_attention_2"
    assert not takes_additive_mask(model)
    changed = base("BERT")

    def only_columns(module, args, kwargs):
        return args, kwargs | {"attention_mask": mask if (mask := kwargs["attention_mask"]).dim() == 2 else None}

    changed.register_forward_pre_hook(only_columns, with_kwargs=True)
    assert not takes_additive_mask(changed)


@pytest.mark.gpu
def test_a_step_in_a_cuda_graph():
    """Forward, loss, backward and optimizer, captured once and replayed on other batches, as eager steps have it."""
    runs = []
    for captured in (True, False):
        fast = build("BERT", additive_mask=True, prune=True).cuda()
        trained = [fast.prompt_embeddings, *fast.classifier.parameters()]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, capturable=True)
        ids, mask = (one.cuda() for one in zoo.padded(zoo.texts(), "right"))
        labels = torch.tensor([0, 1, 2, 1], device="cuda")

        def step(fast=fast, optimizer=optimizer, ids=ids, mask=mask, labels=labels):
            optimizer.zero_grad(set_to_none=False)
            loss = F.cross_entropy(fast(ids, mask), labels)
            loss.backward()
            optimizer.step()
            return loss

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                loss = step()
        losses = []
        for shift in range(4):
            ids.copy_((ids + shift) % zoo.V)
            mask.copy_(mask.roll(1, 0))
            if captured:
                graph.replay()
            else:
                loss = step()
            losses.append(loss.item())
        runs.append(losses)
    assert len(set(runs[0])) == 4
    assert max(abs(one - other) for one, other in zip(*runs)) < 1e-4
