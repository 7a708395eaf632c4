"""Gradients through whole models, in fp64 against finite differences, and of second order; many threads at once."""

import threading

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ptuning_fast import FastPTuning, SoftPrompt
from ptuning_fast.models.trial import quietly

pytestmark = pytest.mark.usefixtures("torch_backend")

M = 2
MODES = {"BERT": ("prepend", "packed"), "Llama": ("prepend", "packed", "shared")}
CASES = [(name, mode) for name, modes in MODES.items() for mode in modes]


@pytest.fixture(autouse=True)
def llama_in_fp64(monkeypatch):
    """Its own normalisation goes through fp32, in which finite differences show nothing."""
    norm = lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)  # noqa: E731
    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)


def fp64(name):
    return zoo.build(name, num_hidden_layers=2).double()


def vectors_of(prompt):
    return prompt.prompt_embeddings.detach().double().requires_grad_()


def of_texts(rows):
    """A number in which every output of these texts counts differently, [n, ...] each."""
    out = torch.cat([row.flatten() for row in rows])
    return (out.tanh() * torch.linspace(0.5, 1, out.numel(), dtype=out.dtype)).sum()


def served(model, prompt, mode):
    """The function of the prompt's vectors that SoftPrompt makes of `model`."""
    (ids, mask), lengths = zoo.padded(zoo.texts([3, 6]), "right"), [3, 6]

    def function(vectors):
        inputs = functional_call(prompt, {"prompt_embeddings": vectors}, (ids, mask), {"mode": mode})
        out = model(**inputs)[0]
        if mode == "packed":
            starts = inputs["cu_seq_lens_q"].tolist()
            return of_texts([out[0, start + M : start + M + n] for start, n in zip(starts, lengths)])
        if mode == "shared":
            starts = inputs["cu_seq_lens_q"].tolist()[1:]
            return of_texts([out[0, start + 1 : start + 1 + n] for start, n in zip(starts, lengths)])
        return of_texts([out[row, M : M + n] for row, n in enumerate(lengths)])

    return function


def by_hand(model, vectors):
    """The same, each text alone and without any of our code."""
    table = model.get_input_embeddings()
    embeds = [torch.cat([vectors, table(text)])[None] for text in zoo.texts([3, 6])]
    return of_texts([model(inputs_embeds=one)[0][0, M:] for one in embeds])


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_gradcheck(name, mode):
    model = fp64(name)
    prompt = SoftPrompt(model, M)
    function, vectors = served(model, prompt, mode), vectors_of(prompt)
    torch.testing.assert_close(function(vectors), by_hand(model, vectors), rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradcheck(function, (vectors,))


@pytest.mark.parametrize("mode", ["prepend", "packed"])
def test_gradcheck_of_the_classifier(mode):
    """In full: where the last layer is pruned, its attention is computed in fp32."""
    fast = FastPTuning(fp64("BERT"), M, 3, mode=mode, prune=False).double().eval()
    batch = zoo.padded(zoo.texts([3, 6]), "right")
    vectors = vectors_of(fast)
    assert torch.autograd.gradcheck(
        lambda vectors: functional_call(fast, {"prompt_embeddings": vectors}, batch), (vectors,)
    )


def twice(function, vectors):
    """Of the gradient's square, the gradient."""
    (grad,) = torch.autograd.grad(function(vectors), vectors, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), vectors)[0]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_second_order(name, mode):
    """With attention that can be differentiated twice, as that of the plain model."""
    model = fp64(name)
    prompt = SoftPrompt(model, M)
    vectors = vectors_of(prompt)
    with sdpa_kernel(SDPBackend.MATH):
        expected = twice(lambda vectors: by_hand(model, vectors), vectors)
        torch.testing.assert_close(twice(served(model, prompt, mode), vectors), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.skipif(torch.cuda.is_available(), reason="which attention torch takes there is its own affair")
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_no_second_order_without(name, mode):
    """torch's fused attention says so, of the plain model and in each mode."""
    model = fp64(name)
    prompt = SoftPrompt(model, M)
    for function in (lambda vectors: by_hand(model, vectors), served(model, prompt, mode)):
        with pytest.raises(
            RuntimeError, match=r"derivative for .*attention.* is not implemented|cannot be differentiated twice"
        ):
            twice(function, vectors_of(prompt))


def test_a_probe_does_not_put_back_what_another_thread_has_set(torch_backend):
    """The attention of packed batches: their mask is NaN for any other."""
    model = zoo.build("Llama")
    prompt, (ids, mask) = SoftPrompt(model, zoo.M), zoo.padded(zoo.texts(), "right")
    prompt(ids, mask, mode="packed")
    model.set_attn_implementation("sdpa")
    thread = threading.Thread(target=prompt, args=(ids, mask), kwargs={"mode": "packed"})
    with quietly(model):
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
    thread.join(60)
    assert model.config._attn_implementation == "ptuning_fast_sdpa"


@pytest.mark.parametrize("own", [False, True])
def test_first_use_by_many_threads_in_every_mode(own):
    """A model that nobody has used yet, and one prompt for all threads or one for each."""
    modes = MODES["Llama"] * 3
    batch = zoo.padded(zoo.texts(), "right")

    def fresh(model):
        torch.manual_seed(1)
        return SoftPrompt(model, zoo.M)

    model = zoo.build("Llama")
    prompt = fresh(model)
    expected = {mode: model(**prompt(*batch, mode=mode)).logits for mode in MODES["Llama"]}
    for _ in range(5):
        model = zoo.build("Llama")
        shared, found, start = fresh(model), {}, threading.Barrier(len(modes))
        prompts = [fresh(model) if own else shared for _ in modes]

        def use(number, model=model, prompts=prompts, found=found, start=start):
            start.wait()
            found[number] = model(**prompts[number](*batch, mode=modes[number])).logits

        threads = [threading.Thread(target=use, args=(number,)) for number in range(len(modes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == list(range(len(modes)))
        for number, mode in enumerate(modes):
            assert (found[number] - expected[mode]).abs().max() <= zoo.TOLERANCE
        assert not any(module.training for module in model.modules())
