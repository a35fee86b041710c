"""Self-contained HTML reports: one file, no network, for laptops, phones and screen readers."""

from dreamreader.report.blocks import (
    Charts,
    Code,
    Curves,
    Facts,
    Folded,
    Gallery,
    HeatMap,
    Number,
    Numbers,
    Picture,
    Series,
    Table,
    Text,
    Tokens,
)
from dreamreader.report.page import Report, Section

__all__ = [
    "Charts",
    "Code",
    "Curves",
    "Facts",
    "Folded",
    "Gallery",
    "HeatMap",
    "Number",
    "Numbers",
    "Picture",
    "Report",
    "Section",
    "Series",
    "Table",
    "Text",
    "Tokens",
]
