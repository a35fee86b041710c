"""Compares recordings and edits of a language model with hooks made by hand, mode by mode."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from oracle.positions import Layout, Selection, Taps, pushed
from tiny import decoders
from torch import Tensor, nn

import dreamreader as dr
from dreamreader.errors import ClockUnknown, InvalidInput, NeverFired, UnknownName
from tests.engine.matrix_modes import PROMPTS, Mode, causal_modes, seq2seq_modes

RECORDS = {
    "all": Selection(),
    "first": Selection(tokens=0),
    "last": Selection(tokens=-1),
    "list": Selection(tokens=[1, 2]),
    "slice": Selection(tokens=slice(1, 3)),
    "row": Selection(rows=[1]),
    "prompt": Selection(steps=0),
}
# what makes one tensor where the prompt comes first and single tokens after it
RECORDS_WRITTEN = {
    "prompt": Selection(steps=0),
    "first": Selection(tokens=0, steps=0),
    "last": Selection(tokens=-1, steps=0),
    "last, any step": Selection(tokens=-1),
    "slice": Selection(tokens=slice(1, 3), steps=0),
    "step": Selection(steps=[1]),
    "row": Selection(steps=0, rows=[1]),
    "row and step": Selection(steps=[1], rows=[1]),
}
EDITS = {
    "all": Selection(),
    "first": Selection(tokens=0),
    "last": Selection(tokens=-1),
    "slice": Selection(tokens=slice(1, 3)),
    "row": Selection(rows=[1]),
}
EDITS_WRITTEN = {**EDITS, "step": Selection(steps=[1])}

# values of the encoder, read inside the decoder
_CROSS = re.compile(r"(encoder_attn|EncDecAttention|cross\w*)\.(\w+\.)*(k|v|key|value)(_proj)?$")


# step -> entry -> its tokens, each as (own number, values [features])
Wanted = dict[int, dict[int, list[tuple[int, Tensor]]]]


@dataclass(frozen=True)
class Outcome:
    """What came of a request at a site.

    `equal`; `refused`, by an error of the library that says why; `wrong`: other values, or another
    error; `blind`: the change by hand does not show in the model's results.
    """

    request: str
    site: str
    what: str
    why: str = ""


class Checker:
    """One model in one mode; `outcomes` compares every request with what is known by hand."""

    def __init__(self, mode: Mode, model: Any):
        self.mode = mode
        self.subject = mode.wrap(model)
        self.reader = dr.Reader(self.subject, decoders.tokenizer())
        self.recorded, self.edited, self.head = _sites(self.subject, mode.prefix, self.reader)
        self._run()  # Reader.run tries a model that it does not know before its first padded run
        taps = Taps()
        read = {name for name in self.recorded if _side(self.reader, name) == "in"}
        with taps.on(self.recorded, read):
            self.output = self._results(self._run()[0])
        self.found = taps.found

    def outcomes(self) -> Iterator[Outcome]:
        for part, layout in self.mode.layouts.items():
            names = [name for name in self.recorded if self._belongs(name, part, layout)]
            edited = [name for name in names if name in self.edited]
            written = layout.calls[-1].step > 0
            for label, chosen in (RECORDS_WRITTEN if written else RECORDS).items():
                found = self._recordings(f"record {label}", chosen, names, layout)
                for outcome in found:
                    timeless = "encoder" in outcome.site.split(".") and chosen.steps is not None
                    timeless = timeless and part == "encoder"
                    yield _of_timeless(outcome) if timeless else outcome
            for label, chosen in (EDITS_WRITTEN if written else EDITS).items():
                yield from self._edits(f"edit {label}", chosen, edited, layout)

    def _run(self, edits: Sequence[Any] = (), records: Sequence[Any] = ()) -> tuple[Any, Any]:
        """(output, cache) of the model as the mode runs it."""
        mode, reader = self.mode, self.reader
        with _silent():
            if mode.inputs is None:
                result = reader.run(PROMPTS, edits=edits, record=records, **mode.arguments)
                return result.output, result.cache
            if edits:
                with reader.editing(edits):
                    return mode.call(self.subject), None
            if records:
                with reader.recording(records) as cache:
                    return mode.call(self.subject), cache
            return mode.call(self.subject), None

    def _belongs(self, name: str, part: str, layout: Layout) -> bool:
        """Whether a site is of this part, and what its values are is known by hand."""
        if len(self.mode.layouts) > 1:
            inside = "encoder" in name.split(".") or _CROSS.search(name)
            if part != ("encoder" if inside else "decoder"):
                return False
        found = self.found[name]
        if len(found) != len(layout.calls) or not found[0].is_floating_point():
            return False
        seen = [
            layout.seen(x, call, name == self.head)
            for x, call in zip(found, layout.calls, strict=True)
        ]
        if any(each is None for each in seen):
            return False
        # tokens are the same dimension at every call: [rows, 1, keys, ...] has none of its own
        turned = {each[0] is x for each, x in zip(seen, found, strict=True) if each is not None}
        return len(turned) == 1

    def _recordings(
        self, label: str, chosen: Selection, names: Sequence[str], layout: Layout
    ) -> Iterator[Outcome]:
        wanted = {name: self._wanted(name, chosen, layout) for name in names}

        def attempt(names: Sequence[str]) -> Any:
            records = [dr.Record(name, **vars(chosen)) for name in names]
            return self._run(records=records)[1]

        for group, cache in _by_group(names, wanted, attempt):
            for name in group:
                if isinstance(cache, Exception):
                    yield _failed(label, name, cache, wanted[name], layout.count(chosen))
                elif not wanted[name]:
                    yield Outcome(label, name, "wrong", "a recording where nothing is selected")
                elif cache[name].positions is None:
                    yield Outcome(label, name, "refused", "a recording without positions")
                else:
                    why = _difference(cache[name], wanted[name], layout)
                    yield Outcome(label, name, "wrong" if why else "equal", why)

    def _wanted(self, name: str, chosen: Selection, layout: Layout) -> Wanted:
        """What a recording has to hold."""
        wanted: Wanted = {}
        for x, call in zip(self.found[name], layout.calls, strict=True):
            seen = layout.seen(x, call, name == self.head)
            assert seen is not None
            for entry, at in layout.hits(chosen, call, seen[1]):
                tokens = wanted.setdefault(call.step, {}).setdefault(entry, [])
                for place in at:
                    own = layout.own(entry // layout.beams, seen[1][place])
                    assert own is not None
                    tokens.append((own, seen[0][entry, place].flatten()))
        return wanted

    def _edits(
        self, label: str, chosen: Selection, names: Sequence[str], layout: Layout
    ) -> Iterator[Outcome]:
        hits = {name: self._wanted(name, chosen, layout) for name in names}
        vectors = {name: self._vector(name) for name in names}

        def by_hand(names: Sequence[str]) -> list[Tensor]:
            with ExitStack() as stack:
                for name in names:
                    hook = pushed(
                        self.edited[name], vectors[name], chosen, layout, name == self.head
                    )
                    stack.enter_context(hook)
                return self._results(self._run()[0])

        def attempt(names: Sequence[str]) -> Any:
            edits = [dr.Steer(name, vectors[name], 1.0, **vars(chosen)) for name in names]
            return self._results(self._run(edits)[0])

        for group, got in _by_group(names, hits, attempt):
            if isinstance(got, Exception):
                yield from (_failed(label, name, got, hits[name]) for name in group)
                continue
            alike = _alike(got, wanted := by_hand(group))
            if len(group) > 1 and not alike:  # which of them it is
                pairs = [(name, attempt([name]), by_hand([name])) for name in group]
            else:
                pairs = [(name, got, wanted) for name in group]
            for name, mine, theirs in pairs:
                what = "equal" if _alike(mine, theirs) else "wrong"
                if what == "equal" and _alike(theirs, self.output):
                    what = "blind"
                yield Outcome(label, name, what)

    def _vector(self, name: str) -> Tensor:
        """A direction of the size of the values at a site."""
        x = self.found[name][0]
        noise = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(1))
        return 3 * x.std() * noise

    def _results(self, output: Any) -> list[Tensor]:
        """What the model gives for the rows' own tokens."""
        logits = getattr(output, "logits", None)
        if isinstance(logits, tuple):  # of generate, step by step
            return [*logits, output.sequences]
        layout = self.mode.layouts.get("decoder") or self.mode.layouts[""]
        call = layout.calls[-1]
        values = output[0] if logits is None else logits
        return [values[entry, at] for entry, at in layout.hits(Selection(), call, call.columns)]


