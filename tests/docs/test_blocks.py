"""Every Python block in README.md and docs/ runs, those of a page in order and in one namespace.

A block under ``<!-- not run: reason -->`` needs what a test machine has not (a network, a GPU, a model of the reader's); it
must at least compile.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"(<!-- not run: (?P<reason>[^>]+?) -->\n+)?^(?P<indent> *)```python\n(?P<code>.*?)^ *```", re.DOTALL | re.MULTILINE
)
LIBRARIES = ["accelerate", "datasets", "diffusers", "lightning", "optuna", "peft", "timm", "transformers", "trl"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page):
    """``(line, code, whether it runs)`` of each block."""
    source = page.read_text()
    for found in BLOCK.finditer(source):
        code = re.sub(f"^{found['indent']}", "", found["code"], flags=re.MULTILINE)
        yield source[: found.start("code")].count("\n") + 1, code, found["reason"] is None


PAGES_WITH_CODE = [page for page in PAGES if any(True for _ in blocks(page))]


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, code, runs in blocks(page):
        # the padding makes a traceback point at the line of the page
        compiled = compile("\n" * (line - 1) + code, str(page), "exec")
        if runs:
            for library in LIBRARIES:
                if re.search(rf"^(from|import) {library}\b", code, re.MULTILINE):
                    pytest.importorskip(library, reason=f"the page uses {library}")
            exec(compiled, namespace)


def test_the_readme_is_at_most_120_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_most_blocks_run():
    every = [runs for page in PAGES_WITH_CODE for _, _, runs in blocks(page)]
    assert sum(every) >= len(every) / 2
