"""The causal topology: no look ahead, a window of N tokens, packed documents and padding."""

import pytest
import torch
from support import Problem, assert_same_up_to_rounding, evaluate, label, make_problem

from torus_kernels import TorusLattice

LATTICES = [TorusLattice(4, 6, "causal", winding=2), TorusLattice(3, 5, "causal", cross_radius=(3, 7)),
            TorusLattice(2, 2, "causal"), TorusLattice(7, 3, "causal", winding=2, cross_radius=(0, 2))]
TOKENS = ("q", "k", "v", "ema_state", "d_out")
GATES = ("stream_weights", "ema_alpha")


def causal_problem(backend, lattice, seq_len, *, token_gates=True, **options) -> Problem:
    problem = make_problem(lattice, seq_len, heads=2, kv_heads=1, token_weights=token_gates, token_alpha=token_gates,
                           **options)
    return problem.to(backend.exact_dtype, backend.device)


def window(problem: Problem, start: int, stop: int) -> Problem:
    """The problem of a run of its tokens."""
    changes = {name: getattr(problem, name)[:, :, start:stop] for name in TOKENS + GATES}
    return problem.replace(**changes, first_key=None)


@pytest.mark.parametrize("lattice", LATTICES, ids=label)
def test_outputs_do_not_depend_on_later_tokens(backend, lattice):
    seq_len = 2 * lattice.num_sites + 3
    problem = causal_problem(backend, lattice, seq_len)
    out, stats = backend.attention_with_stats(**problem.arguments())
    for t in range(0, seq_len, 3):
        later = {name: getattr(problem, name).clone() for name in ("q", "k", "v", "ema_state")}
        for x in later.values():
            x[:, :, t + 1 :] = 37.0
        changed, changed_stats = backend.attention_with_stats(**problem.replace(**later).arguments())
        assert torch.equal(changed[:, :, : t + 1], out[:, :, : t + 1]), t
        assert torch.equal(changed_stats.lse[:, :, : t + 1], stats.lse[:, :, : t + 1]), t
        assert torch.equal(changed_stats.entropy[:, :, : t + 1], stats.entropy[:, :, : t + 1]), t


@pytest.mark.parametrize("lattice", LATTICES, ids=label)
def test_no_gradient_reaches_later_tokens(backend, lattice):
    seq_len = 2 * lattice.num_sites
    problem = causal_problem(backend, lattice, seq_len)
    t = lattice.num_sites
    d_out = problem.d_out.clone()
    d_out[:, :, t + 1 :] = 0.0
    grads = evaluate(backend.attention, problem.replace(d_out=d_out))
    for name in ("d_q", "d_k", "d_v", "d_stream_weights", "d_ema_state", "d_ema_alpha"):
        assert (grads[name][:, :, t + 1 :] == 0).all(), name
        assert (grads[name][:, :, t] != 0).any(), name


@pytest.mark.parametrize("lattice", LATTICES, ids=label)
def test_shorter_sequences_are_prefixes(backend, lattice):
    problem = causal_problem(backend, lattice, 2 * lattice.num_sites + 1)
    out = backend.attention(**problem.arguments())
    for seq_len in range(1, 2 * lattice.num_sites + 1, 5):
        prefix = backend.attention(**window(problem, 0, seq_len).arguments())
        assert_same_up_to_rounding(prefix, out[:, :, :seq_len], f"T = {seq_len}")


@pytest.mark.parametrize("lattice", LATTICES, ids=label)
@pytest.mark.parametrize("dropped", [1, 4, 17])
def test_tokens_beyond_the_window_are_forgotten(backend, lattice, dropped):
    seq_len = dropped + 2 * lattice.num_sites
    problem = causal_problem(backend, lattice, seq_len)
    out = backend.attention(**problem.arguments())
    rest = backend.attention(**window(problem, dropped, seq_len).arguments())
    unchanged = dropped + lattice.num_sites - 1
    assert_same_up_to_rounding(rest[:, :, unchanged - dropped :], out[:, :, unchanged:])
    # One row earlier the window still holds the last token dropped, which only a stream of lag N - 1 may show.
    assert not torch.equal(rest[:, :, 0], out[:, :, dropped])


def test_the_oldest_visible_token(backend):
    """At lag N - 1 = (M - 1) m + (m - 1) the broad flow still sees a token, and at lag N nothing does."""
    lattice = TorusLattice(3, 4, "causal", cross_radius=(3, 3))
    problem = causal_problem(backend, lattice, 30)
    out = backend.attention(**problem.arguments())
    for lag, sees in ((11, True), (12, False), (13, False)):
        v = problem.v.clone()
        v[:, :, 29 - lag] += 1.0
        changed = backend.attention(**problem.replace(v=v).arguments())
        assert torch.equal(changed[:, :, 29], out[:, :, 29]) != sees, lag


@pytest.mark.parametrize("lattice", LATTICES, ids=label)
def test_one_token_sees_itself(backend, lattice):
    problem = causal_problem(backend, lattice, 1, batch=2).replace(ema_state=None, ema_alpha=None)
    out = backend.attention(**problem.arguments())
    expected = problem.stream_weights.sum(dim=-1, keepdim=True) * problem.v
    assert_same_up_to_rounding(out, expected.to(out))


DOCUMENTS = [13, 1, 26, 2, 9]


def starts(lengths: list[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths))]


def packed(lengths: list[int], batch: int = 1, dtype=torch.int32) -> torch.Tensor:
    """``first_key`` ``[B, T]`` of documents laid end to end."""
    row = [start for start, length in zip(starts(lengths), lengths, strict=True) for _ in range(length)]
    return torch.tensor([row] * batch, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=label)
