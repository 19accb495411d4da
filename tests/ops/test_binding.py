"""How tensors cross into native code, and what native code does to Python's lifetimes and lock."""

import ctypes
import gc
import shutil
import subprocess
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch

from elastic_infer import _C
from elastic_infer.ops import Pool, Step, registry
from elastic_infer.ops.matmul import matmul
from elastic_infer.ops.rms_norm import rms_norm
from elastic_infer.ops.tiles import TiledWeight
from support.engines import HANG

ROOT = Path(__file__).resolve().parents[2]

LAYOUT_CHECK = """
#include <cstddef>
#include <type_traits>
#include "ATen/dlpack.h"
#include "host/dlpack.h"
#define SAME_SIZE(T) static_assert(sizeof(::T) == sizeof(ei::T) && alignof(::T) == alignof(ei::T))
#define SAME(T, m) \\
  static_assert(offsetof(::T, m) == offsetof(ei::T, m) && \\
                sizeof(decltype(::T::m)) == sizeof(decltype(ei::T::m)))
#define SAME_VALUE(v) static_assert(static_cast<int>(::v) == static_cast<int>(ei::v))
SAME_SIZE(DLDevice); SAME(DLDevice, device_type); SAME(DLDevice, device_id);
SAME_SIZE(DLDataType); SAME(DLDataType, code); SAME(DLDataType, bits); SAME(DLDataType, lanes);
SAME_SIZE(DLTensor); SAME(DLTensor, data); SAME(DLTensor, device); SAME(DLTensor, ndim);
SAME(DLTensor, dtype); SAME(DLTensor, shape); SAME(DLTensor, strides); SAME(DLTensor, byte_offset);
SAME_SIZE(DLPackVersion); SAME(DLPackVersion, major); SAME(DLPackVersion, minor);
SAME_SIZE(DLPackExchangeAPIHeader);
SAME(DLPackExchangeAPIHeader, version); SAME(DLPackExchangeAPIHeader, prev_api);
SAME_SIZE(DLPackExchangeAPI); SAME(DLPackExchangeAPI, header);
SAME(DLPackExchangeAPI, managed_tensor_allocator);
SAME(DLPackExchangeAPI, managed_tensor_from_py_object_no_sync);
SAME(DLPackExchangeAPI, managed_tensor_to_py_object_no_sync);
SAME(DLPackExchangeAPI, dltensor_from_py_object_no_sync);
SAME(DLPackExchangeAPI, current_work_stream);
SAME_VALUE(kDLCPU); SAME_VALUE(kDLCUDA); SAME_VALUE(kDLCUDAHost); SAME_VALUE(kDLCUDAManaged);
SAME_VALUE(kDLInt); SAME_VALUE(kDLUInt); SAME_VALUE(kDLFloat); SAME_VALUE(kDLBfloat);
SAME_VALUE(kDLComplex); SAME_VALUE(kDLBool);
static_assert(DLPACK_MAJOR_VERSION == 1);
"""


def test_dlpack_layout_is_torchs(tmp_path):
    """Sizes, offsets and enum values of csrc/host/dlpack.h against the header torch ships."""
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    assert compiler, "a C++ compiler is needed, as for building the library"
    source = tmp_path / "layout.cpp"
    include = Path(torch.__file__).parent / "include"
    command = [compiler, "-std=c++17", "-fsyntax-only", "-w", f"-I{include}", f"-I{ROOT / 'csrc'}"]

    def errors(text):
        source.write_text(text)
        done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
        return done.stderr if done.returncode else ""

    assert errors(LAYOUT_CHECK) == ""
    for here in ("offsetof(ei::T, m)", "static_cast<int>(ei::v)", "sizeof(ei::T)"):
        assert "static assertion" in errors(LAYOUT_CHECK.replace(here, f"{here} + 1"))


# -- what is seen of a tensor ------------------------------------------------------------------


