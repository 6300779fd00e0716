"""The networks of fields: what each sees, which rolls commute with it, and that their sizes can be made equal."""

import dataclasses
import itertools

import pytest
import torch
from support import assert_same_up_to_rounding

from torus_kernels import lattice_rope
from torus_model.field import FieldConfig
from torus_model.field.baselines import DenseAttention, WindowAttention
from torus_model.field.baselines.fourier import SpectralConvolution, most_modes
from torus_model.field.baselines.unet import LEVELS
from torus_model.field.networks import (
    FOURIER_CHANNELS,
    NETWORKS,
    PARAMETER_TOLERANCE,
    build_model,
    equal_parameters,
    number_of_parameters,
)

SMALL = FieldConfig(
    grid=(16, 24), patch=2, channels=2, static_channels=1, history=3, width=32, heads=2, layers=2, ff_width=32,
    winding=3, cross_radius=(1, 2), window=4, modes=4,
)  # 8 x 12 patches, 2 x 3 windows

networks = pytest.mark.parametrize("network", NETWORKS)
topologies = pytest.mark.parametrize("topology", ["periodic", "cylinder"])


def make_model(network, dtype=torch.float32, **changes):
    """A model whose head, gains and gates are random, where an untrained one has zeros and ones, and whose Fourier
    modes are not negligible."""
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(SMALL, network=network, **changes)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("head", "norm", "gate", "raw_", "spectral")):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def make_fields(config, batch=2, dtype=torch.float32):
    torch.manual_seed(1)
    frames = torch.randn(batch, config.history, config.channels, *config.grid, dtype=dtype)
    return frames, torch.randn(batch, config.static_channels, *config.grid, dtype=dtype)


@networks
@pytest.mark.parametrize(
    "changes",
    [{}, {"topology": "cylinder"}, {"grid": (32, 16), "channels": 1, "winding": 1}, {"history": 1, "channels": 3}],
    ids=str,
)
def test_an_untrained_model_predicts_the_last_frame(network, changes):
    config = dataclasses.replace(SMALL, network=network, **changes)
    model = build_model(config)
    frames, static = make_fields(config)
    assert model.config.network == network
    assert torch.equal(model(frames, static), frames[:, -1])
    torch.nn.init.normal_(model.network.head.weight)
    predicted = model(frames, static)
    assert predicted.shape == (2, config.channels, *config.grid)
    assert (predicted - frames[:, -1]).abs().flatten(1).amin(1).min() > 0


PATCH = SMALL.patch
WINDOW = SMALL.patch * SMALL.window
SMALLEST_ROLL = {
    "torus": PATCH, "loops": PATCH, "dense": PATCH, "windows-periodic": WINDOW, "fourier": 1, "unet": 2**LEVELS,
}


def rolled_both_ways(model, shift):
    """Prediction from what was rolled, and what was predicted, rolled."""
    frames, static = make_fields(model.config, batch=1, dtype=torch.float64)
    with torch.no_grad():
        rolled = model(frames.roll(shift, (-2, -1)), static.roll(shift, (-2, -1)))
        expected = model(frames, static).roll(shift, (-2, -1))
    return rolled, expected


def assert_does_not_commute(model, shift):
    rolled, expected = rolled_both_ways(model, shift)
    assert (rolled - expected).abs().max() > 1e-3 * expected.abs().max(), shift


@pytest.mark.parametrize("network", SMALLEST_ROLL)
@topologies
def test_rolls_commute(network, topology):
    model, step = make_model(network, torch.float64, topology=topology), SMALLEST_ROLL[network]
    shifts = [(0, step), (0, -2 * step)] + [(step, 0), (-step, step)] * (topology == "periodic")
    for shift in shifts:
        assert_same_up_to_rounding(*rolled_both_ways(model, shift), f"roll by {shift}")


