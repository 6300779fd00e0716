"""The torus lattice and its eight streams: the one Python statement of who sees whom, and how far away it is.

Everything here is arithmetic on displacements. A key is visible to a query through the displacement between
them and nothing else, which is what makes the operator invariant under translations of the lattice.
"""

from __future__ import annotations

import enum
import functools
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

MAX_SITES = 2**48
"""Largest ``n_major * n_minor``: keeps ``harmonic * position`` exact in 64-bit integers."""

_MAX_RADIUS = 2**62
"""A larger cross radius is equivalent: it exceeds every lattice, and its bias is zero in every dtype."""


class Stream(enum.IntEnum):
    """The eight streams, in the order of every ``[..., 8]`` tensor of the library.

    Streams come in pairs that share their work: the two arcs of a loop, the two spirals, the two cross flows.
    """

    major_forward = 0
    major_backward = 1
    minor_forward = 2
    minor_backward = 3
    spiral_cw = 4
    spiral_ccw = 5
    cross_u_to_v = 6
    cross_v_to_u = 7

    @property
    def index(self) -> int:
        """Position of the stream in the last dimension of weights, decay and statistics."""
        return self.value

    @property
    def is_forward(self) -> bool:
        """True for the first stream of each pair: the forward arcs, the clockwise spiral, the flow from u to v."""
        return self.value % 2 == 0

    @property
    def is_cross(self) -> bool:
        """True for the two cross flows, False for the six line streams."""
        return self.value >= Stream.cross_u_to_v

    def pair(self) -> Stream:
        """The other stream of the pair, which a reflection or a transposition of the lattice swaps with this one."""
        return Stream(self.value ^ 1)


NUM_STREAMS = len(Stream)
_ALL_STREAMS = frozenset(Stream)

DEFAULT_DECAY = (0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 4.0, 4.0)
"""Default geodesic decay of each stream: 0 for the loops, 1 for the spirals, 4 for the cross flows."""


class Topology(enum.IntEnum):
    """How the lattice closes; the values travel to the kernels in `TorusLattice.spec`."""

    periodic = 0
    causal = 1
    cylinder = 2


_TOPOLOGIES = {topology.name: topology.value for topology in Topology}


def _integer(name: str, value: Any) -> int:
    if type(value) is int:
        return value
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    try:
        return operator.index(value)  # accepts numpy integers, refuses floats
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}") from None


def _stream(value: object) -> Stream:
    if isinstance(value, str):
        if value not in Stream.__members__:
            raise ValueError(f"streams has no stream named {value!r}; the streams are {', '.join(Stream.__members__)}")
        return Stream[value]
    index = _integer("streams", value)
    if not 0 <= index < NUM_STREAMS:
        raise ValueError(f"streams has no stream {index}; streams are numbered 0 to {NUM_STREAMS - 1}")
    return Stream(index)


def _normalise_streams(streams: object) -> frozenset[Stream]:
    if streams is None:
        return _ALL_STREAMS
    if isinstance(streams, (str, int)) or not isinstance(streams, Iterable):
        raise TypeError(f"streams must be a collection of streams, got {streams!r}")
    chosen = frozenset(_stream(s) for s in streams)
    if not chosen:
        raise ValueError("streams must name at least one stream, got none")
    return chosen


