"""Which tokens of two models belong together, by their index or by the characters they cover."""

from collections.abc import Sequence
from typing import Any

from dreamreader.engine import Reader, spell, tokenize
from dreamreader.errors import InvalidInput

ALIGNMENTS = ("index", "place", "spans", "mean")
SPANS = ("last", "mean")
Span = tuple[int, int] | None
Pieces = list[tuple[list[int], list[int]]]

_OTHERS = "choose align='spans' or 'mean'"


def token_spans(reader: Reader, prompt: str) -> list[Span]:
    """First and last + 1 of the characters that each own token of a prompt covers.

    None is a token without characters: a special one.

    Raises:
        InvalidInput: the tokenizer does not say which characters its tokens cover.
    """
    ids = tokenize(reader, [prompt])[0][0]
    line = spell(reader.tokenizer, ids, prompt)
    if line.is_prompt:
        return list(line.spans)
    # special tokens are a character each in a text that was put together from the tokens
    if line.text.replace("\0", "") != prompt:
        raise InvalidInput(
            f"{type(reader.tokenizer).__name__} gives {prompt!r} back as "
            f"{line.text.replace(chr(0), '')!r}, so which characters its tokens cover is not "
            "known; give a fast tokenizer, or choose align='mean'"
        )
    before = [line.text[:n].count("\0") for n in range(len(line.text) + 1)]
    return [None if s is None else (s[0] - before[s[0]], s[1] - before[s[1]]) for s in line.spans]


def align_spans(text: str, source: Sequence[Span], target: Sequence[Span]) -> Pieces:
    """Gives the shortest pieces of a text that both models cut at their ends, as token numbers.

    White space belongs to no token: models put it before a word, behind it, or nowhere. Tokens
    without characters are left out, and so are parts of the text with tokens of one model only.

    Args:
        text: the prompt. source, target: characters of its tokens, see `token_spans`.

    Returns:
        For each piece the numbers of the source's tokens in it and those of the target's.

    Raises:
        InvalidInput: no part of the text has tokens of both models.

    Example:
        >>> align_spans("red cats", [(0, 3), (3, 7), (7, 8)], [None, (0, 1), (1, 3), (4, 8)])
        [([0], [1, 2]), ([1, 2], [3])]
    """
    place = [0]  # of each character among those that are no white space
    for each in text:
        place.append(place[-1] + (not each.isspace()))
    cuts = set(range(place[-1] + 1))
    sides: list[list[tuple[int, int, int]]] = []
    for spans in (source, target):
        own = [(n, place[s[0]], place[s[1]]) for n, s in enumerate(spans) if s is not None]
        own = [each for each in own if each[1] < each[2]]
        for _, start, stop in own:
            cuts -= set(range(start + 1, stop))
        sides.append(own)
    edges = sorted(cuts)
    pieces: Pieces = []
    for start, stop in zip(edges, edges[1:], strict=False):
        one, other = ([n for n, at, _ in own if start <= at < stop] for own in sides)
        if one and other:
            pieces.append((one, other))
    if not pieces:
        raise InvalidInput(f"{text!r} has no characters that tokens of both models cover")
    return pieces


def align_index(source: Reader, target: Reader, one: str, other: str) -> Pieces:
    """Gives each token of a prompt with the token of the same number in the other.

    Raises:
        InvalidInput: the models cut the text into other tokens, or the target has fewer.
    """
    ids = [tokenize(reader, [text])[0][0] for reader, text in ((source, one), (target, other))]
    spelled = [
        reader.tokenizer.convert_ids_to_tokens(each)
        for reader, each in zip((source, target), ids, strict=True)
    ]
    if one == other and spelled[0] != spelled[1]:
        spans = [token_spans(reader, one) for reader in (source, target)]
        if spans[0] != spans[1]:
            at = next((n for n, (a, b) in enumerate(zip(*spans, strict=False)) if a != b), None)
            at = min(map(len, spans)) if at is None else at
            has = [each[at] if at < len(each) else "nothing" for each in spelled]
            raise InvalidInput(
                f"token {at} of {one!r} is {has[0]!r} in the source model and {has[1]!r} in the "
                f"target model; {_OTHERS}"
            )
    if one != other and not _same_vocabulary(source.tokenizer, target.tokenizer, ids[0] + ids[1]):
        raise InvalidInput(
            f"{one!r} and {other!r} are different texts and the models have different tokenizers: "
            "which of their tokens belong together is not known; choose align='mean'"
        )
    if len(ids[0]) > len(ids[1]):
        raise InvalidInput(
            f"token {len(ids[1])} of {one!r} has no partner: {other!r} has {len(ids[1])} tokens in "
            f"the target model; {_OTHERS if one == other else 'choose align=' + repr('mean')}"
        )
    return [([n], [n]) for n in range(len(ids[0]))]


def _same_vocabulary(one: Any, other: Any, ids: Sequence[int]) -> bool:
    """Whether some tokens are the same in both."""
    listed = list(ids)
    if max(listed) >= min(len(one), len(other)):
        return False
    return one.convert_ids_to_tokens(listed) == other.convert_ids_to_tokens(listed)


def check_same_tokenizers(source: Any, target: Any, prompts: Sequence[str]) -> None:
    """Refuse two pipelines that cut their prompts into different tokens.

    Raises:
        InvalidInput: two of their tokenizers make different tokens of a prompt.
    """
    found = {
        f"the {side}'s {name}": part(list(prompts))["input_ids"]
        for side, pipe in (("source", source), ("target", target))
        for name, part in pipe.components.items()
        if name.startswith("tokenizer") and part is not None
    }
    first = next(iter(found), "")
    for name, ids in found.items():
        if ids != found[first]:
            raise InvalidInput(
                f"{first} and {name} cut the prompts into different tokens, so text tokens of one "
                "number do not belong together; choose align='mean'"
            )
