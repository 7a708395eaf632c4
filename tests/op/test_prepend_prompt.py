"""The op against the reference and against an element-by-element oracle: copies are compared with ==."""

import sys

import oracle
import pytest
import torch
from cases import DTYPES, assert_same, batch, case, compare, gradient_budget, to_device

pytest.importorskip("hypothesis")

import hypothesis.strategies as st
from hypothesis import HealthCheck, example, given, settings

from ptuning_fast import prepend_prompt, reference
from ptuning_fast.op import Batch, Layout, Prompt, functional


@settings(suppress_health_check=list(HealthCheck))
@given(arguments=st.composite(lambda draw: batch(draw, st))())
@example(arguments=case(B=0, n=3, m=2, d=8, packed=True))
@example(arguments=case(B=2, n=0, m=2, d=8, adjacent=True))
@example(arguments=case(B=2, n=0, m=0, d=8))
@example(arguments=case(B=2, n=3, m=0, d=8, packed=True))
@example(arguments=case(B=1, n=1, m=1, d=1))
@example(arguments=case(B=2, n=70, m=3, d=65, adjacent=True))  # more than one tile of rows
@example(arguments=case(B=2, n=1025, m=1, d=8, packed=True))  # more than one block of the mask scan
@example(arguments=case(B=2, n=1030, m=1, d=8, adjacent=True))
@example(arguments=case(B=1, n=2, m=2, d=768))
@example(arguments=case(B=1, n=2, m=2, d=8200))
@example(arguments=case(B=3, n=600, m=1, d=8, adjacent=True, additive_mask=torch.bfloat16))
@example(arguments=case(B=3, n=8, m=0, d=8, additive_mask=torch.float32))
def test_same_as_reference_and_oracle(backend, poisoned_memory, arguments):
    compare(arguments, backend)


@pytest.mark.parametrize(
    ("batch", "layout"),
    [(33, "plain"), (100, "plain"), (33, "adjacent"), (100, "packed"), (513, "packed")],
)
def test_large_batches_split_the_sum(backend, poisoned_memory, batch, layout):
    """From 33 rows on the sum over the batch is split; from 513 on the lengths are added up in blocks."""
    n = 3 if batch < 513 else 1
    arguments = case(B=batch, n=n, m=1, d=16, **({} if layout == "plain" else {layout: True}))
    there = to_device(arguments, backend)
    there["prompt"].requires_grad_()
    actual = prepend_prompt(**there)
    assert_same(
        {**actual, "inputs_embeds": actual["inputs_embeds"].detach()},
        oracle.prepend_prompt(**arguments),
    )
    upstream = torch.randn(actual["inputs_embeds"].shape, generator=torch.Generator().manual_seed(1))
    grads = [
        torch.autograd.grad(actual["inputs_embeds"], there["prompt"], upstream.to(backend), retain_graph=True)[0]
        for _ in range(2)
    ]
    assert torch.equal(*grads), "not deterministic"
    expected = oracle.prompt_grad(
        upstream, (1, 16), None, arguments["attention_mask"], n, layout == "adjacent", layout == "packed"
    )
    assert (grads[0].cpu().double() - expected).abs().max() <= gradient_budget(upstream, batch, torch.float32)


@pytest.mark.parametrize("expand", ["sum", "row", "full"])
def test_expanded_gradients(backend, expand):
    """Upstream gradients with stride 0, as out.sum() and broadcasting make them."""
    arguments = to_device(case(B=3, n=4, m=2, d=20), backend)
    prompt = arguments["prompt"].requires_grad_()
    embeds = prepend_prompt(**arguments)["inputs_embeds"]
    upstream = {
        "sum": torch.ones(1, 1, 1, device=backend),
        "row": torch.randn(1, 1, 20, device=backend),
        "full": torch.randn(3, 6, 20, device=backend),
    }[expand].expand(3, 6, 20)
    (grad,) = torch.autograd.grad(embeds, prompt, upstream)
    torch.testing.assert_close(grad, upstream[:, :2].sum(0), rtol=1e-6, atol=1e-6)  # three fp32 terms


