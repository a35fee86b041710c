"""How the values of a site are read as [rows, tokens, features] in one kind of call."""

import re
from functools import cache
from typing import Any

from torch import Tensor, nn

from dreamreader.engine._axes import Axes, axes_of, describe_open, is_model
from dreamreader.engine._call_context import CallContext
from dreamreader.engine._generation import names_of
from dreamreader.engine._sites import Site
from dreamreader.engine._subject import innermost, is_encoder_decoder
from dreamreader.engine._taps import read_channels, write_channels
from dreamreader.engine._token_layout import (
    PaddingUnknown,
    RowsUnknown,
    TokenLayout,
    TokenMap,
)
from dreamreader.engine._view import View, view_of
from dreamreader.errors import ClockUnknown, InvalidInput


class SiteView:
    """Reads and writes a port's share of a module's value, and knows which tokens it holds.

    Attributes:
        map: the tokens of a language model's call; None elsewhere.
        is_plain: values are read and written as they are.
        canonical: [rows, tokens, features] of the port. hw, heads: see `View`.
    """

    def __init__(self, site: Site, view: View, token_map: TokenMap | ClockUnknown | None):
        self.map = token_map
        self.hw = view.hw
        self.heads = view.heads
        self.is_sequence = "tokens" in view.axes
        self.canonical: tuple[int, ...] = ()
        self._view = view
        self._tap = site.tap
        self._whole = site.tap.is_whole
        self.is_plain = self._whole and view.is_plain
        self._attention = site.port == "probs"

    @classmethod
    def of(
        cls,
        site: Site,
        now: CallContext,
        value: Tensor,
        given: Any,
        layout: str | None,
    ) -> "SiteView":
        """The view for values of this shape.

        Args:
            given: what the module was called with.
            layout: names of the dimensions, where the request says them.

        Raises:
            InvalidInput: which dimensions are tokens and features is unknown, or the layout has
                other dimensions.
        """
        tokens = now.tokens if isinstance(now.tokens, TokenLayout) else None
        flat = None
        if site.port == "probs":  # [batch, queries, heads, keys]
            view = View(("rows", "tokens", "features"), (*value.shape[:2], 1))
        else:
            flat = tokens.unflatten(value.shape[0]) if tokens and value.dim() == 2 else None
            flat = None if flat is not None and _is_routed(site) else flat
            view = view_of(_axes(site, now, value, layout, given), value.shape, flat)
        found = cls(site, view, None)
        x = found.outline(value)
        found.canonical = tuple(x.shape)
        found.map = _map(site, now, value, view, x, given)
        if layout is not None and isinstance(found.map, RowsUnknown):
            found.map = ClockUnknown(*found.map.args)  # the request says which are the rows
        return found

    def outline(self, value: Tensor) -> Tensor:
        """The values as the edits and recordings see them."""
        return value if self._attention else self.read(value)

    def read(self, value: Tensor) -> Tensor:
        """[rows, tokens, features] of the port, in the value's memory where that can be."""
        x = self._view.read(value)
        return x if self._whole else read_channels(x, self._tap)

    def back(self, y: Tensor, value: Tensor) -> Tensor:
        """`value` with the port's values replaced by `y`."""
        if not self._whole:
            y = write_channels(self._view.read(value), self._tap, y)
        return self._view.back(y)


def read_site(site: Site, value: Tensor) -> Tensor:
    """[rows, tokens, features] of a value at a site outside a session, as `SiteView` reads it."""
    view = View(_axes(site, None, value, None, None), value.shape)
    return SiteView(site, view, None).read(value)


def _axes(
    site: Site,
    now: CallContext | None,
    value: Tensor,
    layout: str | None,
    given: Any,
) -> Axes:
    if layout is not None:
        named = tuple(layout.split())
        if len(named) != value.dim():
            raise InvalidInput(
                f"{site.name}: the layout {layout!r} names {len(named)} dimensions, its values are "
                f"{list(value.shape)}"
            )
        return named
    if site.tap.axes is not None and len(site.tap.axes) == value.dim():
        return site.tap.axes
    module = site.tap.module
    tokens = None if now is None else now.tokens
    known = isinstance(tokens, TokenLayout)
    lengths, batch = tokens.lengths if known else (), None if now is None else now.batch
    rows = tokens.rows if known else batch
    turned = _is_turned(value, given, module) if value.dim() == 4 else None
    turning = None if now is None else now.turning
    found = axes_of(value.shape, module, site.around, lengths, turned, rows, turning)
    if found is None:
        raise InvalidInput(describe_open(site.name, module, value.shape, site.around))
    return found


