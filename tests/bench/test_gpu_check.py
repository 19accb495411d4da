"""The GPU check: its floors, peers, parsers and tables, and that one bad item costs only itself."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.common.pairs import compare
from bench.gpu import floors, peers, report, sanitize, setting, shapes, worker
from bench.gpu.laws import own_names
from bench.tables import gpu as gpu_tables
from elastic_infer.ops import registry
from elastic_infer.ops.testing.laws import copy

ROOT = Path(__file__).resolve().parents[2]

# Floors and shapes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "width, times",  # microseconds at 4.3 TB/s, 4096 tokens of context, 1 to 128 sequences
    [
        ("30B", (1530, 5449, 12506, 18185)),
        ("23B", (1185, 4144, 9523, 14192)),
        ("12B", (846, 2401, 5376, 8946)),
    ],
)
def test_step_floor_is_the_sum_of_its_layers(width, times):
    """Against figures computed by hand from the layers' sizes."""
    config, widths = shapes.model_of(shapes.THIRTY)
    for batch, us in zip((1, 8, 32, 128), times):
        moved = floors.step_bytes(config, widths[width], batch, 4096)
        assert moved / 4.3e6 == pytest.approx(us, rel=0.01)


@pytest.mark.parametrize("width, ms", [("30B", 31.3), ("23B", 24.2), ("12B", 17.1)])
def test_prefill_floor(width, ms):
    """4096 tokens at 790 TFLOP/s."""
    config, widths = shapes.model_of(shapes.THIRTY)
    flops = floors.prefill_flops(config, widths[width], 4096)
    assert flops / 790e9 == pytest.approx(ms, rel=0.02)


def test_one_sequence_reads_what_the_library_says_a_token_reads():
    from elastic_infer.sizing.footprint import bytes_per_token

    config, widths = shapes.model_of(shapes.THIRTY)
    for width in widths.values():
        ours = floors.step_bytes(config, width, 1, 0)
        state = sum(
            8 * width.mamba_num_heads[i] * config.mamba_head_dim * config.ssm_state_size
            for i in config.layers_of("M")
        )
        assert ours - state == pytest.approx(
            bytes_per_token(config, width, torch.bfloat16), rel=2e-3
        )


def test_cases_of_true_sizes_cover_every_op_of_a_pass():
    made = shapes.OpCases(shapes.THIRTY)
    cases = [*made.steps(4096), *made.prompts(4096)]
    assert len({c.name for c in cases}) == len(cases)
    assert {c.op for c in cases} >= {
        "embed",
        "rms_norm",
        "matmul",
        "causal_conv",
        "ssm_scan",
        "ssm_step",
        "gated_norm",
        "mamba_step",
        "kv_append",
        "attention_prefill",
        "attention_decode",
        "moe_route",
        "moe_matmul",
        "sample",
    }
    for case in cases:
        moved, _ = registry()[case.op].cost(case.cost, 2)
        whole, _ = registry()[case.op].cost(case.case, 2)
        assert 0 < moved <= whole
    in_proj = next(c for c in cases if c.part == "in_proj" and c.width == "30B")
    assert in_proj.case["segments"] == (4096, 4096, 1024, 1024, 64)
    narrow = next(c for c in cases if c.part == "in_proj" and c.width == "12B")
    assert narrow.case["n"] == ((3584, 3584, 1024, 1024, 56),) and narrow.case["K"] == 2688


# Peers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        c.name
        for c in shapes.OpCases(shapes.sizes(True)).steps(70)
        if c.rows <= 8
        if c.op in ("matmul", "moe_matmul", "causal_conv", "mamba_step")
    ],
)
def test_peers_compute_the_ops(case):
    """At a width's prefix of the full weights too."""
    made = {c.name: c for c in shapes.OpCases(shapes.sizes(True)).steps(70)}[case]
    spec = registry()[made.op]
    problem = spec.inputs(made.case, torch.bfloat16, torch.Generator().manual_seed(1))
    mine, theirs = copy(problem), copy(problem)
    spec.call(mine, None)
    peers.peers_of(made.op)[0](theirs)()
    compare(spec, mine, theirs, problem)


