"""The CUDA kernels of lines and cross flows in the several ways that they go, on a GPU or on the emulation."""

import dense
import pytest
import torch
from conftest import require_backend
from support import Backend, assert_within_budget, check_precision, label, make_problem, score_roundings

from torus_kernels import TorusLattice

pytestmark = [] if Backend("cuda").is_emulated else [pytest.mark.gpu]

LINE_STREAMS, CROSS_FLOWS = range(6), (6, 7)


def lines(n_major: int, n_minor: int, topology: str = "periodic", winding: int = 1) -> TorusLattice:
    return TorusLattice(n_major, n_minor, topology, winding, streams=LINE_STREAMS)


def patches(n_major: int, n_minor: int, topology: str = "periodic", radius: tuple[int, int] = (3, 7)) -> TorusLattice:
    return TorusLattice(n_major, n_minor, topology, cross_radius=radius, streams=CROSS_FLOWS)


# Lattice, sequence length, head dimension.
CASES = {
    "closed lines that are resident": (lines(48, 16), 768, 24),
    "one chunk around": (lines(16, 16), 256, 64),
    "closed lines in stretches, with queries left over": (lines(150, 3), 450, 8),
    "closed lines in stretches, in whole chunks": (lines(160, 2), 320, 128),
    "open in time": (lines(20, 70, "causal", 3), 400, 40),
    "arcs far back in time": (lines(2, 150, "causal"), 333, 8),
    "both ways along an open line": (lines(160, 2, "cylinder"), 320, 8),
    "patches": (patches(32, 16), 512, 64),
    "patches cut by the lattice's ends": (patches(21, 21), 441, 24),
    "patches that are wider than the lattice": (patches(6, 3, radius=(8, 5)), 18, 8),
    "patches in time": (patches(20, 18, "causal"), 403, 40),
    "patches in time on few columns": (patches(90, 2, "causal", (8, 1)), 300, 128),
    "patches on a cylinder": (patches(24, 10, "cylinder", (4, 0)), 240, 8),
    "windows wider than patches reach": (patches(24, 24, radius=(10, 2)), 576, 24),
    "one flow": (TorusLattice(12, 20, "causal", streams=(6,)), 210, 72),
    "an open line of odd length": (lines(53, 2, "cylinder"), 106, 40),
}


@pytest.fixture(scope="module")
def cuda():
    return require_backend("cuda")


def problem_of(case: str):
    lattice, seq_len, head_dim = CASES[case]
    return make_problem(lattice, seq_len, heads=2, kv_heads=1, head_dim=head_dim)


def check_output(cuda, problem) -> None:
    exact = dense.attention(**problem.to(torch.float64, problem.q.device.type).arguments())
    plain = dense.attention(**problem.arguments())
    out = cuda.attention(**problem.arguments())
    assert_within_budget({"out": out}, {"out": exact}, {"out": plain}, score_roundings(problem))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=label)
@pytest.mark.parametrize("case", CASES)
def test_error_budget(cuda, case, dtype):
    check_output(cuda, problem_of(case).to(dtype, cuda.device))


@pytest.mark.parametrize("case", CASES)
def test_gradients(cuda, case):
    """By queries and by keys, which meet both query heads of their group."""
    check_precision(cuda, problem_of(case), torch.bfloat16)


@pytest.mark.parametrize("case", ["closed lines that are resident", "arcs far back in time", "patches",
                                  "patches in time"])
def test_scores_that_grow(cuda, case):
    """Exponents beyond any first maximum, by hundreds."""
    problem = problem_of(case).to(torch.float16, cuda.device)
    growth = torch.linspace(0.0, 8.0, problem.q.shape[2], device=problem.q.device, dtype=problem.q.dtype)[:, None]
    check_output(cuda, problem.replace(k=problem.k * growth, q=problem.q * 2))
    check_output(cuda, problem.replace(k=problem.k * growth.flip(0), q=problem.q * 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=label)
@pytest.mark.parametrize("head_dim", [8, 24, 64, 128])
@pytest.mark.parametrize("case", ["closed lines that are resident", "patches"])
def test_scores_that_are_all_there_is(cuda, case, head_dim, dtype):
    """Far above others' as a query's own score is, it decides alone, whatever a number of its size is rounded to."""
    lattice, seq_len, _ = CASES[case]
    problem = make_problem(lattice, seq_len, heads=2, kv_heads=1, head_dim=head_dim, state=False)
    # Of one length, so that nobody's product with a query is as large as its own.
    k = torch.nn.functional.normalize(problem.k, dim=-1) * (3e3 if dtype == torch.float16 else 1e5)
    problem = problem.replace(k=k, q=k.expand_as(problem.q)).to(dtype, cuda.device)
    out = cuda.attention(**problem.arguments())
    weights = problem.stream_weights[:, list(lattice.streams)].sum(-1)[:, None, None]
    expected = weights * problem.v.float()
    assert ((out - expected).abs() <= torch.finfo(dtype).eps * expected.abs().clamp(min=1e-3)).all()


@pytest.mark.parametrize("case", ["open in time", "arcs far back in time", "patches in time"])
def test_a_key_alone_has_no_entropy(cuda, case):
    problem = problem_of(case).to(cuda.low_dtype, cuda.device)
    _, stats = cuda.attention_with_stats(**problem.arguments())
    assert (stats.entropy[:, :, 0] == 0).all()


@pytest.mark.parametrize("scale", [0.0, 1e-30, -1e-12, -0.7, 1e11, 1e20], ids=str)
@pytest.mark.parametrize("case", ["closed lines that are resident", "patches in time"])
def test_scales(cuda, case, scale):
    """Exponents are shifted in units of q . k, which is no use where those are nothing or everything to a score."""
    problem = problem_of(case)
    if scale > 1:
        problem = problem.replace(q=problem.q / scale)
    check_precision(cuda, problem.replace(scale=scale, decay=-problem.decay.abs()), torch.bfloat16)


@pytest.mark.parametrize("case", ["closed lines that are resident", "open in time", "patches", "patches in time"])
def test_statistics_leave_the_output_as_it_is(cuda, case):
    """Two chunks at a time, or one: to the bit the same, whichever rows ask for a new maximum."""
    problem = problem_of(case).to(torch.bfloat16, cuda.device)
    growth = torch.linspace(0.0, 6.0, problem.q.shape[2], device=problem.q.device, dtype=problem.q.dtype)[:, None]
    for changed in (problem, problem.replace(k=problem.k * growth)):
        assert torch.equal(cuda.attention(**changed.arguments()),
                           cuda.attention_with_stats(**changed.arguments())[0])


@pytest.mark.parametrize("case", ["open in time", "patches in time"])
def test_no_row_depends_on_the_others_of_its_warp(cuda, case):
    problem = problem_of(case).to(torch.bfloat16, cuda.device)
    out = cuda.attention(**problem.arguments())
    for t in (130, 217, 311):
        later = {name: getattr(problem, name).clone() for name in ("q", "k", "v")}
        for x in later.values():
            x[:, :, t + 1 :] = 37.0
        changed = cuda.attention(**problem.replace(**later).arguments())
        assert torch.equal(changed[:, :, : t + 1], out[:, :, : t + 1]), t


@pytest.mark.parametrize("case", ["open in time", "arcs far back in time", "patches in time", "one flow"])
def test_first_key(cuda, case):
    problem = problem_of(case)
    starts = torch.tensor([0, 33, 100, 301])
    document = torch.bucketize(torch.arange(problem.q.shape[2]), starts, right=True) - 1
    check_precision(cuda, problem.replace(first_key=starts[document][None]), torch.bfloat16)
