"""Small tables for terminals and notebooks; every text is escaped."""

from collections.abc import Sequence
from html import escape

_STYLE = "border-collapse:collapse;font-size:90%"
_CELL = "padding:2px 8px;text-align:left;vertical-align:top"
_MOST = 200


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """An HTML table; more than 200 rows are cut, and the caption says so."""
    if len(rows) > _MOST:
        caption = f"{caption} (first {_MOST} of {len(rows)} shown)".strip()
    head = "".join(f'<th style="{_CELL}">{escape(each)}</th>' for each in header)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_CELL}">{escape(str(each))}</td>' for each in row) + "</tr>"
        for row in rows[:_MOST]
    )
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    head = f"<thead><tr>{head}</tr></thead>"
    return f'<table style="{_STYLE}">{above}{head}<tbody>{body}</tbody></table>'


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table in plain text, columns aligned."""
    shown = [tuple(header), *(tuple(map(str, row)) for row in rows[:_MOST])]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in shown
    ]
    if len(rows) > _MOST:
        lines.append(f"... and {len(rows) - _MOST} more")
    return "\n".join(lines)
