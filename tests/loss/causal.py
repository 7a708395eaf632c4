"""Causal language models and batches with labels for the tests of losses, and what their gradients are compared by."""

import sweep
import torch
import zoo

CLASSES = sweep.model_types()
CAUSAL = ["llama", "qwen3", "gemma2", "gemma3_text", "cohere", "granite", "gpt2", "opt", "mixtral", "olmo2"]


def build(kind):
    return sweep.build(kind, CLASSES[kind], "eager" if kind == "gemma2" else "sdpa")


def batch(labelled="all", side="right"):
    """Which tokens have a label: all, those whose id is no multiple of three, or of each text the last two."""
    ids, mask = zoo.padded(zoo.texts(), side)
    labels = ids.masked_fill(mask == 0, -100)
    if labelled == "some":
        labels = labels.masked_fill(ids % 3 == 0, -100)
    if labelled == "last":
        position = mask.cumsum(1)
        labels = labels.masked_fill(position <= mask.sum(1, keepdim=True) - 2, -100)
    return ids, mask, labels


def gradients(loss, *parameters, **options):
    return loss.detach(), *torch.autograd.grad(loss, parameters, **options)


def assert_same(actual, expected, loss=1e-6, gradient=1e-5):
    for one, other, most in zip(actual, expected, [loss] + [gradient] * len(expected)):
        assert one.dtype == other.dtype and (one - other).abs().max() <= most * other.abs().max()
