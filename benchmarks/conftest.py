"""What the benchmarks under pytest share: warm memory, and the machine in the header and in the report."""

from __future__ import annotations

import pytest

from . import environment


def pytest_configure(config: pytest.Config) -> None:
    """Starts pytest anew with `environment.WARM_MEMORY` where it lacks that."""
    if environment.missing_settings() and not hasattr(config, "workerinput"):
        if (capture := config.pluginmanager.getplugin("capturemanager")) is not None:
            capture.stop_global_capturing()  # the new process needs this one's stdout
        environment.restart_with_warm_memory()


def pytest_report_header(config: pytest.Config) -> str:
    return environment.describe(environment.machine())


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["torus_kernels"] = environment.machine()
