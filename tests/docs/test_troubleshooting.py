"""Every message that the library raises or warns with has a place in docs/troubleshooting.md."""

import ast
import re
from pathlib import Path

WARN = ("warnings.warn", "warn_user", "self._warn_once", "self._warn")
ROOT = Path(__file__).parents[2]
INTERNAL = (  # not for users: wrong use of one part of the library by another
    "was not looked at in this step",
    "and others are perturbed: call restore() before",
    "the kernels need Triton",
    "object has no attribute",
    "use optimizer.optimizer where that is asked for",
)


def text(node):
    """A string expression, with … for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp):
        return text(node.left) + text(node.right)
    return "…"


def messages():
    for path in sorted((ROOT / "flatopt").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            call = None
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                call = node.exc
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in WARN:
                call = node
            for argument in call.args[ast.unparse(call.func) == "self._warn_once" :] if call is not None else ():
                message = text(argument)
                if len(message.replace("…", "")) > 20:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", message


def test_every_message_has_a_section():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    phrases = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    assert len(phrases) == len(set(phrases))
    patterns = [re.compile(".+?".join(map(re.escape, phrase.split("…"))), re.DOTALL) for phrase in phrases]
    found = list(messages())
    missing = [
        f"{where}: {message}"
        for where, message in found
        if not any(pattern.search(message) for pattern in patterns) and not any(phrase in message for phrase in INTERNAL)
    ]
    assert not missing, "without a section in docs/troubleshooting.md:\n" + "\n".join(missing)
    sources = [ast.parse(path.read_text()) for path in (ROOT / "flatopt").rglob("*.py")]
    everything = "\n".join(text(node) for tree in sources for node in ast.walk(tree))
    stale = [phrase for phrase, pattern in zip(phrases, patterns) if not pattern.search(everything)]
    assert not stale, f"sections of docs/troubleshooting.md for messages that no longer exist: {stale}"