@pytest.mark.parametrize("lattice", LATTICES, ids=label)
def test_packed_documents_equal_separate_runs(backend, lattice, dtype):
    problem = causal_problem(backend, lattice, sum(DOCUMENTS))
    problem = problem.replace(first_key=packed(DOCUMENTS, dtype=dtype).to(backend.device))
    together = evaluate(backend.attention, problem)
    d_decay = torch.zeros_like(problem.decay)
    for start, length in zip(starts(DOCUMENTS), DOCUMENTS, strict=True):
        alone = evaluate(backend.attention, window(problem, start, start + length))
        d_decay += alone.pop("d_decay")
        for name, value in alone.items():
            assert_same_up_to_rounding(together[name][:, :, start : start + length], value, name, ulps=1024)
    assert_same_up_to_rounding(together["d_decay"], d_decay, "d_decay", ulps=1024)


@pytest.mark.parametrize("lattice", LATTICES, ids=label)
def test_packed_documents_are_independent(backend, lattice):
    problem = causal_problem(backend, lattice, sum(DOCUMENTS))
    problem = problem.replace(first_key=packed(DOCUMENTS).to(backend.device))
    out = backend.attention(**problem.arguments())
    for start, length in zip(starts(DOCUMENTS), DOCUMENTS, strict=True):
        inside = slice(start, start + length)
        changes = {}
        for name in ("q", "k", "v"):
            changes[name] = torch.full_like(getattr(problem, name), 51.0)
            changes[name][:, :, inside] = getattr(problem, name)[:, :, inside]
        others = backend.attention(**problem.replace(**changes).arguments())
        assert torch.equal(others[:, :, inside], out[:, :, inside])

        d_out = torch.zeros_like(problem.d_out)
        d_out[:, :, inside] = problem.d_out[:, :, inside]
        grads = evaluate(backend.attention, problem.replace(d_out=d_out))
        for name in ("d_q", "d_k", "d_v"):
            assert (grads[name][:, :, :start] == 0).all(), name
            assert (grads[name][:, :, start + length :] == 0).all(), name


@pytest.mark.parametrize("padding", [1, 5, 40])
@pytest.mark.parametrize("lattice", LATTICES, ids=label)
def test_left_padding_does_not_matter(backend, lattice, padding):
    length = lattice.num_sites + 7
    problem = causal_problem(backend, lattice, padding + length, batch=2)
    first_key = torch.full((2, padding + length), padding, device=backend.device)
    first_key[1] = 0  # the second sequence of the batch is not padded
    out = backend.attention(**problem.replace(first_key=first_key).arguments())
    unpadded = backend.attention(**window(problem, padding, padding + length).arguments())
    assert_same_up_to_rounding(out[:1, :, padding:], unpadded[:1])
    assert_same_up_to_rounding(out[1:], backend.attention(**problem.arguments())[1:])


def test_first_key_beyond_its_token_leaves_the_token_itself(backend):
    lattice = LATTICES[0]
    problem = causal_problem(backend, lattice, 30).replace(ema_state=None, ema_alpha=None)
    for beyond in (29, 30, 2**31 - 1):
        first_key = torch.full((1, 30), beyond, dtype=torch.int32, device=backend.device)
        out = backend.attention(**problem.replace(first_key=first_key).arguments())
        expected = problem.stream_weights.sum(dim=-1, keepdim=True) * problem.v
        assert_same_up_to_rounding(out[:, :, :29], expected[:, :, :29].to(out))


@pytest.mark.parametrize("first", [0, -1, -(2**31)])
def test_first_key_before_the_sequence_hides_nothing(backend, first):
    problem = causal_problem(backend, LATTICES[1], 40)
    first_key = torch.full((1, 40), first, dtype=torch.int32, device=backend.device)
    out = backend.attention(**problem.replace(first_key=first_key).arguments())
    assert_same_up_to_rounding(out, backend.attention(**problem.arguments()))


def test_the_lowest_first_key_of_64_bits_hides_nothing(backend):
    problem = causal_problem(backend, TorusLattice(4, 6, "causal"), 40)
    first_key = torch.full((1, 40), torch.iinfo(torch.int64).min, device=backend.device)
    out = backend.attention(**problem.replace(first_key=first_key).arguments())
    assert_same_up_to_rounding(out, backend.attention(**problem.arguments()))


def test_first_key_in_64_bits_is_not_cut_to_32(backend):
    problem = causal_problem(backend, LATTICES[1], 40)
    first_key = torch.full((1, 40), 2**32, device=backend.device)
    clamped = torch.arange(40, device=backend.device)[None]
    assert torch.equal(backend.attention(**problem.replace(first_key=first_key).arguments()),
                       backend.attention(**problem.replace(first_key=clamped).arguments()))


@pytest.mark.parametrize("n_major, n_minor", [(10**9, 3), (3, 10**9), (10**7, 10**7), (2**47, 2)])
def test_lattices_larger_than_memory(backend, n_major, n_minor):
    """Only as much of a causal lattice is ever touched as there are tokens."""
    huge = TorusLattice(n_major, n_minor, "causal")
    problem = causal_problem(backend, huge, 45)
    # A loop of 2048 steps is as good as endless to 45 tokens, but for the scale of its distances: rho = pi k / L.
    same = TorusLattice(min(n_major, 2048), min(n_minor, 2048), "causal")
    flat = problem.replace(decay=torch.zeros_like(problem.decay))
    actual, expected = (evaluate(backend.attention, flat.replace(lattice=lattice)) for lattice in (huge, same))
    for name in expected:
        if name != "d_decay":
            assert_same_up_to_rounding(actual[name], expected[name], name)
    assert evaluate(backend.attention, problem)["d_decay"].isfinite().all()
