"""The library `pite_kernels` and its optional C++ operators; pyproject.toml holds the metadata.

`pip install --no-build-isolation ./kernels` or `python setup.py build_ext --inplace` (in this folder) builds the operators.

The operators need torch to be installed first. Without torch, CMake or a C++20 compiler, or if the compilation fails,
the build prints one notice, and the same functions run in PyTorch.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path(__file__).resolve().parent / "csrc"


class BuildError(Exception):
    """The reason why the C++ operators cannot be built, in one sentence."""


class CMakeBuild(build_ext):
    """Builds csrc/CMakeLists.txt into pite_kernels/_C.so."""

    def get_ext_filename(self, fullname: str) -> str:
        # Not a Python module: torch loads the library, so one file works with any version of the interpreter.
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        try:
            built = build_operators(Path(self.build_temp).resolve())
        except BuildError as error:
            print(f"pite_kernels: {error} The C++ operators are not built; PyTorch is used instead.", file=sys.stderr)
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place: overwriting a library that a running process has mapped would crash that process.
        fresh = target.with_suffix(".new")
        shutil.copyfile(built, fresh)
        fresh.replace(target)


def build_operators(folder: Path) -> Path:
    """Configure and build the operators in `folder`; returns the path of the library. Raises BuildError."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed in this environment (with pip, add --no-build-isolation).")
    torch = Path(spec.origin).parent
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        raise BuildError("cmake is not installed.")
    ninja = shutil.which("ninja", path=path)
    configure = [
        cmake,
        *(("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}") if ninja else ()),
        *("-S", str(SOURCES), "-B", str(folder), "-DCMAKE_BUILD_TYPE=Release"),
        f"-DTORCH_INCLUDE_DIR={torch / 'include'}",
        f"-DTORCH_LIBRARY_DIR={torch / 'lib'}",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    # A cache of another checkout, copied along, names that one's folders.
    (folder / "CMakeCache.txt").unlink(missing_ok=True)
    for command in (configure, [cmake, "--build", str(folder), "--parallel"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            # `folder` may be temporary: pip removes it after an editable build.
            log = SOURCES.parent / "build" / "build.log"
            log.parent.mkdir(exist_ok=True)
            log.write_text(done.stdout + done.stderr)
            step = "build" if "--build" in command else "configuration"
            raise BuildError(f"the CMake {step} failed; its output is in {log}.")
    return folder / "_C.so"


setup(
    packages=find_packages(include=["pite_kernels*"]),
    ext_modules=[Extension("pite_kernels._C", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
