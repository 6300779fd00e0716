"""`torch.compile(fullgraph=True)` of the models: equal to eager, and one graph for every batch size and length.

What is tested is the traced graph and neither code generation nor kernels, so the compiler is ``aot_eager`` and the
backend whichever is the default; the default compiler has its tests in test_compile.py and, slow, here.
"""

import pytest
from recompiling import compiled_once, mark_dynamic
from support import assert_same_up_to_rounding
from tiny_models import FIELDS, field, frames, language, outputs_and_gradients, tokens

BATCHES = (2, 3, 4, 7)  # with as many examples as heads


def assert_equal_to_eager(model, compiled, inputs) -> None:
    actual = outputs_and_gradients(model, inputs, compiled)
    for name, expected in outputs_and_gradients(model, inputs).items():
        assert_same_up_to_rounding(actual[name], expected, name, ulps=1024)


def test_language_model_serves_every_batch_size():
    model = language()
    with compiled_once(model) as compiled:
        for batch in BATCHES:
            x = tokens(batch, 20)
            mark_dynamic(x, 0)
            assert_equal_to_eager(model, compiled, [x])


def test_language_model_serves_every_length():
    model = language()
    with compiled_once(model) as compiled:
        for seq_len in (5, 2, 12, 13, 40):  # within a winding, over the window, beyond it
            x = tokens(2, seq_len)
            mark_dynamic(x, 1)
            assert_equal_to_eager(model, compiled, [x])


@pytest.mark.parametrize("name", FIELDS)
def test_field_model_serves_every_batch_size(name):
    model = field(FIELDS[name])
    with compiled_once(model) as compiled:
        for batch in BATCHES:
            inputs = frames(FIELDS[name], batch)
            mark_dynamic(inputs[0], 0)
            assert_equal_to_eager(model, compiled, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIELDS)
def test_field_model_with_the_default_compiler(name):
    model = field(FIELDS[name])
    with compiled_once(model, "inductor") as compiled:
        assert_equal_to_eager(model, compiled, frames(FIELDS[name], 2))
