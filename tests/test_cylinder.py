"""The cylinder, open along the major axis and closed along the minor: what sets it apart from the torus, in the
operator and in the models. Its stored cases, symmetries, statistics and gradients are tested with the others'."""

import math

import pytest
import torch
from support import assert_same_up_to_rounding, evaluate, make_problem

from torus_kernels import Stream, TorusLattice
from torus_model import TorusBlock
from torus_model.field import FieldConfig, TorusField

M, m = 5, 6
GRID = (M, m)


def cylinder(streams=None, cross_radius=(1, 2)) -> TorusLattice:
    """Winding 4, which would not close on a torus of 5 x 6."""
    return TorusLattice(M, m, "cylinder", 4, cross_radius, streams)


def test_every_backend_has_it(backend):
    """Tests of all topologies skip the cylinder where a backend refuses it."""
    assert backend.has_cylinder()


class TestOpenEnds:
    @pytest.mark.parametrize("stream, row", [(Stream.major_forward, 0), (Stream.major_backward, M - 1)],
                             ids=lambda x: getattr(x, "name", str(x)))
    def test_an_arc_that_leaves_the_lattice_shows_the_query_alone(self, backend, stream, row):
        problem = make_problem(cylinder([stream]), batch=2).to(backend.exact_dtype, backend.device)
        problem = problem.replace(stream_weights=torch.ones_like(problem.stream_weights), ema_state=None,
                                  ema_alpha=None)
        out, stats = backend.attention_with_stats(**problem.arguments())
        out, v, entropy = (x.unflatten(2, GRID) for x in (out, problem.v, stats.entropy[..., stream]))
        assert_same_up_to_rounding(out[:, :, row], v[:, :, row], ulps=4)
        assert (entropy[:, :, row] == 0).all()
        others = [u for u in range(M) if u != row]
        assert (entropy[:, :, others] > 0).all()

    @pytest.mark.parametrize("end", [0, M - 1])
    def test_windows_do_not_reach_from_one_end_to_the_other(self, backend, end):
        """What lies at one end changes what is within the radius of 2 rows, on its own side, forward and backward."""
        problem = make_problem(cylinder([Stream.cross_u_to_v, Stream.cross_v_to_u])).to(
            backend.exact_dtype, backend.device)
        rows = torch.arange(M * m, device=backend.device) // m
        changed = problem.replace(**{name: torch.where((rows == end)[:, None], x + 1, x)
                                     for name in ("q", "k", "v") if (x := getattr(problem, name)) is not None})
        before, after = evaluate(backend.attention, problem), evaluate(backend.attention, changed)
        near = (rows - end).abs() <= 2
        # A key's gradient comes from queries within the radius, whose softmax holds keys within it again.
        for name, reach in (("out", near), ("d_q", near), ("d_v", (rows - end).abs() <= 4)):
            differs = (before[name] != after[name]).any(-1)[0]  # [H, T]
            reached = reach.expand_as(differs)
            assert not (differs & ~reached).any(), name
            if backend.exact_dtype.itemsize > 2:  # 16 bits may round a change away
                assert torch.equal(differs, reached), name

    def test_distances_grow_from_end_to_end(self, backend):
        """Equal scores leave the bias alone: the sum over the rows that a stream shows of exp(-decay rho^2 / 2)."""
        decay = 0.7
        problem = make_problem(cylinder()).to(backend.exact_dtype, backend.device)
        problem = problem.replace(scale=0.0, decay=torch.full_like(problem.decay, decay))
        _, stats = backend.attention_with_stats(**problem.arguments())
        for stream, shown in (
            (Stream.major_forward, lambda u: range(u + 1)), (Stream.major_backward, lambda u: range(u, M)),
            (Stream.spiral_cw, lambda u: range(M)), (Stream.spiral_ccw, lambda u: range(M)),
        ):
            weights = [[math.exp(-0.5 * decay * (math.pi * (u - other) / M) ** 2) for other in shown(u)]
                       for u in range(M)]
            expected = torch.tensor([math.log(sum(row)) for row in weights]).to(stats.lse)[:, None].expand(M, m)
            actual = stats.lse[..., stream].unflatten(2, GRID)
            assert_same_up_to_rounding(actual, expected.expand_as(actual), stream.name, ulps=8)

    def test_the_closed_loop_is_that_of_the_torus(self, backend):
        streams = [Stream.minor_forward, Stream.minor_backward]
        problem = make_problem(TorusLattice(6, 6, "cylinder", streams=streams)).to(backend.exact_dtype, backend.device)
        on_cylinder = evaluate(backend.attention, problem)
        on_torus = evaluate(backend.attention, problem.replace(lattice=TorusLattice(6, 6, streams=streams)))
        for name in on_torus:
            assert_same_up_to_rounding(on_cylinder[name], on_torus[name], name)