def _sites(
    subject: Any, prefix: str, reader: dr.Reader
) -> tuple[dict[str, nn.Module], dict[str, nn.Module], str]:
    """Sites that are recorded, those of them that are edited, and the head.

    The embedding, the head, and of every stack of blocks its second block with all that lies two
    levels deep in it, and the heads of its attentions. Edits go to the embedding, the head, first
    blocks and experts.
    """
    modules = reader._subject.modules()
    model = modules.get(prefix.rstrip("."), reader._subject.components()[""])
    path = {id(module): name for name, module in reversed(list(modules.items()))}
    head = path.get(id(model.get_output_embeddings()), "")
    ends = [path.get(id(model.get_input_embeddings()), ""), head]
    recorded = {name: modules[name] for name in ends if name}
    edited = dict(recorded)
    for name, stack in modules.items():
        inside = any(part.isdigit() for part in name.split("."))
        if not isinstance(stack, nn.ModuleList) or len(stack) < 2 or inside:
            continue
        for inner, module in stack[1].named_modules(prefix=f"{name}.1"):
            if any(True for _ in module.parameters()) and inner.count(".") <= name.count(".") + 3:
                recorded[inner] = module
            if inner.endswith("experts"):
                edited[inner] = module
        recorded[f"{name}.0"] = edited[f"{name}.0"] = stack[0]
        try:
            ports = reader.sites(f"{name}.1.**:heads")
        except UnknownName:
            ports = []
        recorded |= {port.name: port.tap.module for port in ports}
    return recorded, edited, head


