"""A page that is one file: a package's ``page.css`` and ``page.js`` around its text, with the figures that the script
draws. It loads nothing from elsewhere."""

from __future__ import annotations

from importlib.resources import files


def assemble(package: str, title: str, body: str, data: str) -> str:
    """The page as HTML.

    Args:
        package: where ``page.css`` and ``page.js`` are.
        title, body: HTML; what comes from files or texts is escaped.
        data: JSON, for the script.
    """
    style, script = (files(package).joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    # Inside a script element only "<" could end it early.
    data = data.replace("<", "\\u003c")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{style}</style></head><body>{body}"
        f'<script type="application/json" id="data">{data}</script><script>{script}</script></body></html>\n'
    )
