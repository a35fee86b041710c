"""The prompts of a spec: inline, from files, or captions of the embedded world."""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dreamreader.errors import InvalidInput, UnknownName, check_text
from dreamreader.specs.files import FileRows
from dreamreader.specs.parts import Data, Scenes

# Columns that the run makes itself.
RESERVED = (
    *("row", "item", "prompt", "seed", "condition", "base", "unit", "digest", "text", "strength"),
    *("cell", "cell_place", "cell_steps", "cell_json", "source_prompt", "target_prompt"),
)
_SOURCE = ("source", "prompt", "corrupted")
_TARGET = ("target", "clean")


@dataclass(frozen=True)
class Item:
    """One prompt, or a pair.

    Attributes:
        id: unique; its place in the data where none is given.
        prompt: what is run and edited (the source of a pair).
        target: the other prompt of a pair.
        columns: everything else, copied into the rows.
    """

    id: str
    prompt: str
    target: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


def read_items(data: Data, label: str = "data") -> list[Item]:
    """Reads the prompts of a spec.

    Raises:
        InvalidInput: a file is missing or cannot be read, a row has no prompt, two have one id, or
            there are none at all.
    """
    if data.scenes is not None:
        found = list(scene_items(data.scenes))
    else:
        found = [item_of(n, row, where) for n, (row, where) in enumerate(_rows(data, label))]
    if data.limit is not None:
        found = found[: data.limit]
    if not found:
        raise InvalidInput(f"{label}: there are no prompts")
    seen: dict[str, int] = {}
    for number, item in enumerate(found):
        if item.id in seen:
            raise InvalidInput(
                f"{label}: id {item.id!r} is that of entry {seen[item.id]} and of entry {number}"
            )
        seen[item.id] = number
    _check_columns(found, label)
    return found


def _check_columns(items: Sequence[Item], label: str) -> None:
    """Refuse a column of different kinds of values, which no table of rows can hold."""
    kinds: dict[str, str] = {}
    for item in items:
        for name, value in item.columns.items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            kind = "numbers" if number else type(value).__name__
            if value is not None and kinds.setdefault(name, kind) != kind:
                raise InvalidInput(
                    f"{label}: the column {name!r} holds {kinds[name]}, but {kind} in entry "
                    f"{item.id!r}; a column has one kind of values"
                )


def pairs_only(items: Sequence[Item], label: str) -> None:
    """Refuse data without pairs.

    Raises:
        InvalidInput: an item has no target prompt.
    """
    alone = [item for item in items if item.target is None]
    if alone:
        raise InvalidInput(
            f"{label}: entry {alone[0].id!r} has no target prompt; give pairs, a file with the "
            "columns source and target, or scenes with target"
        )


