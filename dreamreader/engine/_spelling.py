"""The text of tokens: which characters each token covers, and where a word stands in a text."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dreamreader.errors import InvalidInput

_Form = Literal["NFD", "NFKD"]
_FORMS: tuple[_Form, ...] = ("NFD", "NFKD")  # of letters that are alike, the second finds more
_APART = "\0"  # stands for what is no text of the prompt: special tokens
_JOINERS = "\u200c\u200d"
_SPACES = " \t\r\n\u2581\u0120\u010a"  # with the signs of sentencepiece and byte-level tokenizers
_UNSPACED = (  # scripts that put no spaces between words
    (0x0E00, 0x109F),  # Thai, Lao, Tibetan, Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x2E80, 0x312F),  # radicals, kana, bopomofo
    (0x31A0, 0x31FF),
    (0x3400, 0x9FFF),
    (0xA000, 0xA4CF),  # Yi
    (0xA980, 0xA9DF),  # Javanese
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),  # narrow katakana
    (0x20000, 0x3FFFF),
)


@dataclass(frozen=True)
class Spelling:
    """A text, and of each token the characters that it covers.

    Args:
        text: special tokens are a NUL in it.
        spans: first and last + 1 of each token's characters; None for special tokens and padding.
        is_prompt: the text is what was tokenized, not made from the tokens.
    """

    text: str
    spans: tuple[tuple[int, int] | None, ...]
    is_prompt: bool


def spell(tokenizer: Any, ids: Sequence[int], prompt: str | None = None) -> Spelling:
    """Find the characters of every token of a row.

    Args:
        tokenizer: fast ones say the characters themselves; of others the tokens are decoded.
        ids: of the row, with its special tokens and padding.
        prompt: what was tokenized, where it is known. It is used if it has the same tokens.

    Raises:
        InvalidInput: the tokenizer decodes a token differently with another one behind it.
    """
    listed = list(ids)
    if getattr(tokenizer, "is_fast", False):
        decoded = _decode(tokenizer, listed)
        for text in (prompt, decoded):
            found = None if text is None else _by_offsets(tokenizer, listed, text, text is prompt)
            if found is not None:
                return found
    return _by_decoding(tokenizer, listed)


def _by_offsets(tokenizer: Any, ids: list[int], text: str, is_prompt: bool) -> Spelling | None:
    """What a fast tokenizer says of a text; None where the text has other tokens than the row."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    special = _specials(tokenizer)
    shift = _shift(found["input_ids"], ids, special)
    if shift is None:
        return None
    spans: list[tuple[int, int] | None] = [None] * len(ids)
    letters = list(text)
    for number, (each, (start, stop)) in enumerate(
        zip(found["input_ids"], found["offset_mapping"], strict=True)
    ):
        if each in special:
            letters[start:stop] = [_APART] * (stop - start)
        elif 0 <= number + shift < len(ids) and start < stop and ids[number + shift] == each:
            spans[number + shift] = (start, stop)
    return Spelling("".join(letters), tuple(spans), is_prompt)


def _shift(own: list[int], ids: list[int], special: set[int]) -> int | None:
    """How far the tokens of a text are moved in a row that may be padded and cut; None: not it."""
    a, b = _core(own, special), _core(ids, special)
    mine, row = own[slice(*a)], ids[slice(*b)]
    if not row or len(row) > len(mine):
        return None
    if mine[: len(row)] == row:
        return b[0] - a[0]
    if mine[-len(row) :] == row:
        return b[0] - (a[1] - len(row))
    return None


def _core(ids: list[int], special: set[int]) -> tuple[int, int]:
    """First and last + 1 of what stands between the special tokens at both ends."""
    plain = [number for number, each in enumerate(ids) if each not in special]
    return (plain[0], plain[-1] + 1) if plain else (0, 0)


def _by_decoding(tokenizer: Any, ids: list[int]) -> Spelling:
    """The tokens between special ones, decoded one by one more; an unknown token is no text."""
    apart = _specials(tokenizer) | {tokenizer.unk_token_id}
    spans: list[tuple[int, int] | None] = [None] * len(ids)
    text, start = "", 0
    for stop in range(len(ids) + 1):
        if stop < len(ids) and ids[stop] not in apart:
            continue
        part, found = _decode_growing(tokenizer, ids[start:stop])
        spans[start:stop] = [
            None if at is None else (at[0] + len(text), at[1] + len(text)) for at in found
        ]
        text += part + _APART
        start = stop + 1
    return Spelling(text, tuple(spans), False)


def _decode_growing(tokenizer: Any, ids: list[int]) -> tuple[str, list[tuple[int, int] | None]]:
    """The text of some tokens, and what each of them adds to that of those before it.

    A token that is a part of a letter covers the whole letter.
    """
    whole, at = _decode(tokenizer, ids), 0
    spans: list[tuple[int, int] | None] = []
    for number, each in enumerate(ids):
        so_far, start = _decode(tokenizer, ids[: number + 1]), at
        head, broken, _ = so_far.partition("\ufffd")  # bytes that make no letter yet
        if whole.startswith(so_far) or not broken:
            head, broken = so_far if whole.startswith(so_far) else so_far.rstrip(), ""
        if not whole.startswith(head):
            piece = tokenizer.convert_ids_to_tokens(each)
            raise InvalidInput(
                f"the token {piece!r} is decoded differently with another one behind it, so words "
                "are not known here; give token numbers, or a fast tokenizer"
            )
        at = max(at, len(head))
        partial = broken or (at == start and not _is_space(tokenizer, each))
        stop = min(at + 1 if partial else at, len(whole))
        spans.append((start, stop) if start < stop else None)
    return whole, spans


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _specials(tokenizer: Any) -> set[int]:
    """Special tokens; one that stands for unknown text is none, unless padding is the same."""
    unknown = tokenizer.unk_token_id
    found = set(tokenizer.all_special_ids)
    others = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    return found if unknown in others else found - {unknown}


