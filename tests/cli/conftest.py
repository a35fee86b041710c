import pytest
from tiny.embedded import untrained


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> str:
    """A pipeline of the embedded kind with random weights, as diffusers writes it."""
    path = tmp_path_factory.mktemp("models") / "untrained"
    untrained().save_pretrained(path)
    return str(path)
