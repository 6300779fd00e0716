"""Streams left out, statistics of each stream, and streams whose scores differ by far."""

import dense
import pytest
import torch
from support import assert_same_up_to_rounding, check_precision, error, evaluate, label, make_problem

from torus_kernels import Stream, TorusLattice

PLACES = {
    "periodic": (TorusLattice(6, 8, winding=4, cross_radius=(1, 3)), None),
    "causal": (TorusLattice(4, 6, "causal", winding=2, cross_radius=(1, 3)), 61),
    "cylinder": (TorusLattice(5, 6, "cylinder", winding=2, cross_radius=(1, 3)), None),
}


def restricted(lattice: TorusLattice, streams) -> TorusLattice:
    return TorusLattice(lattice.n_major, lattice.n_minor, lattice.topology, lattice.winding, lattice.cross_radius,
                        streams)


@pytest.mark.parametrize("token_weights", [False, True])
@pytest.mark.parametrize("streams", [[s] for s in Stream] + [[0, 2], [0, 1, 6], [3, 4, 5, 7], range(1, 8)], ids=label)
@pytest.mark.parametrize("place", PLACES)
def test_left_out_is_weight_zero(backend, place, streams, token_weights):
    lattice, seq_len = PLACES[place]
    backend.require(lattice)
    problem = make_problem(lattice, seq_len, token_weights=token_weights).to(backend.exact_dtype, backend.device)
    left_out = [s for s in Stream if s not in list(streams)]
    weights = problem.stream_weights.clone()
    weights[..., left_out] = 0.0
    some = evaluate(backend.attention, problem.replace(lattice=restricted(lattice, streams)))
    zeroed = evaluate(backend.attention, problem.replace(stream_weights=weights))
    zeroed["d_stream_weights"][..., left_out] = 0.0  # a zero weight has a gradient, a stream left out has none
    for name in some:
        assert_same_up_to_rounding(some[name], zeroed[name], name)
    assert (some["d_stream_weights"][..., left_out] == 0).all()
    assert (some["d_decay"][..., left_out] == 0).all()


@pytest.mark.parametrize("decay", [-3e38, 3e38])
@pytest.mark.parametrize("streams", [[0, 2, 4, 6], [1, 3, 5, 7]], ids=label)
@pytest.mark.parametrize(
    "lattice, seq_len",
    [*PLACES.values(), (TorusLattice(66, 2), None), (TorusLattice(66, 2, "causal"), 140)],
    ids=label,
)
def test_the_decay_of_a_stream_left_out_does_not_matter(backend, lattice, seq_len, streams, decay):
    backend.require(lattice)
    problem = make_problem(restricted(lattice, streams), seq_len, batch=1, heads=2, head_dim=8)
    problem = problem.to(backend.exact_dtype, backend.device)
    extreme = problem.decay.clone()
    extreme[:, [s for s in Stream if s not in streams]] = decay
    expected, found = (evaluate(backend.attention, problem.replace(decay=of)) for of in (problem.decay, extreme))
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize(
    "lattice, seq_len, decay",
    [(TorusLattice(2, 3, "causal"), 210, 3e38), (TorusLattice(4, 2), None, 3e38),
     (TorusLattice(2, 3, "cylinder"), None, 3e38), (restricted(TorusLattice(4, 3, "causal"), [1]), 210, -7.5e37)],
    ids=label,
)
def test_a_decay_beyond_what_can_be_multiplied(backend, lattice, seq_len, decay):
    """What overflows is the bias of a key some steps away: the own key, no step away, has none."""
    backend.require(lattice)
    if backend.name == "cuda" and decay < 0:
        pytest.skip("maxima are held in units of q . k there, and overflow beyond 3e38 times the scale")
    problem = make_problem(lattice, seq_len, batch=1, heads=1, head_dim=8, state=False)
    problem = problem.replace(decay=torch.full_like(problem.decay, decay)).to(backend.exact_dtype, backend.device)
    out, stats = backend.attention_with_stats(**problem.arguments())
    lse, _ = dense.statistics(**problem.statistics_arguments())
    torch.testing.assert_close(stats.lse.double(), lse.double(), rtol=1e-5, atol=1e-5)
    if decay > 0:
        torch.testing.assert_close(out, (problem.stream_weights.sum(-1)[None, :, None, None] * problem.v).to(out.dtype),
                                   rtol=1e-5, atol=1e-5)
    gradients = evaluate(backend.attention, problem)
    assert all(gradients[name].isfinite().all() for name in ("d_q", "d_k", "d_v", "d_stream_weights"))