def selective_state_update(state, x, dt, A, B, C, D, dt_bias, dt_softplus, state_batch_indices):
    """What mamba_ssm's kernel of this name computes, after its documentation: head h of H uses
    group h // (H / G) of B and C."""
    assert dt_softplus
    rows, H, G = state_batch_indices.long(), x.shape[1], B.shape[1]
    delta = torch.nn.functional.softplus(dt.float() + dt_bias.float())
    b, c = (v.float().repeat_interleave(H // G, 1)[:, :, None] for v in (B, C))
    new = state[rows] * torch.exp(delta[..., None] * A)
    new = new + (delta * x.float())[..., None] * b
    state[rows] = new
    return ((new * c).sum(-1) + D * x.float()).to(x.dtype)


def test_heads_are_put_in_their_order_and_back(monkeypatch):
    """The adaptation to mamba_ssm, against a plain version of its function."""
    fake = type(sys)("mamba_ssm.ops.triton.selective_state_update")
    fake.selective_state_update = selective_state_update
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    spec = registry()["ssm_step"]
    case = {"lengths": (1,) * 3, "H": 8, "P": 16, "N": 16, "G": 2, "widths": (8,), "step": True}
    problem = spec.inputs(case, torch.float32, torch.Generator().manual_seed(1))
    mine, theirs = copy(problem), copy(problem)
    spec.call(mine, None)
    peer = peers.triton_step(theirs)
    peer()
    peer.finish()
    compare(spec, mine, theirs, problem)


# Parts in processes -------------------------------------------------------------------------------


class Fake(worker.PartBase):
    """An item that works, one that cannot run, one that fails, one that breaks the device, and
    one that would come after it."""

    def items(self):
        return ["good", "refused", "wrong", "fatal", "later"]

    def run(self, item):
        if item == "refused":
            raise worker.PassedOver("not here")
        if item != "good" and item != "later":
            raise RuntimeError("CUDA error: an illegal memory access" if item == "fatal" else item)
        return {"ms": 1.0}


def test_items_are_kept_apart():
    said = []
    part = Fake(setting.Setting(), None)
    assert not worker.run_items(part, set(), time.time() + 60, said.append)
    ended = {e["item"]: e for e in said if "item" in e}
    assert ended["good"]["row"] == {"ms": 1.0} and ended["refused"]["passed_over"] == "not here"
    assert "RuntimeError: wrong" in ended["wrong"]["error"] and "later" not in ended
    assert worker.run_items(part, set(ended), time.time() + 60, said.append)
    assert said[-1]["item"] == "later"


def test_time_that_is_up_leaves_items_out():
    said = []
    assert worker.run_items(Fake(setting.Setting(), None), set(), time.time() - 1, said.append)
    assert said == [{"left_out": ["good", "refused", "wrong", "fatal", "later"]}]


def test_a_worker_that_dies_costs_its_item_alone(monkeypatch):
    """The first worker dies within its second item; the next goes on with the third."""
    runs = iter(
        [
            ([{"begin": "a"}, {"item": "a", "seconds": 1, "row": {}}, {"begin": "b"}], -11),
            ([{"begin": "c"}, {"item": "c", "seconds": 1, "row": {"ms": 2.0}}], 0),
        ]
    )

    def one(name, given, journal, log, until):
        entries, status = next(runs)
        with journal.open("a") as file:
            file.writelines(json.dumps(e) + "\n" for e in entries)
        log.write_text("Segmentation fault\n")
        return status

    monkeypatch.setattr(worker, "_one_worker", one)
    part = worker.supervise("ops", setting.Setting(), 60)
    assert set(part["rows"]) == {"a", "c"} and part["worker"] == ""
    assert "status -11: Segmentation fault" in part["failed"]["b"]
    assert "FAILED b: the process ended" in report.text("ops", part)


def test_a_worker_that_does_nothing_is_not_started_for_ever(monkeypatch):
    def one(name, given, journal, log, until):
        log.write_text("ImportError: no module\n")
        return 1

    monkeypatch.setattr(worker, "_one_worker", one)
    part = worker.supervise("ops", setting.Setting(), 60)
    assert not part["rows"] and "ImportError: no module" in part["worker"]


# Words --------------------------------------------------------------------------------------------


def test_reports_of_the_sanitizer_are_read():
    sound = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    assert sanitize.errors_of(sound) == [] and not sanitize.refused(sound)
    bad = (
        "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n"
        "=========     at gather+0x1b0\n========= ERROR SUMMARY: 1 error\n"
    )
    assert sanitize.errors_of(bad) == ["Invalid __global__ read of size 4 bytes"]
    race = "========= Error: Race reported between Write access at 0x1 and Read access at 0x2\n"
    assert len(sanitize.errors_of(race + race)) == 1
    assert sanitize.refused("========= Error: Device not supported. Please refer\n")


def test_names_of_a_profiler_are_those_of_the_assembler():
    long = "void ei::cuda::(anonymous namespace)::few_rows<1, ei::bf16, ei::bf16, float>(ei::Args)"
    short = "few_rows<1, bf16, bf16, float>"
    assert own_names([long, "void at::native::fill<float>(int)"]) == {short}
    assert short in gpu_tables.all_kernels(ROOT)["matmul"]


def test_a_card_has_a_short_name():
    assert setting.card_slug("NVIDIA H200") == "h200"
    assert setting.card_slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert setting.card_slug("NVIDIA GeForce RTX 5090") == "rtx-5090"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so():
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("gpu-check: a CUDA GPU must be present, but ")
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.run", "--only", "nothing"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "--only must be of build,laws," in done.stderr


# Rehearsals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, items",
    [
        ("laws", ["embed"]),
        ("ops", ["matmul out_proj R=1 L", "moe_matmul R=1 S"]),
        ("decode", ["S B=1"]),
        ("prefill", ["S T=24"]),
        ("graphs", ["carry switch every step B=1"]),
    ],
)
def test_parts_work_on_the_emulator(name, items):
    """Some items of every part; their figures agree with one another."""
    given = setting.Setting(emulate=True)
    make = worker.part_class(name)
    with setting.native(given) as module:
        part = make(given, module)
        assert set(items) <= set(part.items())
        rows = [part.run(item) for item in items]
    for item, row in zip(items, rows):
        assert not row.get("broken")
        if name == "laws":
            assert row["checks"] > 30
        elif name == "ops":
            assert row["gb_s"] == pytest.approx(row["bytes"] / row["us"] / 1e3, abs=6e-4)
            assert row["ratio"] > 0 and row["peer"], item
        elif name == "graphs":
            assert row["captures"] == 0 and row["extra_bytes"] == 0 and row["ratio"] > 0
        else:
            count = row.get("batch") or row["tokens"]
            assert row["tokens_s"] == pytest.approx(1e3 * count / row["ms"])
    figures = {
        "rows": dict(zip(items, rows)),
        "failed": {},
        "passed_over": {},
        "left_out": [],
        "seconds": 1.0,
        "worker": "",
    }
    assert report.text(name, figures).startswith(f"{name}: {len(items)} done")


@pytest.mark.slow
def test_the_whole_command_without_a_network(tmp_path):
    """Every part in its own process; the file is whole after each, and no address is reachable."""
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "bench.gpu.run", "--emulate", "--quick", "--out", str(out)]
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0:
        command = ["unshare", "-rn", *command]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )
    figures = json.loads(out.read_text())
    assert done.returncode == 0, done.stdout[-3000:]
    assert list(figures["parts"]) == list(worker.PARTS) and figures["emulated"]
    for name, part in figures["parts"].items():
        assert part["rows"] and not part["failed"] and not part["worker"], name
        assert part["seconds"] <= part["limit"] + worker.GRACE + 60
    assert "-- decode" in done.stdout and str(out) in done.stdout


