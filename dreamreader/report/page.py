"""A report: a title, sections of blocks, and one HTML file that needs nothing beside itself."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from dreamreader._files import write_atomic
from dreamreader.report.svg import draw_curves


@dataclass(frozen=True)
class Section:
    """A heading, an optional paragraph below it, and blocks."""

    title: str
    blocks: Sequence[object] = ()
    lead: str = ""

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Report:
    """A page of sections below a title, a summary and the blocks that say the result at once.

    All texts are escaped, captions and prompts among them.

    Example:
        >>> page = Report("Red to blue", sections=[Section("Curves", [curves])])
        >>> page.write("report.html")
    """

    title: str
    lead: str = ""
    opening: Sequence[object] = ()
    sections: Sequence[Section] = ()
    footer: Sequence[tuple[str, str]] = field(default_factory=tuple)

    def html(self) -> str:
        """The page as text."""
        return _environment().get_template("report.html").render(page=self, style=_style())

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Writes the page whole or not at all (a temporary file, then a rename).

        Args:
            path: of the HTML file; missing folders are made.

        Returns:
            The path written.
        """
        return write_atomic(path, self.html())


@cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("dreamreader.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["draw_curves"] = draw_curves
    return made


@cache
def _style() -> Markup:
    return Markup(
        resources.files("dreamreader.report").joinpath("templates/report.css").read_text()
    )
