"""`DistributedDataParallel` with a static graph: two processes train as one does."""

import functools
import os
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support import assert_same_up_to_rounding
from tiny_models import FIELDS, field, frames, language, tokens
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

PROCESSES, STEPS, TIMEOUT = 2, 3, 240
MODELS = {
    "language": (language, lambda: [tokens(2 * PROCESSES, 20)]),
    "field": (lambda: field(FIELDS["periodic"]), lambda: frames(FIELDS["periodic"], 2 * PROCESSES)),
}

CASES = [("language", False), ("language", True), ("field", False)]  # the second with activation checkpointing

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()),
                                reason="this PyTorch has no gloo, which processes on CPUs talk through")


def steps(model, forward, inputs) -> list[dict[str, torch.Tensor]]:
    """The gradients of each of a few steps of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        forward(*inputs).square().mean().backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        optimizer.step()
    return found


def train(rank: int, folder: str) -> None:
    """One of the processes: its part of the batch of every case."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    found = {}
    for name, checkpointed in CASES:
        make, make_inputs = MODELS[name]
        model, inputs = make(), make_inputs()
        parallel = DistributedDataParallel(model, static_graph=True)
        if checkpointed:
            for block in model.blocks:
                block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        found[name, checkpointed] = steps(model, parallel, [x.chunk(PROCESSES)[rank] for x in inputs])
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """What every process found in every case."""
    folder = tmp_path_factory.mktemp("processes")
    processes = mp.spawn(train, (str(folder),), nprocs=PROCESSES, join=False)
    deadline = time.monotonic() + TIMEOUT
    try:
        while not processes.join(timeout=max(0.0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, f"the processes take longer than {TIMEOUT} s"
    finally:
        for process in processes.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("name, checkpointed", CASES)
def test_gradients_are_those_of_one_process(ranks, name, checkpointed):
    make, make_inputs = MODELS[name]
    model = make()
    expected = steps(model, model, make_inputs())
    first, second = (rank[name, checkpointed] for rank in ranks)
    for step in range(STEPS):
        for parameter, value in expected[step].items():
            assert torch.equal(first[step][parameter], second[step][parameter]), parameter
            assert_same_up_to_rounding(first[step][parameter], value, f"step {step}, {parameter}", ulps=1024)
