"""Field data: files, the public layouts, splits and windows; the generated task and its command."""

import argparse
import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import assert_same_up_to_rounding

from torus_model.field.commands import generate as command
from torus_model.field.data import FieldData, FieldDataError, Windows, load_data, save_data, split
from torus_model.field.generation import NavierStokesTask, generate
from torus_model.field.navier_stokes import classical_forcing

TINY = {"trajectories": 3, "resolution": 8, "solve_resolution": 16, "frames": 3, "interval": 0.5, "viscosity": 1e-3}


def numbered(trajectories=5, frames=6, channels=2, height=4, width=3):
    """Frames ``[N, F, C, H, W]`` that tell where they were."""
    shape = (trajectories, frames, channels, height, width)
    return torch.arange(float(np.prod(shape))).reshape(shape)


def public_array(data):
    """``[N, F, 1, H, W] -> [N, H, W, T]``, as in the public files."""
    return data[:, :, 0].permute(0, 2, 3, 1).numpy()


def test_what_is_saved_is_loaded(tmp_path):
    static = torch.randn(1, 1, 4, 3)
    data = FieldData(numbered(), static, (1, -1), (-1,), {"viscosity": 1e-5, "times": [1.0, 2.0], "forcing": None})
    save_data(tmp_path / "data.safetensors", data)
    loaded = load_data(str(tmp_path / "data.safetensors"))
    assert torch.equal(loaded.frames, data.frames) and torch.equal(loaded.static, static)
    assert (loaded.parity, loaded.static_parity) == ((1, -1), (-1,))
    assert loaded.parameters == data.parameters
    assert [path.name for path in tmp_path.iterdir()] == ["data.safetensors"]
    save_data(tmp_path / "data.safetensors", FieldData(numbered(2)))
    loaded = load_data(tmp_path / "data.safetensors")
    assert len(loaded) == 2 and loaded.static is None and loaded.parity == (1, 1) and loaded.static_parity == ()


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "data.safetensors"
    save_data(path, FieldData(numbered()))
    with pytest.raises(TypeError):
        save_data(path, FieldData(numbered(), parameters={"what": object()}))
    with pytest.raises(OSError, match="nowhere"):
        save_data(tmp_path / "nowhere" / "data.safetensors", FieldData(numbered()))
    assert len(load_data(path)) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["data.safetensors"]


@pytest.mark.parametrize(("arguments", "message"), [
    ({"frames": numbered().double()}, "frames must be float32"), ({"frames": numbered()[0]}, "frames must be"),
    ({"frames": numbered() / 0}, "frames must be finite"), ({"frames": [1.0]}, "frames must be .* got list"),
    ({"frames": numbered()[:0]}, "frames must be .* not empty"),
    ({"static": torch.zeros(2, 1, 4, 3)}, "static must have 1 or 5 trajectories"),
    ({"static": torch.zeros(1, 1, 3, 4)}, "static must have .* grid"), ({"static": torch.zeros(4, 3)}, "static must"),
    ({"parity": (1,)}, "parity must be 2 times"), ({"parity": (1, 2)}, "parity must be"),
    ({"static_parity": (1,)}, "static_parity must be 0 times"),
])
def test_wrong_data_is_named(arguments, message):
    with pytest.raises(FieldDataError, match=message):
        FieldData(**{"frames": numbered()} | arguments)


def test_split_takes_test_trajectories_from_the_end():
    static = torch.arange(5.0)[:, None, None, None].expand(5, 1, 4, 3)
    train, test = split(FieldData(numbered(), static), 3, 1)
    assert torch.equal(train.frames, numbered()[:3]) and torch.equal(train.static, static[:3])
    assert torch.equal(test.frames, numbered()[4:]) and torch.equal(test.static, static[4:])
    shared = split(FieldData(numbered(), static[:1]), 2, 3)
    assert all(len(part.static) == 1 for part in shared)
    for train, test in ((3, 3), (0, 1), (1, 0)):
        with pytest.raises(FieldDataError, match=r"train and test must be at least 1 .* 5 trajectories"):
            split(FieldData(numbered()), train, test)


