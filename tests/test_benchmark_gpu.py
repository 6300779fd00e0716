"""The GPU suite as far as it goes without a GPU: its peers, its arithmetic, its report, and the order of its work."""

import dataclasses

import pytest
import torch
from rich.console import Console
from support import assert_same_up_to_rounding, error, label

from benchmarks import __main__, gpu, gpu_decode, gpu_peers, gpu_report, gpu_timing
from benchmarks.accuracy import WrongResult
from benchmarks.candidates import BOTH, DIRECTIONS, FORWARD, OPERATOR, Candidate
from benchmarks.gpu_report import GpuReport, Machine, Work
from benchmarks.gpu_timing import GpuTiming
from benchmarks.peers import flex_eager
from benchmarks.report import Case, ReportError
from benchmarks.show import markdown_of
from benchmarks.workloads import WORKLOADS, Workload, make_inputs, operator_on
from torus_kernels import TorusLattice

LATTICES = [TorusLattice(6, 4, winding=2), TorusLattice(5, 4, "causal"), TorusLattice(4, 6, "cylinder")]
H200 = Machine("H200", copy=4.3e12, gemm=790e12, multiprocessors=132, clock=1.755e9, torch="2", triton="3", cuda="13",
               revision="abc", date="2026-01-02T00:00:00")
TINY = Workload("tiny", TorusLattice(6, 4, winding=2), batch=2, heads=3, head_dim=8)


def inputs_of(lattice, dtype=torch.float64):
    return make_inputs(lattice, batch=2, heads=3, head_dim=16, dtype=dtype)


class FakeStopwatch:
    """Runs a function once and says that it took as long as it was called often."""

    def __init__(self):
        self.calls = 0

    def measure(self, run):
        run()
        self.calls += 1
        return GpuTiming(tuple(n * self.calls / 1e3 for n in (1, 2, 3)), 4e-5, 2**20, self.calls == 1)


def suite(peers, backend="reference", others=()) -> gpu.GpuSuite:
    return gpu.GpuSuite(H200, FakeStopwatch(), backend, peers, device="cpu", others=others)


class TestPeers:
    @pytest.mark.parametrize("name", ["compose", "compose_matmul"])
    @pytest.mark.parametrize("lattice", LATTICES, ids=label)
    def test_composition(self, lattice, name):
        inputs, peer = inputs_of(lattice), gpu_peers.GPU_PEERS[name].attention
        expected = inputs.forward_backward(operator_on("reference"))
        for actual, wanted in zip(inputs.forward_backward(peer), expected, strict=True):
            assert_same_up_to_rounding(actual, wanted)

    @pytest.mark.parametrize("lattice", LATTICES, ids=label)
    def test_flex(self, lattice):
        inputs = inputs_of(lattice, torch.float32)

        def eager(*arguments):
            return gpu_peers.flex(*arguments, attend=torch.nn.attention.flex_attention.flex_attention)

        expected = inputs.forward(operator_on("reference"))
        assert error(inputs.forward(eager), expected) <= 1e-5
        if not lattice.is_causal:
            assert error(inputs.forward(flex_eager), expected) <= 1e-5

    def test_plans_move_as_a_whole(self):
        plans = gpu_peers._plans_on(LATTICES[0], 1, 2, 24, torch.float32, torch.device("meta"))
        plan = plans[2]  # of a spiral, whose tokens are gathered
        assert plan.take.index.is_meta
        assert plan.parts[0].split_keys.take.index.is_meta
        assert plan.parts[0].masks[0]._hidden.is_meta
        assert isinstance(plan.take.is_permutation, bool)

    def test_inputs_move_as_a_whole(self):
        moved = gpu_peers.inputs_on(inputs_of(LATTICES[0]), "meta")
        assert all(x.is_meta for x in (*moved.tensors(), moved.d_out))


class TestFloor:
    @pytest.mark.parametrize("name, milliseconds", [
        ("field-16k", (0.039, 0.057, 0.048, 0.060)), ("field-64k", (0.078, 0.20, 0.17, 0.21)),
        ("text-32k", (0.156, 0.18, 0.075, 0.094)),
    ])
    def test_forward_is_that_of_an_h200(self, name, milliseconds):
        work = Work.of(WORKLOADS[name], 2, FORWARD)
        parts = (work.bytes / H200.copy, work.flops / H200.gemm, work.pairs / 3.7e12, 10 * work.pairs / 29.6e12)
        assert [1e3 * part for part in parts] == pytest.approx(milliseconds, rel=0.06)
        assert work.floor(H200) == pytest.approx(max(parts), rel=0.01)

    def test_backward_costs_more(self):
        forward, both = (Work.of(WORKLOADS["field-16k"], 2, direction).floor(H200) for direction in DIRECTIONS)
        assert 3 <= both / forward <= 4.5


