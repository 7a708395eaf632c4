"""Calls of the op, drawn or by hand, and what each must give: the reference's and the oracle's, copies with ==."""

import oracle
import torch

from ptuning_fast import prepend_prompt, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MASKS = [torch.int64, torch.int32, torch.bool, torch.float32, torch.bfloat16, torch.float16, torch.uint8]


def strided(tensor, how):
    """The same values in another memory layout."""
    if how == "transposed" and tensor.dim() >= 2:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "sliced":
        wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1, dtype=tensor.dtype)
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    return tensor


def batch(draw, st):
    """Arguments of prepend_prompt on the CPU, as a dict; `st` has what is drawn from, as hypothesis.strategies has."""
    B, n, m = draw(st.integers(0, 5)), draw(st.integers(0, 19)), draw(st.integers(0, 6))
    d, V = draw(st.sampled_from([1, 8, 16, 20, 65, 128])), draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    hows = st.sampled_from(["contiguous", "transposed", "sliced"])

    def integers(high, *shape):
        dtype = draw(st.sampled_from([torch.int64, torch.int32]))
        return strided(torch.randint(0, high, shape, generator=generator).to(dtype), draw(hows))

    arguments = {"input_ids": integers(V, B, n)}
    weight_dtype = draw(st.sampled_from(DTYPES))
    arguments["weight"] = strided(torch.randn(V, d, generator=generator).to(weight_dtype), draw(hows))
    bank = draw(st.booleans())
    K = draw(st.integers(1, 3))
    prompt = torch.randn(*([K] if bank else []), m, d, generator=generator).to(draw(st.sampled_from(DTYPES)))
    arguments["prompt"] = strided(prompt, draw(hows))
    if bank:
        arguments["prompt_index"] = integers(K, B)
    padding = draw(st.sampled_from(["none given", "left", "right", "holes", "all padding"]))
    if padding != "none given":
        lengths = torch.randint(0, n + 1, (B, 1), generator=generator)
        columns = torch.arange(n)
        mask = {
            "left": columns >= n - lengths,
            "right": columns < lengths,
            "holes": torch.rand(B, n, generator=generator) < 0.6,
            "all padding": torch.zeros(B, n, dtype=torch.bool),
        }[padding]
        arguments["attention_mask"] = strided(mask.to(draw(st.sampled_from(MASKS))), draw(hows))
    if draw(st.booleans()):
        arguments["token_type_ids"] = integers(2, B, n)
    if draw(st.booleans()):
        arguments["labels"] = integers(V, B, n)
    arguments["position_start"] = draw(st.sampled_from([None, 0, 2]))
    arguments["embed_scale"] = draw(st.sampled_from([1.0, 3.3, 0.5]))
    arguments |= draw(st.sampled_from([{}, {"adjacent": True}, {"packed": True}, {"adjacent": True, "packed": True}]))
    if not arguments.get("packed"):
        arguments["additive_mask"] = draw(st.sampled_from([None, None, *DTYPES]))
    return arguments


def to_device(arguments, device):
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in arguments.items()}


def assert_same(actual, expected):
    """Equal keys, shapes, dtypes and bits."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, int):
            assert actual[key] == value, key
        else:
            assert actual[key].dtype == value.dtype, key
            assert actual[key].shape == value.shape, key
            assert torch.equal(actual[key].cpu(), value), (key, actual[key], value)


def gradient_budget(grad, rows, prompt_dtype):
    """How far a sum of `rows` rows in fp32, rounded once to the prompt's dtype, may be from the sum in fp64."""
    scale = grad.double().abs().max().item() * max(rows, 1) if grad.numel() else 0.0
    return scale * (rows * torch.finfo(torch.float32).eps + torch.finfo(prompt_dtype).eps / 2) + 1e-12


def compare(arguments, device, **known):
    """AssertionError unless the op on `device` gives the values and the gradient that it must.

    `known` are arguments that must change nothing.
    """
    prompt = arguments["prompt"]
    expected = oracle.prepend_prompt(**arguments)
    assert_same(reference.prepend_prompt(**arguments), expected)

    there = to_device(arguments, device)
    there["prompt"] = there["prompt"].detach().requires_grad_()
    actual = prepend_prompt(**there, **known)
    embeds = actual["inputs_embeds"]
    if arguments.get("additive_mask") is not None and "attention_mask" in arguments:
        mask = actual["attention_mask"]
        assert not mask.numel() or all(step % 8 == 0 for step in mask.stride()[:-1]), mask.stride()
    assert_same({**actual, "inputs_embeds": embeds.detach()}, expected)
    assert all(
        not value.requires_grad for key, value in actual.items() if key != "inputs_embeds" and torch.is_tensor(value)
    )

    # The gradient, for an upstream gradient that is no memory layout in particular.
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(embeds.shape, generator=generator).to(embeds.dtype)
    upstream = strided(upstream, ["contiguous", "transposed", "sliced"][prompt.shape[-2] % 3])
    (actual_grad,) = torch.autograd.grad(embeds, there["prompt"], upstream.to(device))
    n, packed = arguments["input_ids"].shape[1], arguments.get("packed", False)
    mask = arguments.get("attention_mask")
    if mask is None:
        mask = torch.ones(arguments["input_ids"].shape)
    expected_grad = oracle.prompt_grad(
        upstream, prompt.shape, arguments.get("prompt_index"), mask, n, arguments.get("adjacent", False), packed
    )
    assert actual_grad.dtype == prompt.dtype
    assert actual_grad.shape == prompt.shape
    budget = gradient_budget(upstream, len(arguments["input_ids"]), prompt.dtype)
    if expected_grad.numel():
        assert (actual_grad.cpu().double() - expected_grad).abs().max().item() <= budget


def case(**arguments):
    """A batch by hand, for the examples that must always run."""
    generator = torch.Generator().manual_seed(0)
    B, n, m, d = (arguments.pop(key) for key in "Bnmd")
    base = {
        "input_ids": torch.randint(0, 9, (B, n), generator=generator),
        "weight": torch.randn(9, d, generator=generator),
        "prompt": torch.randn(m, d, generator=generator),
        "attention_mask": (torch.rand(B, n, generator=generator) < 0.7).long(),
        "labels": torch.randint(0, 9, (B, n), generator=generator),
        "position_start": 2,
        "embed_scale": 1.0,
    }
    return base | arguments
