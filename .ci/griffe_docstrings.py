"""An extension of griffe: it turns docstrings, which are written for readers of the source, into Markdown for the site.

Examples stand in docstrings without a heading. Markdown would read each ``>`` as a quotation, so they are put between
fences. References such as ``:class:`Pattern``` are Sphinx's, and become code. A section Returns is prose, which may
have a colon. Griffe would take the words before it for a type, so the colon is written as an entity.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_RETURNS = re.compile(r"^(\s*(?:Returns|Yields):\n\s+[^\n`]*?(?:`+[^\n`]+`+[^\n`]*?)*):(?=\s)", re.MULTILINE)
_ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")


def fence(text: str) -> str:
    """Put each doctest, from its first prompt to the next empty line, between fences.

    Args:
        text: a docstring.

    Returns:
        The docstring as Markdown.
    """
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if not inside and line.lstrip().startswith(">>>"):
            if lines and lines[-1].strip():
                lines.append("")
            lines.append(f"{line[: len(line) - len(line.lstrip())]}```pycon")
            inside = True
        elif inside and not line.strip():
            lines.append("```")
            inside = False
        lines.append(line)
    return "\n".join([*lines, "```"] if inside else lines)


class Docstrings(Extension):
    """Rewrites the docstring of every object before it is parsed."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:  # noqa: ARG002
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = fence(_RETURNS.sub(r"\1&#58;", text))