@pytest.mark.parametrize("lengths", [list, torch.tensor])
@pytest.mark.parametrize("dtype", DTYPES)
def test_known_lengths(backend, lengths, dtype):
    arguments = to_device(case(B=3, n=7, m=2, d=20), backend)
    arguments["weight"] = arguments["weight"].to(dtype)
    known = arguments["attention_mask"].sum(1).tolist()
    expected = prepend_prompt(**arguments, packed=True)
    actual = prepend_prompt(**arguments, packed=True, lengths=lengths(known))
    assert_same(actual, {key: value.cpu() if torch.is_tensor(value) else value for key, value in expected.items()})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", ["one more", "one fewer", "moved", "longest"])
def test_wrong_lengths_come_out_as_nan(change, dtype):
    """What a GPU does, where nobody compares lengths with the mask: NaN throughout, and no row out of place."""
    if functional.kernels is None:
        pytest.skip("no Triton on this platform")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments = to_device(case(B=2, n=5, m=2, d=20), device)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]], device=device)
    lengths = {"one more": [3, 4], "one fewer": [1, 4], "moved": [3, 3], "longest": [1, 5]}[change]
    batch, layout = Batch(arguments["input_ids"], mask), Layout(packed=True, lengths=lengths)
    results = functional.kernels.forward(batch, arguments["weight"].to(dtype), Prompt(arguments["prompt"]), layout)
    assert results[0].shape == (1, sum(lengths) + 4, 20)
    written = results[0][:, : 2 * 2 + 6]
    assert written.isnan().all()


def test_only_the_prompt_gets_a_gradient(backend):
    """Every subset of what could ask for one."""
    arguments = to_device(case(B=2, n=4, m=2, d=20), backend)
    assert not prepend_prompt(**arguments)["inputs_embeds"].requires_grad
    arguments["prompt"].requires_grad_()
    out = prepend_prompt(**arguments)
    assert out["inputs_embeds"].requires_grad
    out["inputs_embeds"].sum().backward()
    assert arguments["prompt"].grad is not None
    assert arguments["weight"].grad is None
    with torch.no_grad():
        assert not prepend_prompt(**arguments)["inputs_embeds"].requires_grad
        arguments["weight"].requires_grad_()
        assert not prepend_prompt(**arguments)["inputs_embeds"].requires_grad
    with pytest.raises(ValueError, match=r"freeze it first.*requires_grad_\(False\)"):
        prepend_prompt(**arguments)
    with pytest.raises(ValueError, match="freeze it first"):
        prepend_prompt(**(arguments | {"prompt": arguments["prompt"].detach()}))


def test_gradcheck_in_fp64(monkeypatch):
    monkeypatch.setattr(functional, "kernels", None)
    arguments = case(B=3, n=4, m=2, d=5)
    arguments["weight"] = arguments["weight"].double()
    index = torch.tensor([1, 0, 1])
    for options in ({}, {"adjacent": True}, {"packed": True}, {"prompt_index": index}):
        shape = (2, 2, 5) if "prompt_index" in options else (2, 5)
        prompt = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda prompt, options=options: prepend_prompt(**(arguments | {"prompt": prompt} | options))[
                "inputs_embeds"
            ],
            (prompt,),
        )


def test_second_order_gradients(backend, monkeypatch):
    """A gradient penalty, as the reference has it."""
    monkeypatch.setattr("ptuning_fast.op.torch_backend._SMALL", [0, 0])  # not torch.cat's own gradient
    for options in ({}, {"adjacent": True}, {"packed": True}, {"prompt_index": torch.tensor([1, 0, 1])}):
        results = []
        for op in (prepend_prompt, reference.prepend_prompt):
            arguments = to_device(case(B=3, n=4, m=2, d=8) | options, backend)
            prompt = arguments["prompt"].expand(2, 2, 8) if "prompt_index" in options else arguments["prompt"]
            arguments["prompt"] = prompt.clone().requires_grad_()
            embeds = op(**arguments)["inputs_embeds"]
            (grad,) = torch.autograd.grad(embeds.pow(3).sum(), arguments["prompt"], create_graph=True)
            results.append(torch.autograd.grad(grad.pow(2).sum(), arguments["prompt"])[0])
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)  # sums of three fp32 terms, cubed and squared


