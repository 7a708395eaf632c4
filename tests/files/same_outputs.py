"""Outputs of a prompt and of PEFT's model, compared."""

import torch
import zoo


def outputs(model, inputs):
    out = model(**inputs)
    found = [out[key] for key in ("logits", "start_logits", "end_logits", "last_hidden_state") if key in out]
    assert found
    return found


def assert_same_outputs(prompt, theirs, task):
    """PEFT's model on a right-padded batch, where it is right, against ours."""
    ids, mask = zoo.padded(zoo.texts(), "right")
    batch = {"input_ids": ids, "attention_mask": mask}
    decoder = {"decoder_input_ids": ids[:, :3]} if task == "SEQ_2_SEQ_LM" else {}
    actual = outputs(prompt.model, prompt(**batch) | decoder)
    expected = outputs(theirs.eval(), batch | decoder)
    rows = torch.cat([torch.ones(len(mask), zoo.M, dtype=mask.dtype), mask], 1) != 0
    for one, other in zip(actual, expected):
        per_row = one.shape[:2] == rows.shape
        one, other = (one[rows], other[rows]) if per_row else (one, other)
        assert (one - other).abs().max() <= zoo.TOLERANCE
