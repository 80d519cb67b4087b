"""The package as a user gets it: sdist, wheel, pure-Python install, and what a machine without the tools is told."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import gradclust_fast as gf
from gradclust_fast import _native

ROOT = Path(__file__).resolve().parents[1]
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("GRADCLUST_")} | {"CMAKE_ARGS": ""}
needs_native = pytest.mark.skipif(_native._C is None, reason=f"no native module here: {_native.unavailable}")


def run(*command: object, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=CLEAN | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def succeed(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    done = run(*command, cwd=cwd, **environment)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def copy_tree(target: Path) -> Path:
    """The sources alone, without anything built in place."""
    target.mkdir()
    ignored = shutil.ignore_patterns("_C*", "__pycache__", "*.egg-info")
    for name in ("csrc", "gradclust_fast", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, target)
    return target


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An unpacked sdist, with the remains of a build by a Python that is gone."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = copy_tree(folder / "tree")
    # setup.py sdist writes the archive that `python -m build --sdist` would, with nothing to download
    succeed(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder, cwd=tree)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    stale = unpacked / "build" / f"temp.{tag}" / "cmake"
    stale.mkdir(parents=True)
    (stale / "CMakeCache.txt").write_text(
        "CMAKE_HOME_DIRECTORY:INTERNAL=/gone\nCMAKE_CACHEFILE_DIR:INTERNAL=/gone/build\n"
        "Python_EXECUTABLE:FILEPATH=/gone/python\nCMAKE_MAKE_PROGRAM:FILEPATH=/gone/ninja\n"
    )
    return unpacked


@pytest.fixture(scope="module")
def wheel(source):
    """A wheel made from the sdist, in a build environment of its own where the build tools can be had."""
    out = source.parent / "wheel"
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", out, "."]
    isolated = run(*command, cwd=source, GRADCLUST_CUDA="OFF")
    if isolated.returncode:
        assert "installing build dependencies" in isolated.stdout.lower(), isolated.stdout[-6000:]
        succeed(*command, "--no-build-isolation", cwd=source, GRADCLUST_CUDA="OFF")
    (path,) = out.glob("*.whl")
    return path


def dependencies_of_torch() -> set[str]:
    """torch, numpy and what they need, as names of distributions."""
    found: set[str] = set()
    pending = ["torch", "numpy"]
    while pending:
        name = pending.pop()
        if name in found:
            continue
        found.add(name)
        requirements = map(Requirement, metadata.requires(name) or [])
        pending += [each.name for each in requirements if not each.marker or each.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory):
    """Makes a virtual environment that holds one wheel, torch and numpy; returns its Python."""
    links = tmp_path_factory.mktemp("torch_and_numpy")
    for name in dependencies_of_torch():
        distribution = metadata.distribution(name)
        for top in {Path(str(file)).parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (links / top).exists():
                (links / top).symlink_to(Path(str(distribution.locate_file(top))))

    def make(wheel: Path, folder: Path) -> Path:
        venv.create(folder / "env", with_pip=False, symlinks=os.name != "nt")
        python = folder / "env" / "bin" / "python"
        site = Path(succeed(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
        (site / "torch_and_numpy.pth").write_text(f"{links}\n")
        return python

    return make


def test_sdist_holds_what_a_build_needs(source):
    names = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    wanted = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "gradclust_fast").rglob("*.py")}
    wanted |= {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md", "tests/conftest.py"}
    assert not wanted - names
    assert not any(name.endswith((".so", ".o", ".pyc")) for name in names)


@pytest.mark.slow
@needs_native
def test_wheel_works_in_an_environment_with_torch_and_numpy_alone(wheel, empty_environment, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert sum(bool(re.fullmatch(r"gradclust_fast/_C\..*(so|pyd)", name)) for name in names) == 1
    assert {name.split("/")[0] for name in names} == {"gradclust_fast", wheel.name.split("-cp")[0] + ".dist-info"}
    python = empty_environment(wheel, tmp_path)
    output = succeed(
        python, "-I", "-c",
        "import importlib.util, torch, gradclust_fast as gf\n"
        "assert 'env' in gf.__file__, gf.__file__\n"
        "assert not any(map(importlib.util.find_spec, ('rich', 'matplotlib', 'sklearn', 'pytest')))\n"
        "act, grad = torch.randn(9, 33), torch.randn(9, 17)\n"
        "with gf.backend('cpu'): ours = gf.ops.grad_sqnorm(act, grad)\n"
        "with gf.backend('reference'): torch.testing.assert_close(ours, gf.ops.grad_sqnorm(act, grad))\n"
        "print(gf.build_info())",
        cwd=tmp_path,
    )  # fmt: skip
    assert "OpenMP" in output and "GRADCLUST_CUDA=OFF" in output


@pytest.mark.slow
@needs_native
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) lists the symbols")
def test_kernel_objects_share_no_symbol_between_instruction_sets(wheel, source):
    """A weak symbol defined in two instruction sets' objects would let AVX-512 code run on an older machine."""
    objects = list(source.glob("build/temp*/cmake/CMakeFiles/cpu_*.dir/csrc/cpu/*.o"))
    isas = {re.search(r"cpu_(\w+)\.dir", str(path)).group(1) for path in objects}
    assert "baseline" in isas
    for path in objects:
        isa = re.search(r"cpu_(\w+)\.dir", str(path)).group(1)
        for line in succeed("nm", "-C", "--defined-only", path).splitlines():
            kind, name = line.split(maxsplit=2)[1:]
            personality = name.startswith("DW.ref.")  # a pointer to the exception handler, the same in every object
            if kind in "WVu" and not personality:
                assert f"gradclust::{isa}::" in name, f"{path.name} ({isa}) defines the weak symbol {name}"


