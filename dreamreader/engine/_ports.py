"""From a module and a port to the tap that reads and writes it."""

from dataclasses import replace

from torch import nn

from dreamreader.engine import _families as families
from dreamreader.engine._families import blocks
from dreamreader.engine._pattern import WHOLE, Pattern
from dreamreader.engine._taps import Tap
from dreamreader.errors import UnknownName

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def can_run(module: nn.Module) -> bool:
    """Whether the module is ever called: a list of modules is not."""
    return not isinstance(module, _CONTAINERS)


def ports_of(module: nn.Module) -> list[str]:
    """The ports that a module has, streams included where it keeps two apart.

    Example:
        >>> ports_of(nn.Linear(2, 2))
        ['out', 'in', 'delta']
    """
    found: list[str] = list(WHOLE)
    facts = families.attention_facts(module)
    streams = blocks.streams(module) or (facts.streams if facts else {})
    if streams:
        found += [f"{port}.text" for port in WHOLE]
    if facts is not None:
        found += facts.ports
        if facts.no_probs is None:
            found.append("probs")
    return found


def tap_for(module: nn.Module, pattern: Pattern, name: str) -> Tap:
    """The tap of a port.

    Raises:
        UnknownName: the module has no such port; the message lists those it has.
    """
    if pattern.port in WHOLE:
        return _on_module(module, pattern)
    facts = families.attention_facts(module)
    if facts is None:
        raise _describe_lack(module, pattern, name, "It is no attention module of a known family")
    if pattern.port == "probs":
        if facts.no_probs is not None:
            raise _describe_lack(module, pattern, name, facts.no_probs)
        return Tap(module, side="probs", heads=facts.heads)
    key = pattern.port + (".text" if pattern.stream == "text" else "")
    if pattern.stream is not None and not any(each.endswith(".text") for each in facts.ports):
        whole = facts.ports.get(pattern.port)  # one sequence, of which the stream is a part
        single = None if whole is None else replace(whole, stream=pattern.stream)
    else:
        single = facts.ports.get(key)
    if single is None:
        raise _describe_lack(module, pattern, name, facts.why_not(key))
    return single


def _on_module(module: nn.Module, pattern: Pattern) -> Tap:
    """out, in and delta: of one stream where the module keeps two, else of its first tensor."""
    facts = families.attention_facts(module)
    streams = blocks.streams(module) or (facts.streams if facts else {})
    if not streams:
        return Tap(module, side=pattern.port, stream=pattern.stream)
    stream = pattern.stream or "image"
    return Tap(module, side=pattern.port, element=streams[stream], argument=blocks.argument(stream))


def _describe_lack(module: nn.Module, pattern: Pattern, name: str, why: str = "") -> UnknownName:
    asked = pattern.port + (f".{pattern.stream}" if pattern.stream else "")
    has = ", ".join(ports_of(module))
    reason = f"{why}; " if why else ""
    path = name.partition(":")[0]
    hint = f"{reason}{path} is a {type(module).__name__} and has the ports {has}"
    return UnknownName("port", asked, ports_of(module), hint)