# README's table -----------------------------------------------------------------------------------

OP_ROW = {
    "us": 12.34,
    "gb_s": 4100.0,
    "tflop_s": 4.1,
    "percent_of_roof": 95.4,
    "roof": "memory",
    "ratio": 1.5,
    "peer": "torch.mm (cuBLAS) on strided views",
}
RUN = {
    "card": "NVIDIA H200",
    "driver": "580",
    "date": "2026-01-02",
    "commit": "abc",
    "emulated": False,
    "parts": {
        "laws": {
            "rows": {
                "embed": {"checks": 3, "broken": [], "kernels": ["gather<float>"]},
                "sample": {"checks": 1, "broken": ["reference"], "kernels": ["choose"]},
            },
            "failed": {"matmul": "crash"},
            "left_out": [],
        },
        "ops": {
            "rows": {
                "roof": {"copy_bytes_s": 4.3e12, "read_bytes_s": 4.5e12, "bf16_flops_s": 7.9e14},
                "matmul in_proj R=1 30B": OP_ROW,
            }
        },
        "decode": {"rows": {"30B B=1": {"ms": 1.9, "tokens_s": 526.0, "percent_of_roof": 80.1}}},
    },
}


def tables_of(tmp_path, runs):
    folder = tmp_path / "bench" / "results"
    folder.mkdir(parents=True)
    (folder / "ptxas.json").write_text((ROOT / "bench/results/ptxas.json").read_text())
    for name, run in runs.items():
        (folder / f"gpu-{name}.json").write_text(json.dumps(run))
    return gpu_tables.gpu_table(tmp_path)


