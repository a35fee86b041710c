"""Reft: the adapters of several sites, and the edits that they make."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from dreamreader.artifacts import Artifact
from dreamreader.edits import LoReFT
from dreamreader.engine import Reader, join, parse
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.reft.adapter import Adapter
from dreamreader.reft.widths import widths_of


class Reft(nn.Module, Artifact, kind="reft"):
    """Learned edits of several sites, trained together.

    Args:
        widths: features of each site, by its name.
        rank: of all adapters, or by site.
        variant: `loreft`, `direft`, `noreft`, `diagonal` or `bias`.
        steps: number of denoising steps that have an adapter each; None: one for all.
        tokens: which tokens are edited, in training and after; see `Request`.
        init: `identity` (bit-equal to no edit), `pyreft` or `zero`.
        seed: of the first values. device: of the parameters.

    Raises:
        InvalidInput: there are no sites, or a rank is above a width.
        UnknownName: there is no such variant or initialisation, or no rank for a site.

    Example:
        >>> reft = Reft({"unet.mid_block": 1280}, rank=32)
        >>> reft.print_trainable_parameters()
        trainable params: 81,952
    """

    def __init__(
        self,
        widths: Mapping[str, int],
        rank: int | Mapping[str, int] = 8,
        variant: str = "loreft",
        *,
        steps: int | None = None,
        tokens: Any = None,
        init: str = "identity",
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        if not widths:
            raise InvalidInput("Reft: there are no sites")
        ranks = (
            {_name_sites(site): each for site, each in rank.items()}
            if isinstance(rank, Mapping)
            else {}
        )
        generator = torch.Generator().manual_seed(seed)
        self.tokens = tokens
        self.variant = variant
        self.steps = steps
        self.of = 0
        self._adapters = nn.ModuleList()
        for site, width in widths.items():
            name = _name_sites(site)
            if ranks and name not in ranks:
                raise UnknownName("rank for site", name, ranks)
            one: Any = ranks[name] if ranks else rank
            options: Any = {"steps": steps, "init": init, "generator": generator, "device": device}
            self._adapters.append(Adapter(name, width, one, variant, **options))

    @classmethod
    def for_sites(
        cls,
        reader: Reader,
        sites: str | Sequence[str],
        rank: int | Mapping[str, int] = 8,
        variant: str = "loreft",
        *,
        per_step: int | None = None,
        tokens: Any = None,
        init: str = "identity",
        seed: int = 0,
        **arguments: Any,
    ) -> Self:
        """Adapters for sites of a model, with the widths and the device that the model has there.

        Args:
            reader: of the model.
            sites: site strings; patterns stand for all that they match.
            per_step: number of denoising steps that have an adapter each.
            arguments: of the short run that tells the widths where none has yet.

        Raises:
            UnknownName, NeverFired: a site is not there, or never runs.
        """
        widths, device = widths_of(reader, sites, arguments)
        made = cls(
            widths,
            rank,
            variant,
            steps=per_step,
            tokens=tokens,
            init=init,
            seed=seed,
            device=device,
        )
        components = reader.components.values()
        made.of = sum(each.numel() for part in components for each in part.parameters())
        return made

    @property
    def adapters(self) -> dict[str, Adapter]:
        """The adapters by site."""
        return {each.site: each for each in self._adapters}  # pyright: ignore

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self.adapters)

    def edits(
        self,
        alpha: float | Sequence[float] | Tensor = 1.0,
        *,
        branch: str | Sequence[str] | None = None,
        steps: Any = None,
        rows: Any = None,
        tokens: Any = None,
        at: Sequence[int] | None = None,
        graph: bool = False,
    ) -> list[LoReFT]:
        """The edits that these adapters make, one for each site.

        Args:
            alpha: strength, one number or one for each row.
            branch, steps, rows: as in `Request`.
            tokens: other tokens than those of the training.
            at: the step whose adapter each row takes, instead of the running step.
            graph: keep the graph to the parameters, for a training loop of your own: the tables
                are those of now, so make the edits anew after a step of the optimiser.

        Raises:
            InvalidInput: `at` without adapters for each step.
        """
        if at is not None and self.steps is None:
            raise InvalidInput("Reft: at is for adapters of each step, these are the same at all")
        chosen = self.tokens if tokens is None else tokens
        common: Any = {"branch": branch, "steps": steps, "rows": rows, "tokens": chosen}
        common |= {"variant": self.variant, "adapter": None if at is None else list(at)}
        made = []
        for site, adapter in self.adapters.items():
            with torch.set_grad_enabled(graph):
                tables = adapter.tables()
            down, bias, up = tables if self.steps is not None else (each[0] for each in tables)
            made.append(LoReFT(site, down, bias, up, alpha, **common))
        return made

    def print_trainable_parameters(self) -> None:
        """Prints how many numbers are trained, and their share of the model's where it is known."""
        count = sum(each.numel() for each in self.parameters())
        said = f"trainable params: {count:,}"
        if self.of:
            said += f" || all params: {self.of:,} || trainable%: {100 * count / self.of:.4f}"
        print(said)

    def to_file(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Parameters as tensors `<number of the site>.<name>`, sites and shapes as plain values.

        Raises:
            InvalidInput: the tokens are no numbers, slice or word.
        """
        adapters = list(self.adapters.values())
        content = {
            "variant": self.variant,
            "steps": self.steps,
            "tokens": _pack_tokens(self.tokens),
            "model_parameters": self.of,
            "sites": [{"site": a.site, "width": a.width, "rank": a.rank} for a in adapters],
        }
        tensors: dict[str, Tensor] = {
            f"{number}.{name}": value
            for number, adapter in enumerate(adapters)
            for name, value in adapter.named_parameters()
        }
        return tensors, content

    @classmethod
    def of_file(cls, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> Self:
        sites = content["sites"]
        largest = max(each.numel() for each in tensors.values())
        for each in sites:  # before parameters of these sizes are made
            sizes = (content["steps"] or 1, each["rank"], each["width"])
            if min(sizes) < 1 or math.prod(sizes) > largest:
                raise InvalidInput(
                    f"{each['site']}: steps, rank and width {sizes} do not fit the tensors, the "
                    f"largest of which has {largest} values"
                )
        reft = cls(
            {each["site"]: each["width"] for each in sites},
            {each["site"]: each["rank"] for each in sites},
            content["variant"],
            steps=content["steps"],
            tokens=_unpack_tokens(content["tokens"]),
        )
        reft.of = content["model_parameters"]
        for number, adapter in enumerate(reft.adapters.values()):
            for name, value in adapter.named_parameters():
                stored = tensors[f"{number}.{name}"]
                if stored.shape != value.shape or stored.dtype != value.dtype:
                    raise InvalidInput(
                        f"{name} of {adapter.site} must be {list(value.shape)} {value.dtype}, got "
                        f"{list(stored.shape)} {stored.dtype}"
                    )
                with torch.no_grad():
                    value.copy_(stored)
        return reft

    def check(self, reader: Reader) -> None:
        """Refuse a model that has other sites, or other widths there, as far as these are known.

        Raises:
            UnknownName: a site is not there.
            InvalidInput: a width differs.
        """
        for site, adapter in self.adapters.items():
            reader.sites(site)
            shape = reader.shape_of(site)
            if shape is not None and shape[-1] != adapter.width:
                raise InvalidInput(
                    f"{site}: the adapter is for width {adapter.width}, the site has {shape[-1]}"
                )


def _pack_tokens(tokens: object) -> object:
    """JSON of a selection of tokens."""
    if tokens is None or isinstance(tokens, int | str):
        return tokens
    if isinstance(tokens, slice):
        return {"slice": [tokens.start, tokens.stop, tokens.step]}
    if isinstance(tokens, list | tuple | range) and all(isinstance(each, int) for each in tokens):
        return list(tokens)
    raise InvalidInput(f"tokens={tokens!r} cannot be saved; give numbers, a slice or a word")


def _unpack_tokens(tokens: object) -> object:
    return slice(*tokens["slice"]) if isinstance(tokens, dict) else tokens


def _name_sites(site: str) -> str:
    pattern = parse(site)
    return join(pattern.path, pattern.port, pattern.stream)
