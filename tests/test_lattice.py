"""The lattice: validity, streams, embedding, and who sees whom against an independent enumeration."""

import copy
import dataclasses
import math
import pickle

import dense
import numpy as np
import pytest
import torch
from hypothesis import given
from strategies import lattices

from torus_kernels import DEFAULT_DECAY, Stream, TorusLattice

NAMES = ["major_forward", "major_backward", "minor_forward", "minor_backward", "spiral_cw", "spiral_ccw",
         "cross_u_to_v", "cross_v_to_u"]


def seen(lattice: TorusLattice, stream: Stream, query: int, seq_len: int) -> list[int]:
    visible, _ = lattice.stream_geometry(stream, seq_len)
    return visible[query].nonzero().flatten().tolist()


class TestStream:
    def test_names_and_indices(self):
        assert [s.name for s in Stream] == NAMES
        assert [s.index for s in Stream] == list(range(8))

    def test_pairs(self):
        assert [s.pair().index for s in Stream] == [1, 0, 3, 2, 5, 4, 7, 6]
        assert all(s.pair().pair() is s for s in Stream)

    def test_directions(self):
        assert [s.is_forward for s in Stream] == [True, False] * 4
        assert [s.is_cross for s in Stream] == [False] * 6 + [True] * 2

    def test_default_decay(self):
        assert DEFAULT_DECAY == (0, 0, 0, 0, 1, 1, 4, 4)


class TestValue:
    def test_defaults(self):
        lattice = TorusLattice(n_major=8, n_minor=4)
        assert (lattice.topology, lattice.winding, lattice.cross_radius) == ("periodic", 1, (3, 7))
        assert lattice.streams == frozenset(Stream)
        assert lattice.num_sites == 32

    def test_immutable_and_hashable(self):
        lattice = TorusLattice(8, 4)
        with pytest.raises(dataclasses.FrozenInstanceError):
            lattice.n_major = 9
        assert len({lattice, TorusLattice(8, 4), TorusLattice(8, 4, winding=3)}) == 2

    def test_streams_in_every_spelling_are_the_same(self):
        spellings = [[0, 5], ["major_forward", "spiral_ccw"], {Stream.spiral_ccw, Stream.major_forward},
                     np.array([5, 0, 0]), (s for s in (0, 5))]
        assert len({TorusLattice(8, 4, streams=s) for s in spellings}) == 1
        assert TorusLattice(8, 4, streams=None) == TorusLattice(8, 4, streams=range(8))

    def test_numpy_integers_and_lists_are_taken(self):
        lattice = TorusLattice(np.int64(8), np.int32(4), cross_radius=[np.int64(1), 2])
        assert lattice == TorusLattice(8, 4, cross_radius=(1, 2))
        assert type(lattice.n_major) is int

    @given(lattices())
    def test_copies_and_specification_round_trip(self, lattice):
        assert pickle.loads(pickle.dumps(lattice)) == lattice
        assert copy.deepcopy(lattice) == lattice
        assert dataclasses.replace(lattice) == lattice
        assert TorusLattice.from_spec(lattice.spec) == lattice

    def test_replace_checks_again(self):
        with pytest.raises(ValueError, match="winding"):
            dataclasses.replace(TorusLattice(8, 4), n_minor=5)


class TestEmbedding:
    def test_points_lie_on_the_surface(self):
        points = TorusLattice(7, 5, "causal").embed(3.0, 0.5)
        assert points.shape == (35, 3)
        assert points.dtype == torch.float64
        ring = points[:, :2].norm(dim=1)
        torch.testing.assert_close((ring - 3.0) ** 2 + points[:, 2] ** 2, torch.full((35,), 0.25, dtype=torch.float64))

    def test_coordinates_of_a_site(self):
        lattice = TorusLattice(7, 5, "causal")
        theta_u, theta_v = lattice.angles()
        token, u, v = 3 * 5 + 2, 2 * math.pi * 3 / 7, 2 * math.pi * 2 / 5
        assert (theta_u[token].item(), theta_v[token].item()) == pytest.approx((u, v))
        ring = 2 + math.cos(v)
        assert lattice.embed()[token].tolist() == pytest.approx(
            [ring * math.cos(u), ring * math.sin(u), math.sin(v)])

    @pytest.mark.parametrize("radii", [(1.0, 1.0), (1.0, 2.0), (1.0, 0.0), (2.0, -1.0)])
    def test_radii(self, radii):
        with pytest.raises(ValueError, match="major_radius > minor_radius > 0"):
            TorusLattice(4, 4).embed(*radii)


