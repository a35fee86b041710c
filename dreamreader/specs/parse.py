"""Plain values out of texts that somebody else wrote: YAML and JSON, with budgets.

A text is refused, with its place, that is not well formed, nests too deeply, means more values than
it shows (aliases of aliases), gives a key twice, or holds what no row can: integers beyond 64 bits
and halves of characters.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from dreamreader.errors import InvalidInput, check_text

DEPTH = 64  # of values in values
NODES = 2_000_000  # values, each alias counted as all that it stands for
_INT64 = range(-(2**63), 2**63)


def parse_yaml(text: str, name: str) -> tuple[Any, yaml.Node | None]:
    """Reads one YAML document of plain values: no tags of Python, no aliases within themselves.

    Args:
        text: of the document. name: of its file or origin, for messages.

    Returns:
        The value, and the tree that it is from, whose nodes know their lines; None of nothing.

    Raises:
        InvalidInput: see above; with name and line.

    Example:
        >>> parse_yaml("seeds: [0, 1]", "spec.yaml")[0]
        {'seeds': [0, 1]}
    """
    loader = root = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return None, None
        _measure(root, name, {})
        value = loader.construct_document(root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f":{mark.line + 1}" if mark is not None else ""
        field = _field_at(root, mark) if isinstance(error, ConstructorError) else None
        where = f" (field {field})" if field else ""
        problem = getattr(error, "problem", None) or str(error)
        raise InvalidInput(f"{name}{at}: no YAML: {' '.join(problem.split())}{where}") from error
    finally:
        if loader is not None:
            loader.dispose()
    return value, root


def parse_json(text: str | bytes, name: str) -> Any:
    """Reads one JSON value.

    Args:
        text: of the value; bytes are UTF-8. name: of its file or line, for messages.

    Raises:
        InvalidInput: see above; with name.

    Example:
        >>> parse_json('{"prompt": "a cat"}', "prompts.jsonl:1")
        {'prompt': 'a cat'}
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
        _check_values(value, name)
    except json.JSONDecodeError as error:
        line = f" in line {error.lineno}" if error.lineno > 1 else ""
        raise InvalidInput(f"{name}: no JSON: {error.msg}{line}") from error
    except RecursionError:
        raise InvalidInput(f"{name}: no JSON that is read here: {_TOO_DEEP}") from None
    except ValueError as error:  # of a hook, or no UTF-8
        raise InvalidInput(f"{name}: no JSON that is read here: {error}") from None
    return value


_TOO_DEEP = f"values stand more than {DEPTH} deep in each other"


class _Loader(yaml.SafeLoader):
    """The safe loader of PyYAML, whose every failure has a line."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > DEPTH:
            raise ComposerError(None, None, _TOO_DEEP, self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int | float):
                _check_spelling(node.value)
            if isinstance(value, int | str):
                _check_scalar(value)
        except yaml.YAMLError:
            raise
        except Exception as error:  # PyYAML passes on what int(), float() and datetime raise
            shown = str(node.value)[:40] if isinstance(node, yaml.ScalarNode) else "this"
            kind = node.tag.rpartition(":")[2]
            said = str(error) if isinstance(error, _Refused) else f"{shown!r} is no {kind}"
            raise ConstructorError(None, None, said, node.start_mark) from error
        return value


def _measure(
    node: yaml.Node, name: str, known: dict[int, tuple[int, int] | None]
) -> tuple[int, int]:
    """How many values a node means, and how deep; refuses too many, and one within itself."""
    if id(node) in known:
        if (found := known[id(node)]) is None:
            raise _at(node, name, "an alias stands within what it stands for")
        return found
    known[id(node)] = None
    inner = [_measure(each, name, known) for each in _inner(node)]
    total = 1 + sum(count for count, _ in inner)
    depth = 1 + max((depth for _, depth in inner), default=0)
    if total > NODES:
        raise _at(node, name, f"its aliases stand for more than {NODES:,} values")
    if depth > DEPTH:
        raise _at(node, name, _TOO_DEEP)
    known[id(node)] = total, depth
    return total, depth


def _field_at(node: yaml.Node | None, mark: yaml.Mark | None, before: str = "") -> str | None:
    """The dotted name of what stands at a place."""
    if node is None or mark is None:
        return None
    if isinstance(node, yaml.ScalarNode):
        return before if node.start_mark.index == mark.index else None
    pairs = node.value if isinstance(node, yaml.MappingNode) else enumerate(node.value)
    for key, inner in pairs:
        name = str(key if isinstance(key, int) else key.value)
        found = _field_at(inner, mark, f"{before}.{name}" if before else name)
        if found:
            return found
    return None


def _inner(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _at(node: yaml.Node, name: str, problem: str) -> InvalidInput:
    return InvalidInput(f"{name}:{node.start_mark.line + 1}: no YAML: {problem}")


class _Refused(ValueError):
    """A value that is well formed, and that no row can hold."""


def _check_spelling(text: str) -> None:
    """Refuses numbers that YAML reads otherwise than people do: octal ones, hours and minutes."""
    if re.match(r"[-+]?(0[0-9_]+$|[0-9_]+:[0-9])", text) and text.strip("-+0"):
        raise _Refused(
            f"{text} is read as another number, octal or in sixties; write it without a leading 0 "
            "and colons, or as a text in quotes"
        )


def _check_scalar(value: int | str) -> None:
    if isinstance(value, str):
        try:
            check_text(value, "this")
        except InvalidInput as error:
            raise _Refused(str(error)) from None
    elif value not in _INT64:
        raise _Refused("an integer beyond 64 bits; write it as a text")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # JSON would keep the last one without a word
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Refused(f"{twice!r} is given twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > 20 or (value := int(digits)) not in _INT64:
        raise _Refused("an integer beyond 64 bits; write it as a text")
    return value


def _check_values(value: Any, name: str, depth: int = 1) -> None:
    if depth > DEPTH:
        raise _Refused(_TOO_DEEP)
    if isinstance(value, str):
        _check_scalar(value)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            _check_scalar(key)
            _check_values(each, name, depth + 1)
    elif isinstance(value, list):
        for each in value:
            _check_values(each, name, depth + 1)
