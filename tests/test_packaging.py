"""What is distributed: a source archive that holds everything, and a wheel of it that works where nothing else is."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SAMPLED = ("test_golden.py", "test_errors.py", "test_build.py", "test_selfcheck.py")


def run(*command, cwd, **variables):
    """Runs a command in an environment without this checkout and shows its output where it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


def distributed(sdist):
    """The files of a source archive, without its own folder."""
    with tarfile.open(sdist) as archive:
        return {name.partition("/")[2] for name in archive.getnames()}


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="not a git checkout")
def test_source_archive_has_every_file(tmp_path):
    run(sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path,
        cwd=ROOT)
    (sdist,) = tmp_path.glob("*.tar.gz")
    tracked = set(subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines())
    there = {name for name in tracked if (ROOT / name).exists()}
    assert there - distributed(sdist) <= {".gitignore"}


@pytest.mark.slow
def test_wheel_of_the_source_archive_passes_the_tests_in_an_empty_environment(tmp_path):
    run(sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv" / "bin"
    variables = {
        "PIP_CONSTRAINT": str(unpacked / "constraints.txt"),
        "TORUS_CACHE_DIR": str(tmp_path / "cache"),  # so that the wheel's own sources are compiled
    }
    run(binaries / "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, sdist, cwd=tmp_path, **variables)
    (wheel,) = tmp_path.glob("*.whl")
    assert {"torus_kernels/py.typed", "torus_model/py.typed"} <= set(zipfile.ZipFile(wheel).namelist())
    run(binaries / "pip", "install", f"{wheel}[test]", cwd=tmp_path, **variables)
    where = run(binaries / "python", "-c", "import torus_kernels; print(torus_kernels.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path / "venv")
    print(run(binaries / "python", "-m", "torus_kernels", cwd=tmp_path, **variables))
    # Not `python -m pytest`, nor the configured path: they would put the unpacked sources before the installed ones.
    print(run(binaries / "pytest", "-q", "-o", "pythonpath=tests", *(f"tests/{name}" for name in SAMPLED), cwd=unpacked,
              **variables))