def _is_space(tokenizer: Any, token: int) -> bool:
    piece = tokenizer.convert_ids_to_tokens(token) or ""  # beyond the vocabulary there is none
    piece = piece.decode("latin-1") if isinstance(piece, bytes) else piece
    return not piece.strip(_SPACES) and not _decode(tokenizer, [token]).strip()


def word_positions(
    tokenizer: Any, ids: Sequence[int], word: str, prompt: str | None = None
) -> list[int]:
    """Numbers of the tokens that spell a word, at each of its occurrences; maybe none.

    Upper and lower case are one, and so are letters with accents in one character or two. A word
    ends where no letter, digit or mark follows, and anywhere in scripts without spaces.

    Args:
        tokenizer: that made the tokens. ids: of a row, with special tokens and padding.
        word: or several words with spaces.
        prompt: what was tokenized, where it is known.

    Raises:
        InvalidInput: the word is empty, or what the tokens spell cannot be told.
    """
    if not word.strip():
        raise InvalidInput(f"tokens={word!r}: a word of the prompt, or token numbers, are needed")
    line = spell(tokenizer, ids, prompt)
    for wanted in (word,) if line.is_prompt else (word, _respell(tokenizer, word)):
        for form in _FORMS:
            found = _occurrences(line.text, wanted.strip(), form)
            if found:
                return sorted(
                    number
                    for number, span in enumerate(line.spans)
                    if span is not None and _covers(tokenizer, ids[number], span, found)
                )
    return []


def _covers(
    tokenizer: Any, token: int, span: tuple[int, int], found: list[tuple[int, int]]
) -> bool:
    """Whether a token has a part in an occurrence; the space in front of one has none."""
    inside = [(start, stop) for start, stop in found if span[0] < stop and start < span[1]]
    if not inside:
        return False
    leads = all(span[0] <= start for start, _ in inside)
    return not (leads and _is_space(tokenizer, token))


def _respell(tokenizer: Any, word: str) -> str:
    """A word as the tokenizer gives it back, which may leave out accents or put in spaces."""
    ids = tokenizer(word.strip(), add_special_tokens=False, verbose=False)["input_ids"]
    return word if tokenizer.unk_token_id in ids else _decode(tokenizer, ids).strip() or word


def _occurrences(text: str, word: str, form: _Form) -> list[tuple[int, int]]:
    """First and last + 1 of the characters of each occurrence of a word."""
    folded, spans = _fold(text, form)
    wanted, _ = _fold(word, form)
    found = []
    for match in re.finditer(f"(?={re.escape(wanted)})", folded) if wanted else ():
        start, stop = match.start(), match.start() + len(wanted)
        before, behind = folded[max(start - 1, 0) : start], folded[stop : stop + 1]
        if _goes_on(before, folded[start]) or _goes_on(folded[stop - 1], behind):
            continue
        found.append((spans[start][0], spans[stop - 1][1]))
    return found


def _fold(text: str, form: _Form) -> tuple[str, list[tuple[int, int]]]:
    """A text without differences of case and of how accents are written; where each letter was."""
    if text.isascii():
        return re.sub(r"\s", " ", text.lower()), [(at, at + 1) for at in range(len(text))]
    letters: list[str] = []
    spans: list[tuple[int, int]] = []
    start = 0
    for stop in range(1, len(text) + 1):
        if stop < len(text) and (unicodedata.combining(text[stop]) or text[stop] in "\ufe0e\ufe0f"):
            continue  # a mark belongs to the letter before it
        piece = unicodedata.normalize(form, text[start:stop]).casefold()
        piece = unicodedata.normalize(form, piece).translate({0xFE0E: None, 0xFE0F: None})
        letters += " " if piece.isspace() else piece
        spans += [(start, stop)] * (1 if piece.isspace() else len(piece))
        start = stop
    return "".join(letters), spans


def _goes_on(left: str, right: str) -> bool:
    """Whether two neighbouring characters, either maybe missing, are within one word."""
    if not left or not right:
        return False
    if _extends(right) or left in _JOINERS:
        return True
    if not (_is_letter(left) and _is_letter(right)):
        return False
    return not (_is_unspaced(left) or _is_unspaced(right))


def _is_letter(each: str) -> bool:
    return each.isalnum() or each == "_" or unicodedata.category(each)[0] == "M"


def _extends(each: str) -> bool:
    """Marks, joiners and the skin tones of emoji have no place of their own."""
    return (
        unicodedata.category(each)[0] == "M" or each in _JOINERS or 0x1F3FB <= ord(each) <= 0x1F3FF
    )


def _is_unspaced(each: str) -> bool:
    return any(first <= ord(each) <= last for first, last in _UNSPACED)
