"""What the tests of the benchmarks share."""

import dataclasses
import io

import torch
from rich.console import Console

from benchmarks import environment, peers
from benchmarks.accuracy import Check, checks, evaluate
from benchmarks.candidates import BOTH, FORWARD, OPERATOR, operator
from benchmarks.report import Accuracy, Case, Measurement, Memory, Report, Roofline, Skipped, default_labels
from benchmarks.timing import Timing
from benchmarks.workloads import Workload, make_inputs
from torus_kernels import TorusLattice

REFERENCE = operator("reference").attention
TINY = Workload("tiny", TorusLattice(6, 4, winding=2), batch=1, heads=2, head_dim=8)
LATTICES = [
    (TorusLattice(16, 16), None),
    (TorusLattice(9, 6, winding=4), None),
    (TorusLattice(26, 13, winding=2), None),  # 13 is no multiple of a tile
    (TorusLattice(5, 15, winding=6, cross_radius=(1, 2)), None),
    (TorusLattice(2, 2), None),
    (TorusLattice(8, 8, "causal"), 200),  # runs of a residue class with a window before them
    (TorusLattice(7, 5, "causal", winding=3), 83),
    (TorusLattice(16, 11, "causal"), 150),
    (TorusLattice(3, 70, "causal", winding=2), 250),
    (TorusLattice(70, 3, "causal"), 300),
    (TorusLattice(12, 13, "causal", cross_radius=(0, 9)), 150),
    (TorusLattice(7, 5, "causal"), 1),
    (TorusLattice(24, 12, "cylinder", winding=5, cross_radius=(2, 4)), None),  # tiles with and without an edge near
    (TorusLattice(13, 10, "cylinder", winding=3), None),  # the last tiles overlap
    (TorusLattice(2, 3, "cylinder"), None),
]
MACHINE = {
    "cpu": "A CPU", "cores": 2, "threads": 2, "capability": "AVX512", "torch": "2.13.0", "torus_kernels": "0.1.0",
    "revision": "abc1234", "backends": ["reference", "cpu"], "allocator": dict(environment.WARM_MEMORY),
    "load_average": 0.1, "date": "2026-01-02T03:04:05+00:00",
}


def describe(value) -> str | None:
    if isinstance(value, TorusLattice):
        return f"{value.topology}-{value.n_major}x{value.n_minor}-w{value.winding}"
    return None


def printed(show, width=120):
    console = Console(width=width, file=io.StringIO())
    show(console)
    return console.file.getvalue()


def inputs_on(lattice, seq_len=None, dtype=torch.float32, batch=2):
    inputs = make_inputs(lattice, batch=batch, heads=3, head_dim=16, dtype=dtype, seq_len=seq_len)
    return dataclasses.replace(inputs, decay=inputs.decay + torch.linspace(0, 1, 24).view(3, 8).to(inputs.decay))


def accuracy(attention, inputs, *, backward=True):
    truth = evaluate(REFERENCE, inputs.to(torch.float64), backward=backward)
    plain = evaluate(REFERENCE, inputs, backward=backward)
    return checks(evaluate(attention, inputs, backward=backward), truth, plain)


def drops_a_stream(q, k, v, weights, decay, state, alpha, lattice):
    keep = torch.ones(8)
    keep[5] = 0
    return peers.compose(q, k, v, weights * keep, decay, state, alpha, lattice)


def make_report():
    case, other = Case("field-4k", "float32", FORWARD), Case("field-4k", "bfloat16", BOTH)
    return Report(
        MACHINE, "cpu", {"field-4k": "periodic 64x64, B=1 H=8 D=64"},
        [
            Measurement(case, OPERATOR, Timing((0.010, 0.020, 0.010), 0)),
            Measurement(case, "flash", Timing((0.250, 0.240, 0.260), 3.0)),
            Measurement(case, "compose", Timing((0.061, 0.080, 0.060), 0)),
            Measurement(other, OPERATOR, Timing((0.0051, 0.0052, 0.0053), 0)),
        ],
        [Accuracy(case, OPERATOR, Check("out", 1e-6, 5e-6))],
        [Memory(case, OPERATOR, 12 * 2**20)],
        [Skipped(other, "compose", "wrong")],
        [Roofline(case, 2 * 10**9, 10**8, 1e12, 2e10)],
        default_labels("cpu"),
    )