class Sub(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "tensor, seen",
    [
        (torch.zeros(2, 3), "float32[2, 3] on cpu"),
        (torch.zeros(6, dtype=torch.bfloat16)[::2], "bfloat16[3] on cpu"),
        (torch.zeros((), dtype=torch.int64), "int64[] on cpu"),
        (torch.zeros(0, 3, dtype=torch.int32), "int32[0, 3] on cpu"),
        (torch.zeros(4, dtype=torch.uint8), "uint8[4] on cpu"),
        (torch.zeros(4, dtype=torch.float64), "float64[4] on cpu"),
        (torch.zeros(4, dtype=torch.bool), "bool[4] on cpu"),
        (torch.nn.Parameter(torch.zeros(2)), "float32[2] on cpu"),
        (torch.zeros(2).as_subclass(Sub), "float32[2] on cpu"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_tensors_are_seen_as_they_are(tensor, seen):
    assert _C.describe(tensor) == seen


def test_strides_and_offsets_are_followed():
    x = torch.randn(9, 64)
    view = x[1:8:2, 16:48]
    out = torch.zeros(4, 32)
    rms_norm(view, torch.ones(32), out, eps=1e-5)
    want = view / (view.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.allclose(out, want, atol=1e-6)


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("thing", [3, 2.5, "x", [1.0], {}, torch.Tensor, object()], ids=repr)
def test_anything_but_a_tensor_is_a_type_error(thing):
    with pytest.raises(TypeError, match=f"expected a tensor, got .*{type(thing).__name__}"):
        _C.describe(thing)


@pytest.mark.parametrize("spec", [pytest.param(s, id=s.name) for s in registry().values()])
def test_ops_refuse_arguments_of_other_types(spec):
    """Every argument that is neither a tensor nor None, one at a time: TypeError or ValueError."""
    case = next(iter(spec.cases()))
    arguments = spec.inputs(case, torch.float32, torch.Generator().manual_seed(0))
    for name in arguments:
        with pytest.raises((TypeError, ValueError)):
            spec.call({**arguments, name: {"not": "this"}}, None)


def test_negative_and_conjugate_views_are_refused():
    z = torch.randn(4, 16, dtype=torch.complex64).conj()
    out = torch.zeros(4, 16)
    with pytest.raises(TypeError, match="negated view"):
        rms_norm(z.imag, torch.ones(16), out, eps=1e-5)
    with pytest.raises(TypeError, match="negated view"):
        rms_norm(torch._neg_view(out), torch.ones(16), out, eps=1e-5)
    with pytest.raises(ValueError, match=r"residual must be float32 or bfloat16, got complex64"):
        rms_norm(z, torch.ones(16), out, eps=1e-5)
    rms_norm(z.imag.resolve_neg(), torch.ones(16), out, eps=1e-5)


def test_misaligned_memory_is_refused():
    odd = torch.frombuffer(bytearray(70), dtype=torch.float32, offset=1, count=16)[None]
    with pytest.raises(TypeError, match="aligned"):
        rms_norm(odd, torch.ones(16), torch.zeros(1, 16), eps=1e-5)


@pytest.mark.parametrize(
    "tensor, reason",
    [
        (torch.empty(2, device="meta"), "meta"),
        (torch.zeros(2, 2).to_sparse(), "storage"),
        (torch.zeros((1,) * 7), "at most 6 dimensions, got 7"),
    ],
    ids=["meta", "sparse", "7 dimensions"],
)
def test_tensors_without_plain_memory_are_refused(tensor, reason):
    with pytest.raises(TypeError, match=reason) as error:
        _C.describe(tensor)
    assert "\n" not in str(error.value), "one line, without the framework's own traces"


# -- other frameworks, devices and versions, through a table made by hand -----------------------


class DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


FILL = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DLTensor))


class Table(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("prev", ctypes.c_void_p),
        ("allocator", ctypes.c_void_p),
        ("from_object", ctypes.c_void_p),
        ("to_object", ctypes.c_void_p),
        ("fill", FILL),
        ("stream", ctypes.c_void_p),
    ]


MEMORY = (ctypes.c_float * 64)()
SHAPE = (ctypes.c_int64 * 2)(4, 16)
KEPT = []


def foreign_type(device=1, major=1, fill=None, prev=None, capsule=b"dlpack_exchange_api"):
    """A tensor type of another framework, whose tensors are dense float32 [4, 16] on `device`."""

    def fill_in(_, out):
        t = out.contents
        t.data, t.device_type, t.device_id = ctypes.addressof(MEMORY), device, 0
        t.ndim, t.code, t.bits, t.lanes, t.shape = 2, 2, 32, 1, SHAPE
        t.strides, t.byte_offset = None, 0
        return 0

    function = FILL() if fill == "absent" else FILL(fill or fill_in)
    table = Table(major, 0, ctypes.addressof(prev) if prev else None, None, None, None, function)
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = (
        ctypes.py_object,
        [
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_void_p,
        ],
    )
    KEPT.append((table, function, capsule))  # capsules keep nothing alive
    return type(
        "Foreign",
        (),
        {
            "__dlpack_c_exchange_api__": make(ctypes.addressof(table), capsule, None),
            "table": table,
        },
    )


def test_tensors_of_another_framework_work():
    """Strides left out mean dense; is_neg is torch's alone."""
    for i in range(64):
        MEMORY[i] = i - 20
    out = torch.zeros(4, 16)
    rms_norm(foreign_type()(), torch.ones(16), out, eps=1e-5)
    x = torch.tensor(list(MEMORY)).view(4, 16)
    assert torch.allclose(out, x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt(), atol=1e-6)


def test_wrong_device_is_refused_by_name():
    cuda = foreign_type(device=2)()
    assert _C.describe(cuda) == "float32[4, 16] on cuda:0"
    ones, out = torch.ones(16), torch.zeros(4, 16)
    with pytest.raises(
        ValueError,
        match=r"rms_norm: residual must be on the CPU .* got "
        r"float32\[4, 16\] on cuda:0",
    ):
        rms_norm(cuda, ones, out, eps=1e-5)
    with pytest.raises(
        ValueError,
        match="rms_norm: out must be on the same device as the first "
        r"tensor, got float32\[4, 16\] on cuda:0",
    ):
        rms_norm(out, ones, cuda, eps=1e-5)
    with pytest.raises(TypeError, match="on the CPU or a CUDA device, got device type 7"):
        _C.describe(foreign_type(device=7)())


def test_exchange_versions():
    """A newer table is walked back to version 1; without one it is refused."""
    old = foreign_type()
    assert _C.describe(foreign_type(major=2, prev=old.table)()) == "float32[4, 16] on cpu"
    for kind in (foreign_type(major=2), foreign_type(major=0), foreign_type(fill="absent")):
        with pytest.raises(TypeError, match="does not offer DLPack exchange version 1"):
            _C.describe(kind())
    with pytest.raises(TypeError, match="unknown name"):
        _C.describe(foreign_type(capsule=b"something_else")())


# -- lifetimes ---------------------------------------------------------------------------------


def test_step_keeps_its_tensors_alive():
    """Only the step holds them; it reads their memory at every replay and lets go with it."""
    step, out = Step(Pool(2)), torch.zeros(300, 64)
    x, weight = torch.randn(300, 64), torch.rand(64)
    want = rms_norm(x, weight, torch.zeros(300, 64), eps=1e-5)
    rms_norm(x, weight, out, eps=1e-5, run=step)
    alive = [weakref.ref(x), weakref.ref(weight)]
    del x, weight
    gc.collect()
    assert all(ref() is not None for ref in alive)
    noise = [torch.randn(300, 64) for _ in range(20)]  # would reuse freed memory
    step.run()
    assert torch.equal(out, want) and len(noise) == 20
    del step
    gc.collect()
    assert all(ref() is None for ref in alive)


def test_calls_keep_no_reference():
    x = torch.randn(3, 16)
    ref = weakref.ref(x)
    rms_norm(x, torch.ones(16), torch.zeros(3, 16), eps=1e-5, run=Pool(1))
    del x
    gc.collect()
    assert ref() is None


# -- the interpreter lock ----------------------------------------------------------------------


def busy_work():
    """(a matmul of a few hundred milliseconds, ready to be run or recorded; its output)."""
    x, out = torch.randn(512, 2048), torch.empty(512, 2048)
    weight = TiledWeight.pack(torch.randn(2048, 2048))

    def call(run):
        matmul(x, weight, out, run=run)

    return call, out


@pytest.mark.parametrize("how", ["call", "step", "profile"])
def test_another_thread_runs_meanwhile(how):
    """The lock is released while kernels run: another thread finds an output half written. Under
    the lock it never would, however often the call is made."""
    (work, out), pool = busy_work(), Pool(1, "portable")
    step = Step(pool)
    work(step)
    some = out.numpy()[::64, ::64]  # so few that numpy keeps the lock while it looks
    calls = [0]  # odd while one runs
    seen, stop = threading.Event(), threading.Event()

    def look():
        while not (seen.is_set() or stop.is_set()):
            call, unwritten = calls[0], (some != some).sum()
            if 0 < unwritten < some.size and call % 2 and call == calls[0]:
                seen.set()

    thread = threading.Thread(target=look)
    thread.start()
    end = time.monotonic() + HANG
    try:
        while not seen.is_set():
            assert time.monotonic() < end, "nothing ran during any call"
            out.fill_(torch.nan)
            calls[0] += 1
            {"call": lambda: work(pool), "step": step.run, "profile": step.profile}[how]()
            calls[0] += 1
    finally:
        stop.set()
        thread.join()


def test_threads_may_share_a_pool():
    """Calls from many threads on one pool give the bits of calls made alone."""
    pool, spec = Pool(2), registry()["matmul"]
    cases = [c for c in spec.cases() if not c.get("bench")]
    problems = [
        spec.inputs(case, torch.float32, torch.Generator().manual_seed(i))
        for i, case in enumerate(cases)
    ]
    want = []
    for problem in problems:
        spec.call(problem, None)
        want.append(problem["out"].clone())
        problem["out"].fill_(torch.nan)
    failures = []

    def work(problem, expected):
        for _ in range(20):
            mine = {**problem, "out": torch.empty_like(problem["out"])}
            spec.call(mine, pool)
            if not torch.equal(mine["out"], expected):
                failures.append("bits differ")

    threads = [
        threading.Thread(target=work, args=pair) for pair in zip(problems, want) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_an_error_leaves_the_pool_usable():
    """A kernel that finds bad data at a replay reports it once; the next replay is clean."""
    embed = registry()["embed"]
    a = embed.inputs(
        {"R": 3, "V": 5, "D": 16, "widths": None}, torch.float32, torch.Generator().manual_seed(0)
    )
    pool = Pool(2)
    step = Step(pool)
    embed.call(a, step)
    a["ids"][1] = 99
    with pytest.raises(ValueError, match=r"embed: ids must hold indices in \[0, 5\), got 99"):
        step.run()
    a["ids"][1] = 2
    step.run()
    assert torch.equal(a["out"], embed.reference(a)["out"])
