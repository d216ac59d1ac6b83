"""Docstrings as Markdown: formulas, examples and lists that ``help()`` shows as they stand."""

import inspect
import re
from typing import Any

from griffe import Docstring, Extension
from latex2mathml.converter import convert

BLOCK = re.compile(r"^\.\. math::\n((?:    .*\n|\n)+)", re.MULTILINE)
ROLE = re.compile(r":math:`([^`]+)`")
LEFT = re.compile(r":\w+:`.*|^ *\.\. .*", re.MULTILINE)  # other reStructuredText
EXAMPLE = re.compile(r"^>>> .*\n(?:.+\n?)*", re.MULTILINE)
DEFAULT = re.compile(r"^( {4}\w+ \(.*), default .*?\): ", re.MULTILINE)  # the signature has them
# A list that is no section of Google's: a sentence that ends with a colon, and indented entries.
LIST = re.compile(r"^(\w.*, .*:)\n((?: {4}.*\n)+)", re.MULTILINE)
ENTRY = re.compile(r"^ {4}((?:\w+, )*\w+): ", re.MULTILINE)

# What fusedopt/_docs.py replaces by the words of another class, which Python alone does.
LEFT_OUT = re.compile(r"^(Arguments, attributes and methods that .* those of) ``(\w+)``\.$", re.M)


def math(formula: str, display: str) -> str:
    """As MathML, which browsers show without a script."""
    if "&" in formula:
        formula = rf"\begin{{align*}}{formula}\end{{align*}}"
    return convert(" ".join(formula.split()), display=display)


def to_markdown(text: str) -> str:
    text = inspect.cleandoc(text) + "\n"
    text = BLOCK.sub(lambda found: math(found[1], "block") + "\n\n", text)
    # Markdown takes <math> at the start of a line for a block.
    text = ROLE.sub(lambda found: f"<span>{math(found[1], 'inline')}</span>", text)
    if left := LEFT.search(text):
        raise ValueError(
            f"no Markdown is known for {left[0]!r} in the docstring that begins "
            f"{text.partition(chr(10))[0]!r}"
        )
    text = EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text)
    text = LEFT_OUT.sub(r"\1 [\2][fusedopt.\2].", text)
    text = DEFAULT.sub(r"\1): ", text)
    return LIST.sub(_as_list, text)


def _as_list(found: re.Match[str]) -> str:
    entries = ENTRY.sub(lambda entry: f"- **{entry[1].replace(', ', '**, **')}**: ", found[2])
    return f"{found[1]}\n\n{re.sub(r'^ {8}', '  ', entries, flags=re.MULTILINE)}"


class Markdown(Extension):
    def on_object(self, *, obj: Any, **_: Any) -> None:
        if isinstance(obj.docstring, Docstring):
            obj.docstring.value = to_markdown(obj.docstring.value)