def test_without_a_run_every_kernel_is_named_as_not_run(tmp_path):
    text = tables_of(tmp_path, {})
    names = {(op, k) for op, kernels in gpu_tables.all_kernels(ROOT).items() for k in kernels}
    assert "Nothing has been measured on a GPU" in text
    assert f"**{len(names)} of {len(names)} CUDA kernels have not run on a GPU**" in text
    for op, kernel in names:
        row = next(row for row in text.splitlines() if f"| `{op}` |" in row)
        family = kernel.split("<")[0]
        count = sum(
            (op, k) in names for k in gpu_tables.all_kernels(ROOT)[op] if k.split("<")[0] == family
        )
        assert f"`{kernel}`" in row or (count > 1 and f"`{family}` x {count}" in row)
    files = {f.stem for f in (ROOT / "csrc" / "ops").glob("*/*.cu")}
    assert {op for op, _ in names} == files and files >= set(registry())


def test_a_run_shows_its_figures_and_what_it_left(tmp_path):
    text = tables_of(tmp_path, {"h200": RUN})
    assert "**NVIDIA H200**, driver 580, 2026-01-02, commit `abc`" in text
    assert "4 checks of 2 ops; broken by `matmul`, `sample`" in text
    assert "| `matmul in_proj R=1 30B` | 12.3 | 4100 | 4.1 | 95 % of memory | 1.50 torch.mm" in text
    assert "| `decode: 30B B=1` | 1.900 | 526 | 80 % | - |" in text
    embed = next(row for row in text.splitlines() if row.startswith("| `embed` |"))
    assert "gather<bf16>" in embed and "gather<float>" not in embed
    assert "| `sample` | `choose` |" in text  # it ran, but not rightly


def test_a_rehearsal_is_no_result(tmp_path):
    with pytest.raises(ValueError, match=r"gpu-emulator\.json must come from a GPU"):
        tables_of(tmp_path, {"emulator": {**RUN, "emulated": True}})