@pytest.mark.parametrize("shared", [True, False])
def test_windows_are_consecutive_frames_of_one_trajectory(shared):
    static = torch.arange(1.0 if shared else 5.0)[:, None, None, None].expand(-1, 1, 4, 3)
    windows = Windows(FieldData(numbered(), static), history=3, horizon=2)
    assert len(windows) == 5 * 2
    history, given, future = windows.gather(torch.tensor([0, 9, 2]))
    for i, (trajectory, start) in enumerate([(0, 0), (4, 1), (1, 0)]):
        assert torch.equal(history[i], numbered()[trajectory, start:start + 3])
        assert torch.equal(future[i], numbered()[trajectory, start + 3:start + 5])
        assert given[0 if shared else i, 0, 0, 0] == (0 if shared else trajectory)
    assert Windows(FieldData(numbered()), 5).gather(torch.tensor([0]))[1] is None


def test_batches_hold_every_window_once_in_the_order_of_the_seed():
    windows = Windows(FieldData(numbered()), 2)

    def first_values(generator=None):
        batches = list(windows.batches(3, generator))
        assert [len(future) for *_, future in batches] == [3] * 6 + [2]
        return [history[i, 0, 0, 0, 0].item() for history, *_ in batches for i in range(len(history))]

    in_order = first_values()
    assert in_order == sorted(in_order)
    shuffled = first_values(torch.Generator().manual_seed(0))
    assert shuffled != in_order and sorted(shuffled) == in_order
    assert shuffled == first_values(torch.Generator().manual_seed(0))
    for history, horizon in ((6, 1), (0, 1), (1, 0)):
        with pytest.raises(FieldDataError, match="6 frames of a trajectory"):
            Windows(FieldData(numbered()), history, horizon)


def write_npy(path, values):
    np.save(path, values)


def write_old_mat(path, values):
    pytest.importorskip("scipy.io").savemat(path, {"a": values[..., 0], "u": values})


def write_new_mat(path, values):
    """As MATLAB v7.3 does: HDF5 behind 512 bytes of its own, axes reversed."""
    with pytest.importorskip("h5py").File(path, "w", userblock_size=512) as file:
        file["u"] = values.transpose()
    with path.open("r+b") as file:
        file.write(b"MATLAB 7.3 MAT-file")


PUBLIC = {"data.npy": write_npy, "old.mat": write_old_mat, "new.mat": write_new_mat}


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_public_layouts_give_the_same_frames(tmp_path, name, dtype):
    frames = numbered(channels=1)
    PUBLIC[name](tmp_path / name, public_array(frames).astype(dtype))
    data = load_data(tmp_path / name)
    assert data.frames.dtype == torch.float32 and torch.equal(data.frames, frames)
    assert data.static is None and data.parity == (-1,)
    assert data.parameters == {"source": name, "forcing": None}


def test_public_files_get_their_forcing_as_static_channel(tmp_path):
    write_npy(tmp_path / "data.npy", public_array(numbered(channels=1, height=6, width=6)))
    data = load_data(tmp_path / "data.npy", forcing="classical")
    assert data.static_parity == (-1,)
    assert torch.equal(data.static, classical_forcing(6).float()[None, None])
    write_npy(tmp_path / "data.npy", public_array(numbered(channels=1)))
    with pytest.raises(FieldDataError, match="square grid"):
        load_data(tmp_path / "data.npy", forcing="classical")
    with pytest.raises(FieldDataError, match="forcing must be one of classical"):
        load_data(tmp_path / "data.npy", forcing="unknown")


