"""Options of maps in specs."""

from typing import Annotated, Any

from pydantic import AfterValidator, ValidationInfo

from dreamreader.errors import UnknownName
from dreamreader.mapping.fit import check_options


def _check(value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
    method = info.data.get("method", info.data.get("map"))
    if method is not None:  # else that is what is wrong
        try:
            check_options(method, value)
        except UnknownName as error:  # which is no ValueError, as pydantic wants it
            raise ValueError(str(error)) from None
    return value


MapOptions = Annotated[dict[str, Any], AfterValidator(_check)]
"""Options of the field `method` or `map` before it, as `fit_map` takes them."""
