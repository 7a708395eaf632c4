"""What only a GPU can show: CUDA graphs, synchronisations, launches, streams, torch.compile, asserts on the device."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from ptuning_fast import prepend_prompt

pytestmark = pytest.mark.gpu

B, N, M, D, V = 5, 7, 3, 64, 50
LAYOUTS = {
    "plain": {},
    "adjacent": {"adjacent": True},
    "packed": {"packed": True},
    "packed, known lengths": {"packed": True, "lengths": [0, 7, 3, 1, 5]},
}
FIXED = ["plain", "adjacent"]  # the layouts whose output has a shape that does not depend on the mask


def batch(layout, seed=0, device="cuda"):
    """Arguments of prepend_prompt: left-padded rows of LAYOUTS' lengths, in another order for another seed."""
    generator = torch.Generator().manual_seed(seed)
    options = dict(LAYOUTS[layout])
    lengths = torch.tensor([0, 7, 3, 1, 5]).roll(seed)
    if "lengths" in options:
        options["lengths"] = lengths.tolist()
    ids = torch.randint(0, V, (B, N), generator=generator)
    arguments = {
        "input_ids": ids,
        "attention_mask": (torch.arange(N) >= N - lengths[:, None]).long(),
        "labels": ids.flip(0),
        "weight": torch.randn(V, D, generator=generator).bfloat16(),
        "prompt": torch.randn(M, D, generator=generator),
    }
    arguments = {key: value.to(device) for key, value in arguments.items()} | options
    arguments["prompt"].requires_grad_()
    return arguments | {"position_start": 2}


def upstream(embeds, seed=0):
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(embeds.shape, generator=generator).to(embeds)


def step(arguments, grad=None):
    """Forward and backward: the outputs and the prompt's gradient."""
    out = prepend_prompt(**arguments)
    grad = upstream(out["inputs_embeds"]) if grad is None else grad
    (prompt_grad,) = torch.autograd.grad(out["inputs_embeds"], arguments["prompt"], grad)
    return {key: value.detach() if torch.is_tensor(value) else value for key, value in out.items()}, prompt_grad


def assert_same(actual, expected):
    (out, grad), (expected_out, expected_grad) = actual, expected
    assert out.keys() == expected_out.keys()
    for key, value in expected_out.items():
        same = torch.equal(out[key], value) if torch.is_tensor(value) else out[key] == value
        assert same, key
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_as_on_the_cpu(layout):
    """The two devices agree to the bit, but for the order in which the gradient is added up."""
    cpu = batch(layout, device="cpu")
    expected = prepend_prompt(**cpu)
    grad = upstream(expected["inputs_embeds"])
    (expected_grad,) = torch.autograd.grad(expected["inputs_embeds"], cpu["prompt"], grad)
    out, actual_grad = step(batch(layout), grad.cuda())
    for key, value in expected.items():
        assert torch.equal(out[key].cpu(), value) if torch.is_tensor(value) else out[key] == value, key
    torch.testing.assert_close(actual_grad.cpu(), expected_grad, rtol=0, atol=1e-5)  # five terms of size 1, in fp32


@pytest.mark.parametrize("layout", FIXED)
def test_cuda_graph(layout):
    """A captured step, replayed on other values in the same memory, gives what an eager step gives."""
    arguments = batch(layout)
    grad = torch.randn(B, M + N, D, device="cuda").bfloat16()
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        step(arguments, grad)
    torch.cuda.current_stream().wait_stream(warm_up)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(arguments, grad)

    for seed in (1, 2):
        other = batch(layout, seed)
        with torch.no_grad():
            for key, value in other.items():
                if torch.is_tensor(value):
                    arguments[key].copy_(value)
            grad.copy_(upstream(grad, seed))
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, step(other, upstream(grad, seed)))


@pytest.fixture
def count_synchronisations():
    """Runs a function and says how often it made the host wait for the GPU."""

    def count(function):
        function()  # compiles
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                function()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)

    yield count
    torch.cuda.set_sync_debug_mode("default")


def test_synchronisations_are_counted(count_synchronisations):
    """So that a count of 0 below means something."""
    ones = torch.ones(3, device="cuda")
    assert count_synchronisations(lambda: ones.tolist()) == 1
    assert count_synchronisations(lambda: (ones.sum().item(), ones.nonzero())) >= 2
    assert count_synchronisations(lambda: ones + 1) == 0


@pytest.mark.parametrize(
    ("layout", "expected"), [("plain", 0), ("adjacent", 0), ("packed", 1), ("packed, known lengths", 0)]
)
def test_synchronisations(count_synchronisations, layout, expected):
    arguments = batch(layout)
    grad = torch.randn_like(prepend_prompt(**arguments)["inputs_embeds"])
    assert count_synchronisations(lambda: step(arguments, grad)) == expected


@pytest.mark.parametrize("layout", ["plain", "adjacent", "packed, known lengths"])
def test_a_synchronisation_would_be_an_error(layout):
    arguments = batch(layout)
    grad = torch.randn_like(prepend_prompt(**arguments)["inputs_embeds"])
    expected = step(arguments, grad)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = step(arguments, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(actual, expected)


def on_the_gpu(function):
    """Names of what `function` makes the GPU do, kernels and copies, in order."""
    from torch.profiler import ProfilerActivity, profile

    function()  # compiles
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name for event in sorted(events, key=lambda event: event.time_range.start)]


