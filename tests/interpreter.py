"""Triton's interpreter, which runs kernels on the CPU under ``TRITON_INTERPRET=1``: quick enough for a suite, and right
in bfloat16."""

import os

import torch


def redefine_the_language_once() -> None:
    """For every call of a device function the interpreter redefines Triton's language anew, which takes half of its
    time. Once for each module in a launch is enough."""
    try:
        from triton.runtime import interpreter
    except ImportError:  # without triton nothing is interpreted
        return
    launch, done = interpreter.GridExecutor.__call__, set()

    def launch_anew(self, *args, **kwargs):
        done.clear()
        return launch(self, *args, **kwargs)

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in done:
            interpreter._patch_lang(self.fn)
            done.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter.InterpretedFunction.__call__ = call


def pretend_capability() -> None:
    """``TORUS_TEST_CAPABILITY=90``: tiles and launches as on a device of that capability, for the interpreter's own."""
    if wanted := os.environ.get("TORUS_TEST_CAPABILITY"):
        from torus_kernels.backends.triton import backward, forward

        for module in (forward.launch, backward.launch):
            module.capability = lambda device: divmod(int(wanted), 10)


def compute_bfloat16() -> None:
    """The interpreter keeps bfloat16 as the integers of its bits. It multiplies matrices of those integers, and cuts
    numbers off where a GPU rounds them to the nearest; here it does as a GPU does."""
    try:
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    except ImportError:
        return
    multiply, cast, cast_rounding = (
        InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp)

    def rounded(source):
        bits = torch.from_numpy(source.data).to(torch.bfloat16).view(torch.uint16).numpy()
        return TensorHandle(bits.reshape(source.data.shape), tl.bfloat16)

    def is_rounding(source, dtype):
        return source.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16

    def cast_impl(self, source, dtype):
        return rounded(source) if is_rounding(source, dtype) else cast(self, source, dtype)

    def create_fp_to_fp(self, source, dtype, rounding_mode):
        return rounded(source) if is_rounding(source, dtype) else cast_rounding(self, source, dtype, rounding_mode)

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        values = torch.from_numpy(operand.data).view(torch.bfloat16).float().numpy()
        return TensorHandle(values, tl.float32)

    def create_dot(self, a, b, *rest):
        return multiply(self, widened(a), widened(b), *rest)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.create_dot = create_dot
