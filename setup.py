"""Builds the native module: configures CMakeLists.txt, the only build recipe, and runs it through ninja.

GRADCLUST_NATIVE=0   skip the native module: a pure-Python install that runs the reference path
GRADCLUST_CUDA=OFF   leave out the CUDA kernels even when nvcc is found; ON insists on them (default AUTO)
CMAKE_ARGS="..."     extra arguments for CMake, e.g. -DCMAKE_CUDA_ARCHITECTURES=90a
CXX, CUDACXX         the compilers, as CMake reads them
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

PURE = """or install without native kernels, on the slower pure-PyTorch path:
    GRADCLUST_NATIVE=0 pip install ."""

NO_COMPILER = (
    """
gradclust_fast could not build its native kernels: {reason}.
Either install a C++17 compiler (Debian/Ubuntu: apt-get install g++; macOS: xcode-select --install),
"""
    + PURE
)

NO_TOOL = (
    """
gradclust_fast could not build its native kernels: {tool} was not found.
Either install it (pip install cmake ninja pybind11; without --no-build-isolation, pip brings them by itself),
"""
    + PURE
)

FAILED = (
    """
gradclust_fast could not build its native kernels: {step} failed, its own message is above.
Either mend what it names (a C++17 compiler is needed; GRADCLUST_CUDA=OFF leaves out the CUDA kernels),
"""
    + PURE
)


def tool(name: str) -> str:
    """cmake or ninja: from the build environment's package if it is there, else from PATH."""
    try:
        module = __import__(name)
        return str(Path(getattr(module, "CMAKE_BIN_DIR", None) or module.BIN_DIR) / name)
    except ImportError:
        found = shutil.which(name)
        if found is None:
            raise SystemExit(NO_TOOL.format(tool=name)) from None
        return found


def require_compiler() -> None:
    """CMake's own error for a missing compiler names no remedy."""
    if sys.platform == "win32":
        return  # CMake finds Visual Studio's compiler without PATH
    wanted = os.environ.get("CXX")
    if wanted:
        if shutil.which(shlex.split(wanted)[0]) is None:
            raise SystemExit(NO_COMPILER.format(reason=f"the C++ compiler CXX={wanted} was not found"))
    elif not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        raise SystemExit(NO_COMPILER.format(reason="no C++ compiler was found (c++, g++ or clang++ on PATH, or CXX)"))


def discard_stale_cache(build: Path, settings: dict) -> None:
    """Starts a build folder afresh when it was configured for another Python, compiler, CMake or set of options.

    CMake keeps its first answers, and then builds with an interpreter or compiler that is long gone.
    """
    stamp = build / "settings.json"
    text = json.dumps(settings, indent=1)
    if build.exists() and not (stamp.exists() and stamp.read_text() == text):
        shutil.rmtree(build)
    build.mkdir(parents=True, exist_ok=True)
    stamp.write_text(text)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        require_compiler()
        cmake, ninja = tool("cmake"), tool("ninja")
        try:
            import pybind11
        except ImportError:
            raise SystemExit(NO_TOOL.format(tool="pybind11")) from None
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        cuda = os.environ.get("GRADCLUST_CUDA", "AUTO").upper()
        variables = ("CC", "CXX", "CXXFLAGS", "CUDACXX", "CUDAFLAGS", "CMAKE_ARGS")
        settings = {
            "source": str(ROOT),
            "python": sys.executable,
            "cmake": subprocess.run([cmake, "--version"], capture_output=True, text=True, check=True).stdout,
            **{name: shutil.which(name) for name in ("c++", "nvcc")},
            **{name: os.environ.get(name) for name in variables},
        }
        discard_stale_cache(build, settings)
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DGRADCLUST_OUTPUT_DIR={target.parent}",
            f"-DGRADCLUST_CUDA={cuda}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        for step, command in (("configuring with CMake", configure), ("compiling", [cmake, "--build", str(build)])):
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError:
                raise SystemExit(FAILED.format(step=step)) from None


native = os.environ.get("GRADCLUST_NATIVE", "1")
if native not in ("0", "1"):
    raise SystemExit(f"GRADCLUST_NATIVE must be 0 (pure Python) or 1 (build the native kernels), got {native!r}")
if native == "0":
    setup()
else:
    setup(ext_modules=[Extension("gradclust_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
