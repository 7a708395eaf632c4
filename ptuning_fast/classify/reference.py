"""The module that FastPTuning replaces, written as it usually is: the opponent in tests and benchmarks."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ReferencePTuning"]


class ReferencePTuning(nn.Module):
    """Prompt tuning as it is usually written: a frozen encoder, a prompt prepended with torch.cat, a linear head.

    Args:
        model_name: a hub id or a folder for `AutoModel.from_pretrained`, or a loaded encoder.
        prompt_length: virtual tokens, m.
        num_labels: classes.

    `forward(input_ids, attention_mask)`, both [B, n], returns logits [B, num_labels], read from the first row of the
    last hidden state.
    """

    def __init__(self, model_name: Any = "bert-base-uncased", prompt_length: int = 10, num_labels: int = 2):
        from transformers import AutoModel

        super().__init__()
        self.bert = AutoModel.from_pretrained(model_name) if isinstance(model_name, str) else model_name
        for parameter in self.bert.parameters():
            parameter.requires_grad = False
        self.prompt_length = prompt_length
        hidden_size = self.bert.config.hidden_size
        self.prompt_embeddings = nn.Parameter(torch.randn(prompt_length, hidden_size))
        self.classifier = nn.Linear(hidden_size, num_labels)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        batch_size = input_ids.shape[0]
        tokens = self.bert.embeddings.word_embeddings(input_ids)
        prompt = self.prompt_embeddings.unsqueeze(0).expand(batch_size, -1, -1)
        inputs_embeds = torch.cat([prompt, tokens], dim=1)
        prompt_mask = torch.ones(batch_size, self.prompt_length).to(attention_mask.device)
        attention_mask = torch.cat([prompt_mask, attention_mask], dim=1)
        outputs = self.bert(inputs_embeds=inputs_embeds, attention_mask=attention_mask)
        return self.classifier(outputs.last_hidden_state[:, 0])
