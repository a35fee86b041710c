"""What was asked for: words of each row, and the attentions that read them."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dreamreader.engine import Call, Row
from dreamreader.errors import InvalidInput

if TYPE_CHECKING:
    from dreamreader.engine import Reader

Asked = str | Sequence[str] | Sequence[Sequence[str]] | None
_WORD = re.compile(r"\w+")


def list_asked(words: Asked) -> list[tuple[str, ...]] | None:
    """A list of words for each row, one for all rows, or None for every word."""
    if words is None:
        return None
    listed: list[Any] = [words] if isinstance(words, str) else list(words)
    if listed and all(isinstance(each, str) for each in listed):
        listed = [listed]
    found = [(each,) if isinstance(each, str) else tuple(each) for each in listed]
    wrong = [word for own in found for word in own if not isinstance(word, str) or not word.strip()]
    if wrong:
        raise InvalidInput(f"words must be words of the prompt, got {wrong[0]!r}")
    if not found or not all(found):
        raise InvalidInput("words is empty: give at least one for each row, or None for all")
    return found


def words_of(row: Row) -> tuple[str, ...]:
    """The words of a row's prompt, each once, in order.

    Raises:
        InvalidInput: there are none, or the prompt is not known.
    """
    if row.prompt is None:
        raise InvalidInput(f"row {row.index}: its prompt is not known; name the words")
    found: dict[str, str] = {}
    for each in _WORD.findall(row.prompt):
        found.setdefault(each.lower(), each)
    if not found:
        raise InvalidInput(f"row {row.index}: the prompt {row.prompt!r} has no words")
    return tuple(found.values())


def missing(word: str, row: Row) -> InvalidInput:
    return InvalidInput(
        f"the word {word!r} is not in the prompt of row {row.index}, {row.prompt!r} (or the text "
        "encoder cuts it off)"
    )


def positions(call: Call, words: list[tuple[str, ...]]) -> list[list[list[int]]]:
    """Keys of every word of every row."""
    found: list[list[list[int]]] = [[] for _ in words]
    for number in range(max(map(len, words))):
        column = [own[number] if number < len(own) else own[0] for own in words]
        for row, keys in enumerate(call.positions(column)):
            if number < len(words[row]):
                found[row].append(keys)
    return found


def text_sites(reader: "Reader") -> list[str]:
    """Every attention of a pipeline's denoiser from picture to text, as sites with `probs`.

    Raises:
        InvalidInput: there is none.
    """
    components = getattr(reader.subject, "components", {})
    found: list[str] = []
    for name in components if isinstance(components, dict) else ():
        if (name == "unet" or name.startswith("transformer")) and components[name] is not None:
            found += [site.name for site in reader.sites(f"{name}.**:probs") if _joins(site)]
    if not found:
        raise InvalidInput(
            f"{type(reader.subject).__name__} has no unet or transformer with attention from the "
            "picture to text; name sites="
        )
    return found


def _joins(site: Any) -> bool:
    """Whether the keys of an attention hold text beside or instead of the queries' own tokens."""
    from dreamreader.engine import attention_facts

    facts = attention_facts(site.tap.module)
    joint = facts is not None and (facts.joint or facts.streams or "k.text" in facts.ports)
    return bool(joint) or bool(getattr(site.tap.module, "is_cross_attention", False))


def factor(call: Call) -> int | None:
    """How many times coarser than the finest grid the image queries are."""
    first, last = call.image[0]
    grid, whole = call.grid, call.whole_grid
    if grid is None or whole is None or grid[0] * grid[1] != last - first:
        raise InvalidInput(f"{call.site}: its {last - first} image tokens are no known grid")
    return round((whole[0] * whole[1] / (last - first)) ** 0.5)
