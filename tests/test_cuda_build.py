"""Building the GPU kernels, and what surrounds them: the compilers' reports for GPUs of both vendors, the
library loaded, launches that fail, the self-check, and the shim that the kernels' own tests rest on.

No GPU is asked for.
"""

import ctypes
import importlib
import math
from collections.abc import Iterator
from types import SimpleNamespace

import gpu_sources
import pytest
import torch
from compilers import require_compiler
from gpu_sources import Report, hip_report, nvcc_report
from operator_calls import OPERATORS, VARIANTS, call

from kernels import jit_build
from kernels.case import Case
from kernels.dispatch import explain
from kernels.gpu import library

SIZES = (32, 64, 128)
SCANS = ("forward_kernel", "reverse_kernel", "again_kernel")
REGISTERS = 65536  # of a multiprocessor, and so the most that a block may take


@pytest.fixture(params=OPERATORS)
def operator(request) -> str:
    return request.param


@pytest.fixture
def shim(operator) -> Iterator[str]:
    """The backend's name."""
    with gpu_sources.shim(operator) as name:
        yield name


def module(operator: str):
    """The operator's GPU backend."""
    return importlib.import_module(f"kernels.{operator}.cuda")


def threads(kernel: str, size: int) -> int:
    """Of a block of a scan kernel, by its template arguments: one for WKV-7, four for WKV-6."""
    arguments = kernel.split("<")[1].rstrip(">").split(", ")
    return 8 * size // int(arguments[0]) if len(arguments) == 1 else 32 * int(arguments[2])


def scans(report: Report, operator: str, ways: int) -> Report:
    """The scan kernels of a report, all of which are there.

    Args:
        report: a compiler's.
        operator: its name; WKV-6's kernels come with and without the bonus.
        ways: in how many ways threads share a head: by whether there are few heads or many.
    """
    found = {name: x for name, x in report.items() if name.startswith(SCANS)}
    each = ways * (2 if operator == "wkv6" else 1)
    assert [sum(name.startswith(scan) for name in found) for scan in SCANS] == [each] * 3, sorted(report)
    return found


def spilled(report: Report) -> Report:
    """The kernels that keep something in memory for want of registers."""
    return {name: x for name, x in report.items() if x[1] > 0}


@pytest.mark.parametrize("size", SIZES)
def test_nvcc_keeps_the_state_in_registers(operator, size):
    """Hopper: nothing spilled, and a block fits into a multiprocessor."""
    report = nvcc_report(library.source(operator), "sm_90", size)
    assert not spilled(report)
    ways = 1 if operator == "wkv7" and size == 128 else 2
    for name, (registers, _) in scans(report, operator, ways).items():
        assert registers * threads(name, size) <= REGISTERS, (name, registers)


@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "sm_120"])
def test_nvcc_keeps_it_there_on_other_generations(operator, arch):
    """Ampere and Blackwell, 16-bit inputs."""
    report = nvcc_report(library.source(operator), arch, 64, torch.bfloat16)
    assert scans(report, operator, ways=2) and not spilled(report)


@pytest.mark.parametrize("size", SIZES)
def test_hip_keeps_the_state_in_registers(operator, tmp_path, size):
    """MI300: nothing lies in memory for want of registers."""
    report = hip_report(library.source(operator), "gfx942", tmp_path, size)
    # WKV-6's blocks have two warps at least with HIP, which at N = 32 are a whole head.
    ways = 1 if (operator, size) in (("wkv7", 128), ("wkv6", 32)) else 2
    assert scans(report, operator, ways) and not spilled(report)


@pytest.mark.parametrize(("arch", "dtype"), [("gfx90a", torch.bfloat16), ("gfx1100", torch.float16)], ids=str)
def test_hip_keeps_it_there_on_other_generations(operator, tmp_path, arch, dtype):
    """MI200 and RDNA 3, whose wavefronts have 32 threads; 16-bit inputs."""
    report = hip_report(library.source(operator), arch, tmp_path, 64, dtype)
    assert scans(report, operator, ways=2) and not spilled(report)


