"""ssm_scan of long prompts in segments, on the emulated GPU: what the laws do not say of them.

A state that fades within a few tokens would hide where a segment begins, so these heads keep theirs
for hundreds of tokens.
"""

import pytest
import torch

from elastic_infer.ops import registry
from elastic_infer.ops.testing import laws as _laws
from support.emulated import built, installed, load

emu = load(built())
BF16, SPEC = torch.bfloat16, registry()["ssm_scan"]
BASE = {"H": 2, "P": 16, "N": 32, "G": 1, "widths": (2, 1), "slow": True}
MANY = 132  # multiprocessors: more than these cases have blocks


@pytest.fixture(autouse=True)
def emulated():
    with installed(emu):
        yield


def made(*lengths: int, **more) -> dict:
    return _laws.make(SPEC, BASE | {"lengths": lengths} | more, BF16)


def run(arguments: dict, multiprocessors: int = MANY, **options) -> dict[str, torch.Tensor]:
    emu.device(multiprocessors=multiprocessors, **options)
    return _laws.run(SPEC, arguments)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm-wise."""
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def owned(a: dict) -> list[int]:
    return [s for s in a["slots"].tolist() if s >= 0]


@pytest.mark.parametrize("state", ["f32", "f16"])
@pytest.mark.parametrize(
    "lengths, more",
    [
        ((1024,), {}),
        ((1025,), {}),
        ((1535,), {}),
        ((3000, 5, 0, 1600), {"padded": 1}),
        ((1200, 1030), {"dt": "f32", "P": 48, "N": 80}),
    ],
)
def test_segments_agree_with_the_scan_in_one_piece(lengths, more, state):
    """Within the error of a bfloat16 output and of sums in another order; and they are cut."""
    a = made(*lengths, state=state, **more)
    cut, whole = run(a), run(a, multiprocessors=1)
    assert not torch.equal(cut["state"], whole["state"])
    slots = owned(a)
    limit = 1e-4 if state == "f32" else 4e-3
    assert error(cut["state"][slots], whole["state"][slots]) <= limit
    tokens = torch.ones(len(a["x"]), dtype=torch.bool)
    for s, slot in enumerate(a["slots"].tolist()):
        tokens[a["cu_seqlens"][s] : a["cu_seqlens"][s + 1]] = slot >= 0
    assert error(cut["y"][tokens], whole["y"][tokens]) <= 4e-3
    assert torch.equal(cut["y"][~tokens], whole["y"][~tokens])


def test_state_is_exact():
    """Against the recurrence in float64."""
    a = made(1300)
    want = SPEC.reference(_laws.wide(SPEC, _laws.copy(a)))
    got, slots = run(a), owned(a)
    assert error(got["state"][slots], want["state"][slots]) <= 1e-5
    assert error(got["y"], want["y"]) <= 4e-3


@pytest.mark.parametrize("state", ["f32", "f16"])
def test_a_sequence_is_cut_by_its_own_tokens_alone(state):
    """Beside another one it has the bits that it has alone."""
    enough_multiprocessors()
    _laws.check_batch(SPEC, made(1100, 1300, state=state))


def test_a_width_is_a_slice():
    """Law 3, bit for bit."""
    enough_multiprocessors()
    for arguments in _laws.one_width(made(1100)):
        assert _laws.check_slice(SPEC, arguments) == 1


def enough_multiprocessors():
    emu.device(multiprocessors=MANY)


@pytest.mark.parametrize("given", [{"batch_invariant": True}, {"multiprocessors": 1}])
def test_where_sequences_stay_whole(given):
    """Under batch_invariant; where heads fill the device."""
    a = made(1100)
    whole = run(a, multiprocessors=0)
    assert all(_laws.same_bits(run(a, **given)[n], whole[n]) for n in SPEC.outputs)


def test_short_prompts_stay_whole():
    a = made(400, 400, 300)
    assert torch.equal(run(a)["state"], run(a, multiprocessors=0)["state"])


def test_a_recorded_step_keeps_its_workspace():
    """Law 7."""
    enough_multiprocessors()
    _laws.check_repeat(SPEC, made(1100), emu.Step(emu.Pool()))
