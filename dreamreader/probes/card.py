"""Probe cards: what a probe was trained on, how it was measured, and what its controls reach."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dreamreader.report.page import Section


@dataclass(frozen=True)
class Card:
    """What is known of a probe; plain values, as JSON has them.

    Attributes:
        subject: the model whose activations it reads. site, branch, steps, pool: which of them.
        task: `classify`, `multilabel` or `regress`. classes: names of its outputs by attribute.
        per_step: `each`, `shared` or `noise`.
        rows, groups: how many trained it, validated it, and were held out.
        counts: rows to train on by label.
        class_weights: of each label in the loss.
        training: loss, hidden widths, activation, epochs, learning rate, batch size, seed, holdout.
        epochs: the epoch whose state was kept, for each step.
        held_out: by attribute, see `scores`.
        controls: `shuffled_labels`, `random_feature`, `capacity_sweep`, see `controls`.
    """

    subject: str | None
    site: str | None
    branch: str | None
    steps: list[int]
    pool: str
    task: str
    classes: dict[str, list[str]]
    per_step: str
    rows: dict[str, int]
    groups: dict[str, int]
    counts: dict[str, int]
    class_weights: dict[str, float]
    training: dict[str, Any]
    epochs: list[int]
    held_out: dict[str, Any]
    controls: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "Card":
        """The card that `as_dict` described."""
        return cls(**content)

    def facts(self) -> list[tuple[str, str]]:
        """What it was trained on, line by line."""
        hidden = self.training["hidden"]
        shape = " and ".join(map(str, hidden)) + " hidden units" if hidden else "linear"
        steps = f"{self.steps[0]} to {self.steps[-1]}" if self.steps else "none"
        return [
            ("subject", self.subject or "not given"),
            ("site", self.site or "not given"),
            ("branch", self.branch or "not given"),
            ("steps", f"{steps} ({len(self.steps)}), {self.per_step}" if self.steps else steps),
            ("rows", ", ".join(f"{name} {n}" for name, n in self.rows.items())),
            ("groups", ", ".join(f"{name} {n}" for name, n in self.groups.items())),
            ("labels", ", ".join(f"{name} {n}" for name, n in self.counts.items())),
            ("probe", f"{shape}, {self.training['loss']}, tokens: {self.pool}"),
        ]

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and lines: what was measured of the probe and of its controls, by attribute."""
        if self.task == "regress":
            return self._numbers()
        head = ["attribute", "probe", "accuracy (95 %)", "AUROC", "ECE", "after temperature"]
        lines = []
        for attribute, own in self.held_out.items():
            name = attribute or "-"
            before, after = own["ece"]
            lines.append(
                [name, "probe", _percent(own["accuracy"]), _number(own["auroc"])]
                + [f"{before:.3f}", f"{after:.3f}"]
            )
            for control, found in self._each_control():
                each = found[attribute]
                lines.append([name, control, _percent(each["accuracy"]), _number(each["auroc"])])
                lines[-1] += ["", ""]
        return head, lines

    def markdown(self) -> str:
        """The card as Markdown."""
        head, lines = self.table()
        facts = [f"- {name}: {value}" for name, value in self.facts()]
        rows = ["| " + " | ".join(each) + " |" for each in [head, ["---"] * len(head), *lines]]
        return "\n".join([f"### Probe of {self.site or 'activations'}", "", *facts, "", *rows])

    def section(self) -> "Section":
        """The card as a part of a report."""
        from dreamreader.report.blocks import Facts, Table
        from dreamreader.report.page import Section

        head, lines = self.table()
        blocks = [Facts(self.facts()), Table(head, lines)]
        return Section(f"Probe of {self.site or 'activations'}", blocks)

    def _numbers(self) -> tuple[list[str], list[list[str]]]:
        lines = []
        each = [("probe", self.held_out), *self._each_control()]
        for name, found in each:
            own = found[""]
            for output, r2 in own["r2"].items():
                lines.append([output, name, _number(r2), f"{own['rmse'][output]:.4g}"])
        return ["output", "probe", "R2", "RMSE"], lines

    def _each_control(self) -> list[tuple[str, Mapping[str, Any]]]:
        found = [
            (name.replace("_", " "), value)
            for name, value in self.controls.items()
            if name != "capacity_sweep"
        ]
        own = str((self.training["hidden"] or [0])[0])
        for width, value in self.controls.get("capacity_sweep", {}).items():
            if width != own:
                found.append(("linear" if width == "0" else f"{width} hidden units", value))
        return found


def _percent(interval: Mapping[str, Any]) -> str:
    value, low, high = (100 * interval[name] for name in ("value", "low", "high"))
    return f"{value:.0f} % ({low:.0f} to {high:.0f})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
