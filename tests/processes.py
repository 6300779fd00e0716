"""Two processes that train in every layout, and what each of them saw: the work behind test_parallel.py."""

import dataclasses
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import torus_model.attention as attention_module
from torus_model import ModelConfig
from torus_model.config import TrainConfig
from torus_model.parallel import LAYOUTS, make_layout
from torus_model.run import Run

PROCESSES, STEPS = 2, 3
SAVED_AT = 2
SINGLE = "one process"
ANY = (SINGLE, *LAYOUTS)

MODEL = ModelConfig(vocab_size=260, width=32, layers=3, heads=4, kv_heads=2, n_major=3, n_minor=4, winding=2)


def make_config(text: Path, **changes) -> TrainConfig:
    """A run of packed documents, so that shares and parts have different numbers of targets, whose gradient is
    clipped."""
    model = dataclasses.replace(MODEL, **changes.pop("model", {}))
    fields = {
        "model": model, "steps": STEPS, "data": str(text), "pack_documents": True, "seq_len": 20, "batch_size": 8,
        "accumulate": 2, "clip": 0.05, "validation_windows": 3, "learning_rate": 1e-2, "backend": "reference",
    }
    return TrainConfig(**fields | changes)


def write_text(folder: Path) -> None:
    """Documents of very different lengths."""
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02}.txt").write_text("to be or not to be, that is the question; "[: 2 + number * 7 % 40])


def make_run(config: TrainConfig, name: str) -> Run:
    return Run(config, layout=make_layout(None if name == SINGLE else name))


def gradients_of(run: Run) -> dict[str, torch.Tensor]:
    """The whole gradient, in the first process."""
    found = run.layout.gather({f"model.{n}": p.grad for n, p in run.model.named_parameters()})
    return {name.removeprefix("model."): x.clone() for name, x in found.items()}


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    """All weights, in the first process."""
    return {n: x.clone() for n, x in run.layout.gather({f"model.{n}": x for n, x in run.model.state_dict().items()}
                                                       ).items()}


def watch(run: Run, seen: dict) -> None:
    """Notes the shapes of the tokens that reach the embedding, the clipped gradient and how many numbers it keeps."""
    if run.model.embedding is not None:
        run.model.embedding.register_forward_pre_hook(lambda _, x: seen["tokens"].append(tuple(x[0].shape)))
    gradients, clip = run.layout.gradients, run.layout.clip

    def watched_gradients(*arguments):
        loss = gradients(*arguments)
        seen["gradients"].append(gradients_of(run))
        return loss

    def watched_clip(*arguments):
        clip(*arguments)
        seen["clipped"].append(gradients_of(run))

    run.layout.gradients, run.layout.clip = watched_gradients, watched_clip


def local_numbers(tensors) -> int:
    return sum((x.to_local() if hasattr(x, "to_local") else x).numel() for x in tensors)


def train(config: TrainConfig, name: str, path: Path) -> dict:
    """A run, saved after `SAVED_AT` steps, and what this process saw of it."""
    seen = {"tokens": [], "heads": [], "gradients": [], "clipped": []}
    operator = attention_module.torus_attention

    def watched_operator(q, k, v, *arguments, **options):
        seen["heads"].append((q.shape[1], k.shape[1], q.shape[2]))
        return operator(q, k, v, *arguments, **options)

    run = make_run(config, name)
    watch(run, seen)
    attention_module.torus_attention = watched_operator
    try:
        for step in range(config.steps):
            if step == SAVED_AT:
                run.save(path)
            run.advance()
        seen["blocks"] = [layer for layer, block in enumerate(run.model.blocks) if block is not None]
        seen["weights"] = local_numbers(run.model.parameters())
        seen["moments"] = local_numbers(s["exp_avg"] for s in run.optimizer.state.values())
        seen["bits"] = run.validate().bits_per_byte
        seen["random"] = torch.rand(()).item()
    finally:
        attention_module.torus_attention = operator
    return seen | {"losses": run.history.losses, "end": weights_of(run)}


def resume(config: TrainConfig, path: Path, name: str) -> dict:
    """The rest of a run in another layout."""
    run = make_run(config, name)
    run.restore(path)
    while not run.is_over:
        run.advance()
    return {"losses": run.history.losses, "end": weights_of(run)}


def work(rank: int, folder: str, cases: dict[str, TrainConfig], resumed: list[tuple[str, str]]) -> None:
    """One of the processes: every case in every layout, then the first case's checkpoints continued elsewhere.

    All in float64, which autocast leaves alone, unless there is autocast: what differs from one process by more than
    the roundings of float64 is another step.
    """
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    found = {}
    for case, config in cases.items():
        torch.set_default_dtype(torch.float32 if config.autocast else torch.float64)
        for name in ANY:
            found[case, name] = train(config, name, Path(folder, f"{case}-{name}.safetensors"))
    dist.barrier()
    first = next(iter(cases))
    torch.set_default_dtype(torch.float64)
    for begun, continued in resumed:
        path = Path(folder, f"{first}-{begun}.safetensors")
        found[begun, continued] = resume(cases[first], path, continued)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def run_processes(folder: Path, cases: dict[str, TrainConfig], resumed=(), timeout: float = 600) -> list[dict]:
    """What every process found."""
    processes = mp.spawn(work, (str(folder), cases, list(resumed)), nprocs=PROCESSES, join=False)
    deadline = time.monotonic() + timeout
    try:
        while not processes.join(timeout=max(0.0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, f"the processes take longer than {timeout} s"
    finally:
        for process in processes.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]
