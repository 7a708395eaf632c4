"""A probe leaves a model as it was."""

import threading

import pytest
import sweep
import torch
import zoo

from ptuning_fast import SoftPrompt

KINDS = sweep.model_types()


def test_a_model_that_changes_itself_is_put_back(torch_backend):
    """BigBird, given a short text, attends fully from then on."""
    model = sweep.build("big_bird", KINDS["big_bird"], "eager")
    kinds = [type(module) for module in model.modules()]
    buffers = dict(model.named_buffers())
    assert model.bert.attention_type == "block_sparse"
    SoftPrompt(model, 3)(*zoo.padded(zoo.texts([30, 31]), "right"))
    assert model.bert.attention_type == "block_sparse"
    assert [type(module) for module in model.modules()] == kinds
    assert all(one is buffers[name] for name, one in model.named_buffers())
    model(torch.arange(10, 14)[None])  # and so it does by itself
    assert model.bert.attention_type == "original_full"


@pytest.mark.parametrize("mode", ["prepend", "packed", "shared"])
def test_many_threads_leave_a_model_in_training(mode, torch_backend):
    for _ in range(3):
        model = zoo.build("Llama").train()
        prompt, start, errors = SoftPrompt(model, 3), threading.Barrier(6), []

        def use(prompt=prompt, start=start, errors=errors):
            start.wait()
            try:
                prompt(*zoo.padded(zoo.texts([3, 5]), "right"), mode=mode)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=use) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors and all(module.training for module in model.modules())


@pytest.mark.parametrize("kind", ["llama, dynamic RoPE", "phi3, longrope"])
def test_rotary_positions_depend_on_the_batch_without_a_prompt_too(kind, torch_backend):
    model = sweep.build(kind, KINDS[kind], "sdpa")
    ids, mask = zoo.padded(zoo.texts([10, 40]), "right")
    alone = sweep.run(model, {"input_ids": ids[:1, :10]}, 1)[0]
    beside = sweep.run(model, {"input_ids": ids, "attention_mask": mask}, 2)[0, :10]
    assert (alone - beside).abs().max() > 0.01 * alone.abs().max()
    prompt = SoftPrompt(model, 3)
    with pytest.warns(UserWarning, match="how long the longest text of the batch is, with a prompt or without"):
        prompt(ids, mask)
