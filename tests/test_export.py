"""`torch.export` of the models: saved, loaded where only the operators are known, and run at other sizes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import assert_same_up_to_rounding
from tiny_models import FIELDS, field, frames, language, tokens

BATCH = torch.export.Dim("batch", min=1, max=1024)
LENGTH = torch.export.Dim("length", min=1, max=4096)

# Loads a program and runs it, without the package that the model was made by.
RUN = """
import sys
import torch
import torus_kernels
program, inputs, outputs = sys.argv[1:]
module = torch.export.load(program).module()
with torch.no_grad():
    torch.save([module(*x) for x in torch.load(inputs)], outputs)
assert "torus_model" not in sys.modules
"""


def run_elsewhere(program: torch.export.ExportedProgram, inputs: list, folder: Path) -> list[torch.Tensor]:
    files = [str(folder / name) for name in ("program.pt2", "inputs.pt", "outputs.pt")]
    torch.export.save(program, files[0])
    torch.save(inputs, files[1])
    subprocess.run([sys.executable, "-c", RUN, *files], check=True, timeout=300,
                   cwd=Path(__file__).resolve().parents[1])
    return torch.load(files[2])


def run_here(program: torch.export.ExportedProgram, inputs: list, folder: Path) -> list[torch.Tensor]:
    module = program.module()
    with torch.no_grad():
        return [module(*x) for x in inputs]


@pytest.mark.parametrize("strict, run", [(False, run_elsewhere), (True, run_here)], ids=["saved", "strict"])
def test_language_model(tmp_path, strict, run):
    model = language().eval()
    with torch.no_grad():
        program = torch.export.export(model, (tokens(3, 20),), dynamic_shapes=({0: BATCH, 1: LENGTH},), strict=strict)
        # As many examples as heads, one token, the length of a winding, more tokens than a query sees.
        inputs = [[tokens(batch, seq_len)] for batch, seq_len in ((3, 20), (1, 20), (4, 1), (2, 4), (2, 40))]
        expected = [model(*x) for x in inputs]
    for actual, wanted in zip(run(program, inputs, tmp_path), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("name, run", [("periodic", run_here), ("cylinder", run_elsewhere)])
def test_field_model(tmp_path, name, run):
    model, config = field(FIELDS[name]).eval(), FIELDS[name]
    example = frames(config, 3)
    dynamic_shapes = [{0: BATCH}, *({} for _ in example[1:])]
    with torch.no_grad():
        program = torch.export.export(model, tuple(example), dynamic_shapes=dynamic_shapes)
        inputs = [frames(config, batch) for batch in (3, 1, config.heads, 8)]
        expected = [model(*x) for x in inputs]
    for actual, wanted in zip(run(program, inputs, tmp_path), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_an_exported_model_trains():
    model = language()
    x = tokens(2, 20)
    module = torch.export.export(model, (x,), dynamic_shapes=({0: BATCH, 1: LENGTH},)).module()
    x = tokens(5, 13)
    module(x).square().mean().backward()
    model(x).square().mean().backward()
    trained = dict(module.named_parameters())
    for name, parameter in model.named_parameters():
        assert_same_up_to_rounding(trained[name].grad, parameter.grad, name)


def test_an_exported_program_names_the_operators():
    """No operator is taken apart, and none is bound to the backend of the machine that exported it."""
    with torch.no_grad():
        program = torch.export.export(language().eval(), (tokens(2, 20),))
    calls = [node for node in program.graph.nodes if getattr(node.target, "namespace", "") == "torus_kernels"]
    assert [node.target._opname for node in calls] == ["rope", "rope", "attention"] * 2
    assert all(node.args[-1] == "auto" for node in calls)
    lse_is_wanted = [node.args[-3] for node in calls if node.target._opname == "attention"]
    assert lse_is_wanted == [False, False]
