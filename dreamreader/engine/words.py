"""Words of the prompts as numbers of the text tokens that a call sees."""

from typing import TYPE_CHECKING, Any

from dreamreader.engine.families.text import text_sources
from dreamreader.engine.now import Now
from dreamreader.engine.spelling import word_positions
from dreamreader.engine.subject import Subject
from dreamreader.errors import ClockUnknown, InvalidInput

if TYPE_CHECKING:
    from dreamreader.engine.tracker import Tracker


class Words:
    """Finds words in what the text encoders, or a language model, were given.

    Where several encoders' tokens stand behind each other, a word is found in each of them.
    """

    def __init__(self, tracker: "Tracker", subject: Subject, tokenizer: Any = None):
        self.tracker = tracker
        self.subject = subject
        self.tokenizer = tokenizer

    def positions(
        self, word: str, now: Now, site: str, branch: str, rows: int
    ) -> list[list[int]] | None:
        """Token numbers of a word in each row; None where the tokens of the branch are not known.

        Raises:
            ClockUnknown: they should be known, but are not.
        """
        return self._found(now, site, branch, rows, word)

    def prompt(self, now: Now, site: str, branch: str, rows: int) -> list[list[int]] | None:
        """Token numbers of each row's whole prompt, without start, end and padding."""
        return self._found(now, site, branch, rows, None)

    def text(self, now: Now, branch: str, row: int) -> str | None:
        """The prompt of a row, as it was given or as its tokens spell it; None: not known."""
        if text := self._prompt(row):
            return text
        for component, _, _ in self._sources(now):
            given = self.tracker.text_ids(component, branch)
            if given is not None and row < len(given[0]):
                ids = given[0][row].tolist()
                return self._tokenizer(component).decode(ids, skip_special_tokens=True).strip()
        return None

    def _found(
        self, now: Now, site: str, branch: str, rows: int, word: str | None
    ) -> list[list[int]] | None:
        places: list[list[int]] = [[] for _ in range(rows)]
        known = False
        for component, offset, packed in self._sources(now):
            given = self.tracker.text_ids(component, branch)
            if given is None:
                continue
            known = True
            ids, mask = given
            tokenizer = self._tokenizer(component)
            for row in range(rows):
                own = row * len(ids) // rows if rows % len(ids) == 0 else row  # images of a prompt
                listed = ids[own].tolist()
                hits = (
                    word_positions(tokenizer, listed, word, self._prompt(row))
                    if word is not None
                    else _plain(tokenizer, listed, None if mask is None else mask[own].tolist())
                )
                if packed and mask is not None:
                    before = (mask[own].cumsum(0) - 1).tolist()
                    hits = [before[at] for at in hits]
                places[row] += [at + offset for at in hits if at + offset >= 0]
        if not known and branch != "uncond":
            raise ClockUnknown(f"{site}: the tokens of the prompt ({branch}) are not known here")
        return places if known else None

    def _prompt(self, row: int) -> str | None:
        """The prompt of a row of this batch, where it is known."""
        prompts = self.tracker.prompts or ()
        return prompts[row] if row < len(prompts) and isinstance(prompts[row], str) else None

    def _sources(self, now: Now) -> list[tuple[str, int, bool]]:
        if now.phase == "language":
            return [("", 0, False)]
        if now.phase == "text":
            return [(now.component, 0, False)]
        return text_sources(self.subject.model, now.layout)

    def _tokenizer(self, component: str) -> Any:
        tokenizer = self.tokenizer
        if self.subject.kind == "pipeline":
            name = component.replace("text_encoder", "tokenizer")
            tokenizer = getattr(self.subject.model, name, None)
        if tokenizer is None:
            raise InvalidInput("words of the prompt need a tokenizer: Reader(model, tokenizer)")
        return tokenizer


def _plain(tokenizer: Any, ids: list[int], mask: list[int] | None) -> list[int]:
    """Numbers of the tokens that are neither special nor padding."""
    special = set(tokenizer.all_special_ids)
    return [
        number
        for number, each in enumerate(ids)
        if each not in special and (mask is None or mask[number])
    ]
