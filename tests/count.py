"""Count lines and code tokens (no comments, no docstrings): python tests/count.py [FILE ...]"""

import ast
import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
)


def docstring_lines(text):
    lines = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                lines.update(range(node.lineno, node.end_lineno + 1))
    return lines


def count(path):
    """-> (lines, code tokens) of one Python file."""
    text = Path(path).read_text(encoding="utf-8")
    docstrings, tokens = docstring_lines(text), 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NOT_CODE and token.start[0] not in docstrings:
            tokens += 1
    return text.count("\n"), tokens


def main(paths):
    total_lines = total_tokens = 0
    for path in paths:
        lines, tokens = count(path)
        total_lines, total_tokens = total_lines + lines, total_tokens + tokens
        print(f"{lines:6} {tokens:7}  {path}")
    print(f"{total_lines:6} {total_tokens:7}  total")


if __name__ == "__main__":
    main(sys.argv[1:] or sorted(ROOT.glob("*.py")))