@pytest.mark.parametrize("network", [name for name in SMALLEST_ROLL if name != "fourier"])
@pytest.mark.parametrize("axis", [0, 1])
def test_smaller_rolls_do_not_commute(network, axis):
    shift = [0, 0]
    shift[axis] = SMALLEST_ROLL[network] // 2
    assert_does_not_commute(make_model(network, torch.float64), shift)


@networks
def test_rolls_over_the_open_edge_of_a_cylinder_do_not_commute(network):
    assert_does_not_commute(make_model(network, torch.float64, topology="cylinder"), (8, 0))


@topologies
@pytest.mark.parametrize("shift", [(WINDOW, 0), (0, WINDOW), (PATCH, PATCH), (1, 0)])
def test_masked_windows_have_a_seam(topology, shift):
    assert_does_not_commute(make_model("windows", torch.float64, topology=topology), shift)


@topologies
def test_windows_that_are_not_shifted_have_no_seam(topology):
    """What breaks the symmetry is the mask: one block of windows commutes along every closed axis."""
    model = make_model("windows", torch.float64, topology=topology, layers=1)
    assert_same_up_to_rounding(*rolled_both_ways(model, (WINDOW if topology == "periodic" else 0, WINDOW)))


def window_of(place, length, window, *, shifted, edge):
    """The window of a place along an axis. Windows tile the axis from ``shift`` on, before it as well as after it, and
    around the axis where that has no edge."""
    shift = window // 2 if shifted and length > window else 0
    return (place - shift) // window if edge else (place - shift) % length // window


def same_window(lattice, window, *, shifted, edges):
    """Visibility by enumeration of all pairs, ``[T, T]``."""
    sides = (lattice.n_major, lattice.n_minor)
    windows = [
        tuple(window_of(place, side, window, shifted=shifted, edge=edge)
              for place, side, edge in zip(site, sides, edges, strict=True))
        for site in itertools.product(*map(range, sides))
    ]
    return torch.tensor([[a == b for b in windows] for a in windows])


