"""Metrics by name: built in, registered in Python, or of installed packages.

A spec can only name a metric and give it options; code comes from Python or from a package.
"""

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module, metadata
from typing import Any

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.metrics.base import FIELDS, Metric
from dreamreader.metrics.own import FunctionMetric

Factory = Callable[..., Metric]
GROUP = "dreamreader.metrics"

_BUILT_IN = {
    "clip_score": "ClipScore",
    "detector": "Detector",
    "latent_distance": "LatentDistance",
    "logit_difference": "LogitDifference",
    "lpips": "Lpips",
    "matches": "Matches",
    "next_token_kl": "NextTokenKl",
    "noise_distance": "NoiseDistance",
    "perplexity": "Perplexity",
    "pixel_distance": "PixelDistance",
    "probability": "Probability",
    "scene": "SceneRight",
    "shape_margin": "ShapeMargin",
    "tint": "Tint",
}
_OWN: dict[str, Factory] = {}


def register(
    name: str,
    factory: Callable[..., Any],
    *,
    needs: str | frozenset[str] | set[str] | None = None,
    compares: bool = False,
) -> None:
    """Make a metric known by name, for this process.

    Args:
        name: as specs will say it. Registering it again replaces it.
        factory: called with the options of the spec, gives a `Metric`; or, with `needs`, the
            measuring function itself: `fn(got)`, or `fn(got, reference)` where it compares, gives
            one value for each row, or a mapping from columns to these.
        needs: fields of the outputs that the function reads, such as "images".
        compares: whether the function is given the reference too.

    Raises:
        InvalidInput: the name is that of a built-in metric, or the factory cannot be called.
        UnknownName: outputs have no such field.

    Example:
        >>> register("brightness", lambda got: got.images.mean((1, 2, 3)).tolist(), needs="images")
        >>> build("brightness").needs
        frozenset({'images'})
    """
    if name in _BUILT_IN:
        raise InvalidInput(f"metric {name!r} is built in; choose another name")
    if not callable(factory):
        raise InvalidInput(f"metric {name!r}: the factory is {type(factory).__name__}, no function")
    if needs is None:
        _OWN[name] = factory
        return
    fields = frozenset({needs} if isinstance(needs, str) else needs)
    for each in fields:
        if each not in FIELDS:
            raise UnknownName("field of outputs", each, FIELDS)
    _OWN[name] = lambda: FunctionMetric(name, factory, fields, compares)


def names() -> list[str]:
    """All metrics that `build` knows, in order."""
    return sorted({*_BUILT_IN, *_OWN, *_is_installed()})


def build(spec: str | Mapping[str, Any]) -> Metric:
    """The metric that a spec names.

    Args:
        spec: a name, or {name: {option: value}}.

    Raises:
        UnknownName: there is no such metric or option; says the nearest.
        InvalidInput: the spec has another form, an option is missing or cannot be right.

    Example:
        >>> build({"noise_distance": {"steps": [0, 1]}}).needs
        frozenset({'noise'})
    """
    name, options = _parse(spec)
    factory = _factory(name)
    known = inspect.signature(factory).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in known.values())
    for each in options:
        if each not in known and not takes_any:
            hint = "" if known else "It takes none."
            raise UnknownName(f"option of metric {name}", each, known, hint)
    missing = [
        each.name
        for each in known.values()
        if each.default is each.empty
        and each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)
        and each.name not in options
    ]
    if missing:
        raise InvalidInput(f"metric {name} needs the option {', '.join(missing)}")
    metric = factory(**options)
    for each in ("name", "needs", "compares", "measure"):
        if not hasattr(metric, each):
            raise InvalidInput(
                f"metric {name}: its factory gave {type(metric).__name__} without {each}; a "
                "measuring function is registered with needs="
            )
    return metric


def numbers_of(metric: Metric) -> tuple[str, ...] | None:
    """Columns of numbers or truth values that a metric can give; None where only a run tells.

    A metric that gives other columns than one of its own name says them as `numbers`.
    """
    if hasattr(metric, "numbers"):
        return metric.numbers  # pyright: ignore[reportAttributeAccessIssue]
    return (metric.name,) if metric.name in _BUILT_IN else None


def _parse(spec: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping) and len(spec) == 1:
        (name, options), *_ = spec.items()
        if isinstance(name, str) and (options is None or isinstance(options, Mapping)):
            return name, {str(key): value for key, value in (options or {}).items()}
    raise InvalidInput(f"a metric is a name, or {{name: {{option: value}}}}, got {spec!r}")


def _factory(name: str) -> Factory:
    if name in _BUILT_IN:
        return getattr(import_module(f"dreamreader.metrics.{name}"), _BUILT_IN[name])
    if name in _OWN:
        return _OWN[name]
    installed = _is_installed()
    if name in installed:
        return installed[name].load()
    raise UnknownName("metric", name, names())


def _is_installed() -> dict[str, metadata.EntryPoint]:
    return {each.name: each for each in metadata.entry_points(group=GROUP)}