@dataclass(frozen=True)
class TorusLattice:
    """A closed lattice of ``n_major * n_minor`` sites; token ``t`` sits at ``u = t // n_minor``, ``v = t % n_minor``.

    Args:
        n_major: sites along the major loop (M), at least 2.
        n_minor: sites along the minor loop (m), at least 2.
        topology: ``"periodic"`` (a field on the closed grid, sequence length exactly N = M*m), ``"causal"``
            (a sequence of any length wound on the torus, one winding per m tokens) or ``"cylinder"``
            (closed along the minor loop, open along the major, as longitude and latitude are; sequence length
            exactly N). On a cylinder `major_forward` shows every row up to the query's own and `major_backward` every
            row from it on, the spirals run from end to end, the cross flows' windows are clipped at both ends, and
            distances along the major axis are ``pi * |u - u'| / M``.
        winding: minor steps that a spiral makes per major step (w), ``1 <= w < m``. In the periodic topology
            the strands must close: ``w*M % m == 0``.
        cross_radius: ``(narrow, broad)`` half-widths of the cross flows' windows, two integers >= 0 in any order.
        streams: the streams that take part (`Stream`, index or name); all eight by default. One left out
            contributes nothing.

    Raises:
        TypeError: an argument is not an integer, or ``streams`` is not a collection of streams.
        ValueError: an argument is out of range, or the winding does not close.
    """

    n_major: int
    n_minor: int
    topology: str = "periodic"
    winding: int = 1
    cross_radius: tuple[int, int] = (3, 7)
    streams: frozenset[Stream] = None  # type: ignore[assignment]  # all of them
    spec: tuple[int, ...] = field(init=False, repr=False, compare=False)

    if TYPE_CHECKING:  # what may be given is wider than what the fields then hold

        def __init__(
            self,
            n_major: int,
            n_minor: int,
            topology: str = "periodic",
            winding: int = 1,
            cross_radius: tuple[int, int] | list[int] = (3, 7),
            streams: Iterable[Stream | int | str] | None = None,
        ) -> None: ...

    # torch.compile traces it: what torch 2.11 cannot trace (enumerations, operator.index) lies in module constants.
    def __post_init__(self) -> None:
        def assign(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        for name in ("n_major", "n_minor", "winding"):
            assign(name, _integer(name, getattr(self, name)))
        for name in ("n_major", "n_minor"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, got {getattr(self, name)}")
        if self.n_major * self.n_minor > MAX_SITES:
            raise ValueError(f"n_major * n_minor must be at most 2**48, got {self.n_major} * {self.n_minor}")
        if not isinstance(self.topology, str):
            raise TypeError(f"topology must be a string, got {self.topology!r}")
        if self.topology not in _TOPOLOGIES:
            raise ValueError(f"topology must be one of {', '.join(_TOPOLOGIES)}, got {self.topology!r}")
        if not 1 <= self.winding < self.n_minor:
            raise ValueError(f"winding must satisfy 1 <= winding < n_minor = {self.n_minor}, got {self.winding}")
        if not isinstance(self.cross_radius, (tuple, list)) or len(self.cross_radius) != 2:
            raise TypeError(f"cross_radius must be two integers (narrow, broad), got {self.cross_radius!r}")
        radius = tuple([_integer("cross_radius", r) for r in self.cross_radius])
        if min(radius) < 0:
            raise ValueError(f"cross_radius must not be negative, got {radius}")
        assign("cross_radius", radius)
        assign("streams", _normalise_streams(self.streams))
        if self.topology == "periodic":
            self._check_winding_closes()
        stream_mask = sum(1 << s for s in self.streams)
        assign("spec", (_TOPOLOGIES[self.topology], self.n_major, self.n_minor, self.winding,
                        *[min(r, _MAX_RADIUS) for r in radius], stream_mask))

    def _check_winding_closes(self) -> None:
        if self.winding * self.n_major % self.n_minor == 0:
            return
        step = self.n_minor // math.gcd(self.n_major, self.n_minor)
        problem = (f"winding {self.winding} does not close on a periodic {self.n_major} x {self.n_minor} lattice: "
                   f"winding * n_major must be a multiple of n_minor")
        if step == self.n_minor:
            raise ValueError(f"{problem}; no winding closes, because {self.n_major} and {self.n_minor} share no factor")
        closing = [str(w) for w in range(step, self.n_minor, step)]
        listed = ", ".join(closing) if len(closing) <= 8 else ", ".join(closing[:8]) + ", ... (multiples)"
        raise ValueError(f"{problem}; windings that close: {listed}")

    @classmethod
    def from_spec(cls, spec: Iterable[int]) -> TorusLattice:
        """The lattice whose `spec` this is (the form in which a lattice travels through an operator schema)."""
        return _lattice_from_spec(tuple(spec))

    @property
    def num_sites(self) -> int:
        """N = n_major * n_minor; in the causal topology the length of the window that a query can see."""
        return self.n_major * self.n_minor

    @property
    def is_causal(self) -> bool:
        """True in the causal topology, where tokens see the past only and T is free."""
        return self.topology == "causal"

    def loop_length(self, stream: Stream) -> int:
        """L, the number of steps of a line stream's loop."""
        stream = Stream(stream)
        if stream.is_cross:
            raise ValueError(f"{stream.name} is a cross flow and has no loop")
        return self.n_minor if stream in (Stream.minor_forward, Stream.minor_backward) else self.n_major

    def stride(self, stream: Stream) -> int:
        """Tokens per step of a line stream in the causal topology: m, 1, m + w or m - w."""
        stream = Stream(stream)
        if stream.is_cross:
            raise ValueError(f"{stream.name} is a cross flow and has no stride")
        return (self.n_minor, self.n_minor, 1, 1, self.n_minor + self.winding, self.n_minor - self.winding)[stream]

    def radii(self, stream: Stream) -> tuple[int, int]:
        """``(radius_u, radius_v)`` of a cross flow's window."""
        stream = Stream(stream)
        if not stream.is_cross:
            raise ValueError(f"{stream.name} is a line stream and has no window")
        narrow, broad = (min(radius, _MAX_RADIUS) for radius in self.cross_radius)
        return (narrow, broad) if stream is Stream.cross_u_to_v else (broad, narrow)

    def check_length(self, seq_len: int) -> None:
        """Raises ValueError where a sequence of this length does not fit the topology."""
        if not self.is_causal and seq_len != self.num_sites:
            raise ValueError(f"q has sequence length {seq_len}, but a {self.topology} lattice of {self.n_major} x "
                             f"{self.n_minor} needs exactly {self.num_sites} tokens")

    def angles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``(theta_u, theta_v)`` of every site, each ``[N]`` float64 in radians, in [0, 2 pi)."""
        sites = torch.arange(self.num_sites)
        theta_u = 2 * math.pi * (sites // self.n_minor).double() / self.n_major
        theta_v = 2 * math.pi * (sites % self.n_minor).double() / self.n_minor
        return theta_u, theta_v

    def embed(self, major_radius: float = 2.0, minor_radius: float = 1.0) -> torch.Tensor:
        """Sites on the surface of the torus in space, ``[N, 3]`` float64; needs ``major_radius > minor_radius > 0``."""
        if not major_radius > minor_radius > 0:
            raise ValueError(f"embedding needs major_radius > minor_radius > 0, got {major_radius} and {minor_radius}")
        theta_u, theta_v = self.angles()
        ring = major_radius + minor_radius * theta_v.cos()
        return torch.stack((ring * theta_u.cos(), ring * theta_u.sin(), minor_radius * theta_v.sin()), dim=-1)

    def stream_geometry(
        self, stream: Stream, seq_len: int, device: torch.device | str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Who sees whom through one stream, and how far away, densely: the specification of the stream.

        Returns:
            ``visible`` ``[T, T]`` bool, rows are queries and columns keys, and ``rho_squared`` ``[T, T]`` float64,
            the squared geodesic distance (zero where the key is not visible).
        """
        stream = Stream(stream)
        self.check_length(seq_len)
        t = torch.arange(seq_len, device=device)
        if self.is_causal:
            visible, rho_squared = self._causal_geometry(stream, t[:, None] - t[None, :])
        else:
            u, v = t // self.n_minor, t % self.n_minor
            visible, rho_squared = self._grid_geometry(stream, u[:, None] - u[None, :], v[:, None] - v[None, :])
        return visible, rho_squared.masked_fill(~visible, 0.0)

    def displacement_geometry(
        self, stream: Stream, a: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`stream_geometry` by displacement: whether a key is visible from there, and how far away it is.

        Args:
            stream: one of the eight.
            a: ``u - u'`` of query and key, integers of any shape and sign; on the cylinder, where the major axis is
                open, the sign matters. Not for the causal topology, where visibility depends on the lag.
            b: ``v - v'``, likewise, of a shape that broadcasts with that of ``a``.

        Returns:
            ``visible`` bool and ``rho_squared`` float64, of the common shape of ``a`` and ``b``.
        """
        if self.is_causal:
            raise ValueError("displacements belong to the periodic and the cylinder topology, this lattice is causal")
        visible, rho_squared = self._grid_geometry(Stream(stream), *torch.broadcast_tensors(a, b))
        return visible, rho_squared.masked_fill(~visible, 0.0)

    def lag_geometry(self, stream: Stream, lag: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`stream_geometry` by lag: whether a key ``lag`` tokens behind its query is visible, and how far away it is.

        Args:
            stream: one of the eight.
            lag: integers of any shape. Causal topology only, where visibility depends on the lag alone.

        Returns:
            ``visible`` bool and ``rho_squared`` float64, shaped as ``lag``.
        """
        if not self.is_causal:
            raise ValueError(f"lags belong to the causal topology, this lattice is {self.topology}")
        visible, rho_squared = self._causal_geometry(Stream(stream), lag)
        return visible, rho_squared.masked_fill(~visible, 0.0)

    def _causal_geometry(self, stream: Stream, lag: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        in_window = (lag >= 0) & (lag < self.num_sites)
        if stream.is_cross:
            low = (self.n_minor - 1) // 2
            b = (lag + low) % self.n_minor - low
            a = (lag - b) // self.n_minor
            visible, rho_squared = self._cross_window(stream, a, b.abs())
            return visible & in_window, rho_squared
        length, stride = self.loop_length(stream), self.stride(stream)
        k = lag // stride
        visible = in_window & (lag % stride == 0) & (k < length) & _on_arc(stream, k, length)
        return visible, (math.pi * k.double() / length) ** 2

    def _grid_geometry(
        self, stream: Stream, a: torch.Tensor, b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        open_major = self.topology == "cylinder"
        b = b % self.n_minor
        abs_b = torch.minimum(b, self.n_minor - b)
        if not open_major:
            a = a % self.n_major
        abs_a = a.abs() if open_major else torch.minimum(a, self.n_major - a)
        if stream.is_cross:
            return self._cross_window(stream, abs_a, abs_b)
        length = self.loop_length(stream)
        if stream in (Stream.minor_forward, Stream.minor_backward):
            visible = (a == 0) & _on_arc(stream, b, length)
            return visible, (2 * math.pi * abs_b.double() / length) ** 2
        slope = {Stream.spiral_cw: self.winding, Stream.spiral_ccw: -self.winding}.get(stream, 0)
        on_strand = b == (slope * a) % self.n_minor
        if open_major:
            half = {Stream.major_forward: a >= 0, Stream.major_backward: a <= 0}.get(stream, True)
            return on_strand & half, (math.pi * abs_a.double() / length) ** 2
        return on_strand & _on_arc(stream, a, length), (2 * math.pi * abs_a.double() / length) ** 2

    def _cross_window(
        self, stream: Stream, abs_a: torch.Tensor, abs_b: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        radius_u, radius_v = self.radii(stream)
        visible = (abs_a <= radius_u) & (abs_b <= radius_v)
        rho_squared = torch.zeros_like(abs_a, dtype=torch.float64)
        if radius_u > 0:
            rho_squared = rho_squared + (abs_a.double() / radius_u) ** 2
        if radius_v > 0:
            rho_squared = rho_squared + (abs_b.double() / radius_v) ** 2
        return visible, rho_squared


def _on_arc(stream: Stream, k: torch.Tensor, length: int) -> torch.Tensor | bool:
    """Whether step k of a loop lies on the stream's arc; the spirals run the whole loop."""
    if stream in (Stream.major_forward, Stream.minor_forward):
        return k <= length // 2
    if stream in (Stream.major_backward, Stream.minor_backward):
        return (k == 0) | (length - k <= length // 2)
    return True


@functools.lru_cache(maxsize=256)
def _lattice_from_spec(spec: tuple[int, ...]) -> TorusLattice:
    topology, n_major, n_minor, winding, narrow, broad, stream_mask = spec
    streams = [s for s in Stream if stream_mask >> s & 1]
    return TorusLattice(n_major, n_minor, Topology(topology).name, winding, (narrow, broad), streams)
