"""The emulator runs CUDA kernels as a GPU would, and shows the mistakes it is there to find."""

import pytest

from support.emulated import ROOT, built, load, run_alone, variant

emu = load(built())
ORDERS = ("ascending", "descending", "shuffled")


@pytest.fixture(autouse=True)
def default_order():
    yield
    emu.configure()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "name",
    [
        "barrier",
        "copy",
        "multiply",
        "votes",
        "unwritten_shared",
        "static_and_dynamic",
        "all_shared",
        "rows_of_grid",
        "overlap",
    ],
)
def test_right_kernels(name, order):
    emu.configure(threads=order, blocks=order)
    assert emu.selftest(name) == "ok"


def test_order_of_threads_and_blocks_is_what_was_asked_for():
    """Ticks of the first thread of the first block and the last thread of the last one."""
    emu.configure()
    assert emu.selftest("order") == "0 191"
    emu.configure(threads="descending")
    assert emu.selftest("order") == "63 128"
    emu.configure(blocks="descending")
    assert emu.selftest("order") == "128 63"
    emu.configure(threads="shuffled", blocks="shuffled")
    first = emu.selftest("order")
    assert first not in ("0 191", "191 0") and first == emu.selftest("order")


def test_missing_barrier_shows_in_some_order():
    seen = set()
    for order in ORDERS:
        emu.configure(threads=order)
        seen.add(emu.selftest("missing_barrier") == "ok")
    assert False in seen


@pytest.mark.parametrize("order", ORDERS)
def test_launch_that_reads_too_early_sees_nothing_of_the_one_ahead(order):
    emu.configure(threads=order, blocks=order)
    assert emu.selftest("early_read") == "a block saw 0.000000"


def test_missing_wait_reads_nan():
    assert "nan" in emu.selftest("missing_wait")


@pytest.mark.parametrize(
    "name, message",
    [
        ("divergent_barrier", "64 threads 40 wait at __syncthreads, 0 at a warp .* 24 have ret"),
        ("divergent_warp", r"0 wait at __syncthreads, 32 at a warp operation \(shuffle_xor\), 32"),
        ("two_operations", "lanes of a warp are at different operations: shuffle and shuffle_xor"),
        ("misaligned", "16-byte read of memory that is not aligned to 16 bytes, in thread 0 of"),
        ("missing_launch_wait", "a thread returned before it waited for the launches ahead"),
        ("partial_warp", "32 to 1024 threads in whole warps, got 48"),
        ("static_and_dynamic_untold", "at most 49152 bytes .*, got 49152 dynamic and 1024 static"),
        ("static_beyond_all", "at most 166912 bytes .*, got 165904 dynamic and 1024 static"),
        ("dynamic_beyond_all", "at most 166912 bytes of shared memory, got 166913 dynamic"),
        ("wide_arguments", "arguments must have at most 4096 bytes, got 4100"),
        ("tall_grid", "1 to 65535 along y and z, got 1 x 65536 x 1"),
    ],
)
def test_mistakes_are_reported(name, message):
    with pytest.raises(RuntimeError, match=message):
        emu.selftest(name)
    assert emu.selftest("barrier") == "ok"  # and the next launch is not affected


@pytest.mark.parametrize(
    "capability, kilobytes", [(80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)]
)
def test_shared_memory_is_that_of_the_compute_capability(capability, kilobytes):
    emu.device(compute_capability=capability)
    try:
        assert emu.selftest("all_shared") == "ok"
        with pytest.raises(RuntimeError, match=f"at most {kilobytes * 1024} bytes of shared"):
            emu.selftest("dynamic_beyond_all")
    finally:
        emu.device()


# What runs the fibers where there is no assembly for them (any processor but x86-64).
PORTABLE = """
import sys
from pathlib import Path
from support.emulated import check_orders, installed, load
from elastic_infer.ops import registry
from elastic_infer.ops.testing import laws as _laws

with installed(load(Path(sys.argv[1]))) as emu:
    for name in ("barrier", "copy", "multiply", "votes", "unwritten_shared"):
        assert emu.selftest(name) == "ok", name
    try:
        emu.selftest("divergent_warp")
        raise SystemExit("a divergent warp was not reported")
    except RuntimeError as error:
        assert "at a warp operation" in str(error)
    for op, number in (("rms_norm", 1), ("matmul", 2), ("moe_route", 1), ("attention_decode", 1)):
        spec = registry()[op]
        for dtype in spec.dtypes:
            check_orders(emu, spec, _laws.small_cases(spec)[number], dtype)
    print(emu.fibers())
"""


def test_fibers_without_assembly(tmp_path):
    """The same selftests, and a few ops in all orders, on the stacks of ucontext."""
    module = variant(tmp_path, ROOT / "csrc" / "emu" / "emu.cpp", "-DEI_EMU_UCONTEXT=1")
    done = run_alone(PORTABLE, str(module))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["ucontext"] and emu.fibers() in ("assembly", "ucontext")
