"""Write each lesson as a Jupyter notebook: docs/lessons/*.md -> docs/notebooks/*.ipynb.

    python -m tools.notebooks

Text and changes of files become Markdown cells. Snippets and commands become code cells.
"""

import json
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"
# A snippet or a command, and the comment before it that only the tests read.
BLOCK = re.compile(r"(?ms)^(?:<!-- [^\n]+ -->\n)?```(python|sh)\n(.*?)^```$")
START = """# Run this first, and again after each restart of the kernel.
import os

if not os.path.exists("train.py"):
    os.chdir("../..")

assert os.path.exists("train.py"), "open this notebook in docs/notebooks of the repository"
"""


def cell(kind, text):
    content = {"cell_type": kind, "metadata": {}, "source": text.strip()}
    return content if kind == "markdown" else content | {"execution_count": None, "outputs": []}


def notebook(lesson):
    """Turn the Markdown of a lesson into a notebook in nbformat 4.4."""
    lesson = re.sub(r"\]\((?!https?:|\.\./)", "](../lessons/", lesson)
    cells = []
    # BLOCK splits into text, kind, block, text, kind, block, ..., text.
    parts = iter(BLOCK.split(lesson))
    for text in parts:
        if text.strip():
            cells.append(cell("markdown", text))
        kind, block = next(parts, ""), next(parts, "")
        if kind == "sh":
            block = re.sub(r"(?m)^(?=python)", "!", block)
        if block:
            cells.append(cell("code", block))
    cells.insert(1, cell("code", START))
    kernel = {"name": "python3", "display_name": "Python 3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}


if __name__ == "__main__":
    for path in sorted(DOCS.glob("lessons/[0-9]*.md")):
        text = json.dumps(notebook(path.read_text(encoding="utf-8")), indent=1, ensure_ascii=False)
        (DOCS / "notebooks" / f"{path.stem}.ipynb").write_text(text + "\n", encoding="utf-8")
