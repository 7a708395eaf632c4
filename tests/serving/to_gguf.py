"""A merged folder of a small Llama as GGUF, as llama.cpp's convert_hf_to_gguf.py writes it (which no wheel brings)."""

import json
from pathlib import Path

import gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight, heads):
    """llama.cpp turns neighbours of a head by one angle, transformers its two halves."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def convert(folder, path, add_bos):
    """Write the model and the tokenizer in `folder` to `path`."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)

    spec = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
    names = {place: name for name, place in tokenizer.get_vocab().items()}
    special = {one["id"] for one in spec["added_tokens"] if one["special"]}
    kinds = [gguf.TokenType.UNUSED, gguf.TokenType.NORMAL, gguf.TokenType.CONTROL]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names.get(place, f"[PAD{place}]") for place in range(config.vocab_size)])
    writer.add_token_types([kinds[(place in names) + (place in special)] for place in range(config.vocab_size)])
    writer.add_token_merges([" ".join(merge) for merge in spec["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(add_bos)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        layer, _, part = name.removeprefix("model.layers.").partition(".") if "layers" in name else ("", "", name)
        part = TENSORS[part.removesuffix(".weight")]
        weight = weight.float().numpy()
        weight = interleaved(weight, heads[part]) if part in heads else weight
        writer.add_tensor(f"blk.{layer}.{part}.weight" if layer else f"{part}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