def block_results(blocks: torch.nn.ModuleList, x: torch.Tensor, d_out: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradient of the tokens ``[B, T, width]``, and gradients of all parameters of a stack of blocks."""
    x = x.clone().requires_grad_()
    out, state = x, None
    for block in blocks:
        out, state = block(out, state)
    parameters = dict(blocks.named_parameters())
    d_x, *grads = torch.autograd.grad(out, [x, *parameters.values()], d_out)
    return {"out": out.detach(), "d_x": d_x, **dict(zip(parameters, grads, strict=True))}


class TestModels:
    @staticmethod
    def blocks(backend: str, device: str, dtype: torch.dtype) -> torch.nn.ModuleList:
        """Two blocks, the second with a state, whose streams differ in weight and decay."""
        torch.manual_seed(0)
        blocks = torch.nn.ModuleList(
            TorusBlock(32, 4, cylinder(), kv_heads=2, token_gated=True, compounding=compounding, backend=backend)
            for compounding in (False, True)
        )
        with torch.no_grad():
            for name, parameter in blocks.named_parameters():
                if "stream" in name or "raw_" in name:
                    parameter.add_(torch.randn_like(parameter))
        return blocks.to(device, dtype)

    @staticmethod
    def tokens(dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(2, 2, M * m, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return x.to(device, dtype).unbind()

    def test_blocks_are_the_same_on_every_backend(self, kernel_backend):
        dtype, device = kernel_backend.exact_dtype, kernel_backend.device
        with kernel_backend.chosen():
            actual = block_results(self.blocks(kernel_backend.name, device, dtype), *self.tokens(dtype, device))
        expected = block_results(self.blocks("reference", "cpu", torch.float64), *self.tokens())
        for name, value in actual.items():
            assert_same_up_to_rounding(value.cpu(), expected[name].to(dtype), name, ulps=4096)

    @pytest.mark.parametrize("shift", [1, 4])
    def test_blocks_commute_with_shifts_along_the_closed_loop(self, shift):
        blocks = self.blocks("reference", "cpu", torch.float64)

        def roll(x: torch.Tensor, axis: int) -> torch.Tensor:
            return x.unflatten(1, GRID).roll(shift, axis).flatten(1, 2)

        x, d_out = self.tokens()
        expected = block_results(blocks, x, d_out)
        actual = block_results(blocks, roll(x, 2), roll(d_out, 2))
        for name, value in expected.items():
            moved = roll(value, 2) if name in ("out", "d_x") else value
            assert_same_up_to_rounding(actual[name], moved, name, ulps=1024)
        across = block_results(blocks, roll(x, 1), roll(d_out, 1))["out"]
        assert (across - roll(expected["out"], 1)).abs().max() > 1e-3

    def test_fields_roll_by_patches_along_the_closed_axis_alone(self):
        torch.manual_seed(0)
        config = FieldConfig(grid=(8, 12), channels=2, static_channels=1, history=2, patch=2, width=16, layers=2,
                             heads=2, topology="cylinder", winding=5, cross_radius=(1, 2))
        model = TorusField(config).double()
        torch.nn.init.normal_(model.network.head.weight, std=0.1)
        frames, static = torch.randn(1, 2, 2, 8, 12, dtype=torch.float64), torch.randn(1, 1, 8, 12, dtype=torch.float64)

        def difference(shift: int, axis: int) -> float:
            rolled = model.rollout(frames.roll(shift, axis), 3, static.roll(shift, axis))
            return (rolled - model.rollout(frames, 3, static).roll(shift, axis)).abs().max().item()

        with torch.no_grad():
            assert all(difference(shift, -1) < 1e-12 for shift in (2, 6, -4))
            assert difference(1, -1) > 1e-3  # not by whole patches
            assert difference(2, -2) > 1e-3  # the open axis
