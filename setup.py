"""Builds the native module: configures CMakeLists.txt, the only build recipe, and runs it through ninja.

GRADCLUST_NATIVE=0   skip the native module: a pure-Python install that runs the reference path
CMAKE_ARGS="..."     extra arguments for CMake, e.g. -DGRADCLUST_CUDA=OFF or -DCMAKE_CUDA_ARCHITECTURES=90a
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

NO_COMPILER = """
gradclust_fast could not build its native kernels ({reason}).
Either install a C++17 compiler (Debian/Ubuntu: apt-get install g++; macOS: xcode-select --install),
or install without native kernels, on the slower pure-PyTorch path:
    GRADCLUST_NATIVE=0 pip install .
"""


def cmake_executable() -> str:
    """cmake from the build environment's package if it is there, else from PATH."""
    try:
        import cmake

        return str(Path(cmake.CMAKE_BIN_DIR) / "cmake")
    except ImportError:
        found = shutil.which("cmake")
        if found is None:
            raise SystemExit(NO_COMPILER.format(reason="cmake was not found; pip install cmake ninja")) from None
        return found


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            cmake_executable(), "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DGRADCLUST_OUTPUT_DIR={target.parent}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]  # fmt: skip
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake_executable(), "--build", str(build)], check=True)
        except subprocess.CalledProcessError as error:
            reason = f"`{' '.join(error.cmd[:2])} ...` failed, see its output above"
            raise SystemExit(NO_COMPILER.format(reason=reason)) from None


if os.environ.get("GRADCLUST_NATIVE", "1") == "0":
    setup()
else:
    setup(ext_modules=[Extension("gradclust_fast._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
