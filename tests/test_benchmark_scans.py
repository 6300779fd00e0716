"""Growth, threads, decoding and roofline: what is measured is checked first, and counted right."""

import dataclasses
import math
import re

import pytest
import torch
from benchmarking import LATTICES, TINY, describe, drops_a_stream, printed

from benchmarks import decode, growth, plots, threads
from benchmarks.accuracy import WrongResult
from benchmarks.candidates import BOTH, FORWARD, OPERATOR, Candidate, operator
from benchmarks.decode import DECODE_WORKLOADS, DENSE, GATHERED, LENGTHS, Decode, DecodeWorkload, after
from benchmarks.growth import Growth
from benchmarks.peers.decode import DenseCache
from benchmarks.progress import silent
from benchmarks.report import Case, Report
from benchmarks.roofline import SHARING, measure_peaks, useful_bytes, useful_flops, visible_pairs
from benchmarks.tables import decode_grid, growth_grid, markdown_report, threads_grid
from benchmarks.threads import ThreadScaling, all_counts, with_threads
from benchmarks.timing import Timing
from benchmarks.workloads import WORKLOADS, Workload
from torus_kernels import Stream, TorusLattice

CAUSAL = Workload("tiny-text", TorusLattice(4, 5, "causal", winding=2), batch=1, heads=4, head_dim=8)


def saved_and_shown(report: Report, plot, path) -> str:
    """The report as Markdown, after a way through a file; the plot is written."""
    report.save(path / "report.json")
    loaded = Report.load(path / "report.json")
    assert (loaded.cases(), loaded.kind, loaded.labels) == (report.cases(), report.kind, report.labels)
    plot(report, path / "plot.png")
    assert (path / "plot.png").read_bytes().startswith(b"\x89PNG")
    return markdown_report(loaded)


class TestRoofline:
    @pytest.mark.parametrize("lattice, seq_len", LATTICES, ids=describe)
    def test_pairs_are_those_of_the_dense_geometry(self, lattice, seq_len):
        seq_len = seq_len or lattice.num_sites
        expected = 0
        for group in SHARING:
            seen = [lattice.stream_geometry(stream, seq_len)[0] for stream in group]
            expected += int(torch.stack(seen).any(dim=0).sum())
        assert visible_pairs(lattice, seq_len) == expected

    def test_every_stream_is_in_one_group(self):
        assert sorted(stream for group in SHARING for stream in group) == list(Stream)

    def test_pairs_of_streams_left_out_do_not_count(self):
        lattice = TorusLattice(8, 6, winding=3, streams=[0, 4])
        assert visible_pairs(lattice, 48) == 48 * (5 + 8)

    def test_known_numbers(self):
        # field-4k: 64 keys on each of two loops and two strands; 7 x 15 and 15 x 7 sites share 7 x 7.
        pairs = 64 * 64 * (4 * 64 + 2 * 105 - 49)
        assert useful_flops(WORKLOADS["field-4k"], FORWARD) == 8 * pairs * 4 * 64
        assert useful_flops(WORKLOADS["field-4k"], BOTH) == 8 * pairs * 14 * 64
        assert useful_bytes(WORKLOADS["field-4k"], torch.bfloat16, FORWARD) == 5 * 8 * 4096 * 64 * 2
        assert useful_bytes(WORKLOADS["field-4k"], torch.float32, BOTH) == 14 * 8 * 4096 * 64 * 4

    def test_peaks_are_rates(self, monkeypatch):
        monkeypatch.setattr("benchmarks.roofline.GEMM_SIZES", (64,))
        monkeypatch.setattr("benchmarks.roofline.COPY_BYTES", 1000)
        monkeypatch.setattr("benchmarks.roofline._median_seconds", lambda run, seconds: (run(), 0.5)[1])
        peaks = measure_peaks(torch.bfloat16)
        assert (peaks.gemm, peaks.copy) == (2 * 64**3 / 0.5, 2 * 1000 / 0.5)

    def test_a_slow_product_gives_way_to_float32(self, monkeypatch):
        """As bfloat16 does where the CPU has no arithmetic in it; and its larger products are not waited for."""
        monkeypatch.setattr("benchmarks.roofline.GEMM_SIZES", (8, 16))
        multiplied = []
        monkeypatch.setattr("torch.mm", lambda a, b, out: multiplied.append((a.dtype, len(a))))

        def seconds(run, _):
            run()
            return 100.0 if multiplied and multiplied[-1][0] == torch.bfloat16 else 0.25

        monkeypatch.setattr("benchmarks.roofline._median_seconds", seconds)
        assert measure_peaks(torch.bfloat16).gemm == 2 * 16**3 / 0.25
        assert multiplied == [(torch.bfloat16, 8), (torch.float32, 8), (torch.float32, 16)]


