"""Peers compute the operator, and nothing wrong passes the gate."""

import pytest
import torch
from benchmarking import LATTICES, REFERENCE, TINY, accuracy, describe, drops_a_stream, inputs_on

from benchmarks import peers
from benchmarks.accuracy import RESULTS, Gate, WrongResult, checks
from benchmarks.peers.tiling import tile_side
from benchmarks.workloads import make_inputs
from torus_kernels import TorusLattice


@pytest.mark.parametrize("peer", [peers.compose, peers.compose_matmul, peers.dense])
@pytest.mark.parametrize("lattice, seq_len", LATTICES, ids=describe)
def test_peers_compute_the_operator_and_its_gradients(lattice, seq_len, peer):
    inputs = inputs_on(lattice, seq_len)
    both, forward = accuracy(peer, inputs), accuracy(peer, inputs, backward=False)
    assert [check.result for check in both] == list(RESULTS)
    assert all(check.ok for check in both + forward), both + forward


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("lattice, seq_len", LATTICES, ids=describe)
def test_flex_computes_the_operator(lattice, seq_len):
    assert all(check.ok for check in accuracy(peers.flex_eager, inputs_on(lattice, seq_len), backward=False))


@pytest.mark.slow
@pytest.mark.parametrize("lattice", [TorusLattice(16, 16), TorusLattice(16, 16, "causal")], ids=describe)
def test_compiled_flex_computes_the_operator(lattice):
    assert all(check.ok for check in accuracy(peers.flex, inputs_on(lattice), backward=False))


@pytest.mark.slow
@pytest.mark.parametrize("lattice", [TorusLattice(9, 6, winding=4), TorusLattice(8, 8, "causal")], ids=describe)
def test_the_compiled_composition_computes_the_operator(lattice):
    for backward in (False, True):
        assert all(check.ok for check in accuracy(peers.compose_compiled, inputs_on(lattice), backward=backward))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("peer", [peers.compose, peers.compose_matmul])
@pytest.mark.parametrize("lattice", [TorusLattice(16, 16), TorusLattice(16, 16, "causal"),
                                     TorusLattice(16, 16, "cylinder")], ids=describe)
def test_compositions_in_low_precision(lattice, peer, dtype):
    inputs = inputs_on(lattice, dtype=dtype)
    gate = Gate(inputs, peers.dense, backward=True)
    gate.check("peer", peer, peer=True)


@pytest.mark.parametrize(
    "length, side", [(64, 8), (36, 9), (60, 6), (90, 9), (180, 9), (13, 8), (26, 8), (3, 3), (5, 5)]
)
def test_tiles_divide_the_lattice_where_they_can(length, side):
    assert tile_side(length) == side


def forgets_the_distance(q, k, v, weights, decay, state, alpha, lattice):
    return peers.compose(q, k, v, weights, 0 * decay, state, alpha, lattice)


def detaches_the_decay(q, k, v, weights, decay, state, alpha, lattice):
    return peers.compose(q, k, v, weights, decay.detach() + 0 * decay, state, alpha, lattice)


def gives_alpha_no_gradient(q, k, v, weights, decay, state, alpha, lattice):
    return peers.compose(q, k, v, weights, decay, state, alpha.detach(), lattice)


def ignores_the_state(q, k, v, weights, decay, state, alpha, lattice):
    return peers.compose(q, k, v, weights, decay, torch.zeros_like(state), torch.ones_like(alpha), lattice)


def has_one_nan(q, k, v, weights, decay, state, alpha, lattice):
    out = peers.compose(q, k, v, weights, decay, state, alpha, lattice)
    return out.masked_fill(torch.arange(out.numel()).view(out.shape) == 77, torch.nan)


def is_one_site_off(q, k, v, weights, decay, state, alpha, lattice):
    return peers.compose(q, k.roll(1, 2), v.roll(1, 2), weights, decay, state, alpha, lattice)


def repeats_the_last_row(q, k, v, weights, decay, state, alpha, lattice):
    out = peers.compose(q, k, v, weights, decay, state, alpha, lattice)
    return torch.cat([out[:, :, :-1], out[:, :, -2:-1]], dim=2)


@pytest.mark.parametrize("peer", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [drops_a_stream, forgets_the_distance, detaches_the_decay, gives_alpha_no_gradient,
                                   ignores_the_state, has_one_nan, is_one_site_off, repeats_the_last_row])
def test_gate_refuses_what_is_wrong(wrong, dtype, peer):
    gate = Gate(inputs_on(TorusLattice(8, 6, winding=3), dtype=dtype), peers.compose, backward=True)
    with pytest.raises(WrongResult, match=r"wrong\b|shape None"):
        gate.check(wrong.__name__, wrong, peer=peer)


def test_nan_exceeds_every_budget():
    truth = {"out": torch.ones(4, dtype=torch.float64)}
    wrong = {"out": torch.tensor([1.0, 1.0, torch.nan, 1.0])}
    assert not checks(wrong, truth, {"out": torch.ones(4)})[0].ok


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gate_admits_the_reference(dtype, backward):
    gate = Gate(inputs_on(TorusLattice(8, 6, winding=3), dtype=dtype), peers.compose, backward=backward)
    assert all(check.ok for check in gate.check("reference", REFERENCE))


def test_inputs_are_the_same_numbers_in_every_dtype():
    wide, low = (make_inputs(TINY.lattice, batch=1, heads=2, head_dim=8, dtype=dtype)
                 for dtype in (torch.float32, torch.bfloat16))
    for a, b in zip((*wide.tensors(), wide.d_out), (*low.tensors(), low.d_out), strict=True):
        assert torch.equal(a.to(b.dtype), b)
    assert low.q.dtype == low.state.dtype == low.d_out.dtype == torch.bfloat16
    assert low.weights.dtype == low.decay.dtype == low.alpha.dtype == torch.float32


def is_wrong_in_the_last_head(q, k, v, weights, decay, state, alpha, lattice):
    out = REFERENCE(q, k, v, weights, decay, state, alpha, lattice)
    return torch.cat([out[:, :-1], -out[:, -1:]], dim=1)


def test_a_gate_of_some_heads_judges_those():
    inputs = inputs_on(TorusLattice(8, 6, winding=3))
    for backward in (False, True):
        Gate(inputs, peers.compose, backward=backward, heads=[0, 2]).check("reference", REFERENCE)
        Gate(inputs, peers.compose, backward=backward, heads=[0]).check("wrong elsewhere", is_wrong_in_the_last_head)
        with pytest.raises(WrongResult, match="out: error"):
            Gate(inputs, peers.compose, backward=backward, heads=[0, 2]).check("wrong", is_wrong_in_the_last_head)
