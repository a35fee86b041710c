"""Artifacts through the hub's own client, against a server on this machine."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dreamreader.artifacts import load
from dreamreader.artifacts.hub import model_card
from tests.artifacts.hub_server import hub
from tests.artifacts.things import THINGS, directions, reft

ROOT = Path(__file__).parents[2]
START = """
import sys
import dreamreader as dr
from dreamreader.errors import InvalidInput
from tests.artifacts.things import directions, reft, written

def failed(call, *arguments, **options):
    try:
        call(*arguments, **options)
    except InvalidInput as error:
        print(error)
    else:
        print("nothing was raised")
"""


def run(address: str, home: Path, script: str, **more: str) -> list[str]:
    """Lines that a script prints in a process whose hub is at an address."""
    own = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "t"}
    own |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **more}
    options: Any = {"capture_output": True, "text": True, "cwd": ROOT, "env": {**os.environ, **own}}
    done = subprocess.run([sys.executable, "-c", START + script], **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_is_pushed_comes_back_through_the_checked_reader(tmp_path: Path) -> None:
    with hub() as (address, server):
        lines = run(
            address,
            tmp_path / "a",
            """
card = {"base_model": "owner/model", "fingerprint": "0f", "notes": "Seen."}
print(dr.push_to_hub(directions(), "me/colour", **card))
found = dr.from_hub("me/colour")
print(found == directions(), type(found).__name__)
print(dr.from_hub("me/colour", dr.steering.Directions, local_files_only=True) == directions())
failed(dr.from_hub, "me/colour", dr.reft.Reft)
failed(dr.from_hub, "me/colour", checksum="0" * 64)
failed(dr.from_hub, "me/missing")
failed(dr.from_hub, "me/colour", file="other.safetensors")
failed(dr.from_hub, "no such name!")
failed(dr.push_to_hub, reft(), "me/forbidden")
""",
        )
        assert lines[0] == f"{address}/me/colour/commit/{'a' * 40}"
        assert lines[1:3] == ["True Directions", "True"]
        assert "holds no reft of dreamreader; it holds directions" in lines[3]
        assert "artifact.safetensors of me/colour has checksum" in lines[4]
        assert lines[5].startswith("from_hub: me/missing: ") and "check the name" in lines[5]
        assert lines[6].startswith("from_hub: me/colour: ")
        assert lines[7].startswith("from_hub: no such name!: ")
        assert lines[8].startswith("push_to_hub: me/forbidden: ") and len(lines) == 9
        assert "POST /api/models/me/colour/commit/main" in server.seen
        assert sorted(server.files) == ["me/colour/README.md", "me/colour/artifact.safetensors"]

        (tmp_path / "file").write_bytes(server.files["me/colour/artifact.safetensors"])
        assert load(tmp_path / "file") == directions()
        card = server.files["me/colour/README.md"].decode()
        _, head, body = card.split("---\n", 2)
        assert yaml.safe_load(head) == {
            "library_name": "dreamreader",
            "tags": ["dreamreader", "directions"],
            "base_model": "owner/model",
        }
        for text in ("- kind: directions", "`unet.a`, `unet.b`", "model: 0f", "Seen.", "from_hub("):
            assert text in body

        whole = server.files["me/colour/artifact.safetensors"]
        server.files["me/colour/artifact.safetensors"] = whole[:-1] + bytes([whole[-1] ^ 1])
        (line,) = run(address, tmp_path / "b", 'failed(dr.from_hub, "me/colour")')
        assert "artifact.safetensors is damaged (it does not have its checksum)" in line
    again = """
import time
start = time.monotonic()
failed(dr.from_hub, "me/other")
print(time.monotonic() - start < 10, dr.from_hub("me/colour") == directions())
"""
    line, other = run(address, tmp_path / "a", again)  # nobody is there
    assert line.startswith(f"from_hub: me/other: the hub at {address} cannot be reached (")
    assert "was not downloaded before. Download" in line and "load_artifact(path)" in line
    assert other == "True True"
    (line,) = run(address, tmp_path / "c", 'failed(dr.from_hub, "me/colour")', HF_HUB_OFFLINE="1")
    assert line.startswith("from_hub: me/colour: HF_HUB_OFFLINE is set, and it was not downloaded")


@pytest.mark.parametrize("kind", THINGS)
def test_every_kind_has_a_card(kind: str) -> None:
    thing = THINGS[kind]()
    card = model_card(thing, "me/x", "0" * 64)
    assert f"- kind: {kind}\n" in card and f".{type(thing).__name__}\n" in card
    assert ("unet." in card) == (kind not in ("probe", "training"))
    assert list(reft().sites) == ["unet.a", "unet.b"]
