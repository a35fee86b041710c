"""Directions as an edit gives them, laid out over the features of its site."""

import re
from typing import Any

import pytest
import torch

from dreamreader.engine._call_context import CallContext
from dreamreader.engine._edit_context import EditContext
from dreamreader.engine._tokens import SiteTokens
from dreamreader.errors import ClockUnknown, InvalidInput

NOW = CallContext("model", "language", 0, ClockUnknown("no steps"), ("all",), 1)
TOKENS = SiteTokens("a.b:v", 4, 1, None, "text", None, NOW)


def place(**changes: Any) -> EditContext:
    """A site of six features in three heads."""
    fields: dict[str, Any] = {
        **{"site": "a.b:v", "width": 6, "heads": 3, "rows": 1, "total": 1, "first": 0},
        **{"branches": ("all",), "sequence": TOKENS, "instant": None},
        **{"device": torch.device("cpu"), "dtype": torch.float32},
    }
    return EditContext(**(fields | changes))


ONE, TWO = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])


@pytest.mark.parametrize(
    ("value", "heads", "expected"),
    [
        (torch.arange(6.0), None, [[0, 1, 2, 3, 4, 5]]),
        (torch.arange(12.0).view(2, 6), [1], [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]),
        (torch.arange(6.0).view(3, 2), None, [[0, 1, 2, 3, 4, 5]]),
        (ONE, [0, 2], [[1, 2, 0, 0, 1, 2]]),
        (TWO, [1], [[0, 0, 1, 2, 0, 0], [0, 0, 3, 4, 0, 0]]),
    ],
)
def test_vectors_of_the_site_and_of_its_heads(value: Any, heads: Any, expected: Any) -> None:
    assert place().vectors(value, heads, "direction").tolist() == expected


def test_values_by_head_need_no_heads_named() -> None:
    assert place(per_head=True).vectors(ONE, None, "direction").tolist() == [[1, 2, 1, 2, 1, 2]]


@pytest.mark.parametrize(
    ("value", "heads"),
    [
        (ONE, None),  # of one head, but of which?
        (torch.ones(4), [0, 1]),  # two heads behind each other
        (torch.ones(1, 1, 2), [0]),
        (torch.ones(1, 1, 6), None),
        (torch.ones(2, 3), None),
    ],
)
def test_vectors_of_another_form_are_refused(value: Any, heads: Any) -> None:
    has = "the site has 6 features (3 heads of 2), direction is"
    with pytest.raises(InvalidInput, match=re.escape(f"a.b:v: {has} {list(value.shape)}")):
        place().vectors(value, heads, "direction")


def test_a_site_without_heads_names_none() -> None:
    with pytest.raises(InvalidInput, match="the site has 6 features, direction is"):
        place(heads=None).vectors(torch.ones(2), None, "direction")
