"""Memory of the kernels: nothing of size T x T, and nothing that stays behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import torus_kernels

SEQ_LEN = 60_000
_SCRIPT = """
import json, resource, sys, torch
from torus_kernels import TorusLattice, torus_attention

name, seq_len, dtype = sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3])

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def run(seq_len):
    q, k, v, state = (torch.randn(1, 1, seq_len, 8, dtype=dtype, requires_grad=True) for _ in range(4))
    alpha = torch.full((1,), 0.3, requires_grad=True)
    out = torus_attention(q, k, v, lattice, ema_state=state, ema_alpha=alpha, backend=name)
    out.backward(torch.ones(()).expand_as(out))
    return sum(x.grad.isfinite().all().item() for x in (q, k, v, state, alpha))

lattice = TorusLattice(16, 16, "causal")
run(512)  # libraries, code and thread pools
before = peak()
finite = run(seq_len)
print(json.dumps({"grown": peak() - before, "finite": finite}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory in kilobytes")
def test_memory_grows_with_the_sequence_and_not_with_its_square(kernel_backend):
    if kernel_backend.device != "cpu":
        pytest.skip("measured on the host")
    root = str(Path(torus_kernels.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    dtype = str(kernel_backend.common_dtype).removeprefix("torch.")
    done = subprocess.run([sys.executable, "-c", _SCRIPT, kernel_backend.name, str(SEQ_LEN), dtype], text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": path}, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["finite"] == 5
    # q, k, v, state, their gradients and out, and the LSEs of 8 streams, in float32. A mask would take 3.6 GB.
    tokens = SEQ_LEN * 4 * (9 * 8 + 8)
    assert result["grown"] <= 3 * tokens, f"{result['grown'] / 2**20:.0f} MiB for {tokens / 2**20:.0f} MiB of tensors"
