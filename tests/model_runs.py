"""What tests of the models' training and of their command line share."""

import torch

from torus_model.__main__ import main


def parameters_of(model) -> dict[str, torch.Tensor]:
    """Copies by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Interrupted(Exception):
    """Ends a run from within."""


def interrupt_at(**where):
    """A callback that ends the run at the point with these attributes."""
    def on_point(point):
        if all(getattr(point, name) == value for name, value in where.items()):
            raise Interrupted

    return on_point


def run(*arguments) -> int:
    """The exit status of ``python -m torus_model``; what argparse and ours print is captured by capsys."""
    try:
        main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code
    return 0


def fails_in_one_line(capsys, *arguments) -> str:
    """What the command says on stderr, one line, when it ends with status 2."""
    capsys.readouterr()
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1 and "error:" in shown.err
    return shown.err