@pytest.mark.slow
def test_pure_python_install_runs_the_reference_path(empty_environment, tmp_path):
    tree = copy_tree(tmp_path / "tree")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, "."]
    succeed(*command, cwd=tree, GRADCLUST_NATIVE="0", PATH=str(tmp_path))  # no compiler, no cmake
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    output = succeed(
        empty_environment(wheel, tmp_path), "-I", "-c",
        "import torch, gradclust_fast as gf\n"
        "act, grad = torch.randn(4, 5), torch.randn(4, 2)\n"
        "oracle = torch.einsum('bo,bi->boi', grad, act).square().sum((1, 2))\n"
        "torch.testing.assert_close(gf.ops.grad_sqnorm(act, grad), oracle)\n"
        "print(gf.explain('grad_sqnorm', act, grad))\n"
        "with gf.backend('cpu'):\n"
        "    try: gf.ops.grad_sqnorm(act, grad)\n"
        "    except RuntimeError as error: print(error)\n"
        "print(gf.build_info())",
        cwd=tmp_path,
    )  # fmt: skip
    assert "grad_sqnorm: reference" in output
    assert "backend 'cpu' was forced and cannot run: the native kernels were not built" in output
    assert re.search(r"C\+\+ kernels +unavailable: the native kernels were not built .*install a C\+\+17", output)


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"PATH": "/nowhere"}, r"no C\+\+ compiler was found .*\n.*apt-get install g\+\+(.|\n)*GRADCLUST_NATIVE=0 pip"),
        ({"CXX": "no-such-c++"}, r"CXX=no-such-c\+\+ was not found\.\n.*apt-get(.|\n)*GRADCLUST_NATIVE=0 pip"),
        ({"GRADCLUST_NATIVE": "no"}, r"GRADCLUST_NATIVE must be 0 \(pure Python\) or 1 .*got 'no'"),
        (
            {"GRADCLUST_CUDA": "maybe"},
            r"GRADCLUST_CUDA must be AUTO, ON or OFF, got MAYBE(.|\n)*GRADCLUST_NATIVE=0 pip",
        ),
    ],
    ids=["no-compiler", "wrong-CXX", "wrong-NATIVE", "wrong-CUDA"],
)
def test_a_build_that_cannot_work_names_the_remedy(tmp_path, variables, message):
    done = run(sys.executable, "setup.py", "build_ext", cwd=copy_tree(tmp_path / "tree"), **variables)
    assert done.returncode != 0
    assert re.search(message, done.stdout), done.stdout[-3000:]


