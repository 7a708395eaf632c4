"""Every text model of transformers, tiny and with random weights: is a text in a batch what it is alone, in each mode?

python tests/sweep.py                     all of them; writes the table of docs/models.md anew (ten minutes)
python tests/sweep.py llama gemma2        these alone, to the screen, with what was refused and why
"""

import argparse
import copy
import re
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto import modeling_auto as auto

from ptuning_fast import SoftPrompt

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
M, V, WINDOW, LENGTHS = 5, 128, 16, [40, 23, 9, 40, 1]
TOLERANCE = 1e-4  # relative to the largest output, through three layers in fp32
OF_NEW = 5e-4  # of what is generated: three times through them, each by what came out before

SIDES = ("right", "left")  # of the padding; nothing is generated behind that on the right: texts are given one by one
MODES = {"prepend": SIDES, "packed": SIDES, "shared": SIDES, "generate": ("alone", "left")}
NEW = 3  # tokens
ATTENTIONS = ["sdpa", "eager"]
NOT_TEXT = (
    "audio|speech|image|vision|video|whisper|wav2vec|hubert|speecht5|seamless|clap|clip|musicgen|moonshine|voxtral"
)

# What makes a config small, under whichever of these names it has it. Windows are smaller than the texts.
SMALL = {
    32: "hidden_size d_model n_embd dim embedding_dim embed_dim model_dim emb_dim decoder_hidden_size n_embed",
    48: "intermediate_size ffn_dim d_ff d_inner hidden_dim n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size "
    "shared_expert_intermediate_size dense_intermediate_size intermediate_size_mlp encoder_hidden_size",
    16: "embedding_size moe_intermediate_size word_embed_proj_dim kv_lora_rank q_lora_rank n_latent "
    "expert_ffn_hidden_size mamba_d_state state_size ssm_state_size index_head_dim dim_proj",
    8: "head_dim d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim mamba_d_head key_dim value_dim d_head "
    "attention_head_dim linear_key_head_dim linear_value_head_dim expert_dim mamba_head_dim",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts mamba_n_heads attention_heads num_encoder_attention_heads "
    "num_decoder_attention_heads linear_num_value_heads moe_num_experts mamba_num_heads n_experts",
    3: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers "
    "num_encoder_layers n_layers_",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok n_kv_heads moe_topk moe_k top_k_experts moe_top_k "
    "linear_num_key_heads experts_per_token num_experts_per_token multi_query_group_num",
    1: "n_group topk_group num_shared_experts n_shared_experts first_k_dense_replace n_groups mamba_n_groups "
    "num_hidden_groups moe_layer_start_index num_nextn_predict_layers",
    128: "max_position_embeddings n_positions max_seq_len max_sequence_length seq_length max_target_positions n_ctx",
    WINDOW: "sliding_window attention_window local_attention window_size attention_chunk_size "
    "attention_window_size local_window_size sliding_window_size expert_capacity floor_scale",
}
SETTINGS = {name.strip(): size for size, names in SMALL.items() for name in names.split()}
SETTINGS |= {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
SETTINGS |= {"use_sliding_window": True, "max_window_layers": 1, "use_cache": True, "initializer_range": 0.2}
SETTINGS |= {"global_attn_every_n_layers": 2, "sliding_window_pattern": 2, "layerdrop": 0.0, "dtype": "float32"}


SETTINGS |= {"block_size": 4, "num_random_blocks": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
SETTINGS |= {"attn_layer_indices": [1], "full_attention_interval": 2, "mamba_expand": 1}
SETTINGS |= {"vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 0, "entity_vocab_size": 9, "d_embed": 16}
# What single architectures need beside.
IMAGES = {"image_token_id": 3, "video_token_id": 4, "audio_token_id": 5}
NEEDS = {
    "gemma4": IMAGES,
    "gemma4_unified": IMAGES,
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_d_head": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "llama4_text": {"no_rope_layers": [1, 0, 0]},
    "minimax": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},  # as the real ones begin
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"head_dim": 16},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
# Models by their settings: rotary positions that depend on the longest text.
ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 24}
VARIANTS = {
    "llama, dynamic RoPE": {
        "rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0},
        "max_position_embeddings": 24,
    },
    "phi3, longrope": {
        "rope_parameters": ROPE | {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4},
        "original_max_position_embeddings": 24,
    },
}
# Where a config made so is refused, it is made with these left as they are by default, or with other sizes.
ATTEMPTS: list[dict] = [
    {},
    {"head_dim": None},
    {"num_hidden_layers": 4, "head_dim": None},
    {"num_key_value_heads": 4, "head_dim": None},
]
ATTEMPTS += [{"hidden_size": None, "head_dim": None}, {"num_hidden_layers": 8, "head_dim": None}]


class Verdict(NamedTuple):
    word: str  # equal, refused, warned or WRONG
    why: str = ""


def model_types() -> dict[str, str]:
    """Each model type that transformers makes a text model of, and the class: with a head where it has one."""
    found: dict[str, str] = {}
    for mapping in (
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ):
        for kind, name in mapping.items():
            name = name if isinstance(name, str) else name[0]
            if not re.search(NOT_TEXT, kind):
                found.setdefault(kind, name)
    found |= {name: found[name.partition(",")[0]] for name in VARIANTS}
    return dict(sorted(found.items()))


def small(config_class, settings, depth=0):
    """A config of the class with what `settings` names made small, in its parts as well."""
    default = config_class()
    given = {}
    known = vars(default).keys() | getattr(default, "attribute_map", {}).keys()
    for name in getattr(config_class, "sub_configs", None) or {}:
        inner = getattr(default, name, None)
        if inner is not None and depth < 3:
            given[name] = small(type(inner), settings, depth + 1)
    for name, size in settings.items():
        if name not in known or size is None:
            continue
        before = getattr(default, name, size)
        if before is None and isinstance(size, (str, list)):
            before = size
        if name == "attention_window" and isinstance(before, list):
            size = [size] * 3
        if (isinstance(before, bool) == isinstance(size, bool)) and isinstance(before, (list, dict)) <= isinstance(
            size, (list, dict)
        ):
            given[name] = size
    return config_class(**given)


def build(kind: str, class_name: str, attention: str):
    """The model with random weights, frozen, in eval mode, once it has been run."""
    config_class = type(AutoConfig.for_model(kind.partition(",")[0]))
    for settings in ATTEMPTS:
        settings = SETTINGS | settings | NEEDS.get(kind, {}) | VARIANTS.get(kind, {})
        try:
            return built(small(config_class, settings), class_name, attention)
        except Exception as error:
            last = error
    raise last


def built(config, class_name: str, attention: str, most: float = 1.2e8, runs: bool = True):
    config._attn_implementation = attention
    model_class = getattr(transformers, class_name)
    with torch.device("meta"):
        size = sum(one.numel() for one in model_class(config).parameters())
    if size > most:
        raise ValueError(f"{size / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    model = model_class(config).float().eval().requires_grad_(False)
    if model.config._attn_implementation != attention:
        raise ValueError(f"has no {attention} attention")
    if runs:
        run(model, {"input_ids": torch.arange(10, 50)[None], "attention_mask": torch.ones(1, 40).long()}, 1)
    return model


def run(model, inputs, B):
    if model.config.is_encoder_decoder:
        inputs = inputs | {"decoder_input_ids": torch.arange(3, 9).repeat(B, 1)}
    with torch.no_grad():
        out = copy.deepcopy(model)(**inputs)  # a copy: some models change themselves in a forward
    return out.logits if "logits" in out else out[0]


def generated(model, ids, mask, generator=None):
    """[B, NEW, V], of what `generator`, the model itself or a prompt in front of it, generates."""
    seen = []

    def keep(_, scores):
        seen.append(scores.nan_to_num(neginf=0.0))  # where an end would be
        return scores

    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    options |= {"decoder_start_token_id": 0} if model.config.is_encoder_decoder else {}
    generator = copy.deepcopy(model) if generator is None else generator
    generator.generate(ids, attention_mask=mask, logits_processor=[keep], **options)
    return torch.stack(seen, 1)


def padded(rows, side):
    n = max(map(len, rows))
    ids, mask = torch.full((len(rows), n), 7), torch.zeros(len(rows), n).long()
    for row, text in enumerate(rows):
        place = slice(0, len(text)) if side == "right" else slice(n - len(text), n)
        ids[row, place], mask[row, place] = text, 1
    return ids, mask


def off(actual, expected):
    if actual.shape != expected.shape:
        return float("inf")
    found = ((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
    return found if found == found else float("inf")


def texts_of(model, prompt, rows, ids, mask, mode, side):
    """Of each text, the outputs of its tokens (of an encoder-decoder and of a classifier, its row), or of new ones."""
    if mode == "generate":
        parts = [padded([row], "left") for row in rows] if side == "alone" else [(ids, mask)]
        return list(torch.cat([generated(model, *part, prompt) for part in parts]))
    inputs = prompt(ids, mask, mode=mode)
    out = run(model, inputs, len(rows))
    if model.config.is_encoder_decoder or out.dim() == 2:
        return list(out)
    if mode == "packed":
        return [out[0, start + M : end] for start, end in pairwise(inputs["cu_seq_lens_q"].tolist())]
    if mode == "shared":  # of which the first sequence is the prompt
        return [out[0, start + 1 : end] for start, end in pairwise(inputs["cu_seq_lens_q"].tolist()[1:])]
    return [one[-ids.shape[1] :][there != 0] for one, there in zip(out, mask)]


def loss_off(model, prompt, ids, mask, mode):
    """How far the loss on the last two tokens of each text is from the model's own, where it has one of tokens."""
    if mode == "generate" or not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return 0.0
    behind = mask.flip(1).cumsum(1).flip(1)  # tokens from here on
    labels = ids.masked_fill((mask == 0) | (behind > 2), -100)
    with torch.no_grad():
        own = copy.deepcopy(model)(**prompt(ids, mask, labels=labels)).loss
        return off(prompt.loss(ids, mask, labels=labels, mode=mode), own)


def judge(model, rows, first, truth, mode, side) -> Verdict:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            model = copy.deepcopy(model)
            table = model.get_input_embeddings()
            with torch.no_grad():
                prompt = SoftPrompt(model, M, init=table(first).float())
            before = prompt.prompt_embeddings.clone(), table.weight.clone()
            ids, mask = padded(rows, side)
            actual = texts_of(model, prompt, rows, ids, mask, mode, side)
            of_loss = loss_off(model, prompt, ids, mask, mode)
            if not (torch.equal(before[0], prompt.prompt_embeddings) and torch.equal(before[1], table.weight)):
                return Verdict("WRONG", "the prompt or the table of embeddings has changed")
        except (TypeError, ValueError) as error:
            return Verdict("refused", str(error))
        except Exception as error:
            return Verdict("fails", f"{type(error).__name__}: {error}")
    worst = max(of_loss, *(off(one, other) for one, other in zip(actual, truth)))
    most = OF_NEW if mode == "generate" else TOLERANCE
    if worst <= most:
        return Verdict("equal", f"{worst:.1e}")
    about = [str(one.message) for one in said if "depend" in str(one.message)]
    if about:
        return Verdict("warned", f"{worst:.1e}; {about[0]}")
    if mode == "generate":  # some count padding on the left as text when they generate, of ids as well
        own = generated(model, *padded([torch.cat([first, one]) for one in rows], side))
        if max(off(one, other) for one, other in zip(actual, own)) <= most:
            return Verdict("as ids", f"{worst:.1e}")
        own = zip(rows, [] if model.config.is_encoder_decoder else truth)
        if not all(is_of_forward(model, torch.cat([first, one])[None], new) for one, new in own):
            return Verdict("-", "nor does the model itself generate what its forward says")
    return Verdict("WRONG", f"{worst:.1e}")


def is_of_forward(model, ids, new):
    """Whether a forward without a cache has the scores `new` [NEW, V] that the model itself had behind `ids` [1, n]."""
    chosen = new.masked_fill(new == 0, float("-inf")).argmax(-1)  # 0: those of an end
    ids = torch.cat([ids, chosen[None]], 1)
    out = run(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 1)[0, -NEW - 1 : -1]
    return off(out.masked_fill(new == 0, 0.0), new) <= OF_NEW


def next_of(model, ids):
    """What the model itself generates, in a list of one; in an empty one where it does not."""
    try:
        return list(generated(model, ids, torch.ones_like(ids))) if model.can_generate() else []
    except Exception:
        return []


def sweep(kind: str, class_name: str) -> dict[str, dict[str, Verdict]] | str:
    """{attention: {"prepend, right": verdict, ...}}, or why there is no model to try."""
    found: dict[str, dict[str, Verdict]] = {}
    why = ""
    for attention in reversed(ATTENTIONS):
        try:
            model = build(kind, class_name, attention)
            generator = torch.Generator().manual_seed(1)
            first, *rows = [torch.randint(10, V - 8, (n,), generator=generator) for n in [M, *LENGTHS]]
            truth, new = [], []
            for row in rows:
                ids = torch.cat([first, row])[None]
                new += next_of(model, ids)
                out = run(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 1)[0]
                truth.append(out[M:] if not model.config.is_encoder_decoder and out.dim() == 2 else out)
        except Exception as error:
            why = why or f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        found[attention] = {
            f"{mode}, {side}": judge(model, rows, first, truth if mode != "generate" else new, mode, side)
            for mode, sides in MODES.items()
            for side in sides
            if mode != "generate" or new
        }
    return found or why


def cell(verdicts: dict[str, dict[str, Verdict]], mode: str) -> str:
    """What holds in a mode: one word, or one for each kind of attention or side of the padding on which it depends."""
    places = [(kind, side) for kind in verdicts for side in MODES[mode]]
    words = {(kind, side): found.word for kind, side in places if (found := verdicts[kind].get(f"{mode}, {side}"))}
    if len(set(words.values())) <= 1:
        return next(iter(words.values()), "-")
    for place, names in enumerate((list(verdicts), MODES[mode])):
        of = {name: {word for key, word in words.items() if key[place] == name} for name in names}
        if all(len(found) == 1 for found in of.values()):
            return ", ".join(f"{name} {found.pop()}" for name, found in of.items())
    return ", ".join(f"{kind} {side} {word}" for (kind, side), word in words.items())


def row(kind: str, class_name: str, found: dict[str, dict[str, Verdict]]) -> str:
    return f"| {kind} | {class_name} | {' | '.join(cell(found, mode) for mode in MODES)} |"


def write_table(rows: list[str], untried: list[str]) -> None:
    head = [f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}:", ""]
    head += [f"| model type | class | {' | '.join(MODES)} |", "| --- " * (2 + len(MODES)) + "|"]
    table = "\n".join([*head, *rows, "", f"Not built at this size: {', '.join(untried)}."])
    pattern = r"(<!-- sweep: python tests/sweep.py -->\n).*?(\n<!-- end of sweep -->)"
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(pattern, lambda marks: marks[1] + table + marks[2], text, flags=re.DOTALL), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="MODEL_TYPE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # for operations this small, the others would only be waited for
    kinds, rows, untried, wrong = model_types(), [], [], 0
    for kind in arguments.kinds or kinds:
        found = sweep(kind, kinds[kind])
        if isinstance(found, str):
            untried.append(kind)
            print(f"{kind}: not built: {found[:150]}", flush=True)
            continue
        rows.append(row(kind, kinds[kind], found))
        print(rows[-1], flush=True)
        for attention, verdicts in found.items():
            for what, one in verdicts.items():
                wrong += one.word == "WRONG"
                if arguments.kinds or one.word in ("WRONG", "fails"):
                    print(f"    {attention}, {what}: {one.word} {one.why[:300]}", flush=True)
    if not arguments.kinds:
        write_table(rows, untried)
    print(f"{len(rows)} models, {wrong} silently wrong; {len(untried)} not built")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
