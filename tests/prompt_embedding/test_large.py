"""Tables, outputs, masks and gradients of more than 2**31 elements: every address is computed in 64 bits.

Memory that nobody touches costs nothing, so only what a test looks at is really there. Where the whole launch would
take Triton's interpreter hours, only its last programs run, and what they write is looked at.
"""

import sys

import pytest
import torch

from ptuning_fast import prepend_prompt
from ptuning_fast.op import functional, torch_backend

LIMIT = 2**31
D = 64


@pytest.fixture
def last_programs(monkeypatch):
    """Of each launch only the last 64 programs run, in the interpreter; on a GPU all do."""
    if functional.kernels is None or torch.cuda.is_available():
        return
    from triton.runtime.interpreter import interpreter_builder

    class Last:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            skipped = max(0, grid[0] - 64)

            def move(x, y, z):
                interpreter_builder.grid_idx = (skipped + x, y, z)

            def launch(*args, **kwargs):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(interpreter_builder, "set_grid_idx", move)
                    self.kernel[(grid[0] - skipped,)](*args, **kwargs)

            return launch

    for module, name in (("forward", "prepend_prompt"), ("backward", "prompt_grad")):
        launcher = getattr(sys.modules[f"ptuning_fast.kernels.{module}"], name)
        monkeypatch.setattr(launcher, "kernel", Last(launcher.kernel))


def untouched(*shape, device, dtype=torch.float16):
    """Memory for more than 2**31 elements, none of it written."""
    tensor = torch.empty(*shape, device=device, dtype=dtype)
    assert tensor.numel() > LIMIT
    return tensor


