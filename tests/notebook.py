"""Run the code cells of a notebook in their order, in one namespace, and keep what they print as their outputs.

python tests/notebook.py docs/quickstart.ipynb
"""

import contextlib
import io
import json
import sys
from pathlib import Path


def executed(notebook):
    """`notebook` (its JSON) with the outputs of this run; what a cell raises is raised."""
    namespace = {"__name__": "__main__"}
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("".join(cell["source"]), f"cell {len(cells)}", "exec"), namespace)
            printed = out.getvalue().splitlines(keepends=True)
            outputs = [{"name": "stdout", "output_type": "stream", "text": printed}] if printed else []
            number = 1 + sum(one["cell_type"] == "code" for one in cells)
            cell = cell | {"outputs": outputs, "execution_count": number}
        cells.append(cell)
    return notebook | {"cells": cells}


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(json.dumps(executed(json.loads(file.read_text())), indent=1, ensure_ascii=False) + "\n")