def test_cuda_on_without_nvcc_says_so(tmp_path):
    tools = {name: shutil.which(name) for name in ("c++", "g++", "gcc", "cc", "as", "ld", "ar", "ranlib", "nm")}
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, path in tools.items():
        if path:
            (bin / name).symlink_to(path)
    done = run(
        sys.executable, "setup.py", "build_ext", cwd=copy_tree(tmp_path / "tree"), PATH=str(bin), GRADCLUST_CUDA="ON"
    )
    assert done.returncode != 0
    assert "GRADCLUST_CUDA=ON, but nvcc was not found" in " ".join(done.stdout.split()), done.stdout[-3000:]


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "sse9"])
def test_the_instruction_set_can_be_lowered_and_never_raised(isa):
    order = ["baseline", "avx2", "avx512"]
    code = (
        "import torch, gradclust_fast as gf\n"
        "print(gf.build_info()['C++ kernels'])\n"
        "print(gf.explain('grad_sqnorm', torch.ones(2, 3), torch.ones(2, 3)).backend)"
    )
    if isa in order and order.index(isa) <= order.index(_native._C.isa):
        output = succeed(sys.executable, "-c", code, GRADCLUST_CPU_ISA=isa)
        assert output.startswith(f"{isa}, ") and output.endswith("cpu\n")
        return
    done = run(sys.executable, "-c", code, GRADCLUST_CPU_ISA=isa)
    assert done.returncode != 0, "the import must not fall back to the reference"
    if isa in order:
        assert f"ValueError: GRADCLUST_CPU_ISA={isa}: this processor does not have it; set it to" in done.stdout
    else:
        assert "ValueError: GRADCLUST_CPU_ISA must be baseline, avx2 or avx512, got sse9; set it" in done.stdout


def test_build_info_says_what_was_built_and_why_not():
    info = gf.build_info()
    declared = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert info["gradclust_fast"] == gf.__version__ == declared
    installed = [each.version for each in metadata.distributions(name="gradclust_fast")]  # none in a merely built tree
    assert set(installed) <= {declared}
    assert info["torch"] == torch.__version__
    assert str(info).count("\n") == len(info) - 1
    for kernels in ("C++ kernels", "CUDA kernels"):
        assert info[kernels]
    if _native._C is not None:
        assert info["C++ kernels"].startswith(_native._C.isa)
        if not torch.cuda.is_available():
            assert re.search(r"torch sees no CUDA device|were not built", info["CUDA kernels"])


@needs_native
def test_a_broken_native_module_is_reported_with_its_own_error(tmp_path):
    package = tmp_path / "gradclust_fast"
    shutil.copytree(ROOT / "gradclust_fast", package, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    (package / "_C.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')\n")
    code = "import gradclust_fast as gf; print(gf.build_info())"
    output = succeed(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert "the native module was found but cannot be loaded: libgomp.so.1" in output


@needs_native
def test_a_native_module_of_an_older_build_is_found_and_not_used(tmp_path):
    tree = tmp_path / "tree"
    for name in ("csrc", "gradclust_fast"):  # the module as built in place
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    if not list((tree / "gradclust_fast").glob("_C*")):
        shutil.copy(_native._C.__file__, tree / "gradclust_fast")
    code = (
        "import torch, gradclust_fast as gf\n"
        "print(gf.build_info()['C++ kernels'])\n"
        "print(gf.ops.grad_sqnorm(torch.ones(2, 3), torch.ones(2, 3)).tolist())\n"
        "with gf.backend('cpu'): gf.ops.grad_sqnorm(torch.ones(2, 3), torch.ones(2, 3))"
    )

    def go():
        return run(sys.executable, "-c", code, cwd=tree, PYTHONPATH=str(tree))

    fresh = go()
    assert fresh.returncode == 0 and fresh.stdout.startswith(_native._C.isa), fresh.stdout
    (tree / "csrc" / "types.h").write_text("// one more field\n")
    stale = go()
    assert stale.stdout.startswith("unavailable: the native module was built from other sources"), stale.stdout
    assert "[9.0, 9.0]" in stale.stdout and stale.returncode != 0
    assert "backend 'cpu' was forced and cannot run: the native module was built from other sources" in stale.stdout
    assert "`pip install -e .`" in stale.stdout


def test_importing_needs_no_gpu_and_no_optional_package():
    modules = "import sys, gradclust_fast; print(sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = succeed(sys.executable, "-c", modules)
    for optional in ("rich", "matplotlib", "sklearn", "triton", "pytest"):
        assert f"'{optional}'" not in loaded