def rows_of(*shape, device):
    """Random fp16 rows."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).half().to(device)


def test_table(backend):
    V = LIMIT // D + 2
    weight = untouched(V, D, device=backend)
    weight[-3:] = rows_of(3, D, device=backend)
    ids = torch.tensor([[V - 1, V - 3], [V - 2, V - 1]], dtype=torch.int32, device=backend)
    prompt = rows_of(1, D, device=backend)
    embeds = prepend_prompt(ids, weight=weight, prompt=prompt)["inputs_embeds"]
    assert torch.equal(embeds[:, 1:], weight[-3:][ids.long() - (V - 3)])
    assert torch.equal(embeds[:, :1], prompt.expand(2, 1, D))


def test_table_with_large_strides(backend):
    """A transposed table: the last element of a row is 2**31 elements away from the first."""
    weight = untouched(LIMIT + 2**24, device=backend).as_strided((2, D), (1, LIMIT // (D - 1) + 40))
    weight.copy_(rows_of(2, D, device=backend))
    ids = torch.tensor([[1, 0]], dtype=torch.int32, device=backend)
    embeds = prepend_prompt(ids, weight=weight, prompt=rows_of(1, D, device=backend))["inputs_embeds"]
    assert torch.equal(embeds[0, 1:], weight.flip(0))


def test_bank_of_prompts(backend):
    K = LIMIT // D + 2
    bank = untouched(K, 1, D, device=backend)
    bank[-2:] = rows_of(2, 1, D, device=backend)
    index = torch.tensor([K - 1, K - 2], dtype=torch.int32, device=backend)
    ids = torch.zeros(2, 1, dtype=torch.int32, device=backend)
    out = prepend_prompt(ids, weight=rows_of(1, D, device=backend), prompt=bank, prompt_index=index)
    assert torch.equal(out["inputs_embeds"][:, 0], bank[-2:, 0].flip(0))


def test_prompt_with_large_strides(backend):
    prompt = untouched(LIMIT + 2**24, device=backend).as_strided((3, D), (LIMIT // 2 + 64, 1))
    prompt.copy_(rows_of(3, D, device=backend))
    ids = torch.zeros(1, 1, dtype=torch.int32, device=backend)
    embeds = prepend_prompt(ids, weight=rows_of(1, D, device=backend), prompt=prompt)["inputs_embeds"]
    assert torch.equal(embeds[0, :3], prompt)


@pytest.mark.parametrize("strides", [(LIMIT // 2 + 1, 1), (3, LIMIT // 2 + 1)], ids=["rows", "columns"])
def test_ids_with_large_strides(backend, strides):
    ids = untouched(LIMIT + 2**24, device=backend, dtype=torch.int32).as_strided((3, 3), strides)
    ids.copy_(torch.arange(9, device=backend).view(3, 3))
    weight = rows_of(9, D, device=backend)
    embeds = prepend_prompt(ids, weight=weight, prompt=rows_of(1, D, device=backend))["inputs_embeds"]
    assert torch.equal(embeds[:, 1:], weight.view(3, 3, D))


@pytest.mark.parametrize("options", [{}, {"adjacent": True}, {"packed": True}], ids=["plain", "adjacent", "packed"])
@pytest.mark.parametrize("strides", [(LIMIT // 2 + 1, 1), (3, LIMIT // 2 + 1)], ids=["rows", "columns"])
def test_mask_with_large_strides(backend, options, strides):
    mask = untouched(LIMIT + 2**24, device=backend, dtype=torch.bool).as_strided((3, 3), strides)
    mask.copy_(torch.tensor([[0, 1, 1], [0, 0, 1], [0, 1, 0]], device=backend))
    arguments = {
        "input_ids": torch.tensor([[0, 1, 2]] * 3, device=backend),
        "weight": rows_of(3, D, device=backend),
        "prompt": rows_of(2, D, device=backend),
        "position_start": 0,
    } | options
    actual = prepend_prompt(attention_mask=mask, **arguments)
    expected = prepend_prompt(attention_mask=mask.contiguous(), **arguments)
    assert all(torch.equal(actual[key], expected[key]) for key in expected if not key.startswith("max_length"))


@pytest.mark.parametrize("layout", ["plain", "adjacent", "packed"])
@pytest.mark.parametrize(("B", "n"), [(1, LIMIT // 2**20 + 1), (LIMIT // 2**22 + 1, 3)], ids=["one row", "rows"])
def test_output(backend, last_programs, layout, B, n):
    """The last elements of an output whose batch rows, or whose only batch row, are more than 2**31 elements."""
    if functional.kernels is None and (layout, B) != ("adjacent", 1):
        pytest.skip("torch itself addresses the elements; once is enough for 4 GB of them")
    d = 2**20
    weight, prompt = rows_of(3, d, device=backend), rows_of(1, d, device=backend)
    ids = torch.randint(0, 3, (B, n), generator=torch.Generator().manual_seed(0), dtype=torch.int32).to(backend)
    mask = torch.ones(B, n, dtype=torch.bool, device=backend)
    options = {"plain": {}, "adjacent": {"adjacent": True}, "packed": {"packed": True}}[layout]
    embeds = prepend_prompt(ids, mask, weight=weight, prompt=prompt, **options)["inputs_embeds"]
    assert embeds.numel() > LIMIT
    assert torch.equal(embeds.view(-1)[-2048:], weight[ids[-1, -1], -2048:])


def backward():
    return (functional.kernels or torch_backend).backward


@pytest.mark.parametrize(
    "strides", [(LIMIT // 2 + 64, D, 1), (8 * D, LIMIT // 2 + 64, 1), (9, 3, LIMIT // (D - 1) + 40)]
)
def test_gradient_with_large_strides(backend, strides):
    """Batch rows, rows and elements that are far apart."""
    grad = untouched(LIMIT + 2**24, device=backend).as_strided((3, 3, D), strides)
    grad.copy_(rows_of(3, 3, D, device=backend))
    actual = backward()(grad, (3, D), torch.float32, None, None, False)
    assert torch.equal(actual, backward()(grad.contiguous(), (3, D), torch.float32, None, None, False))
    torch.testing.assert_close(actual, grad.sum(0, dtype=torch.float32), rtol=0, atol=1e-5)  # three terms of size 1


@pytest.mark.parametrize("packed", [False, True], ids=["adjacent", "packed"])
def test_gradient_at_a_late_start(backend, packed):
    """A prompt that stands 2**31 elements behind the beginning of its batch row, or of the packed batch."""
    S = LIMIT // D + 4
    grad = untouched(1, S, D, device=backend)
    starts = [0, S - 2] if packed else [S - 2]
    for start in starts:
        grad[0, start : start + 2] = rows_of(2, D, device=backend)
    start = torch.tensor(starts, dtype=torch.int32, device=backend)
    actual = backward()(grad, (2, D), torch.float32, start, None, packed)
    assert torch.equal(actual, len(starts) * rows_of(2, D, device=backend).float())


def test_gradient_of_a_large_bank(last_programs):
    """The last of more prompts than 2**31 elements hold. The kernels alone: torch's own sum would take 13 GB."""
    if functional.kernels is None:
        pytest.skip("no Triton on this platform")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    K = LIMIT // D + 2
    grad = rows_of(3, 2, D, device=device)
    index = torch.tensor([K - 1, K - 2, K - 1], dtype=torch.int32, device=device)
    actual = functional.kernels.backward(grad, (K, 1, D), torch.float16, None, index, False)
    expected = torch.stack([grad[1, :1], grad[::2, :1].sum(0, dtype=torch.float32).half()])
    assert torch.equal(actual[-2:], expected)


def test_positions(backend):
    """position_start may be as large as a 32-bit integer is; the positions then need more."""
    ids = torch.zeros(1, 2, dtype=torch.int32, device=backend)
    out = prepend_prompt(
        ids, weight=rows_of(1, D, device=backend), prompt=rows_of(1, D, device=backend), position_start=LIMIT - 2
    )
    assert out["position_ids"].tolist() == [[LIMIT - 2, LIMIT - 1, LIMIT]]
