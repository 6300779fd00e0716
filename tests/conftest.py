import os

import interpreter
import pytest
import torch
from hypothesis import HealthCheck, settings
from support import Backend

import torus_kernels.backends.triton as triton_backend
from torus_kernels.backends import BACKENDS, BackendError, unavailable

# Tests name the backend they run on; a variable left over from the shell would overrule the defaults under test.
os.environ.pop("TORUS_BACKEND", None)

# Threads cost tiny tensors more than they give them. Tests of what threads may break ask for some.
torch.set_num_threads(1)

if Backend("triton").is_interpreted:
    interpreter.redefine_the_language_once()
    interpreter.compute_bfloat16()
    interpreter.pretend_capability()
    triton_backend.INTERPRETED_DTYPES.add(torch.bfloat16)

_QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("default", max_examples=40, derandomize=True, **_QUIET)
# pytest --hypothesis-profile=thorough
settings.register_profile("thorough", max_examples=1000, **_QUIET)
settings.load_profile("default")


@pytest.fixture(scope="session", autouse=True)
def _keep_tokenised_text_out_of_the_users_cache(tmp_path_factory):
    os.environ["TORUS_TEXT_CACHE_DIR"] = str(tmp_path_factory.mktemp("text-cache"))


def _marks(name: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.gpu] if Backend(name).device == "cuda" else []


def require_backend(name: str) -> Backend:
    if reason := unavailable(name):
        pytest.skip(f"backend {name}: {reason.splitlines()[0]}")
    backend = Backend(name)
    if backend.device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"backend {name}: no CUDA device")
    return backend


@pytest.fixture(autouse=True)
def _skip_dtypes_that_the_backend_does_not_take(request):
    """For tests of every backend that are parametrized by the tokens' ``dtype``."""
    backend = next((request.getfixturevalue(name) for name in ("backend", "kernel_backend")
                    if name in request.fixturenames), None)
    dtype = getattr(request.node, "callspec", None) and request.node.callspec.params.get("dtype")
    if backend is not None and dtype is not None and dtype.is_floating_point and dtype not in backend.dtypes:
        pytest.skip(f"{dtype} is not for {backend.name}")


CUDA_REFUSES = ("it takes float16 and bfloat16", "its heads have", "it has no rotary positions")
"""How the reasons begin for which the CUDA kernels leave a problem to other backends."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """The CUDA kernels are for some dtypes and head dimensions: a test that has others is skipped with the reason. That
    they refuse nothing else is a test of theirs."""
    try:
        return (yield)
    except BackendError as error:
        if any(f"backend 'cuda' cannot run here: {reason}" in str(error) for reason in CUDA_REFUSES):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="module", params=[pytest.param(name, marks=_marks(name)) for name in BACKENDS])
def backend(request) -> Backend:
    """Every backend that the library knows by name, skipped with its reason where it cannot run here."""
    return require_backend(request.param)


@pytest.fixture(scope="module", params=[pytest.param(n, marks=_marks(n)) for n in BACKENDS if n != "reference"])
def kernel_backend(request) -> Backend:
    """Every backend but ``reference``, whose dense tensors promise nothing about memory."""
    return require_backend(request.param)
