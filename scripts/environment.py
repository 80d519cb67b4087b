"""Makes the virtual environment that a make target needs, and nothing more; does nothing when it is there already.

    python3 scripts/environment.py demo|test|bench

The target's name is the extra of pyproject.toml that is installed. torch comes, in this order, from the environment,
from the Python that runs this script, or from pip: the CPU build where an index offers one (PIP_EXTRA_INDEX_URL).
Only the standard library is used here.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

TORCH = "2.13.0"
TRITON = "3.6.0"
OLDEST_TORCH = (2, 6)
ROOT = Path(__file__).resolve().parent.parent
VENV = Path(os.environ.get("VENV", ROOT / ".venv")).absolute()
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
NATIVE = os.environ.get("GRADCLUST_NATIVE", "1") == "1"
NESTED = {"demo": ("demo", "test"), "bench": ("bench", "test"), "test": ("test",)}  # the extras that satisfy a target


def say(text: str) -> None:
    print(f"[environment] {text}", flush=True)


def run(*command: str, quiet: bool = False, **variables: str) -> bool:
    output = subprocess.DEVNULL if quiet else None
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, stdout=output, stderr=output)
    return done.returncode == 0


def pip(*arguments: str, quiet: bool = False, **variables: str) -> bool:
    return run(
        str(PYTHON), "-m", "pip", "install", "-qq", "--disable-pip-version-check", *arguments, quiet=quiet, **variables
    )


def fingerprint() -> str:
    """Changes when the installation must be done again: what is built, with what, and what is required."""
    digest = hashlib.sha256(repr((sys.version, TORCH, TRITON)).encode())
    for name in ("GRADCLUST_NATIVE", "GRADCLUST_CUDA", "CMAKE_ARGS", "CXX", "CUDACXX"):
        digest.update(f"{name}={os.environ.get(name)}\n".encode())
    sources = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    for path in [ROOT / "pyproject.toml", ROOT / "setup.py", ROOT / "CMakeLists.txt", *sources]:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def installed() -> bool:
    """Whether this tree is the package that the environment imports, with the native module built."""
    here = (
        f"import gradclust_fast._native as n; assert n.__file__.startswith({str(ROOT)!r}); assert {not NATIVE} or n._C"
    )
    return PYTHON.exists() and run(str(PYTHON), "-c", here, quiet=True)


def has_torch() -> bool:
    wanted = f"import torch; assert tuple(map(int, torch.__version__.split('.')[:2])) >= {OLDEST_TORCH}"
    return run(str(PYTHON), "-c", wanted, quiet=True)


def own_torch() -> list[str]:
    """The directories to borrow torch from: those of the running Python, when it has a torch that will do."""
    from importlib import metadata  # here: Python 3.7 has none, and must get as far as the message of main()

    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return []
    if tuple(map(int, version.split(".")[:2])) < OLDEST_TORCH:
        return []
    say(f"using torch {version} of {sys.executable}")
    return [entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]


def create() -> None:
    if PYTHON.exists() and run(str(PYTHON), "-m", "pip", "--version", quiet=True):
        return
    say(f"creating {VENV}")
    if VENV.exists():
        shutil.rmtree(VENV)  # half made, or of a Python that is gone
    if not run(sys.executable, "-m", "venv", str(VENV)):
        shutil.rmtree(VENV, ignore_errors=True)
        raise SystemExit("python3 -m venv failed; on Debian and Ubuntu it needs: apt-get install python3-venv")


def provide_torch() -> None:
    if has_torch():
        return
    borrowed = own_torch()
    if borrowed:
        where = [str(PYTHON), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        site = subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()
        link = Path(site) / "borrowed_torch.pth"
        link.write_text("\n".join(borrowed) + "\n")
        if has_torch():
            return
        link.unlink()
    say(f"installing torch {TORCH}")
    if sys.platform == "linux" and pip(f"torch=={TORCH}+cpu", quiet=True):
        return
    if sys.platform == "linux":
        say("no index in use offers torch's CPU build, so this is the one with CUDA (gigabytes). For the small one:")
        say("    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make ...")
    if not pip(f"torch=={TORCH}"):
        raise SystemExit(
            f"torch {TORCH} could not be installed, see above; any torch >= 2.6 that python3 imports will do"
        )


def provide_triton() -> None:
    """A known Triton beside a torch that brought none: the tests run the GPU kernels in its interpreter."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or run(str(PYTHON), "-c", "import triton", quiet=True):
        return
    say(f"installing triton {TRITON}")
    if not pip("--no-deps", f"triton=={TRITON}"):
        raise SystemExit(f"triton {TRITON} could not be installed, see above")


def install(target: str) -> None:
    say(f"building and installing gradclust_fast[{target}] (the first time takes a few minutes)")
    variables = {}
    if target == "demo" and "GRADCLUST_CUDA" not in os.environ:
        variables["GRADCLUST_CUDA"] = "OFF"  # the demo runs on the CPU: no need to wait for nvcc
    if not pip("-e", f".[{target}]", **variables):
        raise SystemExit("gradclust_fast could not be installed, see above")


def main(target: str) -> None:
    if sys.version_info < (3, 10):  # noqa: UP036  (whoever runs an older Python is told so, here)
        raise SystemExit(
            f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}; try make PYTHON=python3.12 ..."
        )
    mark = fingerprint()
    stamps = {extra: VENV / f".gradclust-{extra}" for extra in NESTED["test"] + ("demo", "bench")}
    if any(stamps[extra].exists() and stamps[extra].read_text() == mark for extra in NESTED[target]) and installed():
        return
    create()
    provide_torch()
    if target == "test":
        provide_triton()
    for stamp in stamps.values():
        if stamp.exists() and stamp.read_text() != mark:
            stamp.unlink()
    stamps[target].unlink(missing_ok=True)
    install(target)
    stamps[target].write_text(mark)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in NESTED:
        raise SystemExit(f"usage: environment.py {'|'.join(NESTED)}")
    main(sys.argv[1])