class TestSuite:
    def test_measures_every_candidate_and_judges_those_that_compute_the_operator(self):
        peers = [gpu_peers.GPU_PEERS["compose"],
                 dataclasses.replace(gpu_peers.GPU_PEERS["flash"], attention=lambda q, *rest: q * 1)]
        run = suite(peers)
        report = run.measure_all([TINY], [torch.float32], DIRECTIONS, Console(quiet=True))
        assert [(m.case.direction, m.candidate) for m in report.measured] == [
            (direction, name) for direction in DIRECTIONS for name in (OPERATOR, "compose", "flash")]
        assert [(j.case.direction, j.candidate) for j in report.judged] == [
            (direction, name) for direction in DIRECTIONS for name in (OPERATOR, "compose")]
        assert all(j.check.ok for j in report.judged)
        assert report.sizes == {"tiny": "periodic 6x4, winding 2, B=2 H=3 D=8"}
        assert not report.skipped

    def test_further_backends_are_timed_and_judged_as_the_operator(self, monkeypatch):
        run = suite([gpu_peers.GPU_PEERS["compose"]], others=["reference", "cuda"])
        report = run.measure_all([TINY], [torch.float32], [FORWARD], Console(quiet=True))
        assert [m.candidate for m in report.measured] == [OPERATOR, f"{OPERATOR}_reference", "compose"]
        assert [j.candidate for j in report.judged] == [OPERATOR, f"{OPERATOR}_reference", "compose"]
        assert [(s.candidate, "backend 'cuda' cannot run here" in s.reason) for s in report.skipped] == [
            (f"{OPERATOR}_cuda", True)]
        assert f"{OPERATOR} (reference)" in gpu_report.markdown(report)
        right = operator_on("reference")
        monkeypatch.setattr("benchmarks.candidates.operator_on",
                            lambda backend: right if backend == "reference" else lambda *given: 2 * right(*given))
        with pytest.raises(WrongResult, match="cpu"):
            suite([], others=["cpu"]).measure_all([TINY], [torch.float32], [FORWARD], Console(quiet=True))

    def test_a_wrong_peer_is_skipped_and_a_wrong_operator_is_an_error(self, monkeypatch):
        wrong = Candidate("compose", "compose", lambda *arguments: 1.01 * gpu_peers.compose(*arguments))
        run = suite([wrong])
        run.measure(TINY, torch.float32, FORWARD, [run._operator, wrong])
        assert [s.candidate for s in run.report.skipped] == ["compose"]
        assert "compose is wrong and is not timed" in run.report.skipped[0].reason
        broken = dataclasses.replace(run._operator, attention=wrong.attention)
        with pytest.raises(WrongResult, match="torus_attention"):
            run.measure(TINY, torch.float32, FORWARD, [broken])

    def test_a_peer_that_cannot_run_is_skipped_with_its_reason(self):
        def refuse(*arguments):
            raise torch.OutOfMemoryError("40 TiB")

        peer = Candidate("flash", "flash", refuse, computes_operator=False)
        run = suite([peer])
        run.measure(TINY, torch.float32, FORWARD, [peer])
        assert [(s.candidate, s.reason) for s in run.report.skipped] == [("flash", "40 TiB")]

    def test_compiled_peers_come_last_and_only_while_there_is_time(self):
        slow = Candidate("flex", "flex", gpu_peers.compose, compiles=True)
        run = suite([slow, gpu_peers.GPU_PEERS["compose"]])
        report = run.measure_all([TINY], [torch.float32], DIRECTIONS, Console(quiet=True))
        assert [m.candidate for m in report.measured] == [OPERATOR, "compose"] * 2 + ["flex"] * 2
        late = suite([slow]).measure_all([TINY], [torch.float32], DIRECTIONS, Console(quiet=True), max_seconds=0)
        assert [(s.candidate, s.reason) for s in late.skipped] == [("flex", "no time was left")] * 2


