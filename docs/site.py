"""mkdocs hooks: the benchmarks' results, which the pages link to as files of the repository, become part of the site; and
formulas become MathML, which browsers draw by themselves."""

import html
import re
from pathlib import Path

import latex2mathml.converter
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
KEPT = (".png", ".json", ".md")


def on_files(files, config):
    for path in sorted((ROOT / "benchmarks").rglob("*")):
        # pages of the site proper have a place in its navigation; these are files to look at
        if path.suffix in KEPT and (path.parent.name == "results" or path.name == "LOG.md"):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri.replace(".md", ".md.txt"), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """``../benchmarks/x`` from a page in docs/ is ``benchmarks/x`` on the site; one folder deeper it is one more up."""
    up = "../" * page.file.src_uri.count("/")
    return re.sub(
        r"\]\((?:\.\./)+(benchmarks/[^)#]+)\)",
        lambda found: f"]({up}{re.sub('[.]md$', '.md.txt', found[1])})",
        markdown,
    )


def on_page_content(content, page, config, files):
    def formula(found):
        latex = re.sub(r"\\(mathbb|mathcal|mathrm) (\w)", r"\\\1{\2}", html.unescape(found[2]).strip())
        return latex2mathml.converter.convert(latex, display="block" if found[1] == "div" else "inline").replace("\\_", "_")

    return re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', formula, content, flags=re.DOTALL)
