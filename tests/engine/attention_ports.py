"""Checks the ports of every attention inside a model against what they have to satisfy.

`probs @ v == heads` holds for any layout of a projection only where all three are right, and an
edit of head 0 must do what a hand-made hook on the same features does.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dreamreader.edits import Ablate
from dreamreader.engine import Reader
from dreamreader.engine._families import attention_facts
from dreamreader.errors import ClockUnknown, InvalidInput, NeverFired

Call = Callable[[], Any]
Kept = dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What came of one attention.

    Args:
        verdict: `equal`, `gated`, `refused`, `without ports`, `not run` or `wrong`.
        detail: the largest error, or the reason.
    """

    site: str
    kind: str
    verdict: str
    detail: str = ""


@dataclass(frozen=True)
class Gate:
    """A factor between what the attention gives and what the output projection reads.

    Args:
        part: the submodule whose result makes it, None: the factor is fitted.
        factor: from (result of the part, probs @ v, heads) to something that multiplies
            [batch, tokens, heads, d].
    """

    part: str | None
    factor: Callable[[Tensor | None, Tensor, Tensor], Tensor]


def attentions(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that have the ports of an attention, or the name of one and none inside."""
    found = []
    for name, module in model.named_modules():
        if attention_facts(module) is not None:
            found.append((name, module))
        elif "Attention" in type(module).__name__:
            inside = (type(each).__name__ for each in module.modules() if each is not module)
            if not any("Attention" in each for each in inside):
                found.append((name, module))
    return found


def outcomes(
    model: nn.Module, call: Call, gates: Mapping[str, Gate] | None = None
) -> list[Outcome]:
    """The verdict on every attention of a model that `call` runs.

    Args:
        gates: by class the part whose result makes a factor between probs @ v and heads, and how.
    """
    reader, found = Reader(model), []
    for name, module in attentions(model):
        kind = type(module).__name__
        facts = attention_facts(module)
        if facts is None:
            found.append(Outcome(name, kind, "without ports"))
            continue
        missing = [each for each in ("v", "heads") if each not in facts.ports]
        if missing or facts.no_probs:
            reason = facts.no_probs or facts.why_not(missing[0])
            assert reason, f"{name}: {missing} are missing without a reason"
            found.append(Outcome(name, kind, "refused", reason))
            continue
        texts = [each for each in ("v.text", "heads.text") if each in facts.ports]
        gate = (gates or {}).get(kind)
        try:
            with _seen(module, gate) as seen:
                kept = _recorded(reader, name, ["v", "heads", "probs", *texts], call)
        except NeverFired as error:
            found.append(Outcome(name, kind, "not run", str(error)))
            continue
        except (ClockUnknown, InvalidInput) as error:
            found.append(Outcome(name, kind, "refused", str(error)))
            continue
        error = _error(kept, gate.factor if gate else None, seen)
        verdict = "wrong" if error > 1e-4 else "gated" if gate else "equal"
        found.append(Outcome(name, kind, verdict, f"{error:.1e}"))
    return found


def _recorded(reader: Reader, name: str, ports: Sequence[str], call: Call) -> Kept:
    with reader.recording([f"{name}:{each}" for each in ports]) as cache, torch.no_grad():
        call()
    return {each: cache[f"{name}:{each}"].tensor[:, 0] for each in ports}


@contextmanager
def _seen(module: nn.Module, gate: Gate | None) -> Iterator[list[Tensor]]:
    """What the gate's part gives, by a hook of its own."""
    seen: list[Tensor] = []
    if gate is None or gate.part is None:
        yield seen
        return
    part = module.get_submodule(gate.part)
    handle = part.register_forward_hook(lambda _, args, out: seen.append(out))
    try:
        yield seen
    finally:
        handle.remove()


def _error(kept: Kept, factor: Callable | None, seen: list[Tensor]) -> float:
    """How far probs @ v is from heads, relative to the largest of them, in the best key order."""
    streams = ["", ".text"] if "v.text" in kept else [""]
    errors = [_error_in(kept, order, factor, seen) for order in (streams, streams[::-1])]
    return min(each for each in errors if each is not None)


def _error_in(
    kept: Kept, order: Sequence[str], factor: Callable | None, seen: list[Tensor]
) -> float | None:
    v = torch.cat([kept[f"v{each}"] for each in order], 1).transpose(1, 2)
    probs = kept["probs"].transpose(1, 2)
    if probs.shape[-1] != v.shape[2]:
        return None
    mixed = (probs @ v.repeat_interleave(probs.shape[1] // v.shape[1], 1)).transpose(1, 2)
    given = [f"heads{each}" for each in order if f"heads{each}" in kept]
    heads = torch.cat([kept[each] for each in given], 1)
    if mixed.shape[1] != heads.shape[1]:  # the text stream ends here
        mixed = mixed[:, : heads.shape[1]] if order[0] == "" else mixed[:, -heads.shape[1] :]
    if factor is not None:
        mixed = mixed * factor(seen[0] if seen else None, mixed, heads)
    return float((mixed - heads).abs().max() / heads.abs().max())


@dataclass(frozen=True)
class ByHand:
    """The features of head 0 at a port, found without the families.

    Args:
        module: what a plain hook is put on.
        chosen: index into the last dimensions of what it gives or reads.
        side: `out` or `in`.
    """

    module: nn.Module
    chosen: tuple[int | slice, ...]
    side: str = "out"


@contextmanager
def zeroed(place: ByHand) -> Iterator[None]:
    """A hand-made hook sets these features to zero."""

    def without(x: Any) -> Any:
        if isinstance(x, tuple):
            return (without(x[0]), *x[1:])
        x = x.clone()
        x[(..., *place.chosen)] = 0
        return x

    if place.side == "in":
        handle = place.module.register_forward_pre_hook(lambda _, args: without(args))
    else:
        handle = place.module.register_forward_hook(lambda _, args, out: without(out))
    try:
        yield
    finally:
        handle.remove()


def edits_differ(model: nn.Module, site: str, ports: Mapping[str, ByHand], call: Call) -> list[str]:
    """Ports at which ablating head 0 does not do what the hook made by hand does."""
    reader, wrong = Reader(model), []
    with torch.no_grad():
        plain = call()
        for port, place in ports.items():
            with zeroed(place):
                expected = call()
            with reader.editing(Ablate(f"{site}:{port}", "zero", heads=[0])):
                got = call()
            same = torch.allclose(got, expected, rtol=1e-5, atol=1e-6)
            if not same or torch.equal(expected, plain):
                wrong.append(f"{site}:{port} {'has no effect' if same else 'other numbers'}")
    return wrong
