"""The torch.cat path, written as plainly as can be: the ground truth in tests and the opponent in benchmarks.

Nothing here is optimised, and nothing is checked.
"""

import torch
import torch.nn.functional as F
from torch import nn


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
    lengths=None,
    additive_mask=None,
):
    """`ptuning_fast.prepend_prompt` in plain torch: the same arguments, the same results, autograd's own gradient.

    `lengths` spares the fast op a synchronisation; here it is not needed and not read.
    """
    B, n = input_ids.shape
    m = prompt.shape[-2]
    prompt = prompt if prompt_index is None else prompt[prompt_index]
    prompt = prompt.to(weight.dtype).expand(B, -1, -1)
    tokens = F.embedding(input_ids, weight)
    if embed_scale != 1.0:
        tokens = tokens * embed_scale

    def block(like, value):
        return torch.full((B, m), value, dtype=like.dtype, device=like.device)

    # Every output, the prompt in front.
    out = {"inputs_embeds": torch.cat([prompt, tokens], dim=1)}
    if attention_mask is not None:
        out["attention_mask"] = torch.cat([block(attention_mask, 1), attention_mask], dim=1)
    if token_type_ids is not None:
        out["token_type_ids"] = torch.cat([block(token_type_ids, 0), token_type_ids], dim=1)
    if labels is not None:
        out["labels"] = torch.cat([block(labels, -100), labels], dim=1)

    # Adjacent rows: the leading columns of mask 0 move in front of the prompt.
    if adjacent and attention_mask is not None:
        k = (attention_mask != 0).long().cumsum(1).eq(0).sum(1)
        order = torch.stack(
            [torch.cat([torch.arange(m, m + i), torch.arange(m), torch.arange(m + i, m + n)]) for i in k.tolist()]
            or [torch.arange(m + n)]
        )[:B].to(input_ids.device)
        out = {key: torch.stack([x[i] for x, i in zip(value, order)]) if B else value for key, value in out.items()}

    # Positions count the rows that are there.
    there = torch.ones(B, m + n, dtype=torch.bool, device=input_ids.device)
    if attention_mask is not None:
        there = out["attention_mask"] != 0
    if packed and position_start is None:
        position_start = 0
    if position_start is not None:
        before = there.long().cumsum(1) - 1
        out["position_ids"] = position_start + torch.where(there, before, 0)

    # An additive mask: 0 where there is a row, the lowest number where there is none.
    if additive_mask is not None and attention_mask is not None:
        lowest = torch.where(there, 0.0, torch.finfo(additive_mask).min)
        out["attention_mask"] = lowest.to(additive_mask)[:, None, None]

    # Packed: only the rows that are there, one sequence behind the other.
    if packed:
        out.pop("attention_mask", None)
        out = {key: value[there][None] for key, value in out.items()}
        rows = there.sum(1)
        cu_seq_lens = F.pad(rows.cumsum(0), (1, 0)).to(torch.int32)
        longest = max(rows.tolist(), default=0)
        out |= {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens}
        out |= {"max_length_q": longest, "max_length_k": longest}
    return out


class ReferencePTuning(nn.Module):
    """Prompt tuning as it is usually written: a frozen encoder, a prompt put in front with torch.cat, a linear head.

    Args:
        model_name: a hub id or a folder for `AutoModel.from_pretrained`, or a loaded encoder.
        prompt_length: rows of the prompt, m.
        num_labels: classes.

    `forward(input_ids, attention_mask)`, both [B, n], returns logits [B, num_labels], read from the first row of the
    last hidden state.
    """

    def __init__(self, model_name="bert-base-uncased", prompt_length=10, num_labels=2):
        from transformers import AutoModel

        super().__init__()
        self.bert = AutoModel.from_pretrained(model_name) if isinstance(model_name, str) else model_name
        for parameter in self.bert.parameters():
            parameter.requires_grad = False
        self.prompt_length = prompt_length
        hidden_size = self.bert.config.hidden_size
        self.prompt_embeddings = nn.Parameter(torch.randn(prompt_length, hidden_size))
        self.classifier = nn.Linear(hidden_size, num_labels)

    def forward(self, input_ids, attention_mask):
        batch_size = input_ids.shape[0]
        tokens = self.bert.embeddings.word_embeddings(input_ids)
        prompt = self.prompt_embeddings.unsqueeze(0).expand(batch_size, -1, -1)
        inputs_embeds = torch.cat([prompt, tokens], dim=1)
        prompt_mask = torch.ones(batch_size, self.prompt_length).to(attention_mask.device)
        attention_mask = torch.cat([prompt_mask, attention_mask], dim=1)
        outputs = self.bert(inputs_embeds=inputs_embeds, attention_mask=attention_mask)
        return self.classifier(outputs.last_hidden_state[:, 0])
