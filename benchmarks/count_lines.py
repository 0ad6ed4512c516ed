"""How large the library is: lines in all, and of code, for each of its folders.

A line of code is neither blank nor a comment, and no part of a docstring.

Run: ``python benchmarks/count_lines.py [--most-code N] [--most-lines N]``; it fails above these.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent / "superlora"
_BLANK = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code_lines(text: str) -> int:
    """Count the lines of code of a file."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _BLANK:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(
            node
        ):
            first = node.body[0]
            lines.difference_update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--most-code", type=int)
    parser.add_argument("--most-lines", type=int)
    options = parser.parse_args()
    files, code, lines = Counter[str](), Counter[str](), Counter[str]()
    for path in sorted(ROOT.rglob("*.py")):
        text = path.read_text("utf-8")
        folder = path.relative_to(ROOT).parts[0] if path.parent != ROOT else "."
        for name in (folder, "in all"):
            files[name] += 1
            code[name] += code_lines(text)
            lines[name] += text.count("\n")
    print(f"{'':10} {'files':>6} {'code':>7} {'lines':>7}")
    for name in sorted(files, key=lambda name: (name == "in all", name)):
        print(f"{name:10} {files[name]:6} {code[name]:7,} {lines[name]:7,}")
    for kind, found, most in (
        ("code", code, options.most_code),
        ("lines", lines, options.most_lines),
    ):
        if most is not None and found["in all"] > most:
            raise SystemExit(f"{kind} must be at most {most:,}: got {found['in all']:,}")


if __name__ == "__main__":
    main()
