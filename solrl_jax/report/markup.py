"""HTML and SVG from functions. Everything that is not `Html` is escaped, so no prompt or name can become markup."""

import html
from collections.abc import Iterable


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


VOID = {"img", "link", "meta"}


def tag(name: str, /, *inside: object, **attributes: object) -> Html:
    """<name attributes>inside</name>: class_="x" is class="x", data_x=1 is data-x="1", None leaves an attribute out."""
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{words}>" if name in VOID else f"<{name}{words}>{join(inside)}</{name}>")


def join(parts: Iterable[object]) -> Html:
    return Html("".join(part if isinstance(part, Html) else html.escape(str(part)) for part in parts))
