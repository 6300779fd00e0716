"""Writing text: sampling, the cache, batches of unequal prompts and beam search."""

import itertools

import pytest
import torch

from torus_kernels import available_backends
from torus_model import ModelConfig, TorusLM
from torus_model.cache import LMCache
from torus_model.generate import _penalized, beam_search, generate, generate_batch
from torus_model.sampling import Sampling

MODEL = ModelConfig(vocab_size=32, width=32, layers=3, heads=2, kv_heads=1, n_major=4, n_minor=6, cross_radius=(1, 2))
WINDOW = MODEL.lattice.num_sites


def make_model(dtype=torch.float64, backend="reference", **changes):
    """A model whose logits depend strongly on the text: sampled and greedy tokens then vary."""
    torch.manual_seed(0)
    config = ModelConfig.from_dict(MODEL.to_dict() | changes)
    model = TorusLM(config, backend=backend).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("stream_gate.weight", "raw_alpha", "raw_decay")):
                parameter.add_(torch.randn_like(parameter))
            if name == "embedding.weight":
                parameter.mul_(20)
            if name == "norm.weight":  # with tied embeddings a text would repeat its last token
                parameter.normal_()
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


def prompt_of(length, seed=0):
    return torch.randint(MODEL.vocab_size, (length,), generator=generator(seed))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def greedy_by_full_forwards(model, prompt, new_tokens):
    """The specification: every token from a run over the whole text."""
    text = prompt
    with torch.no_grad():
        for _ in range(new_tokens):
            text = torch.cat((text, model(text[None])[0, -1].argmax()[None]))
    return text[len(prompt):].tolist()


@pytest.mark.parametrize("backend", [name for name in ("reference", "cpu") if name in available_backends()])
@pytest.mark.parametrize("prompt_length", [1, 7, WINDOW, 3 * WINDOW + 5])
def test_the_cache_gives_the_logits_of_the_whole_text(backend, prompt_length):
    model = make_model(backend=backend)
    text = prompt_of(prompt_length + 2 * WINDOW)[None]
    with torch.no_grad():
        wanted = model(text)[:, prompt_length - 1:]
    cache = LMCache(model, 1)
    got = [cache.logits(model, text[:, :prompt_length])]
    got += [cache.logits(model, text[:, t:t + 1]) for t in range(prompt_length, text.shape[1])]
    assert len(cache) == text.shape[1]
    torch.testing.assert_close(torch.stack(got, 1), wanted, rtol=0, atol=1e-10 * wanted.abs().max().item())


