"""Activation checkpointing: the forward pass repeated in the backward one gives the same gradients, to the bit."""

import pytest
import torch
from support import make_problem
from tiny_models import FIELDS, field, frames, language, outputs_and_gradients, tokens
from torch.utils.checkpoint import checkpoint

from torus_kernels import TorusLattice, ema_compound, lattice_rope

REENTRANT = pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved_tensor_hooks", "reentrant"])


def checkpoint_blocks(blocks, use_reentrant: bool, monkeypatch) -> list[int]:
    """Lets every block keep nothing but its inputs; counts the blocks' forward passes in the list returned."""
    passes = [0]

    def wrap(block):
        forward = block.forward

        def checkpointed(x, state=None, **options):
            def run(x, state):  # the reentrant variant takes no keyword arguments
                passes[0] += 1
                return forward(x, state, **options)

            return checkpoint(run, x, state, use_reentrant=use_reentrant)

        monkeypatch.setattr(block, "forward", checkpointed)

    for block in blocks:
        wrap(block)
    return passes


@REENTRANT
@pytest.mark.parametrize("name", ["language", *FIELDS])
def test_blocks_of_a_model(monkeypatch, name, use_reentrant):
    if name == "language":
        model, inputs = language(), [tokens(2, 20)]
        blocks = model.blocks
    else:
        model, inputs = field(FIELDS[name]), frames(FIELDS[name], 2)
        blocks = model.network.blocks
    expected = outputs_and_gradients(model, inputs)
    passes = checkpoint_blocks(blocks, use_reentrant, monkeypatch)
    actual = outputs_and_gradients(model, inputs)
    assert passes[0] == 2 * len(blocks)
    for result, value in expected.items():
        assert torch.equal(actual[result], value), result


@REENTRANT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operators(backend, dtype, use_reentrant):
    lattice = TorusLattice(3, 4, "causal", winding=2)
    problem = make_problem(lattice, 17, batch=2, heads=4, kv_heads=2).to(dtype, backend.device)

    def function(q, k, v, weights, decay, state, alpha):
        q, k = lattice_rope(q, lattice), lattice_rope(k, lattice)
        out = backend.attention(q, k, v, lattice, stream_weights=weights, decay=decay, ema_state=state,
                                ema_alpha=alpha)
        return ema_compound(out, state, alpha)

    def evaluate(function):
        leaves = [x.clone().requires_grad_() for x in problem.tensors().values()]
        out = function(*leaves)
        out.backward(problem.d_out)
        return [out, *(leaf.grad for leaf in leaves)]

    with backend.chosen():
        expected = evaluate(function)
        actual = evaluate(lambda *inputs: checkpoint(function, *inputs, use_reentrant=use_reentrant))
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
