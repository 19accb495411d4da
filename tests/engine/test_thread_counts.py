"""Nothing that a request returns depends on threads: torch's, the pool's, or on its neighbours."""

import pytest
import torch

from elastic_infer import Plan, SamplingParams
from elastic_infer.ops import Pool
from elastic_infer.sampling.processors import top_logprobs
from elastic_infer.scheduling.sampler import entropy_of
from support.engines import open_engine
from support.tiny import tiny_config, tiny_widths, write_tiny

V = 131072  # rows so long that torch sums them in as many parts as it has threads


@pytest.fixture(autouse=True)
def threads_of_torch():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_rows_of_logits():
    """Entropy and log-probabilities of long rows: the same bits with any number of threads."""
    rows = torch.randn(20, V, generator=torch.Generator().manual_seed(0)) * 3
    seen = []
    for torch_threads, run in ((1, None), (2, None), (3, Pool(1)), (2, Pool(4))):
        torch.set_num_threads(torch_threads)
        seen.append([(entropy_of(row, 0.7, run), top_logprobs(row, 5, 3, run)) for row in rows])
    assert seen[0] == seen[1] == seen[2] == seen[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = tiny_config(5, hybrid_override_pattern="M*", vocab_size=V, hidden_size=32)
    path = tmp_path_factory.mktemp("long-rows") / "model"
    write_tiny(path, config, tiny_widths(config, 5), torch.bfloat16, seed=5)
    return path


def test_requests(folder):
    """Tokens, log-probabilities, entropies as a plan sees them and the widths of a plan by
    uncertainty, whose threshold is an entropy that occurs: alone and beside others."""
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=5, ignore_eos=True, logprobs=2)

    def generated(torch_threads, threads, beside, threshold=None):
        torch.set_num_threads(torch_threads)
        engine = open_engine(folder, threads=threads)
        entropies, wide = [], list(engine.widths)[-1]
        if threshold is None:
            plan = Plan.custom(lambda view: entropies.append(view.entropy) or wide)
        else:
            narrow = next(iter(engine.widths))
            plan = Plan.by_uncertainty(wide, narrow, threshold=threshold, hold=3)
        others = [engine.submit([9, 8, 7 + i], params) for i in range(beside)]
        output = engine.generate([5, 6, 7], params, plan=plan)
        for other in others:
            other.result()
        engine.close()
        return output.token_ids, output.choices[0].logprobs, entropies, output.width_runs

    first = generated(1, 1, 0)
    threshold = first[2][6]
    uncertain = generated(1, 1, 0, threshold)
    for torch_threads, threads, beside in ((2, 1, 0), (2, 2, 2), (1, 4, 1)):
        assert generated(torch_threads, threads, beside) == first
        assert generated(torch_threads, threads, beside, threshold) == uncertain
