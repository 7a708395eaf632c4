"""Small models of every architecture that SoftPrompt is tested on: real classes, built from configs.

python tests/zoo.py       writes the README's table anew
"""

import re
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig

from ptuning_fast import SoftPrompt

V, D, M = 99, 32, 5
COMMON = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
COMMON |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
ENCODER = COMMON | {"max_position_embeddings": 64}
DECODER = ENCODER | {"num_key_value_heads": 2, "head_dim": 8}
SEQ2SEQ = {"vocab_size": V, "d_model": D, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}

# Name: model type, class, settings.
ZOO = {
    "BERT": ("bert", "BertModel", ENCODER),
    "RoBERTa": ("roberta", "RobertaModel", ENCODER | {"pad_token_id": 1, "bos_token_id": 0}),
    "XLM-R": ("xlm-roberta", "XLMRobertaModel", ENCODER | {"pad_token_id": 1, "bos_token_id": 0}),
    "CamemBERT": ("camembert", "CamembertModel", ENCODER | {"pad_token_id": 1, "bos_token_id": 0}),
    "DistilBERT": (
        "distilbert",
        "DistilBertModel",
        {"vocab_size": V, "dim": D, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
    ),
    "ELECTRA": ("electra", "ElectraModel", ENCODER | {"embedding_size": 16}),
    "ALBERT": ("albert", "AlbertModel", ENCODER | {"embedding_size": 16}),
    "DeBERTa-v2": (
        "deberta-v2",
        "DebertaV2Model",
        ENCODER | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    ),
    "ModernBERT": (
        "modernbert",
        "ModernBertModel",
        ENCODER | {"local_attention": 8, "global_attn_every_n_layers": 3, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "MPNet": ("mpnet", "MPNetModel", ENCODER | {"pad_token_id": 1, "bos_token_id": 0}),
    "GPT-2": ("gpt2", "GPT2LMHeadModel", {"vocab_size": V, "n_embd": D, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "OPT": ("opt", "OPTForCausalLM", ENCODER | {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    "Llama": ("llama", "LlamaForCausalLM", DECODER),
    "Qwen2": ("qwen2", "Qwen2ForCausalLM", DECODER),
    "Mistral": ("mistral", "MistralForCausalLM", DECODER | {"sliding_window": 7}),
    "Phi": ("phi", "PhiForCausalLM", ENCODER | {"num_key_value_heads": 4}),
    "Gemma": ("gemma", "GemmaForCausalLM", DECODER),
    "Gemma 2": ("gemma2", "Gemma2ForCausalLM", DECODER | {"sliding_window": 7}),
    "Gemma 3": ("gemma3_text", "Gemma3ForCausalLM", DECODER | {"sliding_window": 7, "sliding_window_pattern": 2}),
    "Bloom": ("bloom", "BloomForCausalLM", {"vocab_size": V, "hidden_size": D, "n_layer": 3, "n_head": 4}),
    "T5": (
        "t5",
        "T5ForConditionalGeneration",
        SEQ2SEQ | {"d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "relative_attention_num_buckets": 8},
    ),
    "BART": (
        "bart",
        "BartForConditionalGeneration",
        SEQ2SEQ
        | {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
        | {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64, "scale_embedding": True},
    ),
}
TEXTS = [4, 11, 1, 17]  # tokens of each row
TOLERANCE = 2e-5
"""Of outputs of size about 1, in fp32 through three layers. What is checked against it is wrong by 1e-3 and more."""


def build(name, class_name=None, **settings):
    """The model, frozen, in eval mode, with weights from seed 0."""
    model_type, base_class, kinds = ZOO[name]
    config = AutoConfig.for_model(model_type, **kinds | settings)
    torch.manual_seed(0)
    return getattr(transformers, class_name or base_class)(config).eval().requires_grad_(False)


def qwen2_vl():
    """Finds an image's rows and columns by the ids of its tokens (90), and keeps how far they moved its positions."""
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": D, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    text = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
    text |= {"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    text |= {"initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=90, vision_start_token_id=91, vision_end_token_id=92
    )
    torch.manual_seed(0)
    return transformers.Qwen2VLForConditionalGeneration(config).eval().requires_grad_(False)


def texts(lengths=TEXTS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, V, (length,), generator=generator) for length in lengths]


def same(one, other):
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def padded(rows, side):
    """(input_ids, attention_mask) [B, n] of ragged rows; what stands under the padding does not matter."""
    n = max(map(len, rows))
    ids = torch.full((len(rows), n), 7, device=rows[0].device)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(rows):
        place = slice(0, len(text)) if side == "right" else slice(n - len(text), n)
        ids[row, place], mask[row, place] = text, 1
    return ids, mask


def rows_out(model, inputs):
    """What the model says of each row, one vector a column: logits or hidden states."""
    if model.config.is_encoder_decoder:
        B = len(inputs["inputs_embeds"])
        return model(**inputs, decoder_input_ids=torch.arange(3, 9, device=model.device).repeat(B, 1)).logits
    out = model(**inputs)
    return out.logits if "logits" in out else out.last_hidden_state


def by_hand(model, prompt, text):
    """The text alone behind the prompt, without any of our code: [1, m + n, d] through the model."""
    embeds = torch.cat([prompt[None].to(model.dtype), model.get_input_embeddings()(text[None])], 1)
    return rows_out(
        model, {"inputs_embeds": embeds, "attention_mask": torch.ones(embeds.shape[:2], device=embeds.device)}
    )[0]


def real_rows(model, out, inputs, row):
    """Of one row of a batch's output, what belongs to the prompt and to the text, in that order."""
    return out[row] if model.config.is_encoder_decoder else out[row][inputs["attention_mask"][row] != 0]


def measured(name, device="cpu"):
    """Largest differences between a padded batch and its texts alone by hand: {"right": ..., "left": ...}.

    Each is (difference of the outputs, relative difference of the prompt's gradient), or the text of the refusal.
    """
    model, rows = build(name).to(device), [text.to(device) for text in texts()]
    torch.manual_seed(2)
    prompt = SoftPrompt(model, M)
    weights = [torch.randn_like(by_hand(model, prompt.prompt_embeddings, text)) for text in rows]
    expected = [by_hand(model, prompt.prompt_embeddings, text) for text in rows]
    loss = sum((out * weight).sum() for out, weight in zip(expected, weights))
    (expected_grad,) = torch.autograd.grad(loss, prompt.prompt_embeddings)
    found = {}
    for side in ("right", "left"):
        ids, mask = padded(rows, side)
        try:
            inputs = prompt(ids, mask)
        except ValueError as error:
            found[side] = str(error)
            continue
        out = rows_out(model, inputs)
        actual = [real_rows(model, out, inputs, row) for row in range(len(rows))]
        difference = max((one - other).abs().max().item() for one, other in zip(actual, expected))
        loss = sum((out * weight).sum() for out, weight in zip(actual, weights))
        (grad,) = torch.autograd.grad(loss, prompt.prompt_embeddings)
        found[side] = difference, ((grad - expected_grad).abs().max() / expected_grad.abs().max()).item()
    return found


def table():
    """The README's table: what holds for each family."""
    lines = ["| model | right-padded = alone | left-padded = alone | gradient |", "| --- | --- | --- | --- |"]
    for name in ZOO:
        found = measured(name)
        cells = ["refused: pad on the right" if isinstance(one, str) else _holds(one[0]) for one in found.values()]
        gradient = _holds(max(one[1] for one in found.values() if not isinstance(one, str)))
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {gradient} |")
    return "\n".join(lines) + "\n"


def _holds(difference):
    return "yes" if difference <= TOLERANCE else f"off by {difference:.1g}"


def readme_with(readme):
    pattern = r"(<!-- zoo: python tests/zoo.py -->\n).*?(<!-- end of zoo -->)"
    return re.sub(pattern, lambda marks: marks[1] + table() + marks[2], readme, flags=re.DOTALL)


if __name__ == "__main__":
    file = Path(__file__).parents[1] / "docs" / "models.md"
    file.write_text(readme_with(file.read_text(encoding="utf-8")), encoding="utf-8")
