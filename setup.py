"""Builds `dreamreader._C` with CMake and Ninja.

DREAMREADER_EXT=auto       C++, and CUDA where nvcc is found; without a C++ compiler, no extension
DREAMREADER_EXT=off        no extension: everything runs on the references
DREAMREADER_EXT=cpu, cuda  exactly this; anything missing is an error
DREAMREADER_CUDA_ARCHS     machine code of these GPUs alone, as CMake spells them: 90a-real
DREAMREADER_SPILLS=error   a CUDA kernel that needs local memory is an error
DEBUG=1                    without optimisation, with debug information
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CHOICES = ("auto", "off", "cpu", "cuda")


def find_nvcc() -> str | None:
    """nvcc from CUDACXX, CUDA_HOME, the path, or where the toolkit installs itself."""
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    candidates += [str(Path(home, "bin", "nvcc")) for home in homes if home]
    return next((each for each in candidates if each and shutil.which(each)), None)


def find_compiler() -> str | None:
    """The C++ compiler that CMake would take."""
    candidates = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((each for each in candidates if each and shutil.which(each.split()[0])), None)


def plan(choice: str) -> str:
    """What to build: `off`, `cpu` or `cuda`."""
    if choice not in CHOICES:
        sys.exit(f"DREAMREADER_EXT={choice!r}: use one of {', '.join(CHOICES)}")
    if choice == "auto" and find_compiler() is None:
        print(
            "dreamreader: no C++ compiler found, so the native module is not built; every operator "
            "runs on its reference in plain torch, more slowly. Install g++ and reinstall for it.",
            flush=True,
        )
        return "off"
    if choice in ("cpu", "cuda") and find_compiler() is None:
        sys.exit(f"DREAMREADER_EXT={choice} needs a C++ compiler and none was found")
    if choice == "cuda" and find_nvcc() is None:
        sys.exit(
            "DREAMREADER_EXT=cuda needs nvcc (CUDACXX, CUDA_HOME or PATH) and it was not found"
        )
    if choice == "auto":
        return "cuda" if find_nvcc() and any((ROOT / "csrc").glob("*.cu")) else "cpu"
    return choice


def copy_pybind11() -> Path:
    """pybind11 in build/: pip has another copy for each install, and its files count as new."""
    import pybind11

    copy = ROOT / "build" / f"pybind11-{pybind11.__version__}"
    if not copy.exists():
        part = copy.with_name(f"{copy.name}.part")
        shutil.copytree(Path(pybind11.__file__).parent, part, dirs_exist_ok=True)
        part.rename(copy)
    return copy


class CMakeBuild(build_ext):
    """Configures csrc/ and builds the module next to the package."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # One folder for installs of every sort, which also takes what they build with from a place
        # that stays: the next install compiles what changed since.
        build = ROOT / "build" / f"cmake-{ext.kind}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        (build / "CMakeCache.txt").unlink(
            missing_ok=True
        )  # tools may live in another temporary folder now
        debug = os.environ.get("DEBUG", "0") not in ("", "0")
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if debug else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(build),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": str(copy_pybind11() / "share" / "cmake" / "pybind11"),
            "DREAMREADER_VERSION": self.distribution.get_version(),
            "DREAMREADER_WITH_CUDA": "ON" if ext.kind == "cuda" else "OFF",
            "DREAMREADER_SPILLS_FAIL": "ON" if os.environ.get("DREAMREADER_SPILLS") else "OFF",
        }
        nvcc = find_nvcc()
        if archs := os.environ.get("DREAMREADER_CUDA_ARCHS"):
            options["DREAMREADER_CUDA_ARCHS"] = archs
        if ext.kind == "cuda" and nvcc:
            options["CMAKE_CUDA_COMPILER"] = shutil.which(nvcc) or nvcc
        flags = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run(
            ["cmake", "-G", "Ninja", "-S", str(ROOT / "csrc"), *flags], cwd=build, check=True
        )
        jobs = ["-j", str(self.parallel)] if self.parallel else []
        subprocess.run(["cmake", "--build", ".", *jobs], cwd=build, check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a process may have the old one open
        shutil.copy2(build / target.name, target)


kind = plan(os.environ.get("DREAMREADER_EXT", "auto"))
extension = Extension("dreamreader._C", sources=[])
extension.kind = kind
packages = find_packages(include=["dreamreader", "dreamreader.*"])
if (ROOT / "triton_kernels" / "__init__.py").exists():
    packages.append("dreamreader.triton_kernels")
setup(
    packages=packages,
    ext_modules=[] if kind == "off" else [extension],
    cmdclass={"build_ext": CMakeBuild},
)
