"""What the reports of trainings share."""

from collections.abc import Sequence

POINTS = 24  # of a curve


def thin_curve(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means of equal windows, with the number of the last value of each."""
    count = min(POINTS, len(values))
    ends = [round((n + 1) * len(values) / count) for n in range(count)]
    starts = [0, *ends[:-1]]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(starts, ends, strict=True)]
    return [float(end) for end in ends], means
