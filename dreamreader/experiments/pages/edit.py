"""What edits over swept values did, axis by axis."""

from dreamreader.experiments.pages.base import MethodPage, axis_section
from dreamreader.report import Section


class EditPage(MethodPage):
    """Curves and pictures over every axis of the sweep."""

    def sections(self) -> list[Section]:
        sweep = self.method.sweep
        return [axis_section(self.results, name, "edited", f"Over {name}") for name in sweep]

    def summary(self) -> list[str]:
        lines = [self.results.axis_lines(name, "edited") for name in self.method.sweep]
        return [line for each in lines for line in each]
