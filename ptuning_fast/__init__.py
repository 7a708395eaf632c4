"""Prompt tuning with the token lookup, the prompt and the mask in one GPU kernel."""

from .functional import prepend_prompt

__all__ = ["prepend_prompt"]
