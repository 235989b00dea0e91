"""HTML page of runs, in one file with its style and scripts, for the dashboard and the report.

uPlot draws the charts (MIT, see uPlot.LICENSE): 50 kB, no dependency, fast with a hundred thousand
points. Data from nodes is JSON in the page, and the scripts insert it as text only.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Any

from ...runs import round_record

_STYLES = ("uPlot.min.css", "page.css")
_SCRIPTS = (
    *(
        "uPlot.iife.min.js",
        "data.js",
        "charts.js",
        "curves.js",
        "cells.js",
        "nodes.js",
        "labels.js",
    ),
    *("confusion.js", "runs.js", "page.js"),
)


def page(data: dict[str, Any]) -> str:
    """The page as HTML.

    Args:
        data (dict): Of the dashboard ``live`` and ``pause``, the seconds between two requests; of
            a report ``runs``, ``time`` and ``version``.
    """
    style = "\n".join(map(_text, _STYLES))
    scripts = [_text(name) for name in _SCRIPTS]
    text = _text("page.html")
    elements = {
        "style": f"<style>{style}</style>",
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
        "policy": f'<meta http-equiv="Content-Security-Policy" content="{policy()}">',
        # Without "<" the data cannot end its script element ("</script") or start a comment.
        "data": round_record.to_json(data).replace("<", "\\u003c"),
    }
    for name, element in elements.items():
        comment = f"<!-- {name} -->"
        assert comment in text, name
        text = text.replace(comment, element, 1)
    return text


def policy() -> str:
    """Content-Security-Policy that allows the page's scripts and style only, by their hashes."""
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
