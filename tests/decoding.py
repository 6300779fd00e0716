"""Decoding token by token, for the tests of it."""

import math

import dense
import torch
from support import Problem, assert_within_budget, make_problem

from torus_kernels import TorusKVCache, TorusLattice, torus_attention_decode

LATTICES = [TorusLattice(4, 6, "causal", winding=2), TorusLattice(3, 5, "causal", cross_radius=(3, 7)),
            TorusLattice(2, 2, "causal"), TorusLattice(7, 3, "causal", winding=2, cross_radius=(0, 2)),
            TorusLattice(2, 9, "causal", winding=8, cross_radius=(2**62, 1))]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def make_cache(problem: Problem) -> TorusKVCache:
    """An empty cache for the problem's keys; a read of a slot that was never written shows."""
    batch, kv_heads, _, head_dim = problem.k.shape
    cache = TorusKVCache(problem.lattice, batch, kv_heads, head_dim, problem.k.dtype, problem.k.device)
    cache.keys.fill_(math.nan)
    cache.values.fill_(math.nan)
    return cache


def append(cache: TorusKVCache, problem: Problem, start: int, stop: int) -> None:
    cache.append(problem.k[:, :, start:stop], problem.v[:, :, start:stop])


def options(problem: Problem, t: int) -> dict:
    """The options of `torus_attention_decode` for token t."""
    chosen = {name: getattr(problem, name) for name in ("stream_weights", "decay", "scale", "ema_state", "ema_alpha")}
    per_token = {"ema_state": 4, "stream_weights": 4, "ema_alpha": 3}
    for name, dim in per_token.items():
        if chosen[name] is not None and chosen[name].dim() == dim:
            chosen[name] = chosen[name][:, :, t : t + 1]
    chosen["first_key"] = None if problem.first_key is None else problem.first_key[:, t : t + 1]
    return chosen


def decode(backend, problem: Problem, cache: TorusKVCache, t: int) -> torch.Tensor:
    return torus_attention_decode(problem.q[:, :, t : t + 1], cache, backend=backend.name, **options(problem, t))


def steps(backend, problem: Problem) -> list[int]:
    """The tokens that `decode_all` decodes: every one or, interpreted, those before and after each wrap of the ring."""
    seq_len, num_slots = problem.q.shape[2], problem.lattice.num_sites
    if not backend.is_slow:
        return list(range(seq_len))
    around = {t for wrap in range(0, seq_len + 1, num_slots) for t in (wrap - 1, wrap)}
    return sorted(around & set(range(seq_len)) | {seq_len - 1})


def decode_all(backend, problem: Problem, at: list[int] | None = None) -> torch.Tensor:
    """The operator's output, token by token, for the tokens ``at``, or at `steps`."""
    cache, rows = make_cache(problem), []
    for t in steps(backend, problem) if at is None else at:
        append(cache, problem, len(cache), t + 1)
        rows.append(decode(backend, problem, cache, t))
    return torch.cat(rows, dim=2)


def check(backend, problem: Problem, dtype: torch.dtype, rows: slice | None = None, actual=None) -> None:
    """Decoded tokens keep to the error budget of the full operator."""
    problem = problem.to(dtype, backend.device)
    rows = steps(backend, problem) if rows is None else rows
    decoded = (actual or decode_all)(backend, problem)
    plain = dense.attention(**problem.arguments())[:, :, rows]
    expected = dense.attention(**problem.to(torch.float64, backend.device).arguments())[:, :, rows]
    assert_within_budget({"out": decoded}, {"out": expected}, {"out": plain})


def causal(lattice: TorusLattice, seq_len: int | None = None, **choices) -> Problem:
    return make_problem(lattice, 3 * lattice.num_sites + 2 if seq_len is None else seq_len, **choices)


def exact(backend, problem: Problem) -> Problem:
    return problem.to(backend.exact_dtype, backend.device)
