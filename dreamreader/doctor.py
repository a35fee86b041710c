"""What runs each operator here, and why: the content of `dreamreader doctor`."""

import os
import platform
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import torch

from dreamreader import _register
from dreamreader._version import __version__
from dreamreader.errors import BrokenExtension

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "triton",
    "peft",
)
SWITCHES = ("DREAMREADER_BACKEND", "DREAMREADER_EXT", "TRITON_INTERPRET", "OMP_NUM_THREADS")


def report() -> dict[str, Any]:
    """Collects versions, the native module, devices, switches and the back end of every operator.

    Returns:
        Plain values, ready for JSON. A native module that is installed but does not load is
        reported under `native.error`, and then `operators` is empty.
    """
    found: dict[str, Any] = {
        "dreamreader": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.backends.cpu.get_cpu_capability(),
        },
        "cuda": _cuda(),
        "triton": _triton(),
        "switches": {name: os.environ.get(name) for name in SWITCHES},
    }
    try:
        module, reason = _register.native()
    except BrokenExtension as error:
        return found | {"native": {"state": "broken", "error": str(error)}, "operators": {}}
    import_module("dreamreader.ops")  # declares the operators
    if module is None:
        found["native"] = {"state": "missing", "reason": reason}
    else:
        found["native"] = {"state": "active", **module.build_info()}
    found["operators"] = {
        name: {
            key: {"backend": each.backend, "reason": each.reason} for key, each in owners.items()
        }
        for name, owners in _register.active.items()
    }
    return found


def render(found: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    native, cpu, cuda = found["native"], found["cpu"], found["cuda"]
    lines = [f"dreamreader {found['dreamreader']}, Python {found['python']}, {found['platform']}"]
    versions = found["packages"].items()
    lines.append(
        "packages   " + ", ".join(f"{name} {version or '-'}" for name, version in versions)
    )
    lines.append(f"native     {_native(native)}")
    lines.append(
        f"cpu        {cpu['machine']}, torch sees {cpu['torch']}, {cpu['threads']} threads"
    )
    lines.append("cuda       " + ("\n           ".join(cuda["devices"]) or cuda["reason"]))
    lines.append(f"triton     {found['triton']}")
    on = [f"{name}={value}" for name, value in found["switches"].items() if value is not None]
    lines.append("switches   " + (", ".join(on) or "none set"))
    lines.append("operators")
    for name, owners in found["operators"].items():
        for key, each in owners.items():
            lines.append(f"  {name:12} {key:6} {each['backend']:10} {each['reason']}")
    return "\n".join(lines)


def _native(native: dict[str, Any]) -> str:
    if native["state"] == "broken":
        return f"BROKEN: {native['error']}"
    if native["state"] == "missing":
        return (
            f"none ({native['reason']}): every operator runs on its reference in plain torch; "
            "for the kernels install a C++ compiler and reinstall dreamreader"
        )
    text = f"{native['compiled']}, running {native['isa']}, compiler {native['compiler']}"
    if native["cuda"]:
        text += f", CUDA {native['cuda']} for {native['cuda_archs']}, driver: {native['driver']}"
    return text + (", debug build" if native["debug"] else "")


def _cuda() -> dict[str, Any]:
    version = torch.version.cuda
    if version is None:
        return {"torch": None, "devices": [], "reason": "this torch is built without CUDA"}
    count = torch.cuda.device_count()
    devices = [_device(number) for number in range(count)]
    return {"torch": version, "devices": devices, "reason": "" if count else "no device found"}


def _device(number: int) -> str:
    major, minor = torch.cuda.get_device_capability(number)
    try:
        reason = _register.why_not_on(number)
    except BrokenExtension:
        reason = "the native module does not load"
    runs = f"Triton or the references run: {reason}" if reason else "native kernels run"
    return f"{torch.cuda.get_device_name(number)} ({major}.{minor}): {runs}"


def _triton() -> str:
    if find_spec("triton") is None:
        return "not installed"
    needs = "" if torch.version.cuda else "; used on CUDA devices only"
    return f"{_version('triton')}{needs}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