def _is_turned(value: Tensor, given: Any, module: nn.Module) -> bool | None:
    """Whether the second of the two middle dimensions is the outer one in memory; None if unknown.

    What a norm of transformers gets in the order of memory comes from a projection as it is.
    """
    leaf = next(module.children(), None) is None
    from_given = leaf and isinstance(given, Tensor) and given.shape == value.shape
    seen = given if from_given else value
    if seen.stride(1) < seen.stride(2):
        return True
    place = getattr(type(module).forward, "__module__", "")
    own = place.startswith("transformers.") or isinstance(module, nn.LayerNorm | nn.RMSNorm)
    is_norm = own and "norm" in type(module).__name__.lower()
    return False if from_given and is_norm else None


def _map(
    site: Site, now: CallContext, value: Tensor, view: View, x: Tensor, given: Any
) -> TokenMap | ClockUnknown | None:
    if not isinstance(now.tokens, TokenLayout):
        return now.tokens
    layout = now.tokens
    if value.dim() == 2 and view.flat is None:
        if value.shape[0] == layout.rows == layout.length > 1:
            return ClockUnknown(
                f"{site.name}: its {layout.rows} entries may be rows or tokens, there are as many"
            )
        return layout.map_of(x.shape[0], None, site.name, None)
    if value.dim() == 3 and (why := _without_rows(site)) is not None:
        return RowsUnknown(f"{site.name}: {why}", layout.rows)
    both = site.port == "probs" and layout.encoder is not None  # queries or keys
    reads = None if both else _reads_encoder(site, given, now)
    if layout.encoder is None and reads is not False and x.shape[1] == layout.length:
        return PaddingUnknown(
            f"{site.name}: its {x.shape[1]} tokens may be those of the encoder or of the decoder"
        )
    return layout.map_of(x.shape[0], x.shape[1], site.name, reads)


def _without_rows(site: Site) -> str | None:
    """Why three dimensions at a site are no [rows, tokens, features], whatever their sizes."""
    holders = [type(each).__name__ for each in site.around]
    if any(name.endswith("Experts") for name in holders):
        return "inside experts, tokens of all rows are sorted by expert"
    if isinstance(site.tap.module, nn.Embedding) and any("Attention" in each for each in holders):
        return "an embedding inside attention is of pairs of tokens"
    owner = next((each for each in site.around if is_model(type(each))), None)
    if owner is not None and any(_reads_no_tokens(type(each)) for each in owner.children()):
        return f"{type(owner).__name__} has it beside a model that reads no tokens"
    return None


@cache
def _reads_no_tokens(kind: type) -> bool:
    """Whether a class is a model of pictures or sound."""
    names = names_of(kind.forward)[1:] if is_model(kind) else []
    return bool(names) and not any(name.endswith(("input_ids", "inputs_embeds")) for name in names)


def _is_routed(site: Site) -> bool:
    """Whether a module inside a mixture of experts gets its tokens in the order of the experts."""
    names = site.path.split(".")
    for depth, module in enumerate(site.around):
        routes = any(
            name in ("gate", "router") or type(each).__name__.endswith(_ROUTING)
            for name, each in module.named_children()
        )
        if routes:  # `depth` modules stand between the two
            return depth > 0 or names[-1] not in _UNSORTED
    return False


_ROUTING = ("Experts", "Router", "Gating")
_UNSORTED = {"gate", "router", "experts", "shared_expert", "shared_experts", "shared_expert_gate"}
_UNSORTED |= {"shared_mlp"}


def _reads_encoder(site: Site, given: Any, now: CallContext) -> bool | None:
    """Whether a module works on the encoder's states; None where that is unknown."""
    states = now.encoder_states
    if isinstance(given, Tensor) and states is not None and given.shape == states.shape:
        if given.data_ptr() == states.data_ptr():
            return True
    part = _part_of(site, now)
    if part != "decoder":
        return True if part == "encoder" else None
    crossing = _CROSSING.search(site.path)
    if crossing is None or _FROM_DECODER.fullmatch(site.path[crossing.end() :]):
        return False
    return None


def _part_of(site: Site, now: CallContext) -> str | None:
    """`encoder` or `decoder`: whose tokens a module has; None where it stands between the two."""
    module = site.tap.module
    root: Any = site.around[-1] if site.around else module
    if now.component == "encoder" or not is_encoder_decoder(root):
        return "decoder"  # or there is one kind of tokens only
    named = next((each for each in site.path.split(".") if each in ("encoder", "decoder")), None)
    if named is not None:
        return named
    head = innermost(root).get_output_embeddings()  # pyright: ignore[reportCallIssue]
    if module is head or isinstance(module, nn.Embedding):
        return "decoder"
    inside = (name.rpartition(".")[2] for name, _ in module.named_modules())
    return "decoder" if "decoder" in inside else None


_CROSSING = re.compile(r"(enc_?dec|cross)\w*att\w*|encoder_attn\w*", re.IGNORECASE)
_FROM_DECODER = re.compile(
    r"(\.self)?(\.(q|o|q_proj|o_proj|out_proj|query))?|\.output(\.\w+)?", re.IGNORECASE
)
