"""What surrounds the Triton kernels: when they run, what is said when they cannot, precision, launches."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gradclust_fast as gf
from gradclust_fast._dispatch import OPS
from gradclust_fast.ops import _triton
from gradclust_fast.triton_kernels import _support

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(_support.missing() is not None, reason=str(_support.missing()))
interpreted = pytest.mark.skipif(
    not _support.interpreted() or _support.missing() is not None, reason="needs Triton's interpreter"
)


class OnGpu:
    """As much of a CUDA tensor as the checks before a launch look at."""

    device, dtype = torch.device("cuda", 0), torch.float32


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU of a given capability, as far as the checks before a launch see."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(_triton, "_said", set())
    _support._gpu_unavailable.cache_clear()

    def make(capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")

    yield make
    _support._gpu_unavailable.cache_clear()


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with gf.backend("triton"), pytest.raises(RuntimeError, match="need CUDA tensors, got cpu; TRITON_INTERPRET=1 runs"):
        gf.ops.grad_sqnorm(torch.ones(2, 3), torch.ones(2, 4))


@interpreted
def test_auto_leaves_the_interpreter_alone():
    choice = gf.explain("grad_sqnorm", torch.ones(2, 3), torch.ones(2, 4))
    assert choice.backend != "triton" and "interpreter" in choice.others["triton"]


@interpreted
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if "triton" in op.kernels and "grad_" in name])
def test_float64_is_refused_and_says_why(name):
    act, grad = torch.ones(2, 3).double(), torch.ones(2, 4).double()
    more = {
        "grad_dot": (torch.ones(5, 4).double(), torch.ones(5, 3).double()),
        "grad_quantities": {"sqnorm": True},
    }.get(name, ())
    args, kwargs = ((), more) if isinstance(more, dict) else (more, {})
    with gf.backend("triton"), pytest.raises(RuntimeError, match=f"{name}: .*float64 factors need float64; use"):
        getattr(gf.ops, name)(act, grad, *args, **kwargs)


@needs_triton
def test_an_old_gpu_is_warned_of_once(gpu):
    gpu((7, 5))
    with pytest.warns(RuntimeWarning, match="goes on without.*compute capability 8.0 or newer, Some GPU has 7.5"):
        assert "Some GPU has 7.5" in _triton.triton_refuses(OnGpu)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "Some GPU has 7.5" in _triton.triton_refuses(OnGpu)


@needs_triton
def test_hopper_and_ampere_are_taken(gpu):
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0)):
        gpu(capability)
        _support._gpu_unavailable.cache_clear()
        assert _triton.triton_refuses(OnGpu) is None


@needs_triton
def test_amds_gpus_are_refused(gpu, monkeypatch):
    gpu((9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    with pytest.warns(RuntimeWarning, match="built for AMD"):
        assert _triton.triton_refuses(OnGpu)


@pytest.mark.parametrize(
    "module, message",
    [
        (None, "Triton cannot be imported .*pip install triton"),
        (SimpleNamespace(__version__="3.2.0"), r"need Triton 3.6 or newer, this is 3.2.0; upgrade"),
    ],
    ids=["missing", "old"],
)
def test_no_triton_and_an_old_one_say_so_once(gpu, monkeypatch, module, message):
    gpu((9, 0))
    monkeypatch.setitem(sys.modules, "triton", module)
    _support.missing.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=message):
            assert _triton.triton_refuses(OnGpu)
        assert _triton.triton_refuses(OnGpu)
        assert "unavailable" in gf.build_info()["Triton kernels"]
    finally:
        _support.missing.cache_clear()


def test_running_without_a_gpu_imports_no_triton():
    code = "import sys, torch, gradclust_fast as gf; gf.ops.grad_sqnorm(torch.ones(2, 3), torch.ones(2, 4))\n"
    run = [sys.executable, "-c", code + "print('triton' in sys.modules)"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(run, cwd=ROOT, env=environment, check=True, text=True, capture_output=True)
    assert done.stdout == "False\n"


@pytest.fixture
def torch_setting():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("setting, precision", [("highest", "ieee"), ("high", "tf32x3"), ("medium", "tf32")])
def test_float32_products_follow_torchs_setting(torch_setting, setting, precision):
    torch.set_float32_matmul_precision(setting)
    assert _support.float32_precision() == precision


def test_tf32_is_never_taken_unasked():
    assert _support.float32_precision() == "ieee"


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
def test_torchs_newer_setting_is_understood():
    code = (
        "import torch\nfrom gradclust_fast.triton_kernels import _support\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'\nprint(_support.float32_precision())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, text=True, capture_output=True)
    assert done.stdout == "tf32\n"


def test_out_of_memory_names_the_op(monkeypatch):
    def run(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")

    op = OPS["grad_gram"]
    kernel = op.kernels["reference"]
    monkeypatch.setitem(op.kernels, "reference", type(kernel)(run, kernel.refuses, kernel.loses, kernel.route))
    with gf.backend("reference"), pytest.raises(torch.OutOfMemoryError, match=r"grad_gram ran out.*20\.00 GiB"):
        gf.ops.grad_gram(torch.ones(2, 3), torch.ones(2, 4))


def test_a_recording_makes_no_launch_and_an_empty_grid_none_either():
    with _support.recording((9, 0), 132) as launches:
        _support.launch("kernel", (3,), 1, 2, device=torch.device("meta"), num_warps=4)
        _support.launch("kernel", (3, 0), 1, 2, device=torch.device("meta"))
    (launch,) = launches
    assert launch.grid == (3,) and launch.args == (1, 2) and launch.meta == {"num_warps": 4}
    _support.launch("kernel", (0,), device=CPU)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [15, -15, 30, -30])
def test_one_position_survives_magnitudes_in_opposite_directions(dtype, exponent):
    act, grad = torch.randn(4, 70, dtype=torch.float64), torch.randn(4, 90, dtype=torch.float64)
    act[:2] *= 10.0**exponent
    grad[:2] *= 10.0**-exponent
    act[0, :64] *= 1e-6  # the largest comes in a later block
    grad[3] = 0
    act, grad = act.to(dtype), grad.to(dtype)
    want = act.double().square().sum(1) * grad.double().square().sum(1)
    bias = want + grad.double().square().sum(1)
    with gf.backend("triton"):
        for found in (gf.ops.grad_sqnorm(act, grad), gf.ops.grad_quantities(act, grad, sqnorm=True).sqnorm):
            torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=0)
        if exponent > 0:  # else the bias's gradient itself is out of range
            torch.testing.assert_close(gf.ops.grad_sqnorm(act, grad, bias=True).double(), bias, rtol=1e-5, atol=0)
        huge = torch.full((1, 3), 1e30)
        assert gf.ops.grad_sqnorm(huge, huge).isinf().all()


def test_strides_are_passed_in_units_that_tell_their_alignment():
    assert _support.unit(64, 4096) == 16 and _support.unit(64, 33) == 1 and _support.unit(0, 16) == 16


@interpreted
@pytest.mark.parametrize("constant", [False, True], ids=["plain", "centred"])
@pytest.mark.parametrize(
    "T, I, multiprocessors",
    [
        pytest.param(3, 20, 4, id="several-examples-a-tile"),
        pytest.param(70, 20, 4, id="two-tiles-a-side"),
        pytest.param(150, 20, 4, id="three"),
        pytest.param(3, 200, 3, id="several-examples-a-split-tile"),
        pytest.param(70, 300, 40, id="two-split-tiles-a-side"),
    ],
)
def test_gram_tiles_of_every_layout(T, I, multiprocessors, constant):
    """3 + 1 examples in groups, or a triangle of tiles; plain, or with the terms of what was subtracted; in parts."""
    act, grad = torch.randn(4, T, I), torch.randn(4, T, 12)
    if constant:
        act[1:] = 3 + 1e-2 * act[1:]  # the first example of the group stays plain
    found, target = torch.empty(4), _support.Target((0, 0), multiprocessors)
    gram = importlib.import_module("gradclust_fast.triton_kernels.grad_sqnorm_gram")
    with _support.recording((0, 0), multiprocessors) as launches:
        gram.by_gram_tiles(act, grad, True, found, target)
    assert ("grad_sqnorm_gram_join_kernel" in [launch.kernel.__name__ for launch in launches]) == (I > 20)
    gram.by_gram_tiles(act, grad, True, found, target)
    G = grad.double().mT @ act.double()
    want = G.square().sum((1, 2)) + grad.double().sum(1).square().sum(1)
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=0)


@interpreted
@pytest.mark.parametrize("B, I", [(1, 20), (2, 20), (1, 70), (5, 20)])
def test_few_examples_with_many_positions_are_split(B, I):
    act, grad = torch.randn(B, 600, I), torch.randn(B, 600, 12)
    act[:, 590:] *= 10  # a part that is lost shows
    with gf.backend("triton"):
        assert "direct" in gf.explain("grad_sqnorm", act, grad).route
        found = gf.ops.grad_sqnorm(act, grad)
    want = (grad.double().mT @ act.double()).square().sum((1, 2))
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=0)


FEW = [(1, 256, 4096, 4096), (8, 128, 768, 768), (1, 65_536, 64, 64), (4, 8192, 512, 16), (1, 40, 9000, 512)]


@needs_triton
@pytest.mark.parametrize("B, T, I, O", FEW)
def test_few_examples_fill_a_gpu(B, T, I, O, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    factors = (torch.empty(B, T, F, dtype=torch.bfloat16, device="meta") for F in (I, O))
    with _support.recording((9, 0), 132) as launches, gf.backend("triton"):
        OPS["grad_sqnorm"].run(*factors, False)
    products = ("grad_sqnorm_gram_kernel", "grad_sqnorm_direct_kernel")
    plain = next(launch for launch in launches if launch.kernel.__name__ in products)
    assert plain.grid[0] >= 132
