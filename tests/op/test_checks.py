"""Bad input: the error names the value and the limit, and nothing is launched."""

import signal
import subprocess
import sys
import warnings

import pytest
import torch

from ptuning_fast import prepend_prompt
from ptuning_fast.op import Batch, Layout, Prompt, functional

V, D, M = 9, 8, 2


def batch(device, **changes):
    """Two rows of three tokens, changed by keyword; tensors go to `device`."""
    arguments = {
        "input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "weight": torch.randn(V, D, generator=torch.Generator().manual_seed(0)),
        "prompt": torch.randn(M, D, generator=torch.Generator().manual_seed(1)),
    } | changes
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in arguments.items()}


@pytest.fixture
def no_launch(monkeypatch):
    """A launch of any kernel fails the test."""

    def never(*_):
        raise AssertionError("a kernel was launched on bad input")

    if functional.kernels is not None:
        monkeypatch.setattr(sys.modules["ptuning_fast.kernels.runtime"].Launcher, "__call__", never)


@pytest.fixture
def no_torch_backend(monkeypatch):
    """A call of the torch path fails the test. (It finds bad ids where it looks them up, so not for those.)"""

    def never(*_):
        raise AssertionError("the torch path was called on bad input")

    monkeypatch.setattr(functional.torch_backend, "forward", never)


