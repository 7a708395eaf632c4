"""Texts that every Python brings, with labels: the docstrings of its standard library."""

import ast
import importlib.util
from pathlib import Path

__all__ = ["PACKAGES", "stdlib_docstrings"]

PACKAGES = ("asyncio", "email", "importlib", "logging", "multiprocessing", "xml", "http", "decimal")


def stdlib_docstrings() -> tuple[list[str], list[str]]:
    """Texts and labels: each distinct docstring of a module, class or function, and the package that it comes from.

    The source files are parsed, not imported. About 2,000 texts, a few more or fewer with each Python version, always
    in the same order.
    """
    texts, labels = [], []
    for package in PACKAGES:
        # decimal.py only chooses between a C and a Python implementation; the Python one has the docstrings.
        spec = importlib.util.find_spec("_pydecimal" if package == "decimal" else package)
        assert spec is not None and spec.origin is not None
        origin = Path(spec.origin)
        files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
        seen = set()
        for file in files:
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    text = ast.get_docstring(node)
                    if text and text not in seen:
                        seen.add(text)
                        texts.append(text)
                        labels.append(package)
    return texts, labels