class TestGrowth:
    def test_all_sizes_share_their_rounds(self, tmp_path):
        measured = Growth(WORKLOADS["field-4k"], [3, 6], "reference", seconds=0.0, longest_call=60.0)
        measured.measure(torch.float32, FORWARD, silent)
        small, large = Case("field-9", "float32", FORWARD), Case("field-36", "float32", FORWARD)
        report = measured.report
        assert report.cases() == [small, large]
        rounds = {len(timing.seconds) for case in report.cases() for timing in report.timings(case).values()}
        assert rounds == {5}
        assert set(report.timings(large)) == {OPERATOR, "flash"}
        assert "field-36" in saved_and_shown(report, plots.write_growth, tmp_path)

    def test_dense_attention_is_left_out_where_it_takes_too_long(self, monkeypatch):
        tried = []
        monkeypatch.setattr(growth, "_seconds_of", lambda run: tried.append(1) or 1.0)
        # Twice the side is four times the tokens and sixteen times the work.
        measured = Growth(WORKLOADS["field-4k"], [3, 6, 12], "reference", seconds=0.0, longest_call=17.0)
        measured.measure(torch.float32, FORWARD, silent)
        assert len(tried) == 3
        measured = Growth(WORKLOADS["field-4k"], [3, 6, 12], "reference", seconds=0.0, longest_call=15.0)
        measured.measure(torch.float32, FORWARD, silent)
        assert len(tried) == 4
        assert [skipped.case.workload for skipped in measured.report.skipped] == ["field-36", "field-144"]
        assert all(OPERATOR in measured.report.timings(case) for case in measured.report.cases())

    def test_a_wrong_operator_is_not_timed(self, monkeypatch):
        monkeypatch.setattr(growth, "operator", lambda backend: Candidate(OPERATOR, OPERATOR, drops_a_stream))
        measured = Growth(WORKLOADS["field-4k"], [3], "reference", seconds=0.0, longest_call=0.0)
        with pytest.raises(WrongResult):
            measured.measure(torch.float32, BOTH, silent)
        assert not measured.report.measurements

    def test_the_table_divides_by_tokens(self):
        measured = Growth(WORKLOADS["field-4k"], [3, 6], "reference", seconds=0.0, longest_call=0.0)
        report = measured.report
        measured.measure(torch.float32, FORWARD, silent)
        measured.report.measurements = [
            dataclasses.replace(m, timing=Timing((seconds,) * 5, 0.0))
            for m, seconds in zip((m for m in report.measurements if m.candidate == OPERATOR), (9e-6, 72e-6),
                                  strict=True)
        ]
        assert [row[2:] for row in growth_grid(report).rows] == [
            ["field-9", "1.00 (1.00 - 1.00)", "-"], ["field-36", "2.00 (2.00 - 2.00)", "2.00x"]
        ]


class TestThreads:
    def test_every_number_of_threads_is_set_before_its_call(self, monkeypatch, tmp_path):
        used = []

        def attention(*args):
            used.append(torch.get_num_threads())
            return operator("reference").attention(*args)

        monkeypatch.setattr(threads, "operator", lambda backend: Candidate(OPERATOR, "operator", attention))
        before = torch.get_num_threads()
        scaling = ThreadScaling([1, 3], "reference", seconds=0.0)
        scaling.measure(TINY, torch.float32, FORWARD, silent)
        assert torch.get_num_threads() == before
        case, = scaling.report.cases()
        assert set(scaling.report.timings(case)) == {with_threads(name, n) for name in (OPERATOR, "flash")
                                                     for n in (1, 3)}
        assert used.count(3) >= 1 + 5 and used.count(1) >= 1 + 5
        assert "operator, 3 threads" in saved_and_shown(scaling.report, plots.write_threads, tmp_path)

    def test_the_table_shows_speedups(self):
        scaling = ThreadScaling([1, 2], "reference", seconds=0.0)
        scaling.measure(TINY, torch.float32, FORWARD, silent)
        scaling.report.measurements = [
            dataclasses.replace(m, timing=Timing((0.006 / int(m.candidate[-1]),), 0.0))
            for m in scaling.report.measurements
        ]
        assert [row[-2:] for row in threads_grid(scaling.report).rows] == [
            ["6.00 (6.00 - 6.00)", "-"], ["3.00 (3.00 - 3.00)", "2.00 (2.00 - 2.00)"]
        ] * 2

    def test_counts_double_up_to_all(self, monkeypatch):
        for most, counts in ((1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])):
            monkeypatch.setattr(torch, "get_num_threads", lambda most=most: most)
            assert all_counts() == counts