INDEX = torch.tensor([0, 1])
BANK = torch.randn(2, M, D)
BAD = {
    "ids 1-D": ({"input_ids": torch.tensor([1, 2])}, ValueError, r"input_ids must be \[batch, tokens\].*\(2,\)"),
    "ids 3-D": ({"input_ids": torch.ones(1, 2, 3).long()}, ValueError, r"input_ids must be .* \(1, 2, 3\)"),
    "ids float": ({"input_ids": torch.ones(2, 3)}, TypeError, "input_ids must be int32 or int64, not torch.float32"),
    "ids int16": ({"input_ids": torch.ones(2, 3).short()}, TypeError, "input_ids must be int32 or int64.*int16"),
    "table 1-D": ({"weight": torch.randn(D)}, ValueError, r"weight must be a float table \[V, d\].*\(8,\)"),
    "table 3-D": ({"weight": torch.randn(1, V, D)}, ValueError, r"weight must be .*\(1, 9, 8\)"),
    "table int": ({"weight": torch.ones(V, D).long()}, ValueError, r"weight must be a float table.*int64 \(9, 8\)"),
    "table trained": (
        {"weight": torch.randn(V, D, requires_grad=True)},
        ValueError,
        r"weight requires grad.*freeze it first.*requires_grad_\(False\)",
    ),
    "prompt int": ({"prompt": torch.ones(M, D).long()}, TypeError, "prompt must be a float tensor, not torch.int64"),
    "prompt 1-D": ({"prompt": torch.randn(D)}, ValueError, r"prompt must be \[m, d\].*d = 8.*\(8,\)"),
    "prompt wide": ({"prompt": torch.randn(M, D + 1)}, ValueError, r"prompt must be .*d = 8.*it is \(2, 9\)"),
    "bank alone": ({"prompt": BANK}, ValueError, r"a bank \[K, m, d\] with prompt_index.*it is \(2, 2, 8\)"),
    "index alone": ({"prompt_index": INDEX}, ValueError, r"prompt must be a bank \[K, m, d\].*it is \(2, 8\)"),
    "bank wide": (
        {"prompt": torch.randn(2, M, D + 1), "prompt_index": INDEX},
        ValueError,
        r"a bank \[K, m, d\] with d = 8.*\(2, 2, 9\)",
    ),
    "mask shape": (
        {"attention_mask": torch.ones(2, 4)},
        ValueError,
        r"attention_mask must be \(2, 3\), as input_ids; it is \(2, 4\)",
    ),
    "mask 4-D": ({"attention_mask": torch.ones(2, 1, 3, 3)}, ValueError, r"attention_mask must be \(2, 3\).*3, 3\)"),
    "mask complex": (
        {"attention_mask": torch.ones(2, 3, dtype=torch.complex64)},
        TypeError,
        "attention_mask must be bool, int or float, not torch.complex64",
    ),
    "types shape": ({"token_type_ids": torch.ones(2, 4).long()}, ValueError, r"token_type_ids must be \(2, 3\).*2, 4"),
    "types bool": ({"token_type_ids": torch.ones(2, 3).bool()}, TypeError, "token_type_ids must be int32 .*torch.bool"),
    "labels shape": ({"labels": torch.ones(2).long()}, ValueError, r"labels must be \(2, 3\).*it is \(2,\)"),
    "labels float": ({"labels": torch.ones(2, 3)}, TypeError, "labels must be int32 or int64, not torch.float32"),
    "index shape": (
        {"prompt": BANK, "prompt_index": torch.tensor([0, 1, 0])},
        ValueError,
        r"prompt_index must be \(2,\), one per row; it is \(3,\)",
    ),
    "index 2-D": ({"prompt": BANK, "prompt_index": INDEX[None]}, ValueError, r"prompt_index must be \(2,\).*\(1, 2\)"),
    "index float": (
        {"prompt": BANK, "prompt_index": INDEX.float()},
        TypeError,
        "prompt_index must be int32 or int64, not torch.float32",
    ),
    "position": ({"position_start": 1.5}, TypeError, "position_start must be an int, not float"),
    "position tensor": ({"position_start": torch.tensor(2)}, TypeError, "position_start must be an int, not Tensor"),
    "additive int": ({"additive_mask": torch.int64}, TypeError, "must be torch.float32, .* not torch.int64"),
    "additive fp64": ({"additive_mask": torch.float64}, TypeError, "must be torch.float32, .* not torch.float64"),
    "additive bool": ({"additive_mask": True}, TypeError, "must be torch.float32, .* not True"),
    "additive packed": ({"additive_mask": torch.float32, "packed": True}, ValueError, "packed=True has none"),
    "lengths unpacked": ({"lengths": [3, 2]}, ValueError, "lengths is for packed=True"),
    "lengths few": ({"lengths": [3], "packed": True}, ValueError, "lengths has 1 entries for a batch of 2 rows"),
    "lengths many": (
        {"lengths": torch.tensor([3, 2, 1]), "packed": True},
        ValueError,
        "lengths has 3 entries for a batch of 2 rows",
    ),
    "lengths long": (
        {"lengths": [3, 4], "packed": True},
        ValueError,
        r"lengths\[1\] is 4, but a row has from 0 to 3 tokens",
    ),
    "lengths negative": (
        {"lengths": torch.tensor([-1, 2]), "packed": True},
        ValueError,
        r"lengths\[0\] is -1, but a row has from 0 to 3 tokens",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(backend, no_launch, no_torch_backend, name):
    changes, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        prepend_prompt(**batch(backend, **changes))


@pytest.mark.parametrize("name", ["attention_mask", "weight", "prompt", "token_type_ids", "labels", "prompt_index"])
def test_tensors_on_another_device(backend, no_launch, no_torch_backend, name):
    ids = torch.ones(2, 3).long()
    extra = {"token_type_ids": ids, "labels": ids, "prompt": BANK, "prompt_index": INDEX}
    arguments = batch(backend, **extra)
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} is on meta and input_ids on {backend.type}.*move them to one device"):
        prepend_prompt(**arguments)


def test_lengths_on_another_device(backend, no_launch, no_torch_backend):
    with pytest.raises(ValueError, match=r"lengths must be known on the host: .* not one on meta"):
        prepend_prompt(**batch(backend, packed=True), lengths=torch.tensor([3, 2], device="meta"))


def on_cpu(device):
    """Skips where ids and lengths are checked on the GPU, and not by Python."""
    if device.type != "cpu":
        pytest.skip("on a GPU this takes a synchronisation, so nobody looks before the launch")
    return device


@pytest.mark.parametrize("lengths", [[2, 2], torch.tensor([3, 3])], ids=["fewer", "more"])
def test_lengths_that_are_not_the_mask_s(backend, no_launch, no_torch_backend, lengths):
    row = 0 if lengths[0] == 2 else 1
    with pytest.raises(
        ValueError, match=rf"lengths\[{row}\] is {lengths[row]}, but the mask of that row has {3 - row} "
    ):
        prepend_prompt(**batch(on_cpu(backend)), packed=True, lengths=lengths)


def test_lengths_without_a_mask(backend, no_launch, no_torch_backend):
    with pytest.raises(ValueError, match=r"lengths\[1\] is 2, but the mask of that row has 3 tokens"):
        prepend_prompt(**batch(on_cpu(backend), attention_mask=None), packed=True, lengths=[3, 2])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("layout", ["plain", "adjacent", "packed"])
@pytest.mark.parametrize("bad", [-1, V, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("gradient", [False, True])
def test_ids_outside_the_table(backend, no_launch, dtype, layout, bad, gradient):
    ids = torch.tensor([[1, 2, 3], [4, bad, 6]], dtype=dtype)
    arguments = batch(on_cpu(backend), input_ids=ids, **({} if layout == "plain" else {layout: True}))
    arguments["prompt"].requires_grad_(gradient)
    with pytest.raises(IndexError, match=rf"input_ids\[1, 1\] is {bad}, outside .*0 to 8 \(V = 9\)"):
        prepend_prompt(**arguments)


@pytest.mark.parametrize("layout", ["plain", "adjacent"])
def test_ids_outside_the_table_count_under_padding_too(backend, no_launch, layout):
    """Unless they are dropped they are looked up."""
    ids = torch.tensor([[1, 2, 3], [4, 5, V]])
    with pytest.raises(IndexError, match=r"input_ids\[1, 2\] is 9"):
        prepend_prompt(**batch(on_cpu(backend), input_ids=ids), adjacent=layout == "adjacent")


@pytest.mark.parametrize("lengths", [None, [3, 2]])
@pytest.mark.parametrize("bad", [-1, V, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("mask", [[1, 1, 0], [1, 0, 1], [0, 1, 1]], ids=["right", "hole", "left"])
def test_packed_never_looks_dropped_ids_up(backend, bad, lengths, mask):
    mask = torch.tensor([[1, 1, 1], mask])
    good = torch.tensor([[1, 2, 3], [4, 5, 6]])
    arguments = batch(backend, attention_mask=mask, input_ids=torch.where(mask == 0, bad, good))
    embeds = prepend_prompt(**arguments, packed=True, lengths=lengths)["inputs_embeds"]
    tokens = good[1][mask[1] != 0].to(backend)
    weight, prompt = arguments["weight"], arguments["prompt"]
    expected = torch.cat([prompt, weight[1:4], prompt, weight[tokens]])[None]
    assert torch.equal(embeds, expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("layout", ["plain", "adjacent", "packed"])
@pytest.mark.parametrize("bad", [-1, 2])
def test_prompts_outside_the_bank(backend, no_launch, dtype, layout, bad):
    index = torch.tensor([0, bad], dtype=dtype)
    options = {} if layout == "plain" else {layout: True}
    with pytest.raises(IndexError, match=rf"prompt_index\[1\] is {bad}, outside the bank: it holds prompts 0 to 1"):
        prepend_prompt(**batch(on_cpu(backend), prompt=BANK, prompt_index=index, **options))


def test_empty_table(backend, no_launch):
    with pytest.raises(IndexError, match=r"input_ids\[0, 0\] is 1, outside .*V = 0"):
        prepend_prompt(**batch(on_cpu(backend), weight=torch.randn(0, D)))


def launch(*tensors, prompt_index=None, embed_scale=1.0):
    """inputs_embeds as the kernels' own launcher returns it, unchecked. The interpreter passes over failed asserts."""
    if functional.kernels is None or torch.cuda.is_available():
        pytest.skip("an id outside the table is an assert on a GPU; what would be read shows in the interpreter")
    ids, mask, weight, prompt = tensors
    layout = Layout(embed_scale=embed_scale)
    return functional.kernels.forward(Batch(ids, mask), weight, Prompt(prompt, prompt_index), layout)[0]


@pytest.mark.parametrize("bad", [-1, V, -(2**31), 2**31 - 1])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_kernel_reads_nothing_outside_the_table(bad, scale):
    """The launcher alone: the row is NaN, and the rows around it are as always."""
    around = torch.full((V + 2, D), 7.0)  # the table's neighbours in memory
    around[1:-1] = torch.randn(V, D, generator=torch.Generator().manual_seed(0))
    weight, prompt = around[1:-1], torch.randn(M, D)
    ids = torch.tensor([[1, bad, 3]])
    out = launch(ids, None, weight, prompt, embed_scale=scale)
    assert out.isnan().any(-1).tolist() == [[False, False, False, True, False]]
    assert out[0, 3].isnan().all()
    assert torch.equal(out[0, [0, 1, 2, 4]], torch.cat([prompt, weight[[1, 3]] * scale]))


@pytest.mark.parametrize("bad", [-1, 2])
def test_kernel_reads_nothing_outside_the_bank(bad):
    around = torch.full((4, M, D), 7.0)
    weight, ids = torch.randn(V, D), torch.tensor([[1], [2]])
    index = torch.tensor([1, bad])
    out = launch(ids, None, weight, around[1:-1], prompt_index=index)
    assert out[1, :M].isnan().all()
    assert torch.equal(out[0, :M], around[2])
    assert torch.equal(out[:, M:], weight[ids])


BEHIND = """
import ctypes, mmap, torch
from ptuning_fast import kernels
from ptuning_fast.op import Batch, Layout, Prompt

PAGE = mmap.PAGESIZE

def last(*shape):
    # A tensor whose last element is the last one before memory that must not be touched.
    size = 4 * torch.Size(shape).numel()
    pages = -(-size // PAGE) + 1
    memory = mmap.mmap(-1, pages * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    protected = ctypes.c_void_p(address + (pages - 1) * PAGE)
    assert libc.mprotect(protected, ctypes.c_size_t(PAGE), mmap.PROT_NONE if hasattr(mmap, "PROT_NONE") else 0) == 0
    whole = torch.frombuffer(memory, dtype=torch.float32, count=(pages - 1) * PAGE // 4)
    return whole[whole.numel() - size // 4 :].normal_().view(shape)

ids = torch.tensor([[0, 8, 8], [8, 1, 8]])
plain = {"weight": torch.randn(9, 20), "prompt": torch.randn(2, 20), "grad": torch.randn(2, 2, 20)}
tensors = plain | {%r: last(*plain[%r].shape)}
print("start", flush=True)
kernels.forward(Batch(ids), tensors["weight"], Prompt(tensors["prompt"]), Layout())
kernels.backward(tensors["grad"], (2, 20), torch.float32, None, None, False)
print("whole", flush=True)
behind = last(1)
ctypes.string_at(behind.data_ptr() + 4, 1)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects pages as Linux does")
@pytest.mark.parametrize("name", ["weight", "prompt", "grad"])
def test_kernels_read_nothing_behind_a_tensor(name):
    """Rows of 20 in blocks of 64, the last of them before a page that may not be read; one that is ends the process."""
    if functional.kernels is None or torch.cuda.is_available():
        pytest.skip("what would be read shows in the interpreter")
    result = subprocess.run([sys.executable, "-c", BEHIND % (name, name)], capture_output=True, text=True)
    assert result.stdout.split()[:1] == ["start"], result.stderr[-2000:]
    assert "whole" in result.stdout, result.stderr[-2000:]
    assert result.returncode == -signal.SIGSEGV, "the page behind is not protected"


def test_fp64_tables_take_the_torch_backend():
    arguments = batch("cpu", weight=torch.randn(V, D).double(), attention_mask=None)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error")
        if functional.kernels is not None:
            patch.setattr(functional.kernels, "forward", None)
        embeds = prepend_prompt(**arguments)["inputs_embeds"]
    assert embeds.dtype == torch.float64
    assert torch.equal(embeds[:, :M], arguments["prompt"].double().expand(2, M, D))
    assert torch.equal(embeds[:, M:], arguments["weight"][arguments["input_ids"]])


@pytest.mark.parametrize(
    ("kernels", "reason"), [(None, "Triton is not available"), (functional.kernels, "torch.float64")]
)
def test_a_gpu_without_the_kernels_warns(monkeypatch, kernels, reason):
    """Once for each device type and dtype."""
    monkeypatch.setattr(functional, "kernels", kernels)
    functional._warn_torch_backend.cache_clear()
    with pytest.warns(UserWarning, match=f"on meta runs as plain torch operations.*{reason}"):
        prepend_prompt(**batch("meta", weight=torch.randn(V, D).double()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepend_prompt(**batch("meta", weight=torch.randn(V, D).double()))
    functional._warn_torch_backend.cache_clear()
