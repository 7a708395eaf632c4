"""A model under torch.compile(fullgraph=True) in each mode: the same as without, and no graph for each length."""

import pytest
import torch
import zoo
from torch._dynamo.testing import CompileCounterWithBackend

from ptuning_fast import SoftPrompt


@pytest.mark.parametrize(
    ("name", "mode", "backend"),
    [
        ("Llama", "packed", "aot_eager"),
        ("Llama", "shared", "aot_eager"),
        ("BERT", "packed", "eager"),
        ("Gemma 2", "packed", "eager"),
    ],
)
def test_one_graph_serves_all_lengths(name, mode, backend, torch_backend):
    """Traced with its backward pass where "aot" says so: for each mode once."""
    torch._dynamo.reset()
    model, graphs = zoo.build(name), CompileCounterWithBackend(backend)
    prompt = SoftPrompt(model, zoo.M)
    prompt(*zoo.padded(zoo.texts([3, 5]), "right"), mode=mode)  # the model is probed outside
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for lengths in ([3, 5, 9], [4, 7, 2, 8], [1, 11], [6, 3, 12, 2, 2]):
        ids, mask = zoo.padded(zoo.texts(lengths), "right")
        gradients = []
        for one in (model, compiled):
            out = one(**prompt(ids, mask, mode=mode))
            rows = out.logits if "logits" in out else out.last_hidden_state
            gradients.append(torch.autograd.grad(rows.sin().sum(), prompt.prompt_embeddings)[0])
        assert (gradients[1] - gradients[0]).abs().max() <= zoo.TOLERANCE * gradients[0].abs().max()
    assert graphs.frame_count <= 2


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["Llama", "BERT", "Gemma 2", "GPT-2"])
def test_packed_layers_checkpointed_by_hand_have_the_same_gradient(name, reentrant, torch_backend):
    model = zoo.build(name)
    prompt = SoftPrompt(model, zoo.M)
    ids, mask = zoo.padded(zoo.texts(), "left")

    def gradient():
        rows = zoo.rows_out(model, prompt(ids, mask, mode="packed"))
        prompt.zero_grad()
        (rows.sin() * torch.arange(rows.shape[-1])).sum().backward()  # torch.autograd.grad is not for reentrant ones
        return prompt.prompt_embeddings.grad.clone()

    def checkpointed(forward):
        def run(hidden, *args, **kwargs):
            return torch.utils.checkpoint.checkpoint(
                lambda hidden: forward(hidden, *args, **kwargs), hidden, use_reentrant=reentrant
            )

        return run

    expected = gradient()
    layers = next(one for one in model.modules() if isinstance(one, torch.nn.ModuleList))
    for layer in layers:
        layer.forward = checkpointed(layer.forward)
    assert torch.equal(gradient(), expected)
