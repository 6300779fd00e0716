"""The mixture of experts: its formula, its load-balancing loss, and the ways through a model that has one."""

import dataclasses

import pytest
import torch
from model_runs import fails_in_one_line, run
from support import assert_same_up_to_rounding

import torus_model.moe as moe_module
from torus_model import ModelConfig, TorusLM, checkpoint
from torus_model.data import fixed_batches
from torus_model.evaluation import score
from torus_model.generate import generate
from torus_model.moe import MixtureOfExperts, collected_balance
from torus_model.run import make_optimizer, training_step
from torus_model.tokenizer import ByteTokenizer

WIDTH = 16
MODEL = ModelConfig(width=32, layers=2, heads=2, n_major=4, n_minor=6, cross_radius=(1, 2), ff_width=24, experts=4)


def make_mixture(per_token: int, experts: int = 4) -> MixtureOfExperts:
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Tanh()) for _ in range(experts)]
    return MixtureOfExperts(layers, WIDTH, per_token).double()


def make_model(**changes) -> TorusLM:
    torch.manual_seed(0)
    return TorusLM(dataclasses.replace(MODEL, **changes), backend="reference")


def batch(size: int = 4, seq_len: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(256, (size, seq_len + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def balance_of(mixture: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    with collected_balance(mixture) as balance:
        mixture(x)
    return balance[0]


@pytest.mark.parametrize("per_token", [1, 2, 4])
def test_output_and_balance_are_those_of_the_formula(per_token):
    mixture = make_mixture(per_token)
    x = torch.randn(3, 7, WIDTH, dtype=torch.float64)
    wanted, choices, probabilities = torch.zeros_like(x), torch.zeros(4, dtype=torch.float64), []
    for b in range(3):
        for t in range(7):
            p = torch.softmax(mixture.router.weight @ x[b, t], 0)
            best = sorted(range(4), key=lambda e, p=p: -p[e])[:per_token]
            whole = 1 if per_token == 1 else sum(p[e] for e in best)
            wanted[b, t] = sum(p[e] / whole * mixture.experts[e](x[b, t]) for e in best)
            choices[best] += 1
            probabilities.append(p)
    with torch.no_grad():
        assert_same_up_to_rounding(mixture(x), wanted, "output")
        load = choices / choices.sum()
        assert torch.allclose(mixture.load, load)
        assert balance_of(mixture, x).item() == pytest.approx(
            4 * sum(load[e] * sum(p[e] for p in probabilities) / 21 for e in range(4)).item(), rel=1e-12)


def test_no_token_depends_on_another():
    mixture = make_mixture(2)
    x = torch.randn(5, 9, WIDTH, dtype=torch.float64)
    alone = torch.stack([torch.stack([mixture(token) for token in row]) for row in x.unsqueeze(2)]).squeeze(2)
    assert_same_up_to_rounding(mixture(x).detach(), alone.detach(), "tokens")


def test_balance_is_1_where_all_experts_are_used_alike_and_their_number_where_one_is():
    mixture = make_mixture(1)
    x = torch.eye(4, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        mixture.router.weight.zero_()[:, :4] = 1e-3 * torch.eye(4)
        assert balance_of(mixture, x).item() == pytest.approx(1)
        mixture.router.weight.zero_()[2] = 100
        assert balance_of(mixture, x).item() == pytest.approx(4)


def test_every_expert_and_the_router_learn():
    model = make_model()
    tokens, targets = batch()
    model.loss(tokens, targets).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
    optimizer = make_optimizer(model, 1e-3, 0.1)
    [decayed] = [group["param_names"] for group in optimizer.param_groups if group["weight_decay"]]
    assert {"blocks.0.ff.router.weight", "blocks.0.ff.experts.3.2.weight"} <= set(decayed)


def test_the_loss_of_training_has_the_balance_of_every_block_and_that_of_evaluation_none():
    tokens, targets = batch()
    found = {}
    for weight in (0.0, 1.0):
        model = make_model(balance_weight=weight)
        found[weight] = model.loss(tokens, targets).item()
        with collected_balance(model) as balance:
            model(tokens)
        assert len(balance) == MODEL.layers and all(1 <= x.item() < 4 for x in balance)
        scored = [score(model, fixed_batches(tokens.flatten(), 3, 2, 20), ByteTokenizer()).bits_per_byte]
        assert model.eval().loss(tokens, targets).item() == pytest.approx(found[0.0], rel=1e-6)
    assert found[1.0] - found[0.0] == pytest.approx(sum(x.item() for x in balance), rel=1e-5)
    assert scored[0] == score(make_model(balance_weight=0.0), fixed_batches(tokens.flatten(), 3, 2, 20),
                              ByteTokenizer()).bits_per_byte


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_balance_loss_spreads_the_load(weight):
    """Of a router that sends everything to one expert, because all tokens have a part in common."""
    model = make_model(balance_weight=weight, experts_per_token=1, layers=1)
    mixture = model.blocks[0].ff
    with torch.no_grad():
        model.embedding.weight.normal_(1.0, 0.3)
        mixture.router.weight[0] += 0.2
    model.loss(*batch())
    assert mixture.load[0] == 1
    optimizer = torch.optim.SGD([mixture.router.weight], lr=0.03)
    for _ in range(30):
        training_step(model, optimizer, *batch(), clip=1e9)
    assert (mixture.load[0] < 0.5) == bool(weight), mixture.load


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_counts_the_balance_once(dropout):
    found = {}
    for again in (False, True):
        torch.manual_seed(0)
        model = TorusLM(dataclasses.replace(MODEL, dropout=dropout, balance_weight=1.0), backend="reference",
                        activation_checkpointing=again)
        loss = model.loss(*batch())
        loss.backward()
        found[again] = loss.item(), [p.grad for p in model.parameters()]
        assert all(block.ff._collected is None for block in model.blocks)
    assert found[True][0] == found[False][0]
    assert all(torch.equal(one, other) for one, other in zip(found[True][1], found[False][1], strict=True))


def test_the_router_stays_in_float32_under_autocast(monkeypatch):
    seen = []
    linear = moe_module.F.linear
    monkeypatch.setattr(moe_module.F, "linear", lambda *a: seen.append(linear(*a)) or seen[-1])
    model = make_model()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(*batch())
    scores = [x for x in seen if x.shape[-1] == MODEL.experts]
    assert len(scores) == MODEL.layers and {x.dtype for x in scores} == {torch.float32}
    assert any(x.dtype == torch.bfloat16 for x in seen), "the rest is not"
    assert loss.item() == pytest.approx(make_model().loss(*batch()).item(), rel=0.01)


@pytest.mark.parametrize("per_token", [1, 2])
def test_the_cache_gives_the_tokens_of_the_whole_text(per_token):
    model = make_model(experts_per_token=per_token).double().eval()
    with torch.no_grad():
        model.embedding.weight.mul_(20)
        model.norm.weight.normal_()
    prompt = batch()[0][0, :7]
    written = [list(generate(model, prompt, 20, temperature=0, use_cache=cached)) for cached in (True, False)]
    assert written[0] == written[1] and len(set(written[0])) > 3


def test_a_step_repeats_to_the_bit():
    losses = []
    for _ in range(2):
        model = make_model()
        optimizer = make_optimizer(model, 1e-2, 0.1)
        losses.append([training_step(model, optimizer, *batch(), clip=1.0) for _ in range(3)])
    assert losses[0] == losses[1]


def test_one_expert_is_the_dense_layer():
    names = make_model(experts=1).state_dict().keys()
    assert {"blocks.0.ff.0.weight", "blocks.0.ff.2.weight"} <= names and not any("expert" in name for name in names)
    old = {name: value for name, value in MODEL.to_dict().items()
           if name not in ("experts", "experts_per_token", "balance_weight")}
    assert ModelConfig.from_dict(old).experts == 1, "checkpoints from before say nothing of experts"


@pytest.mark.parametrize(("changes", "said"), [
    ({"experts": 0}, "experts"), ({"experts": 2, "experts_per_token": 3}, "experts_per_token must be at most"),
    ({"balance_weight": -1.0}, "balance_weight"), ({"experts": 1.5}, "experts"),
])
def test_wrong_settings_are_refused(changes, said):
    with pytest.raises((TypeError, ValueError), match=said):
        dataclasses.replace(MODEL, **changes)


def test_commands(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question; " * 60)
    command = ["train", "--data", tmp_path / "text.txt", "--steps", 2, "--width", 16, "--layers", 1, "--heads", 2,
               "--n-major", 4, "--n-minor", 6, "--seq-len", 24, "--validations", 1, "--validation-windows", 2,
               "--backend", "reference", "--experts", 3]
    assert run(*command, "--experts-per-token", 1, "--balance-weight", 0.5, "--output", tmp_path / "run") == 0
    config = checkpoint.load_model(tmp_path / "run").config
    assert (config.experts, config.experts_per_token, config.balance_weight) == (3, 1, 0.5)
    for use in (["evaluate", "--windows", 2], ["generate", "--prompt", "to", "--bytes", 3]):
        assert run(*use, "--checkpoint", tmp_path / "run", "--backend", "reference") == 0
    said = fails_in_one_line(capsys, *command, "--experts-per-token", 4, "--output", tmp_path / "other")
    assert "experts_per_token must be at most experts = 3, got 4" in said
    assert run("train", "--help") == 0
    shown = capsys.readouterr().out
    assert all(f"  {flag}" in shown for flag in ("--experts", "--experts-per-token", "--balance-weight"))
