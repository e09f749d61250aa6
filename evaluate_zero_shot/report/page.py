"""HTML report: the Markdown report rendered as one self-contained page, with plots as inline SVG.

Values are escaped in Markdown, and again as HTML by markdown-it-py, whose raw HTML, links and images are off. Only the
plots and the frame of the page are HTML templates; these escape what they print.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment
from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.token import Token
from markupsafe import Markup

_OFF = ["html_block", "html_inline", "link", "image", "autolink", "reference"]
_RIGHT = {"style": "text-align:right"}
_FOLDED = "h5"
"""Heading level whose content, up to the next heading, is folded until the reader opens it."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


def render_page(markdown: str, content: Mapping[str, Any], jinja: Environment) -> str:
    """Return the page.

    Args:
        markdown: The report, in which a fenced block `plots` stands for a group of plots, by its number.
        content: Values of the templates.
        jinja: Environment with the templates, which escapes HTML.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable(_OFF)
    tokens = _folded(_with_tables(parser.parse(markdown)))
    plots = jinja.get_template("plots.html.jinja")
    groups = list(content["illustrations"].values())

    def fence(_: object, tokens: Sequence[Token], index: int, options: object, env: object) -> str:
        return plots.render(illustrations=groups[int(tokens[index].content)])

    def code_inline(_: object, tokens: Sequence[Token], index: int, options: object, env: object) -> str:
        text = escapeHtml(tokens[index].content)
        if not _DIGEST.fullmatch(text):
            return f"<code>{text}</code>"
        return f'<details class="hash"><summary>{text[:8]}…</summary>{text}</details>'

    parser.add_render_rule("fence", fence)
    parser.add_render_rule("code_inline", code_inline)
    body = Markup(parser.renderer.render(tokens, parser.options, {}))
    return jinja.get_template("report.html.jinja").render(content, body=body)


def _with_tables(tokens: Sequence[Token]) -> list[Token]:
    """Return the tokens with tables that scroll, row headers, and classes instead of inline styles."""
    changed: list[Token] = []
    heading = ""
    for index, token in enumerate(tokens):
        if token.type == "heading_open":
            heading = "".join(child.content for child in tokens[index + 1].children or ())
        elif token.type in ("th_open", "td_open"):
            if token.attrs == _RIGHT:
                token.attrs = {"class": "n"}
            _head_row(tokens, index)
        if token.type == "table_open":
            region = {"class": "scroll", "role": "region", "aria-label": heading, "tabindex": "0"}
            changed.append(Token("div_open", "div", 1, attrs=dict(region), block=True))
        changed.append(token)
        if token.type == "table_close":
            changed.append(Token("div_close", "div", -1, block=True))
    return changed


def _head_row(tokens: Sequence[Token], index: int) -> None:
    """Make the cell at `index` a header: of its column, or of its row if it is the row's first."""
    cell, is_first = tokens[index], tokens[index - 1].type == "tr_open"
    if cell.tag == "th":
        cell.attrs |= {"scope": "col"}
    elif is_first:
        cell.tag, cell.attrs = "th", {"scope": "row"}
        tokens[index + 2].tag = "th"


def _folded(tokens: Sequence[Token]) -> list[Token]:
    """Return the tokens with each heading of level `_FOLDED`, and what follows it, as <details>."""
    changed: list[Token] = []
    is_open = False
    for token in tokens:
        if token.type == "heading_open" and is_open:
            changed.append(Token("details_close", "details", -1, block=True))
            is_open = False
        if token.type == "heading_open" and token.tag == _FOLDED:
            changed.append(Token("details_open", "details", 1, block=True))
            is_open = True
        if token.tag == _FOLDED:
            token.tag = "summary"
        changed.append(token)
    return [*changed, *([Token("details_close", "details", -1, block=True)] if is_open else [])]
