"""What trained adapters and probes are, for the terminal."""

from pathlib import Path
from typing import TYPE_CHECKING

from dreamreader.errors import InvalidInput

if TYPE_CHECKING:
    from dreamreader.probes import Probe
    from dreamreader.reft import Reft


def show_adapter_file(file: Path) -> None:
    """Prints what the adapters of a file, or of the folder of a training, are."""
    from dreamreader.reft import Reft
    from dreamreader.training.folder import ADAPTER

    show_adapter(Reft.load(file / ADAPTER if file.is_dir() else file))


def show_adapter(reft: "Reft") -> None:
    """Prints the sites, shapes and parameters of trained adapters."""
    from dreamreader.cli.console import console, table

    listed = table("site", "width", "rank", "parameters", right=("width", "rank", "parameters"))
    for site, adapter in reft.adapters.items():
        count = sum(each.numel() for each in adapter.parameters())
        listed.add_row(site, str(adapter.width), str(adapter.rank), f"{count:,}")
    console().print(listed)
    steps = "the same at all steps" if reft.steps is None else f"one for each of {reft.steps} steps"
    tokens = "all tokens" if reft.tokens is None else f"tokens {reft.tokens}"
    console().print(f"{reft.variant}, {steps}, {tokens}")
    reft.print_trainable_parameters()


def show_probe_file(file: Path) -> None:
    """Prints the card of a probe in a file."""
    from dreamreader.probes import Probe

    if not file.is_file():
        raise InvalidInput(f"{file}: no such file; probes are in the folder probes of a training")
    show_probe(Probe.load(file))


def show_probe(probe: "Probe") -> None:
    """Prints the card of a probe: what it was trained on, what it and its controls reach."""
    from dreamreader.cli.console import console, table

    card = probe.card
    facts = table("", "")
    for name, value in card.facts():
        facts.add_row(name, value)
    facts.show_header = False
    console().print(facts)
    head, lines = card.table()
    listed = table(*head, right=tuple(head[2:]))
    for line in lines:
        listed.add_row(*line)
    console().print(listed)
