"""Sites: places in a subject, found by pattern."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

from torch import nn

from dreamreader.engine import _html as html
from dreamreader.engine._pattern import Pattern, join, parse
from dreamreader.engine._ports import can_run, ports_of, tap_for
from dreamreader.engine._subject import Modules
from dreamreader.engine._taps import Tap
from dreamreader.errors import DreamreaderError, UnknownName


@dataclass(frozen=True)
class Site:
    """One place in a subject.

    Attributes:
        path: dotted path of the module.
        port: what is read or written there.
        stream: `image` or `text` where a joint stream was asked for.
        module_class: class name of the module.
        shape: of the latest values seen there, as [batch, tokens, features]; None before a run.
        ports: the ports that the module has.
        around: the modules that hold it, the nearest first.
    """

    path: str
    port: str
    stream: str | None
    module_class: str
    tap: Tap = field(repr=False, compare=False)
    shape: tuple[int, ...] | None = None
    ports: tuple[str, ...] = ()
    around: tuple[nn.Module, ...] = field(default=(), repr=False, compare=False)

    @property
    def name(self) -> str:
        return join(self.path, self.port, self.stream)

    @property
    def component(self) -> str:
        return self.path.split(".")[0]

    @property
    def heads(self) -> int | None:
        return self.tap.heads


class SiteList(Sequence[Site]):
    """Sites that matched a pattern; prints as a table."""

    def __init__(self, sites: Sequence[Site]):
        self._sites = tuple(sites)

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> "SiteList": ...
    def __getitem__(self, index: int | slice) -> "Site | SiteList":
        return SiteList(self._sites[index]) if isinstance(index, slice) else self._sites[index]

    def __len__(self) -> int:
        return len(self._sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    @property
    def names(self) -> list[str]:
        return [each.name for each in self._sites]

    def _table(self) -> list[tuple[str, ...]]:
        return [
            (
                each.name,
                each.module_class,
                "x".join(map(str, each.shape)) if each.shape else "",
                str(each.heads or ""),
            )
            for each in self._sites
        ]

    def __repr__(self) -> str:
        return f"{len(self)} sites\n" + html.text_table(_HEADER, self._table())

    def _repr_html_(self) -> str:
        return html.table(_HEADER, self._table(), f"{len(self)} sites")


_HEADER = ("site", "module", "shape", "heads")


def find(
    modules: Modules,
    text: str,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> SiteList:
    """Sites of a subject that match a pattern, in the order of the model.

    A glob takes the modules that have the port; a plain path must have it.

    Raises:
        UnknownName: nothing matches; names the nearest sites, or the ports that there are.
    """
    pattern = parse(text)
    if not pattern.is_glob:
        module = modules.get(pattern.path)
        if module is None:
            raise _unknown(modules, pattern, text)
        return SiteList([_site(modules, pattern.path, pattern, shapes)])
    hits = [path for path in modules.matching(pattern) if can_run(modules[path])]
    if not hits:
        raise _unknown(modules, pattern, text)
    found, failure = [], None
    for path in hits:
        try:
            found.append(_site(modules, path, pattern, shapes))
        except UnknownName as error:
            failure = failure or error
    if failure is not None and not found:
        raise failure
    return SiteList(found)


def _site(
    modules: Modules,
    path: str,
    pattern: Pattern,
    shapes: Mapping[str, tuple[int, ...]] | None,
) -> Site:
    module = modules[path]
    name = join(path, pattern.port, pattern.stream)
    if not can_run(module):
        raise DreamreaderError(
            f"{path} is a {type(module).__name__}, which is never called: name one of its entries, "
            f"for example {path}.0 or {path}.*"
        )
    return Site(
        path,
        pattern.port,
        pattern.stream,
        type(module).__name__,
        tap_for(module, pattern, name),
        (shapes or {}).get(name),
        # Worked out for people only: a run asks for thousands of sites.
        tuple(ports_of(module)) if shapes is not None else (),
        modules.around(path),
    )


def _unknown(modules: Mapping[str, nn.Module], pattern: Pattern, text: str) -> UnknownName:
    runs = {path: module for path, module in modules.items() if can_run(module)}
    has_port = [path for path, module in runs.items() if pattern.port in ports_of(module)]
    known = [join(path, pattern.port, pattern.stream) for path in has_port or runs]
    tops = sorted({path.split(".")[0] for path in runs})
    return UnknownName("site", text, known, f"Paths start with {', '.join(tops[:12])}")
