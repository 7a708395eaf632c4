"""What ptuning-fast is compared with: the op and the classifier in plain torch operations."""

from .classify.reference import ReferencePTuning
from .op.reference import prepend_prompt

__all__ = ["ReferencePTuning", "prepend_prompt"]
