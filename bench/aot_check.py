"""Compiles the Triton kernels ahead of time, without a GPU, and reads what the compiler made of them.

    python -m bench.aot_check                          (or make aot-check) every benchmark case, for sm_80 and sm_90
    python -m bench.aot_check --op grad_sqnorm --arch 90

A benchmark case runs on meta tensors, on which nothing is computed; each launch is recorded with the configuration that
its shape and the asked GPU get, and compiled as the launch itself would be. Per kernel: registers, shared memory,
spills, and whether its PTX has tensor-core instructions. Exit code 1 when a kernel spills, does not fit the GPU, or
misses the instructions it was made for.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import gradclust_fast as gf
from bench.run import available_ops, cases_of
from gradclust_fast._dispatch import OPS
from gradclust_fast.triton_kernels import _support
from gradclust_fast.triton_kernels._support import Launch

SHARED_LIMIT = {
    80: 163 << 10,
    90: 227 << 10,
}  # bytes a block may take: CUDA's programming guide, "compute capabilities"
MULTIPROCESSORS = {80: 108, 90: 132}
WARP_REGISTERS = 64 << 10  # registers of a multiprocessor: threads × registers of one block must fit


@dataclass
class Compiled:
    """One kernel as compiled for one architecture."""

    kernel: str
    arch: int
    case: str
    """The first benchmark case that launches it so."""
    constants: str
    warps: int
    registers: int
    shared: int
    spills: int
    """Bytes stored to and loaded from local memory."""
    products: int
    """Rows of the largest product, in the kernel's Triton IR, of a type that tensor cores take; 0 for none."""
    wgmma: bool
    mma: bool
    seconds: float

    @property
    def fault(self) -> str | None:
        if self.spills:
            return f"{self.spills} bytes spilled"
        if self.shared > SHARED_LIMIT[self.arch]:
            return f"{self.shared} bytes of shared memory, sm_{self.arch} has {SHARED_LIMIT[self.arch]}"
        if self.registers * self.warps * 32 > WARP_REGISTERS:
            return f"{self.registers} registers × {32 * self.warps} threads do not fit a multiprocessor"
        wanted = self.arch >= 90 and self.products >= 64 and self.warps >= 4  # what one wgmma takes
        if self.products and not (self.wgmma if wanted else self.mma):
            return "its products were not compiled to " + ("wgmma" if wanted else "mma")
        return None


@contextmanager
def launches_of(arch: int) -> Iterator[list[Launch]]:
    """Ops called inside run their Triton launchers, also on meta tensors, whose launches are listed."""
    calls = {op: op.call for op in OPS.values()}
    capability = divmod(arch, 10)
    with _support.recording(capability, MULTIPROCESSORS[arch]) as launches, gf.backend("triton"):
        for op in OPS.values():
            op.call = op.run
        try:
            yield launches
        finally:
            for op, call in calls.items():
                op.call = call


def source_of(launch: Launch, arch: int) -> tuple[Any, dict[str, Any]]:
    """What Triton's own launch would compile: the source with its specialisation, and the options."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", arch, 32))
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, options = bind(*launch.args, **launch.meta, debug=False)
    parsed, signature, constants, attributes = launch.kernel._pack_args(
        backend, options, bound, specialization, options
    )
    return ASTSource(launch.kernel, signature, constants, attributes), parsed.__dict__


def compile_launch(launch: Launch, arch: int, case: str) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget

    source, options = source_of(launch, arch)
    begin = time.monotonic()
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    seconds = time.monotonic() - begin
    names = launch.kernel.arg_names
    constants = {names[path[0]]: value for path, value in source.constants.items()}
    ptx = compiled.asm["ptx"]
    registers, spills = resources(compiled.asm["cubin"])
    return Compiled(
        launch.kernel.__name__, arch, case, ", ".join(f"{k}={v}" for k, v in constants.items() if k.isupper()),
        compiled.metadata.num_warps, registers, compiled.metadata.shared, spills,
        products_for_tensor_cores(compiled.asm["ttir"]), "wgmma.mma_async" in ptx, "mma.sync" in ptx, seconds,
    )  # fmt: skip


def products_for_tensor_cores(ir: str) -> int:
    """See ``Compiled.products``; the "ieee" products of float32 go without tensor cores."""
    rows = 0
    for line in re.findall(r"tt\.dot .*", ir):
        height, kind = re.findall(r": tensor<(\d+)x\d+x(\w+)", line)[0]
        if kind == "f64":
            rows = max(rows, 1)  # too few for wgmma, which float64 does not have
        elif kind != "f32" or "tf32" in line:
            rows = max(rows, int(height))
    return rows


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of local memory (spills and register arrays that could not stay)."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"{tool} printed no resource usage:\n{text}")
    return int(found[1]), int(found[2]) + int(found[3])


def key_of(launch: Launch, arch: int) -> str:
    """What Triton keeps compiled kernels by: launches with one key share one compilation."""
    source, options = source_of(launch, arch)
    return source.hash() + json.dumps(options, default=str, sort_keys=True)


def cases(ops: Sequence[str] | None, limit: int | None) -> Iterator[Any]:
    for op in ops or available_ops():
        if op in OPS and "triton" in OPS[op].kernels:
            module = importlib.import_module(f"bench.kernels.bench_{op}")
            yield from itertools.islice(cases_of(module, "meta"), limit)


def check(ops: Sequence[str] | None, archs: Sequence[int], limit: int | None = None) -> Iterator[Compiled]:
    """Every distinct compilation of every case, or of the first ``limit`` of each op."""
    for arch in archs:
        seen = set()
        for case in cases(ops, limit):
            with launches_of(arch) as launches:
                case.ours()
            for launch in launches:
                key = key_of(launch, arch)
                if key not in seen:
                    seen.add(key)
                    yield compile_launch(launch, arch, f"{case.op}: {case.label}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="aot_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", action="append", metavar="NAME", help="only this op's cases (repeatable)")
    parser.add_argument("--arch", action="append", type=int, choices=sorted(SHARED_LIMIT), help="default: all")
    parser.add_argument("--cases", type=int, metavar="N", help="only the first N cases of each op")
    parser.add_argument(
        "--precision", choices=("highest", "high", "medium"), default="highest",
        help="torch.set_float32_matmul_precision, which float32 products follow",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with its fault")
    arguments = parser.parse_args(argv)
    if _support.missing() or _support.interpreted():
        raise SystemExit(_support.missing() or "unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    torch.set_float32_matmul_precision(arguments.precision)
    faults = 0
    for each in check(arguments.op, arguments.arch or sorted(SHARED_LIMIT), arguments.cases):
        faults += each.fault is not None
        if arguments.json:
            print(json.dumps(asdict(each) | {"fault": each.fault}), flush=True)
            continue
        core = "wgmma" if each.wgmma else "mma" if each.mma else "-"
        print(
            f"sm_{each.arch} {each.kernel:<32} {each.registers:3d} registers  {each.shared:6d} B shared  "
            f"{each.warps} warps  {core:<5}  {each.seconds:4.1f} s  {each.fault or 'ok'}\n    {each.case}\n"
            f"    {each.constants}",
            flush=True,
        )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
