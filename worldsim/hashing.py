"""Content hashes: the same bytes, or the same code, give the same name wherever they lie."""

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path

NOT_CONTENT = ("CARD.md",)
"""Files of a checkpoint folder that decide nothing."""


def content_hash(path: Path) -> str:
    """Return 16 hex digits that change with any byte of a file, or of the files of a folder (but its card).

    Raises:
        ValueError: there is no such file or folder.
    """
    if not path.exists():
        raise ValueError(f"a file or folder must exist to be hashed, got {path}")
    files = (
        [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name not in NOT_CONTENT)
    )
    digest = hashlib.sha256()
    for file in files:
        name = "" if path.is_file() else file.relative_to(path).as_posix()
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def code_hash(paths: Iterable[Path]) -> str:
    """Return 16 hex digits that change with what Python files do, not with their comments, docstrings or layout.

    Args:
        paths: Python files, or folders that are searched for them.
    """
    files = sorted({file for path in paths for file in ([path] if path.is_file() else path.rglob("*.py"))})
    digest = hashlib.sha256()
    for file in files:
        tree = ast.parse(file.read_text(), str(file))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                node.body = [line for line in node.body if not _is_bare_string(line)]
        digest.update(f"{file.name}\0{ast.dump(tree)}\0".encode())
    return digest.hexdigest()[:16]


def _is_bare_string(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
