"""Where the attention to a word was, beside where the object is."""

from dreamreader.experiments.pages.base import COLUMNS, MethodPage, picture
from dreamreader.experiments.results import format_interval
from dreamreader.report import Gallery, Number, Section, Table

# Endings of the columns by what the map was read for.
_TITLES = {
    "the word": "",
    "another word (control)": "_other_word",
    "another row's map (control)": "_other_row",
}


class HeatMapPage(MethodPage):
    """Pictures beside maps, and how well the maps point at the object."""

    def numbers(self) -> list[Number]:
        means = {t: self.results.mean("read", f"pointing{end}") for t, end in _TITLES.items()}
        return [
            Number(f"{mean.value:.2f}", f"points into the object: {title}", format_interval(mean))
            for title, mean in means.items()
        ]

    def sections(self) -> list[Section]:
        rows = self.results.of("read")[:COLUMNS]
        kept = []
        for name, kind in (("picture", "images"), ("map", "maps")):
            line = [each for row in rows if (each := picture(self.results, row, kind)) is not None]
            kept += [(name, line)] if line else []
        table = Table(
            ("map", "IoU with the object", "points into the object"),
            [
                (title, self._mean(f"iou{end}"), self._mean(f"pointing{end}"))
                for title, end in _TITLES.items()
            ],
        )
        return [Section("Where the attention was", [table, *([Gallery(kept)] if kept else [])])]

    def summary(self) -> list[str]:
        return [
            f"  {title:<28} IoU {self._mean(f'iou{end}')}, pointing {self._mean(f'pointing{end}')}"
            for title, end in _TITLES.items()
        ]

    def _mean(self, column: str) -> str:
        return format_interval(self.results.mean("read", column))
