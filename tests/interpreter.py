"""Triton's interpreter, which runs kernels on the CPU under ``TRITON_INTERPRET=1``, made quick enough for a suite."""


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