@pytest.mark.parametrize(("name", "package"), [("old.mat", "scipy"), ("new.mat", "h5py")])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, name, package):
    PUBLIC[name](tmp_path / name, public_array(numbered(channels=1)))
    for module in (package, f"{package}.io"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(FieldDataError, match=rf"needs {package}: pip install 'torus-kernels\[field\]'$"):
        load_data(tmp_path / name)


def test_files_that_are_something_else_are_named(tmp_path):
    for name in ("none.safetensors", "none.mat"):
        with pytest.raises(FieldDataError, match=f"no file at .*{name}"):
            load_data(tmp_path / name)
    for name in ("broken.safetensors", "broken.npy", "broken.mat", "data.csv"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(FieldDataError, match=name):
            load_data(tmp_path / name)
    write_npy(tmp_path / "shape.npy", np.zeros((2, 3, 4)))
    with pytest.raises(FieldDataError, match=r"shape.npy must hold real numbers \[N, H, W, T\], got float64 \[2, 3, 4"):
        load_data(tmp_path / "shape.npy")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(FieldDataError, match=r"objects\.npy cannot be read"):
        load_data(tmp_path / "objects.npy")
    save_file({"frames": numbered()}, tmp_path / "foreign.safetensors")
    with pytest.raises(FieldDataError, match=r"foreign\.safetensors is not a file of field data"):
        load_data(tmp_path / "foreign.safetensors")
    pytest.importorskip("scipy.io").savemat(tmp_path / "other.mat", {"v": np.zeros((2, 3, 3, 4))})
    with pytest.raises(FieldDataError, match=r"other.mat has no variable 'u'"):
        load_data(tmp_path / "other.mat")
    save_data(tmp_path / "own.safetensors", FieldData(numbered()))
    with pytest.raises(FieldDataError, match="carries its own static fields"):
        load_data(tmp_path / "own.safetensors", forcing="classical")


def test_generated_trajectories_depend_on_seed_and_number_alone():
    task = NavierStokesTask(**TINY)
    data = generate(task, batch_size=2)
    assert_same_up_to_rounding(generate(task, batch_size=3).frames, data.frames)
    longer = generate(NavierStokesTask(**TINY | {"trajectories": 5}), batch_size=5)
    assert_same_up_to_rounding(longer.frames[:3], data.frames)
    other = generate(NavierStokesTask(**TINY | {"seed": 1}))
    assert (other.frames - data.frames).abs().amax((1, 2, 3, 4)).min() > 0.1 * data.frames.std()


def test_generated_frames_are_every_other_point_of_the_solution():
    task = NavierStokesTask(**TINY)
    data = generate(task)
    solution = task.solver().solve(task.initial_fields(0, 3), [0.5, 1.0, 1.5], cfl=1.0)
    assert data.frames.shape == (3, 3, 1, 8, 8) and data.parity == data.static_parity == (-1,)
    assert_same_up_to_rounding(data.frames[:, :, 0], solution[..., ::2, ::2])
    assert torch.equal(data.static, classical_forcing(8).float()[None, None])
    assert json.loads(json.dumps(data.parameters)) == data.parameters
    assert data.parameters["times"] == [0.5, 1.0, 1.5] and data.parameters["viscosity"] == 1e-3
    unforced = generate(NavierStokesTask(**TINY | {"forcing": None, "dt": 0.1}))
    assert unforced.static is None and unforced.parameters["dt"] == 0.1


@pytest.mark.parametrize(("field", "value"), [
    ("trajectories", 0), ("viscosity", -1.0), ("solve_resolution", 12), ("resolution", 2), ("interval", 0.0),
    ("dt", -0.1), ("cfl", 0.0), ("initial", "other"), ("forcing", "other"), ("dtype", "float16"), ("seed", -1),
])
def test_wrong_tasks_are_named(field, value):
    with pytest.raises((TypeError, ValueError), match=field):
        NavierStokesTask(**TINY | {field: value})


def prepare(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.prepare(parser.parse_args(arguments))


def test_the_command_writes_data_and_a_preview(tmp_path, capsys):
    output = tmp_path / "new" / "data.safetensors"
    flags = [part for name, value in TINY.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    prepare("--output", str(output), "--batch-size", "2", *flags)()
    assert f"wrote {output}" in capsys.readouterr().out
    assert_same_up_to_rounding(load_data(output).frames, generate(NavierStokesTask(**TINY)).frames)
    assert sorted(path.name for path in output.parent.iterdir()) == ["data.png", "data.safetensors"]
    with pytest.raises(FileExistsError, match="--overwrite"):
        prepare("--output", str(output))
    prepare("--output", str(output), "--overwrite", *flags, "--forcing", "none")()
    assert load_data(output).static is None


@pytest.mark.parametrize(("flags", "message"), [
    (["--output", "data.npy"], "output must end in .safetensors"), (["--batch-size", "0"], "batch-size"),
    (["--device", "nonsense"], "device nonsense"), (["--resolution", "48"], "solve_resolution must be a multiple"),
])
def test_wrong_options_are_named_before_any_work(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        prepare("--output", str(tmp_path / "data.safetensors"), *flags)
    assert not list(tmp_path.iterdir())