def _side(reader: dr.Reader, name: str) -> str:
    """Which side of its module a site is read on."""
    return reader.sites(name)[0].tap.side if ":" in name else "out"


def _by_group(
    names: Sequence[str], hits: dict[str, Any], attempt: Callable[[Sequence[str]], Any]
) -> Iterator[tuple[Sequence[str], Any]]:
    """Groups of sites with what an attempt at them gave, or its error.

    All that have something selected are tried at once; a site that an error names goes alone.
    """
    together = [name for name in names if hits[name]]
    alone = [name for name in names if not hits[name]]
    while together:
        try:
            yield together, attempt(together)
            break
        except Exception as error:
            said = str(error)
            named = max((name for name in together if name in said), key=len, default=None)
            if len(together) == 1:
                yield together, error
                break
            culprits = [named] if named else list(together)
        alone += culprits
        together = [name for name in together if name not in culprits]
    for name in alone:
        try:
            yield [name], attempt([name])
        except Exception as error:
            yield [name], error


def _difference(got: dr.Activation, wanted: Wanted, layout: Layout) -> str:
    """Why a recording is not what it has to be; empty where it is."""
    steps = [each.step for each in got.steps]
    if steps == [-1] and "encoder" in got.site.split("."):
        steps = [0]  # an encoder runs before decoding, once: it has no step
    if steps != sorted(wanted):
        return f"steps {steps} instead of {sorted(wanted)}"
    for at, step in enumerate(steps):
        entries = wanted[step]
        if got.tensor.shape[0] != len(entries):
            return f"{got.tensor.shape[0]} rows instead of {len(entries)}"
        for number, (entry, values) in enumerate(entries.items()):
            have = got.tensor[number, at].flatten(1)
            assert got.positions is not None
            own = got.positions[number, at]
            if own[own >= 0].tolist() != [place for place, _ in values]:
                return f"positions {own.tolist()} in entry {entry} at step {step}"
            if not torch.equal(have[own >= 0], torch.stack([value for _, value in values])):
                return f"other values in entry {entry} at step {step}"
            if got.rows[number].index != entry // layout.beams:
                return f"row {got.rows[number].index} instead of {entry // layout.beams}"
    return ""


def _failed(label: str, site: str, error: Exception, wanted: Wanted, count: int = 0) -> Outcome:
    """What an error means: it may be right, a refusal that says why, or wrong.

    `count`: entries that a recording chooses from.
    """
    why = f"{type(error).__name__}: {error}"
    if isinstance(error, NeverFired):
        return Outcome(label, site, "wrong" if wanted else "equal", why if wanted else "")
    ragged = any(
        len(entries) < count or len(set(map(len, entries.values()))) > 1
        for entries in wanted.values()
    )
    if count and ragged and "different numbers of tokens" in why:  # no tensor could hold them
        return Outcome(label, site, "equal")
    refused = isinstance(error, (ClockUnknown, InvalidInput))
    return Outcome(label, site, "refused" if refused else "wrong", why)


def _of_timeless(outcome: Outcome) -> Outcome:
    """What asks for a step of an encoder has to be refused: it has none."""
    if outcome.what == "equal":
        return replace(outcome, what="wrong", why="a step where there is none")
    refused = outcome.why.startswith("ClockUnknown")
    return replace(outcome, what="equal") if refused else outcome


def _alike(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(
        x.shape == y.shape and torch.allclose(x, y, rtol=1e-3, atol=1e-4)
        for x, y in zip(a, b, strict=True)
    )


@contextmanager
def _silent() -> Iterator[None]:
    """Without gradients, compiled code, and what models warn of."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def modes(name: str) -> list[Mode]:
    """The modes of a class."""
    embed = decoders.build(name).get_input_embeddings()
    with torch.no_grad():
        if decoders.kind(name) != "causal":
            return seq2seq_modes(embed)
        found = causal_modes(embed, cached=name not in decoders.UNCACHED)
    return [each for each in found if each.settings is None or name not in decoders.OWN_TOKENS]


def check(name: str, mode: Mode) -> list[Outcome]:
    """All outcomes of a class in a mode; `absent` where the model does not run so by itself."""
    model = decoders.build(name)
    try:
        checker = Checker(mode, model)
    except InvalidInput as error:  # of Reader.run
        return [Outcome("run", "", "refused", f"InvalidInput: {error}")]
    except Exception as error:
        return [Outcome("run", "", "absent", f"{type(error).__name__}: {error}")]
    return list(checker.outcomes())
