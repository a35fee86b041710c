"""Words of the prompts as numbers of the text tokens that a call sees."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from dreamreader.engine._call_context import CallContext
from dreamreader.engine._families.text import Source, text_sources
from dreamreader.engine._spelling import spell, word_positions
from dreamreader.engine._subject import Subject
from dreamreader.errors import ClockUnknown, InvalidInput

if TYPE_CHECKING:
    from dreamreader.engine._tracker import Tracker


_NEGATIVE = ("negative_prompt_embeds", "negative_prompt_embeds_2", "negative_prompt_embeds_clip")


class Words:
    """Finds words in what the text encoders, or a language model, were given.

    Where several encoders' tokens stand behind each other, a word is found in each of them.
    """

    def __init__(self, tracker: "Tracker", subject: Subject, tokenizer: Any = None):
        self.tracker = tracker
        self.subject = subject
        self.tokenizer = tokenizer

    def positions(
        self, word: str, now: CallContext, site: str, branch: str, rows: int
    ) -> list[list[int]] | None:
        """Token numbers of a word in each row; None where the tokens of the branch are not known.

        Raises:
            ClockUnknown: they should be known, but are not.
        """
        return self._find(now, site, branch, rows, word)

    def prompt(self, now: CallContext, site: str, branch: str, rows: int) -> list[list[int]] | None:
        """Token numbers of each row's whole prompt, without start, end and padding."""
        return self._find(now, site, branch, rows, None)

    def text(self, now: CallContext, branch: str, row: int) -> str | None:
        """The prompt of a row, as it was given or as its tokens spell it; None: not known."""
        for components, _, _ in self._sources(now):
            for component in components:
                given = self.tracker.text_ids(component, branch)
                if given is not None and row < len(given[0]):
                    line = spell(
                        self._tokenizer(component), given[0][row].tolist(), self._prompt(row)
                    )
                    return line.text.replace("\0", "").strip()
        return self._prompt(row)

    def _find(
        self, now: CallContext, site: str, branch: str, rows: int, word: str | None
    ) -> list[list[int]] | None:
        places: list[list[int]] = [[] for _ in range(rows)]
        known = False
        for components, offset, packed in self._sources(now):
            found = {
                component: self._in(component, *given, site, rows, word, packed)
                for component in components
                if (given := self.tracker.text_ids(component, branch)) is not None
            }
            if not found:
                continue
            if len(found) < len(components):
                raise ClockUnknown(
                    f"{site}: its text tokens hold features of {' and '.join(components)}, and the "
                    f"tokens ({branch}) are known of {', '.join(found)} alone"
                )
            known = True
            hits = next(iter(found.values()))
            if any(each != hits for each in found.values()):
                raise InvalidInput(_describe_apart(site, word, found))
            for row, own in enumerate(hits):
                places[row] += [at + offset for at in own if at + offset >= 0]
        if not known and (branch != "uncond" or self._is_given_negative()):
            raise ClockUnknown(f"{site}: the tokens of the prompt ({branch}) are not known here")
        return places if known else None

    def _is_given_negative(self) -> bool:
        """Whether the caller embedded the negative prompt himself, so that it has unknown words."""
        clock = getattr(self.tracker, "clock", None)
        given = {} if clock is None else clock.arguments
        return any(given.get(name) is not None for name in _NEGATIVE)

    def _in(
        self,
        component: str,
        ids: Tensor,
        mask: Tensor | None,
        site: str,
        rows: int,
        word: str | None,
        packed: bool,
    ) -> list[list[int]]:
        """Numbers of the tokens of each row in what one text encoder was given."""
        if rows % len(ids):
            raise ClockUnknown(
                f"{site}: {component} was given {len(ids)} texts, and which of them belongs to "
                f"each of {rows} rows is not known"
            )
        tokenizer, places = self._tokenizer(component), []
        for row in range(rows):
            own = row * len(ids) // rows  # images of a prompt
            listed = ids[own].tolist()
            hits = (
                word_positions(tokenizer, listed, word, self._prompt(row))
                if word is not None
                else _plain(tokenizer, listed, None if mask is None else mask[own].tolist())
            )
            if packed and mask is not None:
                before = (mask[own].cumsum(0) - 1).tolist()
                hits = [before[at] for at in hits]
            places.append(hits)
        return places

    def _prompt(self, row: int) -> str | None:
        """The prompt of a row of this batch, where it is known."""
        prompts = self.tracker.prompts or ()
        return prompts[row] if row < len(prompts) and isinstance(prompts[row], str) else None

    def _sources(self, now: CallContext) -> list[Source]:
        if now.phase == "language":
            return [(("",), 0, False)]
        if now.phase == "text":
            return [((now.component,), 0, False)]
        sources = text_sources(self.subject.model, now.layout)
        self._check_lengths(now, sources)
        return sources

    def _check_lengths(self, now: CallContext, sources: list[Source]) -> None:
        """What the encoders read has to be as long as the text that the denoiser gets.

        Raises:
            ClockUnknown: it is not: a template was cut off, or tokens were put in between.
        """
        components, offset, packed = sources[-1]  # the last ones end where the text does
        given = [self.tracker.text_ids(each, "cond") for each in components]
        lengths = {each[0].shape[1] for each in given if each is not None}
        text = now.layout.text if now.layout is not None else None
        if packed or not lengths or lengths == {None if text is None else text - offset}:
            return
        read, got = " and ".join(map(str, lengths)), "an unknown number" if text is None else text
        raise ClockUnknown(
            f"{' and '.join(components)} read {read} tokens, {now.component} gets {got} of text: "
            "where the words of the prompt are among these is not known (a template or padding may "
            "have been cut off); give token numbers"
        )

    def _tokenizer(self, component: str) -> Any:
        tokenizer = self.tokenizer
        if self.subject.kind == "pipeline":
            name = component.replace("text_encoder", "tokenizer")
            tokenizer = getattr(self.subject.model, name, None)
        if tokenizer is None:
            raise InvalidInput("words of the prompt need a tokenizer: Reader(model, tokenizer)")
        return tokenizer


def _describe_apart(site: str, word: str | None, found: dict[str, list[list[int]]]) -> str:
    rows = next(
        n
        for n, each in enumerate(zip(*found.values(), strict=True))
        if len({*map(tuple, each)}) > 1
    )
    where = ", ".join(f"{name} {places[rows] or 'nowhere'}" for name, places in found.items())
    what = "the prompt has" if word is None else f"the word {word!r} is at"
    return (
        f"{site}: {what} other tokens in each text encoder ({where}, row {rows}), and the tokens "
        "here hold the features of all of them side by side: give one text for every encoder, or "
        "token numbers"
    )


def _plain(tokenizer: Any, ids: list[int], mask: list[int] | None) -> list[int]:
    """Numbers of the tokens that are neither special nor padding."""
    special = set(tokenizer.all_special_ids)
    return [
        number
        for number, each in enumerate(ids)
        if each not in special and (mask is None or mask[number])
    ]
