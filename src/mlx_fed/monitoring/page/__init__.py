"""The page that shows runs, in one file: its own style and scripts, and none from elsewhere.

The charts are drawn by uPlot (MIT, see uPlot.LICENSE): 50 kB, no dependency, and quick with a
hundred thousand points. What nodes send reaches the page as JSON and is only ever set as text.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Any

from ...runs import round_record

_STYLES = ("uPlot.min.css", "page.css")
_SCRIPTS = (
    *("uPlot.iife.min.js", "data.js", "charts.js", "cells.js", "nodes.js", "labels.js"),
    "page.js",
)


def page(data: dict[str, Any]) -> str:
    """The page with its data.

    Args:
        data (dict): ``live`` with ``pause``, the seconds between two questions to the server that
            the page came from; or ``runs``, ``time`` and ``version``.
    """
    style = "\n".join(map(_text, _STYLES))
    scripts = [_text(name) for name in _SCRIPTS]
    text = _text("page.html")
    parts = {
        "style": f"<style>{style}</style>",
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
        "policy": f'<meta http-equiv="Content-Security-Policy" content="{policy()}">',
        # Nothing in a script's element ends it but "</script", nor begins a comment but "<!--".
        "data": round_record.to_json(data).replace("<", "\\u003c"),
    }
    for name, part in parts.items():
        before, mark, after = text.partition(f"<!-- {name} -->")
        assert mark, name
        text = before + part + after
    return text


def policy() -> str:
    """The Content-Security-Policy: these scripts and this style, and no other server."""
    scripts = " ".join(_hash(_text(name)) for name in _SCRIPTS)
    style = _hash("\n".join(map(_text, _STYLES)))
    return (
        f"default-src 'none'; script-src {scripts}; style-src {style}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'"
    )


def _text(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