class TestVisibility:
    @given(lattices())
    def test_agrees_with_the_enumeration(self, lattice):
        lengths = [1, lattice.num_sites - 1, 2 * lattice.num_sites + 3] if lattice.is_causal else [lattice.num_sites]
        for seq_len in lengths:
            for stream in Stream:
                visible, rho_squared = lattice.stream_geometry(stream, seq_len)
                expected, expected_rho_squared = dense.geometry(lattice, int(stream), seq_len)
                assert torch.equal(visible, expected), stream
                torch.testing.assert_close(rho_squared, expected_rho_squared, rtol=1e-14, atol=0)

    def test_periodic_by_hand(self):
        lattice, site = TorusLattice(4, 6, winding=3, cross_radius=(0, 2)), lambda u, v: u % 4 * 6 + v % 6
        query = site(1, 2)
        by_hand = {
            0: [(1, 2), (0, 2), (3, 2)], 1: [(1, 2), (2, 2), (3, 2)],
            2: [(1, 2), (1, 1), (1, 0), (1, 5)], 3: [(1, 2), (1, 3), (1, 4), (1, 5)],
            4: [(1, 2), (0, 5), (3, 2), (2, 5)], 5: [(1, 2), (0, 5), (3, 2), (2, 5)],
            6: [(1, v) for v in range(5)], 7: [(u, 2) for u in range(4)],
        }
        for stream, keys in by_hand.items():
            assert seen(lattice, Stream(stream), query, 24) == sorted(site(*key) for key in keys), stream

    def test_causal_by_hand(self):
        lattice = TorusLattice(4, 3, "causal", cross_radius=(1, 1))
        by_hand = {0: [0, 3, 6], 1: [0, 6, 9], 2: [0, 1], 3: [0, 2], 4: [0, 4, 8], 5: [0, 2, 4, 6],
                   6: [0, 1, 2, 3, 4], 7: [0, 1, 2, 3, 4]}
        for stream, steps in by_hand.items():
            assert seen(lattice, Stream(stream), 30, 31) == sorted(30 - tau for tau in steps), stream

    def test_cylinder_by_hand(self):
        lattice, site = TorusLattice(4, 3, "cylinder", cross_radius=(1, 0)), lambda u, v: u * 3 + v % 3
        by_hand = {0: [(0, 1), (1, 1)], 1: [(1, 1), (2, 1), (3, 1)], 4: [(u, u) for u in range(4)],
                   5: [(u, 2 - u) for u in range(4)], 6: [(0, 1), (1, 1), (2, 1)], 7: [(1, 0), (1, 1), (1, 2)]}
        for stream, keys in by_hand.items():
            assert seen(lattice, Stream(stream), site(1, 1), 12) == sorted(site(*key) for key in keys), stream

    def test_two_steps_coincide_on_the_shortest_loop(self):
        lattice = TorusLattice(2, 2)
        for stream in (Stream.major_forward, Stream.minor_forward):
            assert torch.equal(lattice.stream_geometry(stream, 4)[0], lattice.stream_geometry(stream.pair(), 4)[0])

    @given(lattices())
    def test_every_query_sees_itself_at_no_distance(self, lattice):
        for stream in Stream:
            visible, rho_squared = lattice.stream_geometry(stream, lattice.num_sites)
            assert visible.diagonal().all()
            assert (rho_squared.diagonal() == 0).all()

    @pytest.mark.parametrize("topology", ["periodic", "causal", "cylinder"])
    def test_a_radius_of_any_size(self, topology):
        huge, wide = (TorusLattice(4, 6, topology, winding=3, cross_radius=(0, r)) for r in (10**30, 24))
        for stream in (Stream.cross_u_to_v, Stream.cross_v_to_u):
            visible, rho_squared = huge.stream_geometry(stream, 24)
            assert torch.equal(visible, wide.stream_geometry(stream, 24)[0])
            assert rho_squared.max() < 1e-20


class TestByDisplacement:
    @pytest.mark.parametrize("stream", Stream)
    @pytest.mark.parametrize("lattice", [TorusLattice(4, 6, "causal", winding=2),
                                         TorusLattice(3, 5, "causal", cross_radius=(3, 7)),
                                         TorusLattice(2, 9, "causal", winding=8, cross_radius=(2**62, 1))])
    def test_lags_are_a_row_of_the_dense_geometry(self, lattice, stream):
        n = lattice.num_sites
        visible, rho_squared = lattice.lag_geometry(stream, torch.arange(-2, 2 * n))
        assert not visible[:2].any()
        assert not visible[n + 2 :].any()
        expected = dense.lags(lattice, int(stream), n)
        assert (visible.nonzero().flatten() - 2).tolist() == sorted(expected)
        torch.testing.assert_close(rho_squared[visible].tolist(), [expected[lag] for lag in sorted(expected)])
        assert not rho_squared[~visible].any()

    @given(lattices(topologies=("periodic", "cylinder")))
    def test_displacements_are_those_of_the_dense_geometry(self, lattice):
        major, minor = torch.arange(lattice.n_major), torch.arange(lattice.n_minor)
        u, v = major.repeat_interleave(lattice.n_minor), minor.repeat(lattice.n_major)
        for stream in Stream:
            visible, rho_squared = lattice.displacement_geometry(stream, u[:, None] - u, v[:, None] - v)
            expected, expected_rho_squared = dense.geometry(lattice, int(stream), lattice.num_sites)
            assert torch.equal(visible, expected), stream
            torch.testing.assert_close(rho_squared, expected_rho_squared, rtol=1e-14, atol=0)

    def test_displacements_broadcast(self):
        a, b = torch.arange(-3, 4)[:, None], torch.arange(6)
        visible, rho_squared = TorusLattice(4, 6, "cylinder").displacement_geometry(Stream.major_forward, a, b)
        assert visible.shape == rho_squared.shape == (7, 6)
        assert visible.nonzero().tolist() == [[a, 0] for a in range(3, 7)]

    def test_each_belongs_to_its_topologies(self):
        with pytest.raises(ValueError, match="lags belong to the causal topology, this lattice is periodic"):
            TorusLattice(4, 4).lag_geometry(0, torch.arange(3))
        with pytest.raises(ValueError, match="displacements belong to the periodic and the cylinder topology"):
            TorusLattice(4, 4, "causal").displacement_geometry(0, torch.arange(3), torch.arange(3))


