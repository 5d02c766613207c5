"""Text that is on this machine: which kind of library does a piece of documentation come from?"""

import ast
import importlib.util
import random
from pathlib import Path

from datasets import Dataset


def docstrings(package: str, size: int) -> "list[str]":
    """``size`` pieces of documentation, 80 characters each, from a package's source files; its own name is blanked."""
    found = []
    paths = sorted(Path(importlib.util.find_spec(package).origin).parent.rglob("*.py"))
    random.Random(0).shuffle(paths)
    for path in paths:
        try:
            tree = ast.parse(path.read_text(errors="replace"))
        except SyntaxError:  # a file for a newer Python
            continue
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else None
            if text and len(text) > 120:
                found.append(" ".join(text.split())[20:100].lower().replace(package, "_"))
        if len(set(found)) > 2 * size:
            break
    return random.Random(0).sample(sorted(set(found)), size)


def offline_data(tiny: bool) -> "tuple[Dataset, Dataset, Dataset]":
    """Source, labelled and test rows of text -> "deep" or "classic"."""
    sizes = (16, 8, 8) if tiny else (500, 64, 200)

    def rows(deep: "list[str]", classic: "list[str]") -> Dataset:
        pairs = [(text, "deep") for text in deep] + [(text, "classic") for text in classic]
        return Dataset.from_list([{"text": text, "target": target} for text, target in pairs])

    deep, classic = (docstrings(package, sizes[1] + sizes[2]) for package in ("transformers", "sklearn"))
    source = rows(docstrings("torch", sizes[0]), docstrings("numpy", sizes[0]))
    return source, rows(deep[: sizes[1]], classic[: sizes[1]]), rows(deep[sizes[1] :], classic[sizes[1] :])
