"""What the tests of FastPTuning's savings share."""

import torch
import zoo

from ptuning_fast import FastPTuning

PACKABLE = ["BERT", "RoBERTa", "XLM-R", "CamemBERT", "DistilBERT", "ELECTRA", "ALBERT", "ModernBERT"]
PACKABLE += ["GPT-2", "OPT", "Llama", "Qwen2", "Mistral", "Phi", "Gemma", "Gemma 2", "Gemma 3"]
DECODERS = PACKABLE[PACKABLE.index("GPT-2") :]
FULL = ["BERT", "RoBERTa", "XLM-R", "CamemBERT", "DistilBERT", "ELECTRA", "ALBERT"]
PRUNABLE = ["BERT", "RoBERTa", "XLM-R", "CamemBERT", "DistilBERT", "ELECTRA", "DeBERTa-v2"]


def base(name):
    model = zoo.build(name)
    return model if model.base_model is model else model.base_model


def build(name, **options):
    torch.manual_seed(3)
    model = base(name)
    if "pooling" not in options:
        options["pooling"] = "last" if name in DECODERS else "first"
    fast = FastPTuning(
        model, zoo.M, 3, init=torch.randn(zoo.M, model.get_input_embeddings().weight.shape[1]), **options
    )
    return fast.train()


def logits_and_gradients(fast, ids, mask):
    logits = fast(ids, mask)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))
    return logits, *torch.autograd.grad((logits * weight).sum(), [fast.prompt_embeddings, fast.classifier.weight])


def assert_same(actual, expected):
    for one, other in zip(actual, expected):
        assert (one - other).abs().max() <= zoo.TOLERANCE * max(1, other.abs().max())


def seen_in(fast, ids, mask):
    """Of one forward: the arguments of the encoder, its last hidden state, and what the head is given."""
    seen = {}

    def of_encoder(module, args, kwargs, out):
        seen.update(inputs=kwargs, hidden=out.last_hidden_state)

    hooks = [
        fast.bert.register_forward_hook(of_encoder, with_kwargs=True),
        fast.classifier.register_forward_pre_hook(lambda module, args: seen.update(pooled=args[0])),
    ]
    fast(ids, mask)
    for hook in hooks:
        hook.remove()
    return seen
