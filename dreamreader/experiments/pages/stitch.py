"""What stitched runs keep of the subject's own success: beside controls, over data and strength."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dreamreader.experiments.pages.base import MethodPage, curves, interval_number
from dreamreader.experiments.results import Found, format_interval
from dreamreader.metrics.next_token_kl import NextTokenKl
from dreamreader.report import Number, Section, Table
from dreamreader.stats import Interval, ratio_of_means

CONTROLS = ("mean_ablated", "random_map")
SETTING = ("map", "fit_prompts", "strength")
DESTROYED = 0.25  # share of native that a mean may leave: above it a site proves little


class StitchPage(MethodPage):
    """The best map of each pair beside its controls, every setting, and scores before stitching."""

    @property
    def effect(self) -> str:
        """The column that success is read from."""
        return self.results.effect_column(self.method.effect, "stitched", "unedited")

    @property
    def cells(self) -> list[str]:
        """Pairs in the order of the spec."""
        return list(dict.fromkeys(row["cell"] for row in self.results.of("stitched")))

    @property
    def is_distance(self) -> bool:
        """Whether the effect is how far the subject is from itself, 0 without a stitch."""
        return self.effect == NextTokenKl.name

    @property
    def _whole(self) -> str:
        """What a share is of, in words."""
        return "recovered of the mean's" if self.is_distance else "of native"

    def share(self, condition: str, **where: Any) -> Interval | None:
        """How much of what the subject has without a stitch is left, with an interval over prompts.

        Formula: sum(effect) / sum(effect of unedited rows); of a distance, 1 - sum(effect) /
            sum(effect of the site's mean).
        """
        rows = self.results.of(condition, **where)
        if not rows:
            return None
        if self.is_distance:
            means = self.results.of("mean_ablated", cell=rows[0]["cell"])
            return _recovered(rows, means, self.effect)
        native = {row["row"]: row for row in self.results.of("unedited")}
        return _share(rows, native, self.effect)

    def best(self, cell: str) -> dict[str, Any]:
        """The setting of a pair that keeps most, at strength 1 or what is nearest to it.

        A weak stitch leaves the subject's own, which says nothing of the map.
        """
        settings = self.settings(cell)
        nearest = min((each[2] for each in settings), key=lambda strength: abs(strength - 1))
        shares = {
            setting: self.share("stitched", cell=cell, **dict(zip(SETTING, setting, strict=True)))
            for setting in settings
            if setting[2] == nearest
        }
        chosen = max(shares, key=lambda each: getattr(shares[each], "value", 0.0))
        return {"cell": cell, **dict(zip(SETTING, chosen, strict=True))}

    def numbers(self) -> list[Number]:
        found = []
        for cell in self._telling()[:4]:
            at = self.best(cell)
            share = self.share("stitched", **at)
            if share is not None:
                found.append(interval_number(share, self._whole, f"{cell}{_strength(at)}"))
        return found

    def pictured_setting(self) -> Mapping[str, Any]:
        return self.best(self._telling()[0])

    def _telling(self) -> list[str]:
        """Pairs by what their best map keeps; last those that a mean does not destroy."""

        def rank(cell: str) -> tuple[bool, float]:
            mean = self.share("mean_ablated", cell=cell)
            stitched = self.share("stitched", **self.best(cell))
            return mean is None or mean.value <= DESTROYED, getattr(stitched, "value", 0.0)

        return sorted(self.cells, key=rank, reverse=True)

    def sections(self) -> list[Section]:
        lead = (
            f"Share of the unedited {self.effect} that is left, with 95 % intervals over prompts. "
            f"Where the mean leaves more than {DESTROYED:.0%}, the site carries little and proves "
            "little."
        )
        if self.is_distance:
            lead = (
                f"Share of the {self.effect} of the site's mean that is taken away, with 95 % "
                "intervals over prompts: 0 is no better than the mean, 1 the subject itself."
            )
        return [
            Section("Pairs", [self._pairs()], lead),
            *self._curves(),
            Section("Every map", [self._every()], "FVU, R2 and CKA on held-out prompts."),
        ]

    def summary(self) -> list[str]:
        told = []
        for cell in self.cells:
            at = self.best(cell)
            parts = [f"{at['map']}{_strength(at)} {_shown(self.share('stitched', **at))}"]
            parts += [f"{name.replace('_', ' ')} {_shown(self.share(name, cell=cell))}"
                      for name in CONTROLS if self.results.of(name)]  # fmt: skip
            told.append(f"  {cell}: {self._whole} {self.effect}: {', '.join(parts)}")
        return told

    def settings(self, cell: str) -> list[tuple[Any, ...]]:
        """Map, prompts and strength of all that was stitched at a pair."""
        rows = self.results.of("stitched", cell=cell)
        return list(dict.fromkeys(tuple(row[name] for name in SETTING) for row in rows))

    def _pairs(self) -> Table:
        rows = []
        for cell in self.cells:
            at = self.best(cell)
            controls = [_shown(self.share(name, cell=cell)) for name in CONTROLS]
            where = f"{at['map']}, {at['fit_prompts']} prompts"
            rows.append(
                (cell, where + _strength(at), _shown(self.share("stitched", **at)), *controls)
            )
        return Table(("pair", "best map", "stitched", "mean ablated", "random map"), rows)

    def _curves(self) -> list[Section]:
        found = []
        for axis, title in (("fit_prompts", "Amount of data"), ("strength", "Strength")):
            values = {row[axis] for row in self.results.of("stitched")}
            if len(values) < 2:
                continue
            for cell in self.cells:
                best = self.best(cell)
                other = "strength" if axis == "fit_prompts" else "fit_prompts"
                lines = {
                    own.label: self.results.of(
                        "stitched", cell=cell, map=own.label, **{other: best[other]}
                    )
                    for own in self.method.maps
                }
                found.append(Section(f"{title}, {cell}", [curves(self.results, axis, lines)]))
        return found

    def _every(self) -> Table:
        scores = self.scores()
        rows = []
        for cell in self.cells:
            for own, amount, strength in self.settings(cell):
                at = {"cell": cell, "map": own, "fit_prompts": amount, "strength": strength}
                mean = self.results.mean("stitched", self.effect, **at)
                found = scores.get((cell, own, amount), {})
                shown = [_number(found.get(name)) for name in ("fvu", "r2", "cka")]
                share = _shown(self.share("stitched", **at))
                rows.append((cell, own, amount, strength, share, format_interval(mean), *shown))
        heads = ("pair", "map", "prompts", "strength", self._whole, self.effect, "FVU", "R2", "CKA")
        return Table(heads, rows)

    def scores(self) -> dict[tuple[str, str, int], Mapping[str, Any]]:
        """What maps reached on held-out prompts, by pair, map and number of prompts."""
        from dreamreader.experiments.methods.stitch_maps import MapKey

        found = {}
        for pair in self.method.sites:
            for row in self.results.of("stitched", cell=pair.label):
                name = pair.label, row["map"], row["fit_prompts"]
                if name not in found:
                    file = MapKey(pair, row["map"], row["fit_prompts"]).file
                    read = self.results.folder.read(f"artifacts/{file}.json") or {}
                    found[name] = read.get("scores", {})
        return found


def _share(rows: Sequence[Found], native: Mapping[int, Found], name: str) -> Interval:
    """Of sums over prompts: rows of one prompt are drawn together."""
    over: dict[str, float] = {}
    under: dict[str, float] = {}
    for row in rows:
        item = row["item"]
        over[item] = over.get(item, 0.0) + float(row[name] or 0.0)
        under[item] = under.get(item, 0.0) + float(native[row["base"]][name] or 0.0)
    counts = all(isinstance(row[name], bool | None) for row in rows)
    return ratio_of_means(np.array([list(over.values())]), list(under.values()), within=counts)[0]


def _recovered(rows: Sequence[Found], means: Sequence[Found], name: str) -> Interval:
    """Of sums over prompts: what rows have less than those of the mean."""
    under = {(row["item"], row["seed"]): float(row[name]) for row in means}
    over: dict[str, float] = {}
    whole: dict[str, float] = {}
    for row in rows:
        item, mean = row["item"], under[row["item"], row["seed"]]
        over[item] = over.get(item, 0.0) + mean - float(row[name])
        whole[item] = whole.get(item, 0.0) + mean
    return ratio_of_means(np.array([list(over.values())]), list(whole.values()))[0]


def _shown(share: Interval | None) -> str:
    return "–" if share is None else format_interval(share)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _strength(setting: Mapping[str, Any]) -> str:
    """The strength of a setting, where it is not that of a whole stitch."""
    return "" if setting["strength"] == 1 else f", strength {setting['strength']:g}"
