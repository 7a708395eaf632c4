"""The op: embedding lookup, prompt prepending and mask construction in one pass; a gradient for the prompt alone."""

from .arguments import Batch, Embedded, Layout, Prompt
from .functional import embed, embed_plainly, prepend_prompt

__all__ = ["Batch", "Embedded", "Layout", "Prompt", "embed", "embed_plainly", "prepend_prompt"]
