"""The benchmark of layouts: bytes as counted and by formula, the arithmetic, and the report."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from benchmarking import printed
from processes import MODEL, make_config, write_text

from benchmarks import __main__ as command_line
from benchmarks import environment, scale
from benchmarks.report import ReportError
from benchmarks.scale_arithmetic import LINKS, Step, least_tokens
from benchmarks.scale_report import SINGLE, Measured, ScaleReport, markdown
from torus_model import TorusLM
from torus_model.config import SIZES
from torus_model.parallel import LAYOUTS

GPT2 = Step(SIZES["gpt2"], 64, 1024, 8, activation=2)


@pytest.mark.parametrize("changes", [
    {}, {"token_gated": False}, {"compounding": False}, {"ff_width": 40}, {"kv_heads": None},
    {"streams": ("major_forward", "spiral_cw")},
])
def test_parameters_are_those_of_the_model(changes):
    config = dataclasses.replace(MODEL, **changes)
    model, step = TorusLM(config), Step(config, 2, 8, 2)
    assert step.block_parameters == sum(p.numel() for p in model.blocks.parameters())
    assert step.end_parameters == model.embedding.weight.numel() + model.norm.weight.numel()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("link", LINKS)
def test_at_the_least_tokens_sending_takes_as_long_as_computing(layout, link):
    tokens = least_tokens(GPT2, layout, LINKS[link])
    if tokens == float("inf"):
        assert dataclasses.replace(GPT2, batch=2**20).ratio(layout, LINKS[link]) > 1
    elif tokens > 1:
        at_that = dataclasses.replace(GPT2, batch=tokens * GPT2.size / GPT2.seq_len)
        assert at_that.ratio(layout, LINKS[link]) == pytest.approx(1, rel=0.01)


def test_a_slower_link_needs_more_tokens_and_a_larger_model_does_not():
    assert least_tokens(GPT2, "ddp", 1e9) > 4 * least_tokens(GPT2, "ddp", 10e9)
    # 4/3 (p - 1) / p F / W, less what attention and the embedding's other use compute beside.
    rule = 4 / 3 * 7 / 8 * 400e12 / 50e9
    assert 0.5 * rule < least_tokens(GPT2, "ddp", 50e9) < rule
    assert least_tokens(GPT2, "fsdp", 50e9) == pytest.approx(1.5 * least_tokens(GPT2, "ddp", 50e9), rel=0.1)


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch has no gloo")
def test_report_counts_what_the_formulas_say_and_survives_its_file(tmp_path, capsys):
    write_text(tmp_path / "text")
    config = make_config(tmp_path / "text", model={"vocab_size": 256}, pack_documents=False)
    path = tmp_path / "out" / "scale.json"
    text = printed(lambda console: scale.run(config, output=path, console=console), width=200)
    assert "Written:" in text and path.with_suffix(".png").stat().st_size > 10_000
    report = ScaleReport.load(path)
    report.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == path.read_text()
    for layout in LAYOUTS:
        assert len(report.runs[layout]) == 2 and report.difference(layout) < 64 * torch.finfo(torch.float32).eps
        for run, predicted in zip(report.runs[layout], report.predicted[layout], strict=True):
            # Beside tensors travel a handful of numbers that processes agree on.
            assert predicted <= run.sent < predicted + 256
        assert len(report.runs[layout][0].seconds) == config.steps - 2
    [single] = report.runs[SINGLE]
    assert single.sent == 0
    assert sum(run.weights for run in report.runs["fsdp"]) == single.weights
    command_line.main(["table", str(path)])
    assert capsys.readouterr().out == markdown(report) + "\n"


@pytest.mark.parametrize(("load", "is_busy"), [(0.5, False), (9.0, True), (None, False)])
def test_times_of_a_busy_machine_are_said_to_say_nothing(load, is_busy):
    machine = environment.machine() | {"cores": 2, "load_average": load}
    run = Measured([1.0, 1.0], 1, 2, 3.0, [0.1])
    report = ScaleReport(machine, dict.fromkeys(("batch", "seq_len", "parts", "steps", "processes", "width", "layers"),
                                                1), {SINGLE: [run]}, {})
    assert ("the times say nothing" in markdown(report)) == is_busy


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "scale", "format": 2}', '{"kind": "scale", "format": 1}'])
def test_damaged_reports_are_refused(tmp_path, text):
    (tmp_path / "broken.json").write_text(text)
    with pytest.raises(ReportError, match=r"broken\.json"):
        ScaleReport.load(tmp_path / "broken.json")


@pytest.mark.parametrize("argv, code", [(["--help"], 0), (["--steps", "2"], 2)])
def test_command_line(argv, code, capsys):
    with pytest.raises(SystemExit) as exit_info:
        command_line.main(["scale", *argv])
    assert exit_info.value.code == code
    assert "Traceback" not in capsys.readouterr().err