@pytest.fixture
def profiler():
    ones = torch.ones(3, device="cuda")
    if not on_the_gpu(lambda: ones + 1):
        pytest.skip("torch.profiler sees no kernel on this machine (CUPTI is not available)")
    return on_the_gpu


@pytest.mark.parametrize(
    ("layout", "before"),
    [("plain", []), ("adjacent", ["scan_mask"]), ("packed, known lengths", ["scan_mask", "add_lengths"])],
)
def test_launches(profiler, layout, before):
    """The GPU does nothing but the launches that are counted: no copy, no fill, no second kernel."""
    arguments = batch(layout)
    kernels = [f"{name}_kernel" for name in (*before, "prepend_prompt")]
    assert profiler(lambda: prepend_prompt(**arguments)) == kernels
    embeds = prepend_prompt(**arguments)["inputs_embeds"]
    grad = torch.randn_like(embeds)
    backward = profiler(lambda: torch.autograd.grad(embeds, arguments["prompt"], grad, retain_graph=True))
    assert backward == ["prompt_grad_kernel"]


@pytest.mark.parametrize("layout", FIXED)
def test_torch_compile(layout):
    """No graph break: forward and backward of the compiled function equal the eager ones."""
    torch._dynamo.reset()
    options = LAYOUTS[layout] | {"position_start": 2}

    @torch.compile(fullgraph=True)
    def compiled(input_ids, attention_mask, labels, weight, prompt):
        return prepend_prompt(input_ids, attention_mask, labels=labels, weight=weight, prompt=prompt, **options)

    for seed in (0, 1):
        arguments = batch(layout, seed)
        tensors = {key: value for key, value in arguments.items() if torch.is_tensor(value)}
        out = compiled(**tensors)
        grad = upstream(out["inputs_embeds"])
        (prompt_grad,) = torch.autograd.grad(out["inputs_embeds"], arguments["prompt"], grad)
        out = {key: value.detach() for key, value in out.items()}
        assert_same((out, prompt_grad), step(arguments, grad))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_stream(layout):
    """The kernels run on the current stream: they see what was written on it before, after a long wait."""
    expected = step(batch(layout, 1))
    arguments, late = batch(layout), batch(layout, 1)
    if "lengths" in arguments:
        arguments["lengths"] = late["lengths"]
    grad = upstream(expected[0]["inputs_embeds"])
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            for key, value in late.items():
                if torch.is_tensor(value):
                    arguments[key].copy_(value)
        actual = step(arguments, grad)
    stream.synchronize()
    assert_same(actual, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_device(layout):
    """Tensors on a GPU that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert torch.cuda.current_device() == 0
    expected_out, expected_grad = step(batch(layout))
    out, grad = step(batch(layout, device="cuda:1"))
    torch.cuda.synchronize("cuda:1")
    for value in (*out.values(), grad):
        assert not torch.is_tensor(value) or value.device == torch.device("cuda:1")
    out = {key: value.to("cuda:0") if torch.is_tensor(value) else value for key, value in out.items()}
    assert_same((out, grad.to("cuda:0")), (expected_out, expected_grad))
    assert torch.cuda.current_device() == 0


PROGRAM = """
import torch
from ptuning_fast import prepend_prompt
ids = torch.tensor([[1, 2, 3], [4, {bad}, 6]], device="cuda")
mask = torch.tensor([[1, 1, 1], [1, {mask}, 1]], device="cuda")
prompt, index = torch.randn(2, 3, 64, device="cuda"), torch.tensor([0, {index}], device="cuda")
embeds = prepend_prompt(
    ids, mask, weight=torch.randn(9, 64, device="cuda"), prompt=prompt, prompt_index=index, packed={packed}
)["inputs_embeds"]
torch.cuda.synchronize()
print("no error", bool(embeds.isfinite().all()))
"""


def run(*, bad=5, mask=1, index=1, packed=False):
    """A failed assert ends the CUDA context for good, hence a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    program = PROGRAM.format(bad=bad, mask=mask, index=index, packed=packed)
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("wrong", [{"bad": 9}, {"bad": -1}, {"index": 2}, {"index": -1}], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_ids_outside_the_table_are_a_device_side_assert(wrong, packed):
    result = run(**wrong, packed=packed)
    assert result.returncode != 0
    assert "no error" not in result.stdout
    message = (
        "a prompt_index is outside the bank" if "index" in wrong else "an id in input_ids is outside the embedding"
    )
    assert message in result.stderr or "CUDA error" in result.stderr, result.stderr[-2000:]


def test_ids_that_are_never_looked_up_are_no_error():
    """The program above is sound; and a dropped row may hold any id."""
    for options in ({}, {"packed": True}, {"bad": -1, "mask": 0, "packed": True}):
        result = run(**options)
        assert result.returncode == 0, result.stderr[-2000:]
        assert "no error True" in result.stdout
