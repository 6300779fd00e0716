"""Random problems over everything the operator accepts, against the error budget."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import TOPOLOGIES, layouts, problems
from support import LAYOUTS, assert_within_budget, check_precision, evaluate

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def topologies_of(backend) -> tuple[str, ...]:
    return TOPOLOGIES if backend.has_cylinder() else TOPOLOGIES[:2]


@given(data=st.data())
@settings(max_examples=max(100, settings.default.max_examples))
def test_any_problem_keeps_to_the_budget(backend, data):
    problem = data.draw(problems(topologies_of(backend)))
    check_precision(backend, problem, data.draw(st.sampled_from(backend.dtypes)))


@given(data=st.data())
def test_any_strides_give_the_same_result(backend, data):
    dtype = data.draw(st.sampled_from(backend.dtypes))
    problem = data.draw(problems(topologies_of(backend))).to(dtype, backend.device)
    tensors = {**problem.tensors(), "d_out": problem.d_out}
    strided = {name: LAYOUTS[data.draw(layouts, label=name)](x) if x.dim() > 2 else x for name, x in tensors.items()}
    if data.draw(st.booleans()):
        strided["d_out"] = tensors["d_out"] = problem.d_out[:, :, :1, :1].expand_as(problem.d_out)
    actual = evaluate(backend.attention, problem.replace(**strided))
    packed = {name: x.contiguous() for name, x in tensors.items()}
    expected = evaluate(backend.attention, problem.replace(**packed))
    if backend.name != "reference":
        for name, value in expected.items():
            assert torch.equal(actual[name], value), name
    else:
        # BLAS chooses its order of summation by layout.
        assert_within_budget(actual, expected, plain=expected)


@given(data=st.data())
def test_statistics_do_not_change_the_output(backend, data):
    dtype = data.draw(st.sampled_from(backend.dtypes))
    problem = data.draw(problems(topologies_of(backend))).to(dtype, backend.device)
    out, stats = backend.attention_with_stats(**problem.arguments())
    assert torch.equal(out, backend.attention(**problem.arguments()))
    kept = sorted(int(s) for s in problem.lattice.streams)
    assert stats.lse[..., kept].isfinite().all()
    assert stats.lse.isfinite().sum() == stats.lse[..., kept].numel()
    assert (stats.entropy >= 0).all()
