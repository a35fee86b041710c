"""Reading spec files: YAML with overrides, and errors that name file, line and field."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from dreamreader.errors import InvalidInput, nearest
from dreamreader.specs.overrides import apply_override
from dreamreader.specs.parse import parse_yaml

if TYPE_CHECKING:
    from dreamreader.engine import Reader

S = TypeVar("S", bound=BaseModel)
Lines = dict[tuple[str | int, ...], int]


def load_spec(model: type[S], path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> S:
    """Reads a spec file.

    Args:
        model: what the file describes.
        path: YAML or JSON.
        overrides: `key=value` with a dotted key, e.g. `method.strengths=[0,1]` or `seeds.count=4`;
            the value is read as YAML.

    Returns:
        The checked spec, with all defaults. Relative paths in it are meant from its own folder.

    Raises:
        InvalidInput: the file is missing or no YAML, or a field cannot be right; every wrong field
            is named with file, line, and the nearest valid name where its name is unknown.
    """
    file = Path(path)
    content, lines = read_content(file)
    where: dict[tuple[str | int, ...], str] = {key: f"{file}:{n}" for key, n in lines.items()}
    for override in overrides:
        for key in apply_override(model, content, override):
            where[key] = f"override {override!r}"
    return check_spec(model, content, where, str(file), file.parent)


def read_content(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Lines]:
    """The plain content of a spec file, and the line of every key.

    Raises:
        InvalidInput: the file is missing, or no YAML that is a mapping.
    """
    file = Path(path)
    if file.is_dir():
        raise InvalidInput(f"{file} is a folder; name a spec file")
    if not file.is_file():
        raise InvalidInput(f"{file}: no such spec file")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{file}: no UTF-8 text ({error.reason})") from error
    return _parse(text, str(file))


def spec_of(
    model: type[S],
    spec: S | Mapping[str, Any] | None,
    fields: Mapping[str, Any],
    reader: "Reader | None",
    source: str,
) -> S:
    """The spec that Python gives: whole, as a mapping, or field by field.

    Args:
        model: what it is. spec: whole, or its content. fields: beside a content.
        reader: of a subject of one's own, whose class is the subject's name where none is given.
        source: who asks, for messages.

    Raises:
        InvalidInput: fields beside a whole spec, or one that cannot be right.
    """
    if isinstance(spec, model):
        if fields:
            raise InvalidInput(
                f"{source}: a whole spec is given, and {next(iter(fields))} beside it; change the "
                "spec"
            )
        return spec
    content = {**(spec or {}), **fields}  # pyright: ignore[reportGeneralTypeIssues]
    if reader is not None:
        content.setdefault("subject", type(reader.subject).__name__)
    return check_spec(model, content, source=source)


def check_spec(
    model: type[S],
    content: Mapping[str, Any],
    where: Mapping[tuple[str | int, ...], str] | None = None,
    source: str = "spec",
    folder: Path | None = None,
) -> S:
    """Validates plain values as a spec.

    Args:
        model: what they describe.
        content: what the file, or Python, says.
        where: place of every key, for messages; `source` where it has none.
        source: name of the whole, for messages.
        folder: what a relative path is meant from.

    Raises:
        InvalidInput: as `load_spec` does.
    """
    try:
        spec = model.model_validate(content)
    except ValidationError as error:
        raise InvalidInput(_explain(error, model, where or {}, source)) from None
    if folder is not None:
        spec = _anchor_files(spec, folder)
    return spec


def _parse(text: str, name: str) -> tuple[dict[str, Any], Lines]:
    content, root = parse_yaml(text, name)
    if not isinstance(content, dict):
        raise InvalidInput(f"{name}: a spec is a mapping, got {type(content).__name__}")
    lines: Lines = {}
    _walk(root, (), lines, name)
    return content, lines


def _walk(node: Any, key: tuple[str | int, ...], lines: Lines, name: str) -> None:
    lines.setdefault(key, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for left, right in node.value:
            inner = (*key, left.value)
            line = left.start_mark.line + 1
            if inner in lines:  # YAML would keep the last one without a word
                raise InvalidInput(
                    f"{name}:{line}: {'.'.join(map(str, inner))} is given twice, first in line "
                    f"{lines[inner]}"
                )
            lines[inner] = line
            _walk(right, inner, lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _walk(item, (*key, number), lines, name)


def _explain(
    error: ValidationError, model: type[BaseModel], where: Mapping[Any, str], source: str
) -> str:
    schema = model.model_json_schema()
    found: dict[tuple[str | int, ...], list[str]] = {}
    for each in error.errors():
        key = _without_tags(each["loc"], schema)
        message = _message(each, key, schema)
        if message not in found.setdefault(key, []):
            found[key].append(message)
    lines = []
    for key, messages in found.items():
        place = next((where[key[:n]] for n in range(len(key), -1, -1) if key[:n] in where), source)
        field = ".".join(map(str, key)) or "the spec"
        lines.append(f"{place}: {field}: {'; or '.join(messages)}")
    return "\n".join(lines)


def _message(error: Mapping[str, Any], key: tuple[str | int, ...], schema: dict[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        known = _list_fields(schema, error["loc"][:-1])
        near = nearest(str(key[-1]), known) or known[:8]
        return f"unknown field; nearest: {', '.join(near)}"
    if error["type"] == "union_tag_not_found":
        return (
            f"{error['ctx']['discriminator'].strip(chr(39))} is missing: it says which one is meant"
        )
    if error["type"] == "union_tag_invalid":
        tags = [tag.strip(" '") for tag in error["ctx"]["expected_tags"].split(",")]
        tag = error["ctx"]["tag"]
        near = nearest(tag, tags) or tags
        return f"unknown kind {tag!r}; nearest: {', '.join(near)}; all: {', '.join(tags)}"
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    given = error.get("input")
    shown = (
        "" if isinstance(given, dict | list) or error["type"] == "missing" else f", got {given!r}"
    )
    return message + shown


def _without_tags(loc: tuple[str | int, ...], schema: dict[str, Any]) -> tuple[str | int, ...]:
    """The path in the file, without what pydantic adds to say which kind of a union it tried."""
    kept: list[str | int] = []
    node: Any = schema
    for part in loc:
        if part == "[key]":  # what pydantic puts behind a key that is wrong itself
            continue
        node = _resolve(node, schema)
        if isinstance(part, str) and part in node.get("discriminator", {}).get("mapping", {}):
            node = {"$ref": node["discriminator"]["mapping"][part]}
            continue
        if isinstance(part, int):
            kept.append(part)
            node = _resolve(_choice(node, "items", schema), schema).get("items", {})
            continue
        inner = _choice(node, part, schema).get("properties", {})
        if part in inner or not _is_branch(part, node):
            kept.append(part)
        node = inner.get(part, node if _is_branch(part, node) else {})
    return tuple(kept)


def _is_branch(part: str, node: dict[str, Any]) -> bool:
    """Whether pydantic named an alternative of a union here, such as `list[int]` or `Seeds`."""
    plain = part in ("str", "int", "float", "bool", "dict", "list")
    return "anyOf" in node and (plain or not part.islower() or not part.isidentifier())


def _list_fields(schema: dict[str, Any], loc: tuple[str | int, ...]) -> list[str]:
    """Names of the fields at a place of the schema."""
    node: Any = schema
    for part in loc:
        node = _resolve(node, schema)
        mapping = node.get("discriminator", {}).get("mapping", {})
        if part in mapping:
            node = {"$ref": mapping[part]}
        elif isinstance(part, int):
            node = _choice(node, "items", schema).get("items", {})
        else:
            inner = _choice(node, part, schema).get("properties", {})
            node = inner.get(part, node)
    return list(_choice(_resolve(node, schema), "properties", schema).get("properties", {}))


def _choice(node: dict[str, Any], wanted: str, schema: dict[str, Any]) -> dict[str, Any]:
    """The alternative of a union that has the wanted property (or `items`, `properties`)."""
    node = _resolve(node, schema)
    options = [_resolve(each, schema) for each in node.get("anyOf", [])] or [node]
    for each in options:
        if wanted in each or wanted in each.get("properties", {}):
            return each
    return next((each for each in options if "properties" in each), node)


def _resolve(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    return node


def _anchor_files(spec: S, folder: Path) -> S:
    """The spec with absolute paths of files, stores and adapters, which its folder finds too."""

    def anchor(part: Any) -> Any:
        if isinstance(part, list):
            inner = [anchor(each) for each in part]
            return inner if any(a is not b for a, b in zip(part, inner, strict=True)) else part
        if not hasattr(type(part), "model_fields"):
            return part
        changes = {}
        for name in type(part).model_fields:
            value = getattr(part, name)
            if name in ("file", "store", "adapter") and isinstance(value, str):
                changes[name] = str((folder / value).resolve())
            elif (inner := anchor(value)) is not value:
                changes[name] = inner
        return part.model_copy(update=changes) if changes else part

    return anchor(spec)
