"""A section of the page, and the empty frames that the page's script fills."""

from __future__ import annotations

import html
from dataclasses import dataclass

#: Everything that comes from the text, the tokenizer or the model's files passes through this.
esc = html.escape


@dataclass(frozen=True)
class Stage:
    """One section of the page; all but the key is HTML."""

    key: str
    title: str
    lead: str
    formula: str
    body: str


def strip(key: str, title: str) -> str:
    """A picture of vectors; ``key`` says which, "qkv-q" and the like those of the chosen layer and head."""
    return f'<figure class="strip" data-strip="{key}"><figcaption>{title}</figcaption></figure>'


def picker() -> str:
    """Where layer and head are chosen."""
    return (
        '<div class="picker"><label>layer <select class="layer"></select></label>'
        '<label>head <select class="head"></select></label></div>'
    )
