"""The content hash of a run: settings, subject, code, packages and seeds; not the machine."""

import dataclasses
import hashlib
import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dreamreader._hashing import bytes_of
from dreamreader.errors import InvalidInput
from dreamreader.jobs.subject import describe_subject, hash_weights

PACKAGES = (
    *("torch", "diffusers", "transformers", "tokenizers", "accelerate", "peft", "safetensors"),
    *("numpy", "pillow"),
)


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What a run's result depends on (hashed) and where it ran (beside it, not hashed)."""

    settings: Mapping[str, Any]
    weights: str
    subject: Mapping[str, str]
    code: str
    packages: Mapping[str, str]
    seeds: Sequence[int]
    machine: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def content(self) -> dict[str, Any]:
        """The hashed part as plain JSON values."""
        return {
            "settings": plain(self.settings),
            "weights": self.weights,
            "subject": dict(self.subject),
            "code": self.code,
            "packages": dict(sorted(self.packages.items())),
            "seeds": [int(seed) for seed in self.seeds],
        }

    @property
    def digest(self) -> str:
        """SHA-256 of the content as canonical JSON, 64 hexadecimal digits."""
        text = json.dumps(self.content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        return {"digest": self.digest, **self.content, "machine": dict(self.machine)}


def fingerprint(
    subject: Any, settings: Mapping[str, Any], seeds: Sequence[int], tokenizer: Any = None
) -> Fingerprint:
    """Takes the fingerprint of a run on `subject` with these resolved settings and seeds.

    Args:
        subject: diffusers pipeline, module, or anything `hash_weights` takes.
        settings: all that was chosen, defaults included; tensors enter by their hash.
        seeds: every seed used.
        tokenizer: that a language model was used with; those of a pipeline are its components.

    Returns:
        A fingerprint with this machine's facts beside the hash.

    Raises:
        InvalidInput: for a setting that has no canonical form, e.g. a function or a NaN.
    """
    return Fingerprint(
        settings=plain(settings),
        weights=hash_weights(subject),
        subject=describe_subject(subject, tokenizer),
        code=code_version(),
        packages=package_versions(),
        seeds=list(seeds),
        machine=machine_facts(),
    )


def fingerprint_of_rows(settings: Mapping[str, Any], seeds: Sequence[int] = ()) -> Fingerprint:
    """Takes the fingerprint of a job on rows that are there, of which no model is run.

    Args:
        settings: with what identifies the rows: the fingerprints of a store's harvests know the
            weights. seeds: every seed used.
    """
    return Fingerprint(
        settings, "", {}, code_version(), package_versions(), list(seeds), machine_facts()
    )


@cache
def code_version() -> str:
    """Version of the package and a hash of its files, e.g. `0.1.0+3f9c52d1a0b4`.

    The files are those in Python and the native module that is loaded, where there is one.
    """
    from dreamreader._register import native
    from dreamreader._version import __version__

    root = Path(__file__).parent.parent
    digest, module = hashlib.sha256(), native()[0]
    built = [] if module is None or module.__file__ is None else [Path(module.__file__)]
    for path in sorted([*root.rglob("*.py"), *built], key=lambda p: p.relative_to(root).as_posix()):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Installed versions of the packages that decide the numbers, Python's among them."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine_facts() -> dict[str, str]:
    """Where the run happens: processor, threads, system, accelerator."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "accelerator": accelerator,
    }


def plain(value: Any) -> Any:
    """The canonical JSON form of a setting: dataclasses, tensors and sets become plain values.

    Raises:
        InvalidInput: for a value without one, named with its place.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidInput(f"a setting is {value}; settings must be finite")
        return value
    if isinstance(value, (Tensor, np.ndarray)):
        tensor = torch.as_tensor(value)
        return {"tensor": hashlib.sha256(bytes_of(tensor)).hexdigest(), "shape": list(tensor.shape)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, (Sequence, range)):
        return [plain(item) for item in value]
    if isinstance(value, (np.generic,)):
        return plain(value.item())
    raise InvalidInput(f"a setting of type {type(value).__name__} has no canonical form")


def portable(value: Any) -> Any:
    """Files by name, as what they hold is hashed apart; floats as text where JSON has none."""
    if isinstance(value, Mapping):
        return {
            key: Path(each).name if key == "file" and isinstance(each, str) else portable(each)
            for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [portable(each) for each in value]
    return value if not isinstance(value, float) or value - value == 0 else repr(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or sys.platform
