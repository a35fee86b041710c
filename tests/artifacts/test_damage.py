"""Files of every kind with one damage each: refused by name, or the thing is the right one."""

import random
from pathlib import Path

import pytest

from dreamreader.artifacts import load
from dreamreader.errors import InvalidInput
from tests.artifacts.things import THINGS, written
from tests.jobs.test_damage import _damage


@pytest.mark.parametrize("kind", THINGS)
def test_a_damaged_file(kind: str, tmp_path: Path) -> None:
    thing, path = THINGS[kind](), tmp_path / "thing.safetensors"
    thing.save(path)
    whole, expected = path.read_bytes(), written(thing)
    rng, refused = random.Random(0), 0
    for number in range(120):
        path.write_bytes(whole)
        what = _damage(path, rng)
        try:
            found = load(path) if number % 2 else type(thing).load(path)
        except InvalidInput as error:
            refused += 1
            assert "thing.safetensors" in str(error), what
        else:
            assert written(found) == expected, what  # two equal bytes changed places
    assert refused > 110
