"""An extension of griffe: what docstrings say in the manner of Sphinx, said in Markdown for the site.

A role such as ``:func:`pyrformer.load``` becomes a link where the site has a place for it, code otherwise.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|data|func|meth|mod|attr):`[~.]?([\w.]+)`")
CODE = re.compile(r"``([^`]+)``")


class Roles(griffe.Extension):
    """Rewrites docstrings as they are read."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring:
            text = ROLE.sub(
                r'<autoref optional identifier="\1"><code>\1</code></autoref>', obj.docstring.value
            )
            obj.docstring.value = CODE.sub(r"`\1`", text)
