"""HTML that cannot be unbalanced or unescaped: text becomes markup only through these functions."""

import html
import re
from typing import final

from kdcli.console import shown

_VOID = frozenset({"meta", "br", "col", "img"})
_NO_CHARACTER = re.compile(r"[\ufffe\uffff]")


@final
class Html(str):
    """Text that is markup already. Every other string is escaped before it gets into a page."""

    __slots__ = ()


def clean(text: str) -> str:
    """``text`` without characters that no HTML or SVG may hold; what turns or hides text is written out."""
    return _NO_CHARACTER.sub("\N{REPLACEMENT CHARACTER}", shown(text, keep="\t\n\r"))


def element(tag: str, *children: "Html | str | None", **attributes: str | None) -> Html:
    """``<tag attributes>children</tag>``.

    Args:
        tag: name of the element.
        children: markup as it is, other text escaped; None is left out.
        attributes: values are escaped; None is left out, and ``_`` in a name becomes ``-``
            (``class_`` is ``class``).
    """
    pairs = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(clean(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _VOID:
        return Html(f"<{tag}{pairs}>")
    return Html(f"<{tag}{pairs}>{join(*children)}</{tag}>")


def join(*children: "Html | str | None") -> Html:
    """The children one after the other."""
    return Html("".join(_markup(child) for child in children if child is not None))


def _markup(child: "Html | str") -> str:
    return child if isinstance(child, Html) else html.escape(clean(child), quote=False)