def test_function_transforms(backend, monkeypatch):
    """jvp, vmap and torch.func.grad give what the reference gives: never a silent zero."""
    monkeypatch.setattr("ptuning_fast.op.torch_backend._SMALL", [0, 0])
    arguments = to_device(case(B=3, n=4, m=2, d=8), backend)
    prompt = arguments.pop("prompt")

    def loss(op):
        return lambda prompt: op(**arguments, prompt=prompt)["inputs_embeds"].pow(2).sum()

    fast, plain = loss(prepend_prompt), loss(reference.prepend_prompt)
    prompts = torch.stack([prompt, 2 * prompt])
    for transform in (
        lambda f: torch.func.jvp(f, (prompt,), (torch.ones_like(prompt),))[1],
        lambda f: torch.func.grad(f)(prompt),
        lambda f: torch.func.vmap(f)(prompts),
        lambda f: torch.autograd.functional.hessian(f, prompt),
    ):
        actual, expected = transform(fast), transform(plain)
        assert expected.abs().max() > 0
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_gradient_memory(monkeypatch):
    """Backward allocates nothing near [V, d] or [B, n, d]: no tensor larger than the prompt, once per split."""
    if functional.kernels is None or torch.cuda.is_available():
        pytest.skip("counts the launcher's own torch.empty calls, on the CPU")
    sizes = []
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, **kw: sizes.append(empty(*size, **kw).numel()) or empty(*size, **kw)
    )
    grad = torch.randn(70, 40, 16)
    functional.kernels.backward(grad, (3, 16), torch.float32, None, None, False)
    assert sizes == [3 * 16, 3 * 3 * 16]


def test_launches(monkeypatch):
    """One for everything; before it one over the mask where that must be read first, and for packed rows one that adds
    the lengths up. Backward one, two when split, none where there is one row and nothing to add up."""
    kernels = pytest.importorskip("ptuning_fast.kernels")
    launcher = sys.modules["ptuning_fast.kernels.runtime"].Launcher
    count, launch = [], launcher.__call__
    monkeypatch.setattr(launcher, "__call__", lambda self, *args: count.append(self.kernel) or launch(self, *args))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert kernels.runs_on(torch.empty(1, device=device))

    def launches(batch=4, **options):
        arguments = to_device(case(B=batch, n=4, m=2, d=16), device)
        arguments["token_type_ids"] = arguments["labels"]
        count.clear()
        prompt = arguments["prompt"].requires_grad_()
        embeds = prepend_prompt(**arguments, **options)["inputs_embeds"]
        forward = len(count)
        embeds.sum().backward()
        assert prompt.grad is not None
        return forward, len(count) - forward

    assert launches() == (1, 1)
    assert launches(batch=40) == (1, 2)
    assert launches(adjacent=True) == (2, 1)
    assert launches(packed=True) == (3, 1)
    assert launches(batch=1) == (1, 0)
    assert launches(batch=1, adjacent=True) == (2, 1)
    assert launches(batch=1, packed=True) == (3, 0)


@pytest.mark.parametrize("layout", [{}, {"adjacent": True}, {"packed": True}], ids=["plain", "adjacent", "packed"])
def test_the_result_can_be_changed_in_place(backend, layout):
    """Noise on inputs_embeds, as NEFTune adds it, with the gradient that it then has."""
    arguments = to_device(case(B=3, n=70, m=2, d=768, **layout), backend)
    prompt = arguments["prompt"].requires_grad_()
    embeds = prepend_prompt(**arguments)["inputs_embeds"]
    (expected,) = torch.autograd.grad(embeds.sum(), prompt)
    embeds = prepend_prompt(**arguments)["inputs_embeds"]
    embeds *= 2
    (actual,) = torch.autograd.grad(embeds.sum(), prompt)
    assert torch.equal(actual, 2 * expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bank", [False, True])
def test_the_torch_backend_sums_half_precision_in_fp32(monkeypatch, dtype, bank):
    """257 ones: in bf16 their sum is 256, in the other two it is 257."""
    monkeypatch.setattr(functional, "kernels", None)
    arguments = case(B=257, n=2, m=1, d=8)
    prompt = torch.zeros(2, 1, 8, dtype=dtype) if bank else torch.zeros(1, 8, dtype=dtype)
    arguments |= {"weight": arguments["weight"].bfloat16(), "prompt": prompt.requires_grad_()}
    if bank:
        arguments["prompt_index"] = torch.zeros(257, dtype=torch.int64)
    prepend_prompt(**arguments)["inputs_embeds"].backward(torch.ones(257, 3, 8, dtype=torch.bfloat16))
    assert prompt.grad.dtype == dtype
    assert (prompt.grad[0] if bank else prompt.grad).unique().tolist() == [256 if dtype == torch.bfloat16 else 257]