@pytest.mark.parametrize(("hip", "expected"), [(None, "compute_90,code=sm_90"), ("7.0", "gfx942:sramecc+")])
def test_the_compiler_is_that_of_the_gpu(monkeypatch, hip, expected):
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    compiler, flags = library.target.__wrapped__(torch.device("cuda", 0))
    assert compiler is (jit_build.HIPCC if hip else jit_build.NVCC)
    assert expected in flags[-1]


def test_heads_are_split_where_they_are_few(monkeypatch):
    monkeypatch.setattr(library, "multiprocessors", lambda device: 132)
    gpu = torch.device("cuda", 0)
    assert library.split(132, gpu) and not library.split(133, gpu)


def test_the_backend_says_why_not(operator):
    """On a CPU it is no choice, and says so; on a GPU nothing holds it back but its self-check."""
    assert "not cpu" in explain(operator)["rejected"]["cuda"]
    backend = importlib.import_module(f"kernels.{operator}").TABLE["cuda"]
    assert backend.native and backend.step is not None and backend.held_back is None


def test_the_self_check_would_find_wrong_kernels(operator, shim, monkeypatch):
    """What `prepare` runs on a GPU, here through the shim: it fails where results are off or missing."""
    case, seen = Case("cpu", torch.float32, 32), set()
    cuda, run = module(operator), importlib.import_module(f"kernels.{operator}").TABLE[shim].run

    def split(units, device):
        seen.add(units <= 5)
        return units <= 5

    monkeypatch.setattr(library, "multiprocessors", lambda device: 5)
    monkeypatch.setattr(library, "split", split)
    monkeypatch.setattr(cuda, "run", run)
    cuda.prepare(case)
    assert seen == {True, False}, "the kernels for few heads and those for many are checked"
    monkeypatch.setattr(cuda, "run", lambda *x: tuple(y * 1.001 for y in run(*x)))
    with pytest.raises(jit_build.BuildError, match="wrong on this device in its self-check"):
        cuda.prepare(case)

    def no_kernel_for_this_device(*tensors):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(cuda, "run", no_kernel_for_this_device)
    with pytest.raises(jit_build.BuildError, match="did not run on this device .no kernel image"):
        cuda.prepare(case)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_failed_launch_is_an_error(variant):
    """The message has what the library says of it."""
    operator, bonus = variant
    inputs = {name: x.float() for name, x in call(variant, batch=0).inputs.items()}
    state = inputs.pop("state")
    none = [None] if operator == "wkv6" and not bonus else []
    with gpu_sources.shim(operator), pytest.raises(RuntimeError, match=f"{operator}_forward at .* one block"):
        gpu_sources.operators(operator).forward(*inputs.values(), *none, state, None, False)


# How many floats of scratch B = 2, T = 65, H = 3, N = 32 takes: WKV-7's h or WKV-6's du, and two anchors.
@pytest.mark.parametrize(
    ("operator", "scratch", "pointers"), [("wkv7", 2 * 65 * 3 * 32, 12), ("wkv6", 2 * 3 * 32, 10)]
)
def test_the_cuda_library_loads_and_reports(operator, scratch, pointers, monkeypatch):
    """Built by nvcc as for a GPU, loaded where there may be none: what the CUDA runtime refuses is told."""
    require_compiler(jit_build.NVCC)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(library, "target", library.target.__wrapped__)
    built = library.library.__wrapped__(operator, torch.bfloat16, 32, gpu)
    sizes = [ctypes.c_int64(n) for n in (2, 65, 3, 0)]
    assert getattr(built, f"{operator}_scratch")(*sizes) == scratch + 2 * 3 * 2 * 32 * 32
    no_rows = [ctypes.c_int64(n) for n in (0, 65, 3, 0)]
    launched = getattr(built, f"{operator}_forward")(*no_rows, *[ctypes.c_void_p()] * pointers)
    assert launched == library.LAUNCH_FAILED
    assert built.transmute_message()


