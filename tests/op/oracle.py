"""What the op returns, spelled out element by element: an oracle that shares no idea with the code it checks."""

import torch


def layout(mask_row, n, m, adjacent):
    """The columns of one output row: ("prompt", s) or ("token", column)."""
    k = 0
    if adjacent and mask_row is not None:
        while k < n and not mask_row[k]:
            k += 1
    tokens = [("token", j) for j in range(n)]
    return tokens[:k] + [("prompt", s) for s in range(m)] + tokens[k:]


def prepend_prompt(
    input_ids,
    attention_mask=None,
    *,
    weight,
    prompt,
    token_type_ids=None,
    labels=None,
    position_start=None,
    prompt_index=None,
    embed_scale=1.0,
    adjacent=False,
    packed=False,
    additive_mask=None,
):
    """`ptuning_fast.prepend_prompt` for tests: slow, in loops, on the CPU."""
    (B, n), d, m = input_ids.shape, weight.shape[1], prompt.shape[-2]
    if packed and position_start is None:
        position_start = 0
    rows = []  # one list of (embedding, mask, type, label, position) per batch row
    for b in range(B):
        mask_row = None if attention_mask is None else attention_mask[b].tolist()
        bank = prompt if prompt_index is None else prompt[prompt_index[b]]
        row, seen = [], 0
        for kind, at in layout(mask_row, n, m, adjacent and not packed):
            if kind == "prompt":
                entry = [bank[at].to(weight.dtype), 1, 0, -100]
            else:
                token = weight[input_ids[b, at]]
                if embed_scale != 1.0:
                    token = (token.float() * embed_scale).to(weight.dtype)
                value = 1 if mask_row is None else mask_row[at]
                kinds = 0 if token_type_ids is None else token_type_ids[b, at].item()
                entry = [token, value, kinds, 0 if labels is None else labels[b, at].item()]
            there = entry[1] != 0
            entry.append((position_start or 0) + (seen if there else 0))
            seen += there
            if there or not packed:
                row.append(entry)
        rows.append(row)

    flat = [entry for row in rows for entry in row]
    shape = (1, len(flat)) if packed else (B, m + n)

    def column(index, dtype):
        return torch.tensor([entry[index] for entry in flat], dtype=dtype).view(shape)

    embeds = torch.stack([entry[0] for entry in flat]) if flat else weight.new_empty(0, d)
    out = {"inputs_embeds": embeds.view(*shape, d)}
    if attention_mask is not None and not packed:
        out["attention_mask"] = column(1, attention_mask.dtype)
        if additive_mask is not None:
            lowest = {torch.float32: -(2 - 2**-23) * 2.0**127, torch.float16: -65504.0}
            lowest |= {torch.bfloat16: -(2 - 2**-7) * 2.0**127}
            values = [0.0 if entry[1] else lowest[additive_mask] for entry in flat]
            out["attention_mask"] = torch.tensor(values, dtype=additive_mask).view(B, 1, 1, m + n)
    if token_type_ids is not None:
        out["token_type_ids"] = column(2, token_type_ids.dtype)
    if labels is not None:
        out["labels"] = column(3, labels.dtype)
    if position_start is not None:
        out["position_ids"] = column(4, torch.int64)
    if packed:
        lengths = [len(row) for row in rows]
        cu = torch.tensor([sum(lengths[:b]) for b in range(B + 1)], dtype=torch.int32)
        out |= {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
        out |= {"max_length_q": max(lengths, default=0), "max_length_k": max(lengths, default=0)}
    return out


def prompt_grad(grad, prompt_shape, prompt_index, attention_mask, n, adjacent, packed):
    """The prompt's gradient in fp64, from the gradient of inputs_embeds."""
    m = prompt_shape[-2]
    out = torch.zeros(prompt_shape, dtype=torch.float64)
    B = len(grad) if not packed else len(attention_mask)
    first = 0
    for b in range(B):
        mask_row = None if attention_mask is None else attention_mask[b].tolist()
        if packed:
            rows = grad[0, first : first + m]
            first += m + sum(value != 0 for value in mask_row)
        else:
            columns = [kind for kind, _ in layout(mask_row, n, m, adjacent)]
            rows = grad[b, [s for s, kind in enumerate(columns) if kind == "prompt"]]
        target = out if prompt_index is None else out[prompt_index[b]]
        target += rows.double()
    return out
