"""Word heat maps: where the attention to a word of the prompt was, beside where the object is."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from dreamreader.errors import InvalidInput
from dreamreader.experiments.job import Job, Method
from dreamreader.experiments.methods.base import RowTable, check_size
from dreamreader.experiments.row import Row, turn_apart

# Words that a map of the same row is read for instead, where the prompt has them.
_OTHER = ("background", "a", "on", "at")


class HeatMapMethod(Method):
    """Reads a word's heat map in every row, and how well it points at the detected object.

    The columns `iou` and `pointing` compare the map with the mask of the picture's largest object;
    `iou_other_word` and `iou_other_row` are the controls: another word of the same prompt, and the
    same word's map of another row.
    """

    kind: Literal["heatmap"] = "heatmap"
    word: str = Field(
        description="A word of every prompt, or $column: the word in that column of each row."
    )
    other: str | None = Field(
        None, description="The other word of the control; by default one that every prompt has."
    )
    sites: str | list[str] | None = Field(
        None, description="Attentions with the port probs; all that read the text by default."
    )
    steps: tuple[int, int] | None = Field(None, description="Steps (start, stop); all by default.")
    skip_factor: int | None = Field(8, description="Leaves out grids this many times coarser.")

    def check(self, job: Job) -> None:
        check_size(prompts=len(job.items), seeds=len(job.seeds))

    def rows(self, job: Job) -> list[Row]:
        table = RowTable()
        for item in job.items:
            for seed in job.seeds:
                table.add(item, seed, "read")
        return table.rows

    def records(self, job: Job, rows: Sequence[Row]) -> list[Any]:
        from dreamreader.attention import WordMap

        words = [[self._word(row), self._other(row)] for row in rows]
        found = WordMap(
            job.reader,
            words,
            sites=self.sites,
            steps=None if self.steps is None else range(*self.steps),
            skip_factor=self.skip_factor,
        )
        job.memory["maps"] = found
        return found.requests()

    def columns(self, job: Job, rows: Sequence[Row], result: Any) -> dict[str, list[Any]]:
        from dreamreader.attention import iou, pointing
        from dreamreader.zoo.detector import detect

        images = result.images
        readings = detect(images)
        size = tuple(images.shape[-2:])
        maps = job.memory.pop("maps").result().upsampled(size).maps  # [rows, words, h, w]
        nothing = torch.zeros(size, dtype=torch.bool)
        masks = torch.stack([r.objects[0].mask if r.objects else nothing for r in readings])
        own, other = maps[:, :1], maps[:, 1:2]
        turned = own.roll(-turn_apart([row.prompt for row in rows]), 0)
        found: dict[str, list[Any]] = {}
        for name, read in (("", own), ("_other_word", other), ("_other_row", turned)):
            found[f"iou{name}"] = _scores_of(iou(read, masks))
            found[f"pointing{name}"] = _scores_of(pointing(read, masks))
        if len(rows) == 1:  # there is no other row
            found |= {"iou_other_row": [None], "pointing_other_row": [None]}
        if job.folder is not None and job.spec.save.images:
            for row, each in zip(rows, own[:, 0], strict=True):
                job.folder.keep_image(row.number, _shade(each), "maps")
        return found

    def _word(self, row: Row) -> str:
        if not self.word.startswith("$"):
            return self.word
        name = self.word[1:]
        if name not in row.item.columns:
            raise InvalidInput(f"method.word: row {row.number} has no column {name!r}")
        return str(row.item.columns[name])

    def _other(self, row: Row) -> str:
        if self.other is not None:
            return self.other
        words = row.prompt.lower().split()
        found = [word for word in _OTHER if word in words and word != self._word(row)]
        if not found:
            raise InvalidInput(
                f"method.other: give a word for the control, row {row.number} has none of "
                f"{', '.join(_OTHER)}"
            )
        return found[0]


def _scores_of(values: Tensor) -> list[float | None]:
    """One value for each row from [rows, 1]; None where no object was found."""
    return [None if value != value else value for value in values[:, 0].tolist()]


def _shade(values: Tensor) -> Tensor:
    """A map [h, w] as a grey picture [3, h, w], dark where the attention was."""
    share = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-12)
    return (1 - share).clamp(0, 1).expand(3, *share.shape)