def masked_softmax(layer, x, visible):
    """All pairs in plain PyTorch, with the layer's weights."""
    def heads(y):
        return y.unflatten(-1, (layer.heads, -1)).transpose(1, 2)

    q, k, v = (heads(projection(x)) for projection in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = lattice_rope(layer.q_norm(q), layer.lattice), lattice_rope(layer.k_norm(k), layer.lattice)
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    out = scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v
    return layer.out_proj(out.transpose(1, 2).flatten(2))


def check_attention(layer, visible):
    torch.manual_seed(2)
    layer = layer.double()
    for norm in (layer.q_norm, layer.k_norm):
        torch.nn.init.uniform_(norm.weight, 1, 3)  # so that scores, and with them positions, matter
    x = torch.randn(2, layer.lattice.num_sites, SMALL.width, dtype=torch.float64)
    with torch.no_grad():
        out, state = layer(x)
        assert state is None
        assert_same_up_to_rounding(out, masked_softmax(layer, x, visible))


@topologies
def test_dense_attention_is_a_softmax_over_all_pairs(topology):
    config = dataclasses.replace(SMALL, topology=topology)
    sites = config.lattice.num_sites
    check_attention(DenseAttention(config), torch.ones(sites, sites, dtype=torch.bool))


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("window", [1, 2, 4])
@pytest.mark.parametrize(
    "topology, edges",
    [*(("periodic", edges) for edges in itertools.product((False, True), repeat=2)),
     ("cylinder", (True, False)), ("cylinder", (True, True))],
)
def test_window_attention_is_a_softmax_within_windows(topology, edges, window, shifted):
    config = dataclasses.replace(SMALL, topology=topology, window=window)
    layer = WindowAttention(config, shifted=shifted, edges=edges)
    check_attention(layer, same_window(config.lattice, window, shifted=shifted, edges=edges))


def test_odd_windows():
    config = dataclasses.replace(SMALL, grid=(12, 18), winding=3, window=3)  # 6 x 9 patches
    layer = WindowAttention(config, shifted=True, edges=(True, True))
    check_attention(layer, same_window(config.lattice, 3, shifted=True, edges=(True, True)))


@pytest.mark.parametrize("network", ["windows", "windows-periodic"])
def test_windows_are_not_shifted_along_an_axis_that_one_spans(network):
    model = make_model(network, grid=(8, 24))  # 4 x 12 patches
    assert [block.attention.shifts for block in model.network.blocks] == [(0, 0), (0, 2)]


def test_every_second_block_is_shifted_and_masked_at_the_edges_of_the_array():
    def masked(network, topology):
        model = make_model(network, topology=topology, layers=4)
        layers = [block.attention for block in model.network.blocks]
        assert [layer.shifts for layer in layers] == [(0, 0), (2, 2)] * 2
        assert layers[0].mask is None and layers[2].mask is None
        if layers[1].mask is None:
            return 0
        return int((~layers[1].mask.flatten(1).all(1)).sum())  # windows with a hidden pair

    assert masked("windows", "periodic") == masked("windows", "cylinder") == 4  # the last row and the last column
    assert masked("windows-periodic", "periodic") == 0
    assert masked("windows-periodic", "cylinder") == 3  # the last row


def test_loops_see_their_row_and_column():
    model = make_model("loops", torch.float64, layers=1, streams=("spiral_cw",))
    frames, static = make_fields(model.config, batch=1, dtype=torch.float64)
    other = frames.clone()
    other[..., 6:8, 10:12] += 1  # the patch in row 3, column 5
    with torch.no_grad():
        change = (model(other, static) - model(frames, static))[0].abs().amax(0)
    changed = change.unflatten(1, (12, 2)).unflatten(0, (8, 2)).amax((1, 3)) > 0
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[3], expected[:, 5] = True, True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("grid, modes", [((16, 24), 4), ((8, 24), 4), ((16, 6), 4), ((9, 7), 3), ((12, 12), 1)])
def test_spectral_convolution_multiplies_the_low_modes(grid, modes):
    torch.manual_seed(0)
    layer = SpectralConvolution(3, modes).double()
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(2, 3, *grid, dtype=torch.float64)
    spectrum, weight = torch.fft.rfft2(x), torch.view_as_complex(layer.weight)
    product = torch.zeros_like(spectrum)
    for row, column in itertools.product(range(2 * modes), range(modes)):
        frequency = row if row < modes else row - 2 * modes
        product[:, :, frequency, column] = spectrum[:, :, frequency, column] @ weight[row, column]
    with torch.no_grad():
        assert_same_up_to_rounding(layer(x), torch.fft.irfft2(product, s=grid))


@pytest.mark.parametrize("grid, topology, most", [
    ((16, 24), "periodic", 8), ((16, 12), "periodic", 7), ((24, 8), "periodic", 5), ((16, 24), "cylinder", 9),
])
def test_modes_go_up_to_all_of_the_grid(grid, topology, most):
    changes = {"grid": grid, "topology": topology, "winding": 1 if grid == (24, 8) else 3}
    model = make_model("fourier", torch.float64, modes=most, **changes)
    assert most_modes(model.config) == most
    assert_same_up_to_rounding(*rolled_both_ways(model, (3 if topology == "periodic" else 0, 5)))
    with pytest.raises(ValueError, match="modes"):
        build_model(dataclasses.replace(model.config, modes=most + 1))


@pytest.mark.parametrize(
    "config",
    [
        FieldConfig(static_channels=1),
        FieldConfig(static_channels=1, grid=(32, 32), width=32, layers=2, heads=2, modes=8, token_gated=False),
        dataclasses.replace(SMALL, topology="cylinder", width=48, ff_width=192, streams=("spiral_cw",)),
    ],
    ids=["default", "small", "cylinder"],
)
@networks
def test_parameters_can_be_made_equal(config, network):
    with torch.device("meta"):
        target = number_of_parameters(build_model(config))

        def difference(candidate):
            return abs(number_of_parameters(build_model(candidate)) - target)

        chosen = equal_parameters(config, network)
        assert dataclasses.replace(chosen, ff_width=config.ff_width, modes=config.modes, network="torus") == config
        assert network == "fourier" or chosen.modes == config.modes
        assert difference(chosen) <= PARAMETER_TOLERANCE * target
        if network == "torus":
            assert chosen == config
            return
        step = 1 if network in ("fourier", "unet") else 8
        for other in (chosen.ff_width - step, chosen.ff_width + step):
            assert difference(dataclasses.replace(chosen, ff_width=other)) >= difference(chosen)
        if network == "fourier":
            distance = abs(chosen.ff_width - FOURIER_CHANNELS)
            nearer = range(FOURIER_CHANNELS - distance + 1, FOURIER_CHANNELS + distance)
            for modes, size in itertools.product(range(1, most_modes(chosen) + 1), nearer):
                other = dataclasses.replace(chosen, modes=modes, ff_width=size)
                assert difference(other) > PARAMETER_TOLERANCE * target


def test_parameters_are_those_of_the_torus_whatever_the_network_and_its_size():
    config = dataclasses.replace(SMALL, ff_width=48)
    target = number_of_parameters(build_model(config))
    chosen = equal_parameters(dataclasses.replace(config, network="unet"), "dense")
    assert chosen.network == "dense"
    assert abs(number_of_parameters(build_model(chosen)) - target) <= PARAMETER_TOLERANCE * target


@networks
def test_overfits_a_batch_and_every_parameter_learns(network):
    model = make_model(network)
    frames, static = make_fields(model.config)
    target = frames[:, -1].roll(1, -1) - static
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = (model(frames, static) - target).square().mean()
        loss.backward()
        losses.append(loss.item())
        if len(losses) == 1:
            for name, parameter in model.named_parameters():
                assert parameter.grad.abs().max() > 0, name
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@networks
def test_state_dict_round_trip(network):
    model, other = make_model(network), build_model(dataclasses.replace(SMALL, network=network))
    weights = model.state_dict()
    assert weights.keys() == {name for name, _ in model.named_parameters()} | {"frame_scale", "static_scale"}
    other.load_state_dict(weights)
    fields = make_fields(model.config)
    with torch.no_grad():
        assert torch.equal(model(*fields), other(*fields))


@networks
def test_dropout_acts_in_training_only(network):
    model = make_model(network, dropout=0.5)
    fields = make_fields(model.config)
    with torch.no_grad():
        assert not torch.equal(model(*fields), model(*fields))
        assert torch.equal(model.eval()(*fields), model(*fields))


@networks
def test_networks_run_under_autocast(network):
    model = make_model(network)
    fields = make_fields(model.config)
    with torch.no_grad():
        exact = model(*fields)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(*fields)
    change = (exact - fields[0][:, -1]).abs().max()
    assert 0 < (low - exact).abs().max() <= 16 * torch.finfo(torch.bfloat16).eps * change


@pytest.mark.parametrize(
    ("network", "changes", "field"),
    [
        ("windows", {"window": 3}, "window"), ("windows-periodic", {"window": 8}, "window"),
        ("windows", {"window": 24}, "window"), ("fourier", {"modes": 9}, "modes"),
        ("fourier", {"modes": 10, "topology": "cylinder"}, "modes"),
        ("unet", {"grid": (20, 20), "winding": 1}, "grid"), ("perceptron", {}, "network"),
    ],
)
def test_errors_name_the_field_that_is_wrong(network, changes, field):
    with pytest.raises(ValueError, match=field):
        build_model(dataclasses.replace(SMALL, network=network, **changes))
    with pytest.raises(ValueError, match="network"):
        equal_parameters(SMALL, "perceptron")


@networks
def test_backend_is_checked_and_reaches_the_torus(network):
    config = dataclasses.replace(SMALL, network=network)
    with pytest.raises(ValueError, match="backend"):
        build_model(config, "abacus")
    model = build_model(config, "reference")
    if network in ("torus", "loops"):
        assert [block.attention.backend for block in model.network.blocks] == ["reference"] * SMALL.layers
