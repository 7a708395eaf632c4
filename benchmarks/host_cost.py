"""What an eager call costs the host: python benchmarks/host_cost.py [--once]

Everything is timed until it is launched, not until it is done: on a GPU as it is, elsewhere on a stub of one
(stub_gpu.py) in which launches do nothing. There the opponent is what torch.cat's lines take on the CPU, at the same
sizes (small, but its time has the copying in it) and with rows of 8 elements, which is dispatch alone. A GPU's dispatch
takes longer than either, so the stub does not favour ours. A round of each takes turns, and a ratio is of two of them.

Prints a list of cases as JSON. With --once each case runs twice and is not timed: that is a check of the launches.
"""

import argparse
import contextlib
import functools
import json
import sys
import time
from statistics import quantiles
from unittest import mock

import stub_gpu
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ptuning_fast import FastPTuning, prepend_prompt
from ptuning_fast.op import functional
from ptuning_fast.reference import ReferencePTuning

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
N, M, D, V = 16, 10, 768, 30522
CALLS, ROUNDS = (50, 40) if GPU else (400, 25)


class Returned(PreTrainedModel):
    """An encoder that returns what it is given, so that what stands around it is all there is to time."""

    config_class = PreTrainedConfig

    def __init__(self, embedding):
        config = PreTrainedConfig(
            hidden_size=embedding.embedding_dim, vocab_size=V, num_hidden_layers=0, num_attention_heads=1
        )
        super().__init__(config)
        self.embeddings = nn.Module()
        self.embeddings.word_embeddings = embedding

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def forward(self, inputs_embeds=None, attention_mask=None):
        return BaseModelOutput(last_hidden_state=inputs_embeds)


class Stage:
    """A batch of B rows, and the functions that are timed on it."""

    def __init__(self, B, d=D):
        self.embedding = nn.Embedding(V, d, device=DEVICE).requires_grad_(False)
        self.prompt = nn.Parameter(torch.randn(M, d, device=DEVICE))
        self.ids, self.mask = torch.randint(V, (B, N), device=DEVICE), torch.ones(B, N, device=DEVICE).long()
        self.grad = torch.randn(B, M + N, d, device=DEVICE)

    def torch_cat(self):
        B = len(self.ids)
        tokens = self.embedding(self.ids)
        inputs_embeds = torch.cat([self.prompt.unsqueeze(0).expand(B, -1, -1), tokens], dim=1)
        prompt_mask = torch.ones(B, M).to(self.mask.device)
        return inputs_embeds, torch.cat([prompt_mask, self.mask], dim=1)

    def fast(self, **options):
        out = prepend_prompt(self.ids, self.mask, weight=self.embedding.weight, prompt=self.prompt, **options)
        return out["inputs_embeds"], out.get("attention_mask")


def no_gradient(call):
    def called():
        with torch.no_grad():
            return call()

    return called


def gradient(call, stage):
    grad = stage.grad.reshape(call()[0].shape)
    return lambda: torch.autograd.grad(call()[0], stage.prompt, grad)


def cases():
    """(name, launches, ours, torch.cat's at the same sizes, and in thin rows)."""

    def case(name, launches, B, direction, **options):
        stage, thin = Stage(B), Stage(B, 8)
        if direction == "forward":
            return name, launches, *map(no_gradient, (lambda: stage.fast(**options), stage.torch_cat, thin.torch_cat))
        calls = (lambda: stage.fast(**options), stage), (stage.torch_cat, stage), (thin.torch_cat, thin)
        return name, launches, *(gradient(*call) for call in calls)

    packed = {"packed": True, "lengths": [N] * 4}
    yield case("forward", 1, 1, "forward")
    yield case("forward + backward", 1, 1, "forward + backward")
    yield case("forward + backward, B = 4", 2, 4, "forward + backward")
    yield case("forward, adjacent, B = 4", 2, 4, "forward", adjacent=True)
    yield case("forward, packed, B = 4", 3, 4, "forward", **packed)
    yield case("forward + backward, packed, B = 4", 4, 4, "forward + backward", **packed)

    # The whole module, around an encoder that does nothing.
    stage, thin = Stage(1), Stage(1, 8)
    modules = (
        FastPTuning(Returned(stage.embedding), M),
        *(ReferencePTuning(Returned(s.embedding), M) for s in (stage, thin)),
    )
    yield "FastPTuning, encoder left out", 1, *(functools.partial(m.to(DEVICE), stage.ids, stage.mask) for m in modules)


def microseconds(calls):
    """One round of each of `calls`, in turn."""
    for call in calls:
        if GPU:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        yield 1e6 * (time.perf_counter() - start) / CALLS


def quartiles(values):
    return quantiles(values, n=4, method="inclusive")


def timed(*calls):
    for _ in range(3):
        list(microseconds(calls))
    rounds = [list(microseconds(calls)) for _ in range(ROUNDS)]
    ours, same, thin = zip(*rounds)
    return {
        "us": quartiles(ours),
        "torch_cat_us": quartiles(same),
        "dispatch_us": quartiles(thin),
        "of_torch_cat": quartiles([one / other for one, other in zip(ours, same)]),
        "of_dispatch": quartiles([one / other for one, other in zip(ours, thin)]),
    }


def parts(fast_forward, fast_step):
    """Where the time of ours goes: what is saved by leaving a part out, microseconds."""
    launcher = sys.modules["ptuning_fast.kernels.runtime"].Launcher

    def without(owner, name, call):
        def left_out():
            with mock.patch.object(owner, name, lambda *_: None):
                list(microseconds((call,)))
                return quartiles([*microseconds([call] * ROUNDS)])[1]

        return left_out

    whole, step = (quartiles([*microseconds([call] * ROUNDS)])[1] for call in (fast_forward, fast_step))
    checks = whole - without(functional, "check", fast_forward)()
    launch = whole - without(launcher, "__call__", fast_forward)()
    return {
        "checks": checks,
        "launch": launch,
        "allocation and the rest": whole - checks - launch,
        "autograd": step - whole,
    }


def check(stub, name, fast, expected):
    """The launches are as many as they should be, and all of them past Triton's binder; AssertionError otherwise."""
    from triton.runtime import JITFunction

    def bound(*_, **__):
        raise AssertionError(f"{name}: a launch went through Triton's binder")

    fast()
    before = stub.launches() if stub else 0
    with mock.patch.object(JITFunction, "run", bound):
        fast()
    if stub:
        assert stub.launches() - before == expected, f"{name}: {stub.launches() - before} launches, not {expected}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--once", action="store_true", help="check the launches, and time nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    with contextlib.nullcontext() if GPU else stub_gpu.active() as stub:
        of = {}
        for name, launches, fast, *plain in cases():
            of[name] = fast
            check(stub, name, fast, launches)
            found.append({"case": name, "launches": launches} | ({} if options.once else timed(fast, *plain)))
        if not options.once:
            found[0]["parts"] = parts(of["forward"], of["forward + backward"])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
