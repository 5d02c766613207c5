"""griffe extension: docstrings are in reStructuredText's roles and formulas, the site is in Markdown; and a line that
documents several arguments becomes one for each, so that each finds its type and default."""

import re
import textwrap

import griffe


def to_markdown(text: str) -> str:
    r"""``.. math::`` blocks and ``:math:`` become ``\[...\]`` and ``\(...\)``, other roles code, ``Example::`` a heading."""

    def block(found: re.Match) -> str:
        formula = " ".join(textwrap.dedent(found["first"] + "\n" + found["rest"]).split())
        return f"\n{found['indent']}\\[ {formula} \\]\n\n"

    text = re.sub(
        r"^(?P<indent> *)\.\. math::(?P<first>.*)\n(?P<rest>(?:(?P=indent) +.*\n|\n(?=(?P=indent) +\S))*)",
        block,
        text + "\n",
        flags=re.MULTILINE,
    )
    text = re.sub(r":math:`([^`]*)`", lambda found: rf"\({found[1]}\)", text)
    text = re.sub(r":(?:class|func|meth|mod|data|attr):`~?([^`]*)`", r"`\1`", text)
    return re.sub(r"^( *)Example::$", r"\1Example:", text, flags=re.MULTILINE).rstrip()


def one_argument_a_line(text: str) -> str:
    def split(found: re.Match) -> str:
        return "".join(f"{found['indent']}{name}: {found['rest']}" for name in found["names"].split(", "))

    def arguments(found: re.Match) -> str:
        several = r"^(?P<indent> +)(?P<names>\w+(?:, \w+)+): (?P<rest>.*\n(?:(?P=indent) +.*\n)*)"
        return re.sub(several, split, found[0], flags=re.MULTILINE)

    return re.sub(r"^Args:\n(?: +.*\n)+", arguments, text + "\n", flags=re.MULTILINE).rstrip()


class Markdown(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = one_argument_a_line(to_markdown(obj.docstring.value))