PROBE = """
#include "{folder}/portable.h"
using namespace transmute;

TRANSMUTE_GLOBAL void TRANSMUTE_BOUNDS(64) divided_kernel() {{
  if (thread_index() < 7) shuffle_xor(0, 1, 32);
  else sync_threads();
}}
TRANSMUTE_GLOBAL void TRANSMUTE_BOUNDS(128) mirror_kernel(const float* in, float* out) {{
  TRANSMUTE_SHARED(float, all, 128);
  all[thread_index()] = in[thread_index()];
  {barrier}
  out[thread_index()] = all[127 - thread_index()];
}}
template <class T>
TRANSMUTE_GLOBAL void TRANSMUTE_BOUNDS(32) round_kernel(const float* in, T* out, float* back) {{
  const int64_t i = block_index() * 32 + thread_index();
  store(out + i, in[i]);
  back[i] = load(out + i);
}}

extern "C" int divided() {{ return LAUNCH(divided_kernel, 1, 64, nullptr); }}
extern "C" int nothing() {{ return LAUNCH(divided_kernel, 0, 64, nullptr); }}
extern "C" int mirror(const float* in, float* out) {{
  return LAUNCH(mirror_kernel, 1, 128, nullptr, in, out);
}}
extern "C" int round_bf16(int64_t count, const float* in, bf16* out, float* back) {{
  return LAUNCH(round_kernel<bf16>, count / 32, 32, nullptr, in, out, back);
}}
extern "C" int round_fp16(int64_t count, const float* in, fp16* out, float* back) {{
  return LAUNCH(round_kernel<fp16>, count / 32, 32, nullptr, in, out, back);
}}
"""


def probe(tmp_path, barrier="sync_threads();") -> ctypes.CDLL:
    """A library of small kernels for the shim."""
    require_compiler()
    source = tmp_path / "probe.cu"
    source.write_text(PROBE.format(folder=library.FOLDER, barrier=barrier))
    built = jit_build.load(jit_build.build("probe", [source], library.SHIM_FLAGS, headers=library.HEADERS))
    built.transmute_message.restype = ctypes.c_char_p
    return built


def pointer(x: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def test_rounding_is_that_of_torch(tmp_path):
    """To 16 bits and back, ties, subnormals, overflow, infinities and NaN among them."""
    built = probe(tmp_path)
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), generator=torch.Generator().manual_seed(0))
    special = [
        0.0,
        -0.0,
        math.inf,
        -math.inf,
        math.nan,
        65504.0,
        65520.0,
        3.4e38,
        1e-40,
        6e-8,
        1.00390625,
        1.01171875,
    ]
    x = torch.cat([bits.int().view(torch.float32), torch.randn(4096 - len(special)), torch.tensor(special)])
    for name, dtype in (("round_bf16", torch.bfloat16), ("round_fp16", torch.float16)):
        out, back = torch.empty_like(x, dtype=dtype), torch.empty_like(x)
        assert getattr(built, name)(ctypes.c_int64(len(x)), pointer(x), pointer(out), pointer(back)) == 0
        torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(back, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


def test_the_shim_finds_what_a_gpu_would_not_forgive(tmp_path):
    """A warp divided at a shuffle hangs, an empty grid fails, a missing barrier gives wrong results."""
    built, without = probe(tmp_path), probe(tmp_path, barrier="")
    assert built.divided() == library.LAUNCH_FAILED and b"wait for each other" in built.transmute_message()
    assert built.nothing() == library.LAUNCH_FAILED and b"at least one block" in built.transmute_message()
    x, right, wrong = torch.randn(128), torch.empty(128), torch.zeros(128)
    assert built.mirror(pointer(x), pointer(right)) == 0 and torch.equal(right, x.flip(0))
    assert without.mirror(pointer(x), pointer(wrong)) == 0 and not torch.equal(wrong, x.flip(0))