@pytest.mark.parametrize("token_gated", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_greedy_text_is_that_of_whole_forwards_far_past_the_window(use_cache, token_gated):
    model = make_model(token_gated=token_gated)
    prompt = prompt_of(3)
    wanted = greedy_by_full_forwards(model, prompt, 2 * WINDOW)
    assert len(set(wanted)) > 3, "a text that repeats one token would hide mistakes"
    assert list(generate(model, prompt, 2 * WINDOW, temperature=0, use_cache=use_cache)) == wanted


def test_the_cache_reads_the_prompt_once_and_then_single_tokens(model, monkeypatch):
    lengths = []
    forward = TorusLM.forward

    def record(self, tokens, **options):
        lengths.append(tokens.shape[1])
        return forward(self, tokens, **options)

    monkeypatch.setattr(TorusLM, "forward", record)
    list(generate(model, prompt_of(9), 5, temperature=0))
    assert lengths == [9, 1, 1, 1, 1]
    lengths.clear()
    list(generate(model, prompt_of(9), 5, temperature=0, use_cache=False))
    assert lengths == [9, 10, 11, 12, 13]


def test_a_cache_that_is_not_empty_takes_one_token_at_a_time(model):
    cache = LMCache(model, 1)
    cache.logits(model, prompt_of(4)[None])
    with pytest.raises(ValueError, match="one token"):
        cache.logits(model, prompt_of(2)[None])
    cache.reset()
    assert len(cache) == 0 and cache
    cache.logits(model, prompt_of(2)[None])


@pytest.mark.parametrize("use_cache", [False, True])
def test_unequal_prompts_in_one_batch_continue_as_they_do_alone(model, use_cache):
    prompts = [prompt_of(length, seed=length) for length in (1, 5, 2 * WINDOW + 3)]
    together = generate_batch(model, prompts, WINDOW, temperature=0, use_cache=use_cache)
    for prompt, text in zip(prompts, together, strict=True):
        assert text.tolist() == greedy_by_full_forwards(model, prompt, WINDOW)


def test_texts_of_a_batch_stop_on_their_own(model):
    prompts = [prompt_of(3, seed=seed) for seed in range(4)]
    free = generate_batch(model, prompts, 20, temperature=0)
    stop = free[1][6].item()
    seen = []
    stopped = generate_batch(model, prompts, 20, temperature=0, stop_tokens={stop}, on_tokens=seen.append)
    for all_of_it, text in zip(free, stopped, strict=True):
        wanted = all_of_it.tolist()
        assert text.tolist() == (wanted[:wanted.index(stop) + 1] if stop in wanted else wanted)
    assert len(stopped[1]) < 20
    for text, column in zip(stopped, zip(*seen, strict=True), strict=True):
        assert [token for token in column if token is not None] == text.tolist()
        assert all(token is None for token in column[len(text):])


def test_generation_ends_when_every_text_has_stopped(model):
    first = next(generate(model, prompt_of(3), 1, temperature=0))
    assert list(generate(model, prompt_of(3), 100, temperature=0, stop_tokens={first})) == [first]
    calls = []
    generate_batch(model, [prompt_of(3)] * 2, 100, temperature=0, stop_tokens={first}, on_tokens=calls.append)
    assert len(calls) == 1


def test_sampling_follows_its_seed(model):
    def draw(seed, **options):
        return list(generate(model, prompt_of(2), 20, generator=generator(seed), **options))

    assert draw(0) == draw(0) == draw(0, use_cache=False)
    assert draw(0) != draw(1)
    assert draw(0, top_k=1) == list(generate(model, prompt_of(2), 20, temperature=0))
    assert draw(0, top_p=1e-9) == list(generate(model, prompt_of(2), 20, temperature=0))


def test_tokens_arrive_as_they_are_drawn(model, monkeypatch):
    calls = []
    monkeypatch.setattr(Sampling, "draw", lambda *_: calls.append(1) or torch.tensor([3]))
    tokens = generate(model, prompt_of(2), 10)
    assert list(itertools.islice(tokens, 2)) == [3, 3] and len(calls) == 2


def draws(sampling, logits, text=None, count=500):
    rows = torch.tensor(logits).expand(count, -1)
    return sampling.draw(rows, None if text is None else torch.tensor(text).expand(count, -1), generator()).tolist()


def test_top_k_samples_from_the_k_likeliest():
    logits = [0.0, 3.0, 1.0, 2.0]
    assert set(draws(Sampling(top_k=2), logits)) == {1, 3}
    assert set(draws(Sampling(top_k=9), logits)) == {0, 1, 2, 3}


def test_top_p_samples_from_the_fewest_that_reach_the_sum():
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log().tolist()
    assert set(draws(Sampling(top_p=0.5), logits)) == {1}
    assert set(draws(Sampling(top_p=0.51), logits)) == {1, 2}
    assert set(draws(Sampling(top_p=0.89), logits)) == {1, 2, 3}
    assert set(draws(Sampling(top_p=1.0), logits)) == {0, 1, 2, 3}


def test_temperature_sharpens():
    for temperature in (0.5, 1.0, 4.0):
        share = sum(draws(Sampling(temperature=temperature), [0.0, 1.0], count=4000)) / 4000
        assert share == pytest.approx(torch.tensor(1 / temperature).sigmoid().item(), abs=0.04)


def test_the_repetition_penalty_lowers_tokens_of_the_text_whatever_their_sign():
    greedy = {"temperature": 0.0}
    assert draws(Sampling(**greedy), [2.0, 1.5, -1.0], [[0]], count=1) == [0]
    assert draws(Sampling(2.0, **greedy), [2.0, 1.5, -1.0], [[0]], count=1) == [1]
    assert draws(Sampling(2.0, **greedy), [-1.0, -1.5, -9.0], [[0]], count=1) == [1]
    # Padding is no text: token 0 keeps its logit.
    assert draws(Sampling(2.0, **greedy), [2.0, 1.5, -1.0], [[-1]], count=1) == [0]


def test_the_repetition_penalty_acts_on_generated_text(model):
    plain = list(generate(model, prompt_of(3), 12, temperature=0))
    penalised = list(generate(model, prompt_of(3), 12, temperature=0, repetition_penalty=1e6))
    assert len(set(plain)) < 12
    assert len(set(penalised)) == 12 and not set(penalised) & set(prompt_of(3).tolist())


def log_probability(model, prompt, continuation):
    text = torch.cat((prompt, continuation))
    with torch.no_grad():
        steps = model(text[None])[0].log_softmax(-1)[len(prompt) - 1:-1]
    return steps.gather(1, continuation[:, None]).sum().item()


@pytest.mark.parametrize("use_cache", [False, True])
def test_beams_that_keep_everything_find_the_likeliest_text(use_cache):
    model = make_model(vocab_size=4)
    every = [torch.tensor(text) for text in itertools.product(range(4), repeat=3)]

    def likeliest(prompt):
        return max(every, key=lambda text: log_probability(model, prompt, text)).tolist()

    # One of the prompts after which greedy decoding misses the likeliest text.
    prompts = (torch.tensor(prompt) for prompt in itertools.product(range(4), repeat=3))
    prompt = next(p for p in prompts if likeliest(p) != list(generate(model, p, 3, temperature=0)))
    wanted = likeliest(prompt)
    assert beam_search(model, prompt, 3, beams=16, use_cache=use_cache).tolist() == wanted


def test_one_beam_is_greedy(model):
    assert beam_search(model, prompt_of(4), 30, beams=1).tolist() == list(
        generate(model, prompt_of(4), 30, temperature=0)
    )


def test_more_beams_never_find_less_likely_text_here(model):
    found = [log_probability(model, prompt_of(4), beam_search(model, prompt_of(4), 10, beams=b)) for b in (1, 4, 16)]
    assert found[0] < found[1] <= found[2]


def test_a_beam_ends_at_a_stop_token_and_long_texts_cost_what_the_penalty_says(model):
    prompt = prompt_of(4)
    likeliest = next(generate(model, prompt, 1, temperature=0))
    short = beam_search(model, prompt, 8, beams=4, stop_tokens={likeliest}, length_penalty=0)
    assert short.tolist() == [likeliest], "a sum of log-probabilities only falls"
    long = beam_search(model, prompt, 8, beams=4, stop_tokens={likeliest}, length_penalty=50)
    assert len(long) == 8


@pytest.mark.parametrize("length_penalty", [float("inf"), -float("inf"), float("nan"), 100.5, -101, 10**400])
def test_length_penalty_out_of_range_is_refused(model, length_penalty):
    with pytest.raises(ValueError, match="length_penalty must be at least -100 and at most 100, got"):
        beam_search(model, prompt_of(4), 2, length_penalty=length_penalty)


def test_penalized_scores_are_ordered_without_overflow():
    pairs = [(-0.0, 3), (-2.0, 1), (-2.5, 2), (-9.0, 7), (-7.0, 6), (-torch.inf, 2)]
    for penalty in (-2, 0, 0.7, 1, 3):
        by_power = sorted(pairs, key=lambda pair: pair[0] / pair[1] ** penalty)
        assert sorted(pairs, key=lambda pair: _penalized(*pair, penalty)) == by_power
    assert _penalized(-5.0, 4096, 100) > _penalized(-5.0, 4095, 100)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"prompt": torch.empty(0, dtype=torch.int64)}, "prompt"),
        ({"prompt": torch.zeros(1, 3, dtype=torch.int64)}, "prompt"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"new_tokens": -1}, "new_tokens"),
    ],
)
def test_wrong_arguments_raise_before_the_first_token(model, arguments, name):
    with pytest.raises(ValueError, match=name):
        generate(**({"model": model, "prompt": prompt_of(1), "new_tokens": 1} | arguments))


def test_wrong_batches_and_beams_raise(model):
    with pytest.raises(ValueError, match="prompts"):
        generate_batch(model, [], 1)
    with pytest.raises(ValueError, match="beams"):
        beam_search(model, prompt_of(1), 1, beams=0)
