"""How many compilers the build driver runs at once."""

import os

import pytest

from torus_kernels import building
from torus_kernels.building import toolchain


def test_jobs_follow_cores_and_memory(monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for memory, jobs in ((None, 8), (64 << 30, 8), ((3 << 30) + 1, 3), (1 << 20, 1), (-5, 1)):
        monkeypatch.setattr(toolchain, "_available_memory", lambda memory=memory: memory)
        assert building.max_jobs(1 << 30) == jobs
    monkeypatch.setenv("MAX_JOBS", "11")
    assert building.max_jobs(1 << 30) == 11
    for wrong in ("0", "-1", "many"):
        monkeypatch.setenv("MAX_JOBS", wrong)
        with pytest.raises(building.BuildError, match="MAX_JOBS must be a positive integer"):
            building.max_jobs(1 << 30)


def test_memory_is_the_smaller_of_machine_and_container(monkeypatch, tmp_path):
    limit, used = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(toolchain, "_CGROUP_MEMORY", ((str(limit), str(used)),))
    machine = toolchain._available_memory()
    limit.write_text("max\n")
    used.write_text("1000\n")
    assert toolchain._available_memory() == pytest.approx(machine, rel=0.5)
    limit.write_text("5000\n")
    assert toolchain._available_memory() == 4000
