"""What the layers of a text encoder hold."""

from dreamreader.experiments.pages.base import MethodPage, axis_section
from dreamreader.report import Section


class LensPage(MethodPage):
    """Curves and pictures over the layers."""

    def sections(self) -> list[Section]:
        title = f"What {self.method.encoder} holds, layer by layer"
        return [axis_section(self.results, "layer", "lens", title)]

    def summary(self) -> list[str]:
        return self.results.axis_lines("layer", "lens")