class TestDecode:
    WORKLOAD = Workload("text", TorusLattice(6, 4, "causal", winding=2), batch=1, heads=3, head_dim=8)

    def test_a_step_beside_its_peers(self):
        found = GpuReport(H200, {OPERATOR: "ours"})
        gpu_decode.measure(found, FakeStopwatch(), self.WORKLOAD, torch.float32, 2, "reference", "cpu")
        case, = found.cases()
        assert case == Case("text", "float32", "decode, B=2")
        assert list(found.timings(case)) == [OPERATOR, "dense_cache", "gathered"]
        assert found.fastest_dense(case) == 0.004
        assert "| text | float32 | decode, B=2 | 2.00 (1.50-2.50) graph | 0.500 |" in gpu_report.markdown(found)

    def test_a_wrong_step_is_an_error(self, monkeypatch):
        step, report = gpu_decode.torus_attention_decode, GpuReport(H200, {})
        monkeypatch.setattr(gpu_decode, "torus_attention_decode", lambda *x, **options: 1.01 * step(*x, **options))
        with pytest.raises(WrongResult, match="decoding on reference is off"):
            gpu_decode.measure(report, FakeStopwatch(), self.WORKLOAD, torch.float32, 2, "reference", "cpu")


@pytest.fixture
def report() -> GpuReport:
    dense = [dataclasses.replace(gpu_peers.GPU_PEERS[name], attention=lambda q, *rest: q * 1)
             for name in ("flash", "cudnn")]
    found = suite([gpu_peers.GPU_PEERS["compose"], *dense])
    return found.measure_all([TINY], [torch.float32], DIRECTIONS, Console(quiet=True))


class TestReport:
    def test_comes_back_from_its_file(self, report, tmp_path):
        path = tmp_path / "deep" / "gpu.json"
        report.save(path)
        assert GpuReport.load(path) == report
        assert markdown_of(path) == gpu_report.markdown(report)

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "gpu", "format": 99}', '{"kind": "gpu", "format": 1}'])
    def test_other_files_are_refused(self, tmp_path, text):
        path = tmp_path / "other.json"
        path.write_text(text)
        with pytest.raises(ReportError, match=r"other\.json"):
            GpuReport.load(path)

    def test_table(self, report):
        head, _, forward, both, *_ = gpu_report.markdown(report).splitlines()
        assert head.startswith("| workload | dtype | direction | ms (quartiles) | of dense |")
        assert head.endswith("| compose | one dense SDPA (flash) | one dense SDPA (cuDNN) |")
        # The fake stopwatch says 2 ms, then 4, 6 and 8.
        assert forward.startswith("| tiny | float32 | forward | 2.00 (1.50-2.50) graph | 0.333 |")
        assert forward.endswith("| 40 | 1 | 4.00 (2.0x) | 6.00 (3.0x) | 8.00 (4.0x) |")
        assert both.startswith("| tiny | float32 | forward+backward |")
        work = report.work_of(Case("tiny", "float32", FORWARD))
        assert f"{work.bytes / 2e-3 / 1e9:.0f} |" in forward
        assert f"{100 * work.floor(H200) / 2e-3:.0f}%" in forward

    def test_command_prints_the_table(self, report, tmp_path, capsys):
        report.save(tmp_path / "gpu.json")
        __main__.main(["table", str(tmp_path / "gpu.json")])
        assert "H200, copy 4.3 TB/s, matrix product 790 TFLOP/s" in capsys.readouterr().out

    def test_plot(self, report, tmp_path):
        gpu_report.plot(report, tmp_path / "gpu.png")
        assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_command_needs_a_device(capsys):
    with pytest.raises(SystemExit) as raised:
        __main__.main(["gpu"])
    assert raised.value.code == 1
    assert capsys.readouterr().err == "python -m benchmarks: the GPU suite needs a CUDA device, and there is none\n"


@pytest.mark.gpu
def test_a_stopwatch_on_a_device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    a = torch.randn(4096, 4096, device="cuda")
    timing = gpu_timing.Stopwatch(0.05).measure(lambda: a + 1)
    assert timing.from_graph
    assert timing.peak_bytes == a.numel() * 4
    assert 1e-6 < timing.spread.median < 1e-3
    assert timing.spread.lower <= timing.spread.median <= timing.spread.upper
    assert BOTH in DIRECTIONS