class TestErrors:
    @pytest.mark.parametrize("name", ["n_major", "n_minor", "winding"])
    @pytest.mark.parametrize("value", [4.0, "4", None, True, [4], torch.tensor(4.0)], ids=repr)
    def test_integers(self, name, value):
        with pytest.raises(TypeError, match=f"{name} must be an integer, got"):
            TorusLattice(**{"n_major": 8, "n_minor": 4, name: value})

    @pytest.mark.parametrize("name", ["n_major", "n_minor"])
    @pytest.mark.parametrize("value", [1, 0, -3])
    def test_sizes(self, name, value):
        with pytest.raises(ValueError, match=f"{name} must be at least 2, got {value}"):
            TorusLattice(**{"n_major": 8, "n_minor": 4, name: value})

    def test_size_beyond_exact_arithmetic(self):
        with pytest.raises(ValueError, match=r"n_major \* n_minor"):
            TorusLattice(2**40, 2**40)

    @pytest.mark.parametrize("topology", ["causal", "periodic", "cylinder"])
    @pytest.mark.parametrize("winding", [0, -1, 4, 5])
    def test_winding_out_of_range(self, topology, winding):
        with pytest.raises(ValueError, match=f"winding .*n_minor = 4, got {winding}"):
            TorusLattice(8, 4, topology, winding=winding)

    @pytest.mark.parametrize("n_major, n_minor, winding, message", [
        (6, 4, 1, "windings that close: 2$"),
        (9, 6, 3, "windings that close: 2, 4$"),
        (5, 7, 1, "no winding closes, because 5 and 7 share no factor"),
        (50, 100, 1, "windings that close: 2, 4, 6, 8, 10, 12, 14, 16"),
    ])
    def test_winding_that_does_not_close(self, n_major, n_minor, winding, message):
        with pytest.raises(ValueError, match=f"winding {winding} does not close.*{message}"):
            TorusLattice(n_major, n_minor, winding=winding)

    @pytest.mark.parametrize("n_major, n_minor", [(6, 4), (9, 6), (5, 10), (4, 4), (12, 18)])
    def test_named_windings_are_the_ones_that_close(self, n_major, n_minor):
        closing = [w for w in range(1, n_minor) if w * n_major % n_minor == 0]
        for winding in range(1, n_minor):
            if winding in closing:
                TorusLattice(n_major, n_minor, winding=winding)
            else:
                with pytest.raises(ValueError, match=": " + ", ".join(map(str, closing)) + "$"):
                    TorusLattice(n_major, n_minor, winding=winding)

    @pytest.mark.parametrize("topology", ["causal", "cylinder"])
    def test_open_topologies_have_no_closing_rule(self, topology):
        assert TorusLattice(5, 7, topology, winding=3).winding == 3

    @pytest.mark.parametrize("topology, error", [("torus", ValueError), ("", ValueError), (0, TypeError),
                                                 (None, TypeError)])
    def test_topology(self, topology, error):
        with pytest.raises(error, match="topology must be"):
            TorusLattice(8, 4, topology)

    @pytest.mark.parametrize("radius, error", [
        (3, TypeError), ((3,), TypeError), ((1, 2, 3), TypeError), ("37", TypeError), ((1.0, 2), TypeError),
        ((1, None), TypeError), ((True, 2), TypeError), ((-1, 2), ValueError), ((3, -7), ValueError),
    ], ids=str)
    def test_cross_radius(self, radius, error):
        with pytest.raises(error, match="cross_radius must"):
            TorusLattice(8, 4, cross_radius=radius)

    @pytest.mark.parametrize("streams, error", [
        ([], ValueError), ([8], ValueError), ([-1], ValueError), (["minor"], ValueError), (["0"], ValueError),
        ("spiral_cw", TypeError), (3, TypeError), (Stream.spiral_cw, TypeError), ([0.0], TypeError),
        ([None], TypeError), ([True], TypeError), (3.5, TypeError),
    ], ids=str)
    def test_streams(self, streams, error):
        with pytest.raises(error, match="streams"):
            TorusLattice(8, 4, streams=streams)

    def test_questions_a_stream_cannot_answer(self):
        lattice = TorusLattice(8, 4)
        for ask in (lattice.loop_length, lattice.stride):
            with pytest.raises(ValueError, match="cross_u_to_v is a cross flow"):
                ask(Stream.cross_u_to_v)
        with pytest.raises(ValueError, match="spiral_cw is a line stream"):
            lattice.radii(Stream.spiral_cw)
