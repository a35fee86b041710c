"""Overrides of a spec: one `key=value` with a dotted key."""

from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel

from dreamreader.errors import InvalidInput
from dreamreader.specs.parse import parse_yaml
from dreamreader.specs.parts import Shorthand

Key = tuple[str | int, ...]


def apply_override(model: type[BaseModel], content: dict[str, Any], text: str) -> list[Key]:
    """Sets one value of a spec's content in place; gives the keys that are new or changed.

    Where the key goes on below a plain value, that is put into the mapping that it stands for:
    with `subject: shapes-unet`, `subject.device=cuda` keeps the model.

    Args:
        model: what the content describes; says what a plain value stands for.
        content: changed in place.
        text: `key=value`; the value is read as YAML.

    Raises:
        InvalidInput: no `key=value`, no such entry of a list, or a key below a value without parts.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InvalidInput(f"override {text!r}: write key=value, for example seeds.count=4")
    path: list[str | int] = []
    changed: list[Key] = []
    place: Any = content
    *outer, last = key.strip().split(".")
    for part, below in zip(outer, [*outer, last][1:], strict=True):
        step = _step(place, part, text)
        path.append(step)
        there = place[step] if isinstance(step, int) else place.get(step)
        if there is None:  # a field that was left to its default
            place[step] = {}
            changed.append(tuple(path))
        elif not isinstance(there, dict | list):
            place[step] = _expand(model, path, there, below, text)
        place = place[step]
    step = _step(place, last, text)
    try:
        place[step], _ = parse_yaml(value, "value")
    except InvalidInput as error:
        said = str(error).partition(": ")[2]  # without the line: there is only one
        raise InvalidInput(f"override {text!r}: the value is {said}") from error
    return [*changed, (*path, step)]


def _step(place: Any, part: str, text: str) -> str | int:
    if not isinstance(place, list):
        return part
    if not part.isdigit() or int(part) >= len(place):
        raise InvalidInput(f"override {text!r}: {part} is no entry of a list of {len(place)}")
    return int(part)


def _expand(
    model: type[BaseModel], path: list[str | int], value: Any, below: str, text: str
) -> dict[str, Any]:
    """The mapping that a plain value stands for."""
    nodes: list[Any] = [model]
    for part in path:
        nodes = [inner for node in nodes for inner in _inside(node, part)]
    for node in nodes:
        for short in _shorthands(node):
            if isinstance(whole := short.expand(value), dict):
                return whole
    if value == below:  # a name, for the name with options: metrics, optimizer
        return {value: {}}
    name = ".".join(map(str, path))
    raise InvalidInput(
        f"override {text!r}: {name} is {value!r}, which has no {below}; give {name} as a whole"
    )


def _inside(node: Any, part: str | int) -> Iterator[Any]:
    """Types of what is at a key or number of a value of this type."""
    if isinstance(node, type) and issubclass(node, BaseModel):
        if field := node.model_fields.get(str(part)):
            yield (
                Annotated[(field.annotation, *field.metadata)]
                if field.metadata
                else (field.annotation)
            )
    elif get_origin(node) is list and isinstance(part, int):
        yield from get_args(node)
    elif get_origin(node) is dict:
        yield get_args(node)[1]
    else:
        for member in _members(node):
            yield from _inside(member, part)


def _members(node: Any) -> tuple[Any, ...]:
    """What a union or an annotated type is made of."""
    if get_origin(node) in (list, dict, tuple):
        return ()
    return get_args(node)[:1] if get_origin(node) is Annotated else get_args(node)


def _shorthands(node: Any) -> Iterator[Shorthand]:
    if get_origin(node) is Annotated:
        yield from (each for each in get_args(node)[1:] if isinstance(each, Shorthand))
    for member in _members(node):
        yield from _shorthands(member)