@pytest.mark.parametrize("streams", [range(8), [5], [1, 2, 6], [0, 3, 4, 7]], ids=label)
@pytest.mark.parametrize("place", PLACES)
def test_statistics(backend, place, streams):
    lattice, seq_len = PLACES[place]
    backend.require(lattice)
    problem = make_problem(restricted(lattice, streams), seq_len, batch=2, heads=4, kv_heads=2)
    for dtype in backend.dtypes:
        cast = problem.to(dtype, backend.device)
        out, stats = backend.attention_with_stats(**cast.arguments())
        assert torch.equal(out, backend.attention(**cast.arguments()))
        lse, entropy = dense.statistics(**cast.statistics_arguments())
        for value, expected in ((stats.lse, lse), (stats.entropy, entropy)):
            assert value.shape == (2, 4, cast.q.shape[2], 8)
            assert value.dtype == torch.float32
            assert torch.equal(value.isinf(), expected.isinf())
            visible = expected.isfinite()
            size = lse[visible].abs().max().item()  # entropy is a difference of numbers as large as the lse
            assert error(value[visible], expected[visible]) <= 16 * torch.finfo(torch.float32).eps * max(1.0, size)
        left_out = [s for s in Stream if s not in list(streams)]
        assert (stats.lse[..., left_out] == -torch.inf).all()
        assert (stats.entropy[..., left_out] == 0).all()
        assert (stats.entropy >= 0).all()


def test_statistics_carry_no_gradient(backend):
    problem = make_problem(TorusLattice(2, 3, "causal"), 9).to(backend.exact_dtype, backend.device)
    problem.q.requires_grad_()
    out, stats = backend.attention_with_stats(**problem.arguments())
    assert out.requires_grad
    assert not stats.lse.requires_grad
    assert not stats.entropy.requires_grad
    out.backward(problem.d_out)
    assert problem.q.grad.isfinite().all()


def test_statistics_with_packed_documents(backend):
    problem = make_problem(PLACES["causal"][0], 61, batch=2)
    first_key = torch.stack([torch.arange(61) // 20 * 20, torch.full((61,), 100)]).to(torch.int32)
    cast = problem.replace(first_key=first_key).to(backend.exact_dtype, backend.device)
    _, stats = backend.attention_with_stats(**cast.arguments())
    lse, entropy = dense.statistics(**cast.statistics_arguments())
    tolerance = 16 * torch.finfo(torch.float32).eps * lse.abs().max().item()
    assert error(stats.lse, lse) <= tolerance
    assert error(stats.entropy, entropy) <= tolerance


@pytest.mark.parametrize("scale", [None, -3.0, 1e3])
def test_one_visible_key(backend, scale):
    problem = make_problem(TorusLattice(3, 4, "causal"), 1, batch=2).to(backend.exact_dtype, backend.device)
    _, stats = backend.attention_with_stats(**problem.replace(scale=scale).arguments())
    score = (problem.q.double() * problem.k.double()).sum(dim=-1) * (8**-0.5 if scale is None else scale)
    assert_same_up_to_rounding(stats.lse, score.float()[..., None].expand_as(stats.lse), ulps=4)
    assert (stats.entropy == 0).all()


def test_equal_scores_give_the_logarithm_of_the_number_of_keys(backend):
    lattice = TorusLattice(6, 8, winding=4, cross_radius=(1, 3))
    problem = make_problem(lattice).to(backend.exact_dtype, backend.device)
    flat = problem.replace(scale=0.0, decay=torch.zeros_like(problem.decay))
    _, stats = backend.attention_with_stats(**flat.arguments())
    keys = torch.tensor([4, 4, 5, 5, 6, 6, 3 * 7, 6 * 3], device=backend.device)
    for value in stats:
        assert_same_up_to_rounding(value, keys.log().expand_as(value), ulps=8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=label)
@pytest.mark.parametrize("stream", Stream, ids=label)
@pytest.mark.parametrize("place", PLACES)
def test_a_stream_far_below_the_others(backend, place, stream, dtype):
    """All keys that one stream shows a query score far less than the other streams' keys."""
    lattice, seq_len = PLACES[place]
    backend.require(lattice)
    if dtype not in backend.dtypes:
        pytest.skip(f"{dtype} is not for {backend.name}")
    problem = make_problem(lattice, seq_len)
    visible, _ = dense.geometry(lattice, int(stream), problem.q.shape[2])
    query = problem.q.shape[2] - 1 if lattice.is_causal else problem.q.shape[2] // 2
    low = visible[query]
    problem.q[..., 0] = 1.0
    problem.k[..., 0] = torch.where(low, -1000.0, 100.0)
    problem = problem.replace(scale=0.5)
    check_precision(backend, problem, dtype)
    cast = problem.to(dtype, backend.device)
    _, stats = backend.attention_with_stats(**cast.arguments())
    assert (stats.lse[:, :, query, stream.index] < -400).all()
    others = [s.index for s in Stream if (dense.geometry(lattice, int(s), problem.q.shape[2])[0][query] & ~low).any()]
    assert others
    assert (stats.lse[:, :, query, others] > 0).all()
    lse, entropy = dense.statistics(**cast.statistics_arguments())
    tolerance = 16 * torch.finfo(torch.float32).eps * lse.abs().max().item()
    assert error(stats.lse, lse) <= tolerance
    assert error(stats.entropy, entropy) <= tolerance