def _rows(data: Data, label: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    if data.file is not None:
        yield from FileRows(Path(data.file))
        return
    for number, entry in enumerate(data.prompts or data.pairs or ()):
        row = {"prompt": entry} if isinstance(entry, str) else entry
        yield row, f"{label}.{'prompts' if data.prompts else 'pairs'}.{number}"


def item_of(
    number: int,
    row: Mapping[str, Any],
    where: str,
    names: Sequence[str] = _SOURCE,
    targets: Sequence[str] = _TARGET,
    reserved: Sequence[str] = RESERVED,
) -> Item:
    """The prompt, or pair, that a row of the data holds.

    Args:
        number: its place in the data. where: the same for messages.
        names: columns that the prompt may be in. targets: those of the other prompt of a pair.
        reserved: columns that it may not have.

    Raises:
        InvalidInput: the row has no prompt, several, or a column that it may not have.
    """
    rest = dict(row)
    for each in (names, targets):
        several = [name for name in each if name in rest]
        if len(several) > 1:
            raise InvalidInput(
                f"{where}: {' and '.join(several)} both name the prompt; rename one of the columns"
            )
    prompt = next((rest.pop(name) for name in names if name in rest), None)
    target = next((rest.pop(name) for name in targets if name in rest), None)
    for name, value in (("prompt", prompt), ("target", target)):
        if value is None and name == "target":
            continue
        if name == "prompt" and not any(each in row for each in names):
            raise InvalidInput(
                f"{where}: needs a column {' or '.join(names)}, has {', '.join(row) or 'none'}"
            )
        if not isinstance(value, str) or not value.strip():
            raise InvalidInput(f"{where}: {name} must be text, got {value!r}")
    for name, value in row.items():
        if isinstance(value, str):
            check_text(value, f"{where}: {name}")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise InvalidInput(f"{where}: {name} is beyond 64 bits; write it as a text")
    taken = [name for name in rest if name in reserved]
    if taken:
        raise InvalidInput(f"{where}: the column {taken[0]!r} is made by the run; rename it")
    name = rest.pop("id", None)
    return Item(str(number if name is None else name), str(prompt), target, rest)


def scene_items(wanted: Scenes) -> Iterator[Item]:
    """Captions of scenes with one object, as pairs where a target is given.

    Colour-shape pairs that training never shows are left out. All else is drawn evenly from `seed`.
    The columns `source_color` and so on say what a prompt shows; where a pair differs in one
    attribute, `source` and `target` are its two values.

    Raises:
        UnknownName: there is no such attribute or value.
        InvalidInput: there are not so many different scenes.
    """
    from dreamreader.zoo import scenes

    values: dict[str, list[str]] = {
        "color": list(scenes.COLORS),
        "shape": list(scenes.SHAPES),
        "size": list(scenes.SIZES),
        "place": [f"{row} {column}" for row in scenes.ROWS for column in scenes.COLUMNS],
        "background": list(scenes.BACKGROUNDS),
        "frame": ["no", "yes"],
    }
    for part in (wanted.source, wanted.target or {}):
        for name, value in part.items():
            if name not in values:
                raise UnknownName("attribute of scenes", name, values)
            if value not in values[name]:
                raise UnknownName(f"{name} of scenes", value, values[name])
    axes = [[wanted.source[n]] if n in wanted.source else v for n, v in values.items()]
    every = [dict(zip(values, each, strict=True)) for each in itertools.product(*axes)]
    pairs = [(each, {**each, **(wanted.target or {})}) for each in every]
    pairs = [pair for pair in pairs if not any(_is_held_out(each) for each in pair)]
    random.Random(wanted.seed).shuffle(pairs)
    stop = wanted.skip + wanted.count
    if stop > len(pairs):
        behind = f" behind the first {wanted.skip}" if wanted.skip else ""
        raise InvalidInput(
            f"data.scenes: {wanted.count} are asked for{behind}, there are {len(pairs)}"
        )
    said = frozenset({"color", "size", "place"}) - set(wanted.unsaid)
    background = "background" not in wanted.unsaid
    for number, (source, target) in enumerate(pairs[wanted.skip : stop]):
        captions = [_scene(each, said, background).caption() for each in (source, target)]
        columns = {f"source_{k}": v for k, v in source.items()}
        if wanted.target is None:
            yield Item(str(number), captions[0], None, columns)
            continue
        columns |= {f"target_{k}": v for k, v in target.items()}
        changed = [name for name in values if source[name] != target[name]]
        if len(changed) == 1:  # what metrics such as tint ask for
            columns |= {"source": source[changed[0]], "target": target[changed[0]]}
        yield Item(str(number), captions[0], captions[1], columns)


def _is_held_out(values: Mapping[str, str]) -> bool:
    from dreamreader.zoo import scenes

    return (values["color"], values["shape"]) in scenes.HELD_OUT_PAIRS


def _scene(values: Mapping[str, str], said: frozenset[str], background: bool) -> Any:
    from dreamreader.zoo import scenes

    row, column = values["place"].split()
    obj = scenes.Obj(values["shape"], values["color"], values["size"], row, column, said)
    scene = scenes.Scene((obj,), values["background"], background_said=background)
    return replace(scene, frame=values["frame"] == "yes")