class TestDecode:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kv_heads", [4, 2])
    def test_all_candidates_are_right_and_timed(self, kv_heads, dtype, tmp_path):
        measured = Decode("reference", seconds=0.0)
        measured.measure(DecodeWorkload("tiny", CAUSAL, kv_heads), dtype, silent)
        case, = measured.report.cases()
        assert list(measured.report.timings(case)) == [after(LENGTHS[0]), OPERATOR, GATHERED, after(LENGTHS[2]), DENSE]
        assert measured.report.accuracy[0].check.ok
        assert "after N/4 tokens" in saved_and_shown(measured.report, plots.write_decode, tmp_path)

    @pytest.mark.parametrize("broken", ["torus_attention_decode", "GatheredCache.step"])
    def test_what_is_wrong_is_not_timed(self, monkeypatch, broken):
        def wrong(q, *args, backend=None, **kwargs):
            right = original(q, *args, **kwargs) if backend is None else original(q, *args, backend=backend, **kwargs)
            return right if backend == "reference" else right * 1.1

        owner, _, name = f"decode.{broken}".rpartition(".")
        owner = {"decode": decode, "decode.GatheredCache": decode.GatheredCache}[owner]
        original = getattr(owner, name)
        measured = Decode("auto", seconds=0.0)
        measured.report.labels = decode.labels("cpu")
        monkeypatch.setattr(owner, name, wrong if broken.startswith("torus") else
                            lambda self, *args: original(self, *args) * 1.1)
        with pytest.raises(WrongResult, match="is wrong and is not timed"):
            measured.measure(DecodeWorkload("tiny", CAUSAL, 2), torch.float32, silent)
        assert not measured.report.measurements

    def test_the_dense_cache_attends_to_all_slots(self):
        keys, values = torch.randn(2, 2, 2, 7, 8)
        cache = DenseCache(keys.clone(), values.clone())
        q, k, v = torch.randn(2, 6, 1, 8), *torch.randn(2, 2, 2, 1, 8)
        for slot in (0, 1):
            keys[:, :, slot : slot + 1], values[:, :, slot : slot + 1] = k, v
            scores = q @ keys.repeat_interleave(3, dim=1).mT / math.sqrt(8)
            torch.testing.assert_close(cache.step(q, k, v), scores.softmax(-1) @ values.repeat_interleave(3, dim=1))

    def test_ratios_are_to_the_operator_after_n_tokens(self):
        measured = Decode("reference", seconds=0.0)
        measured.measure(DecodeWorkload("tiny", CAUSAL, 4), torch.float32, silent)
        measured.report.measurements = [
            dataclasses.replace(m, timing=Timing((4e-3 if m.candidate == DENSE else 1e-4,), 0.0))
            for m in measured.report.measurements
        ]
        assert [row[-2:] for row in decode_grid(measured.report).rows] == [
            ["100 (100 - 100)", "1.00 (1.00 - 1.00)"], ["100 (100 - 100)", "-"],
            ["100 (100 - 100)", "1.00 (1.00 - 1.00)"], ["100 (100 - 100)", "1.00 (1.00 - 1.00)"],
            ["4000 (4000 - 4000)", "40.0 (40.0 - 40.0)"],
        ]

    def test_the_workloads(self):
        assert {w.workload.lattice.num_sites for w in DECODE_WORKLOADS.values()} == {1024, 4096, 32768}
        assert all(w.workload.lattice.is_causal for w in DECODE_WORKLOADS.values())
        assert any(w.kv_heads < w.workload.heads for w in DECODE_WORKLOADS.values())


@pytest.mark.parametrize("command, options", [
    (growth, {"base": WORKLOADS["field-4k"], "sides": [3], "longest_call": 1.0, "directions": [FORWARD]}),
    (threads, {"workloads": [TINY], "counts": [1], "directions": [FORWARD]}),
    (decode, {"workloads": [DecodeWorkload("tiny", CAUSAL, 4)]}),
], ids=["growth", "threads", "decode"])
def test_commands_write_a_report_and_a_plot(command, options, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "best_cpu_backend", lambda: "reference")
    output = tmp_path / "out" / "report.json"
    text = printed(lambda console: command.run(dtypes=[torch.float32], seconds=0.0, output=output, console=console,
                                               **options))
    assert re.search(r"Timing .*float32", text) and str(output.name) in text
    assert Report.load(output).kind == command.__name__.rpartition(".")[2]
    assert output.with_suffix(".png").exists()
