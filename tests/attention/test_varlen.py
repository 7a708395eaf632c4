"""Attention over packed sequences: every backend against attention over each sequence by itself, written out."""

import pytest
import torch

from ptuning_fast.attention import varlen
from ptuning_fast.attention.arguments import Scores, Sequences
from ptuning_fast.attention.by_length import groups_of
from ptuning_fast.attention.varlen import backend_for, varlen_attention

LENGTHS = [5, 5, 1, 0, 12, 3]
OPTIONS = {
    "full": {"causal": False},
    "causal": {"causal": True},
    "scale": {"causal": True, "scale": 0.3},
    "window": {"causal": False, "window": 3},
    "causal window": {"causal": True, "window": 3},
    "softcap": {"causal": True, "softcap": 2.0},
    "softcap and window": {"causal": True, "softcap": 2.0, "window": 3},
}
PLAIN = ["full", "causal", "scale"]  # what jagged tensors know
HEADS = {"one key a head": (4, 4), "grouped": (4, 2)}


def written_out(q, k, v, lengths, *, causal, window=None, scale=None, softcap=None, prefix=0):
    """Softmax of the scores of each sequence, in fp64; behind a prefix, the first sequence, of it and the sequence."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (one.repeat_interleave(q.shape[1] // one.shape[1], 1) for one in (k, v))
    out, start = [], 0
    for n in lengths:
        one_q, one_k, one_v = (one[start : start + n].double() for one in (q, k, v))
        before = prefix if start else 0
        one_k, one_v = (torch.cat([all[:before].double(), one]) for all, one in ((k, one_k), (v, one_v)))
        scores = torch.einsum("ihe,jhe->hij", one_q, one_k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        for i in range(n):
            for j in range(before + n):
                distance = before + i - j
                if (causal and distance < 0) or (window is not None and abs(distance) >= window):
                    scores[:, i, j] = float("-inf")
        out.append(torch.einsum("hij,jhe->ihe", scores.softmax(-1), one_v))
        start += n
    return torch.cat(out)


def tensors(heads, dtype=torch.float32, device="cpu", size=8, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    H, G = HEADS[heads]
    q, k, v = (torch.randn(sum(lengths), count, size, generator=generator) for count in (H, G, G))
    return [one.to(device, dtype).requires_grad_() for one in (q, k, v)]


def sequences(device="cpu", lengths=LENGTHS, prefix=0):
    return Sequences(torch.tensor([0, *lengths]).cumsum(0).int().to(device), max(lengths), prefix)


def compare(backend, inputs, options, lengths=LENGTHS, prefix=0):
    """Output and gradients against those written out, relative to the largest."""
    out = backend(*inputs, sequences(inputs[0].device, lengths, prefix), Scores(**options))
    assert out.shape == inputs[0].shape
    assert out.dtype == inputs[0].dtype
    expected = written_out(*inputs, lengths, **options, prefix=prefix)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device)
    actual = [out, *torch.autograd.grad((out.float() * weight).sum(), inputs)]
    expected = [expected, *torch.autograd.grad((expected * weight).sum(), inputs)]
    # Scores, weights and sums are rounded a few times each; sums are of twelve terms at most.
    budget = 30 * torch.finfo(inputs[0].dtype).eps
    for one, other in zip(actual, expected):
        assert (one.double() - other.double()).abs().max() <= budget * other.abs().max()


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("options", OPTIONS)
def test_by_length(heads, options):
    for backend in (varlen.by_length, varlen.under_a_mask):
        compare(backend, tensors(heads), OPTIONS[options])


@pytest.mark.parametrize("lengths", [[5, 5, 1, 0, 12, 3], [9, 2, 2, 9], [1, 4]], ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("options", [name for name in OPTIONS if OPTIONS[name]["causal"]])
def test_behind_a_prefix(options, heads, lengths):
    settings, inputs = OPTIONS[options], tensors(heads, lengths=lengths)
    chosen = backend_for(inputs[0], sequences(lengths=lengths, prefix=lengths[0]), Scores(**settings))
    assert (chosen is varlen.merged) == (options in PLAIN)
    for backend in {chosen, varlen.by_length, varlen.under_a_mask}:
        compare(backend, inputs, settings, lengths, prefix=lengths[0])


def test_a_window_that_cuts_nothing_is_none():
    scores = Scores(causal=True, window=24)
    assert backend_for(tensors("grouped")[0], sequences(prefix=5), scores) is varlen.merged
    compare(varlen.merged, tensors("grouped"), {"causal": True, "window": 24}, prefix=5)
    assert backend_for(tensors("grouped")[0], sequences(prefix=13), scores) is varlen.by_length


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_behind_a_prefix_in_other_dtypes(dtype):
    compare(varlen.merged, tensors("grouped", dtype), {"causal": True}, prefix=5)


@pytest.mark.parametrize("heads", HEADS)
def test_jagged(heads):
    """On a CPU torch has it for full attention alone; `test_on_a_gpu` has the rest."""
    compare(varlen.jagged, tensors(heads), OPTIONS["full"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("options", OPTIONS)
def test_on_a_gpu(heads, options, dtype):
    """Whichever backend is chosen there, and jagged tensors and calls by length beside it."""
    inputs = tensors(heads, dtype, "cuda", size=32)
    settings = OPTIONS[options]
    chosen = backend_for(inputs[0], sequences("cuda"), Scores(**settings))
    for backend in {chosen, varlen.by_length} | ({varlen.jagged} if options in PLAIN else set()):
        compare(backend, inputs, settings)
    if settings["causal"]:
        chosen = backend_for(inputs[0], sequences("cuda", prefix=5), Scores(**settings))
        for backend in (chosen, varlen.by_length, varlen.under_a_mask):
            compare(backend, inputs, settings, prefix=5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_on_a_gpu(dtype):
    """As many weights as were asked for are dropped, and what remains is scaled up."""
    lengths = [64] * 8
    q, k, _ = (one * 0 for one in tensors("one key a head", dtype, "cuda", size=64, lengths=lengths))
    v = torch.ones_like(k)
    out = varlen_attention(q, k, v, sequences("cuda", lengths), Scores(False, dropout=0.25)).float()
    assert out.std() > 0.01
    assert abs(out.mean().item() - 1) < 0.02  # 2,048 rows with a deviation of 0.07 each


def test_the_choice(monkeypatch):
    """By device, dtype, head size, and what the attention asks for."""

    class Query:
        def __init__(self, device, dtype, size=64):
            self.device, self.dtype, self.shape = torch.device(device), dtype, (7, 4, size)

    def chosen(query, *, prefix=0, **options):
        return backend_for(query, sequences(prefix=prefix), Scores(causal=True, **options))

    half, full = Query("cuda", torch.bfloat16), Query("cuda", torch.float32)
    assert chosen(Query("cpu", torch.bfloat16)) is varlen.by_length
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(varlen, "flash_attn_varlen_func", None)
    assert chosen(half) is varlen.torch_flash
    assert chosen(half, window=4) is varlen.torch_flash
    assert chosen(half, window=4, softcap=2.0) is varlen.by_length
    assert chosen(full) is varlen.jagged
    assert chosen(full, window=4) is varlen.by_length
    assert chosen(Query("cuda", torch.bfloat16, 512)) is varlen.jagged
    assert chosen(half, prefix=5) is varlen.merged
    for unlike in (chosen(full, prefix=5), chosen(half, prefix=5, window=4), chosen(half, prefix=5, softcap=2.0)):
        assert unlike is varlen.by_length
    monkeypatch.setattr(varlen, "flash_attn_varlen_func", print)
    assert chosen(half, window=4, softcap=2.0) is varlen.flash_attn
    assert chosen(full) is varlen.jagged
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert chosen(half) is varlen.jagged
    assert chosen(half, prefix=5) is varlen.by_length


def test_what_the_fused_operators_are_given(monkeypatch):
    """Without a GPU: the operator exists with these arguments and a gradient, and a window means what it means here."""
    given = {}

    def recorded(*args, **kwargs):
        given.update(kwargs, args=args)
        return [args[0]]

    q, k, v = tensors("grouped", torch.bfloat16)
    for causal, window, expected in ((False, None, (-1, -1)), (True, 3, (2, 0)), (False, 3, (2, 2))):
        scores = Scores(causal, window, scale=0.5, dropout=0.1)
        monkeypatch.setattr(varlen, "flash_attn_varlen_func", recorded)
        varlen.flash_attn(q, k, v, sequences(), scores)
        assert given["window_size"] == expected
        assert (given["causal"], given["softmax_scale"], given["dropout_p"]) == (causal, 0.5, 0.1)
        assert given["args"][5:] == (12, 12)
    # The arguments of torch's own are bound to its schema; what it does with them, a GPU has to show.
    schema = torch.ops.aten._flash_attention_forward.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names[:10] == [
        *("query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k"),
        *("dropout_p", "is_causal", "return_debug_mask"),
    ]
    assert {"scale", "window_size_left", "window_size_right"} <= set(names[10:])
    names = [argument.name for argument in torch.ops.aten._flash_attention_backward.default._schema.arguments]
    assert names[:14] == [
        *("grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k"),
        *("dropout_p", "is_causal", "rng_state", "unused"),
    ]


def test_dropout_by_length():
    lengths = [64] * 8
    q, k, _ = (one * 0 for one in tensors("one key a head", size=64, lengths=lengths))
    torch.manual_seed(0)
    out = varlen_attention(q, k, torch.ones_like(k), sequences(lengths=lengths), Scores(False, dropout=0.25))
    assert out.std() > 0.01
    assert abs(out.mean().item() - 1) < 0.02  # 2,048 rows with a deviation of 0.07 each


def test_no_rows():
    inputs = tensors("one key a head", lengths=[0, 0])
    assert varlen_attention(*inputs, sequences(lengths=[0, 0]), Scores(True)).shape == (0, 4, 8)


def test_groups():
    ends = sequences().cu_seq_lens
    assert groups_of(ends) == [(2, 5), (1, 1), (1, 0), (1, 12), (1, 3)]
    assert groups_of(ends) is groups_of(ends)
