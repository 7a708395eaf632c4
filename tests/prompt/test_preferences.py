"""PromptedModel in TRL's trainers of preferences and rewards, beside a Llama that concatenates its prompt by itself."""

import pytest
import torch
import zoo
from torch import nn
from transformers import LlamaModel, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_utils import set_seed

from ptuning_fast import PromptedModel

pytestmark = pytest.mark.usefixtures("torch_backend")
M = 3


class Concatenated(LlamaModel):
    """[prompt, text] by torch.cat, in training and in the first step of `generate`; hidden states of the text alone."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
        B, n = input_ids.shape
        cache = kwargs.get("past_key_values", kwargs.get("cache"))  # its name before and after transformers 5.24
        past = 0 if cache is None else cache.get_seq_length()
        if attention_mask is None:
            attention_mask = torch.ones(B, n + max(past - M, 0), dtype=torch.long)
        positions = torch.cat([torch.arange(M).expand(B, M), M + (attention_mask.cumsum(1) - 1).clamp(min=0)], 1)
        mask = torch.cat([torch.ones(B, M, dtype=attention_mask.dtype), attention_mask], 1)
        rows = self.embed_tokens(input_ids)
        rows = torch.cat([self.prompt.expand(B, -1, -1), rows], 1) if past == 0 else rows
        kwargs |= {"inputs_embeds": rows, "attention_mask": mask, "position_ids": positions[:, -rows.shape[1] :]}
        out = super().forward(**kwargs)
        out.last_hidden_state = out.last_hidden_state[:, -n:]
        return out


def start():
    return torch.linspace(-1, 1, M * zoo.D).view(M, zoo.D)


def concatenated():
    model = zoo.build("Llama")
    model.model.__class__ = Concatenated
    model.model.prompt = nn.Parameter(start())
    return model, model.model.prompt


def prompted(mode):
    model = PromptedModel(zoo.build("Llama"), M, init=start(), mode=mode)
    return model, model.prompt.prompt_embeddings


class Losses(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen += [value for name, value in logs.items() if name in ("loss", "reward", "eval_loss")]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<end>": 1, **{f"w{i}": i for i in range(2, zoo.V)}}
    one = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    one.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=one, pad_token="<pad>", eos_token="<end>", padding_side="left")


def rows(kind):
    texts = [" ".join(f"w{i}" for i in text.tolist()) for text in zoo.texts([4, 9, 2, 7, 5, 3, 8, 6])]
    pairs = zip(texts, texts[3:] + texts[:3], texts[5:] + texts[:5], strict=True)
    if kind == "dpo":
        return [{"prompt": f"{one} ", "chosen": two, "rejected": three} for one, two, three in pairs]
    if kind == "kto":
        return [{"prompt": f"{one} ", "completion": two, "label": len(two) % 2 == 0} for one, two, _ in pairs]
    return [{"prompt": f"{one} "} for one, _, _ in pairs]


def reward(completions, **_):
    return [float(sum(map(ord, text)) % 13) for text in completions]


def trained(kind, model, folder):
    """The losses (and rewards) of three steps."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    settings = {"learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 3}
    settings |= {"per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none", "save_strategy": "no"}
    settings |= {"disable_tqdm": True, "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    given = {"processing_class": tokenizer(), "train_dataset": Dataset.from_list(rows(kind))}
    losses = Losses()
    given |= {"callbacks": [losses]}
    set_seed(3)
    if kind == "grpo":
        settings |= {"num_generations": 4, "max_completion_length": 5}
        run = trl.GRPOTrainer(model, reward, args=trl.GRPOConfig(folder, **settings), **given)
    elif kind == "dpo":
        run = trl.DPOTrainer(model, zoo.build("Llama"), args=trl.DPOConfig(folder, **settings), **given)
    else:
        run = trl.KTOTrainer(model, zoo.build("Llama"), args=trl.KTOConfig(folder, **settings), **given)
    run.train()
    return torch.tensor(losses.seen)


@pytest.mark.parametrize("mode", ["auto", "prepend"])
@pytest.mark.parametrize("kind", ["dpo", "kto", "grpo"])
def test_training_is_that_of_a_model_that_concatenates(tmp_path, kind, mode):
    (expected, theirs), (model, ours) = concatenated(), prompted(mode)
    losses = trained(kind, expected, str(tmp_path / "expected"))
    assert len(losses) >= 3
    torch.testing.assert_close(trained(kind, model, str(tmp_path)), losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert (ours - start()).abs().max() > 0.05
