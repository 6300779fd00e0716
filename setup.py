"""Packaging of torus-kernels. Installing never needs torch or a compiler: see BuildLibraries."""

import importlib.util
import re
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent


def load_build_driver():
    """torus_kernels/building by its path: importing the package it is in would need torch."""
    folder = ROOT / "torus_kernels" / "building"
    spec = importlib.util.spec_from_file_location("torus_kernels_building", folder / "__init__.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


building = load_build_driver()
LIBRARIES = {"_cpu.so": lambda: building.CPU, "_cuda.so": building.cuda}


class BuildLibraries(build_ext):
    """Builds the libraries ahead of time where torch and their compilers are there, and otherwise leaves them to the
    first use. An editable install and ``build_ext --inplace`` put them into the package directory of the checkout."""

    def _output_dir(self) -> Path:
        return (ROOT if self.inplace else Path(self.build_lib).absolute()) / "torus_kernels"

    def run(self):
        for file, describe in LIBRARIES.items():
            try:
                torch_root = building.find_torch()
                library = describe()
                building.check_ahead_of_time(library, torch_root)
                building.build_library(
                    library,
                    self._output_dir(),
                    torch_root,
                    build_dir=building.build_dir_of(building.PACKAGE / file),
                    notice=f"torus-kernels: compiling the {library.contents} ahead of time",
                    force=bool(self.force),
                )
            except building.BuildError as error:
                if not self.inplace:
                    (self._output_dir() / file).unlink(missing_ok=True)  # a wheel must not take along an earlier one
                print(f"torus-kernels: {file} will be compiled on first use, because {error}", file=sys.stderr)

    def _built(self) -> list[Path]:
        return [path for file in LIBRARIES if (path := self._output_dir() / file).is_file()]

    def get_outputs(self):
        if self.inplace:
            return list(self.get_output_mapping())
        return [str(path) for path in self._built()]

    def get_output_mapping(self):
        if not self.inplace:
            return {}
        return {str(Path(self.build_lib) / "torus_kernels" / path.name): str(path) for path in self._built()}


class PlatformWheel(bdist_wheel):
    """The libraries run on one platform but under every Python; without any the wheel runs anywhere."""

    def get_tag(self):
        has_library = any((Path(self.bdist_dir) / "torus_kernels" / file).is_file() for file in LIBRARIES)
        return ("py3", "none", super().get_tag()[2] if has_library else "any")


def version():
    text = (ROOT / "torus_kernels" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE).group(1)


EXTRAS = {
    "model": ["safetensors", "tqdm", "matplotlib"],
    "text": ["tokenizers"],
    "quantize": ["torchao>=0.18"],
    "tensorboard": ["tensorboard"],
    "field": ["scipy", "h5py"],  # to read the public Navier-Stokes files
    "bench": ["pytest-benchmark", "rich", "matplotlib"],
    "test": ["pytest", "pytest-benchmark", "hypothesis", "markdown-it-py"],
    "hf": ["transformers>=5.4"],
    "lint": ["ruff", "mypy"],
    "package": ["build"],
    "docs": ["sphinx>=8", "myst-parser>=4", "furo"],
    # CUDA builds of torch bring along the one they are made for; others take it to interpret and compile kernels.
    "triton": ["triton>=3.6; sys_platform == 'linux' and platform_machine == 'x86_64'"],
}
EXTRAS["all"] = sorted({name for extra in EXTRAS.values() for name in extra})

setup(
    name="torus-kernels",
    version=version(),
    description="Attention on a torus: eight streams, their mixing and EMA compounding, as kernels for PyTorch",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").is_file() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    install_requires=["torch>=2.11", "numpy", "ninja"],
    extras_require=EXTRAS,
    # First use compiles from these sources, so that an installed package has them too.
    packages=[*find_packages(include=["torus_kernels*", "torus_model*"]), "torus_kernels.csrc"],
    package_dir={"torus_kernels.csrc": "csrc"},
    package_data={
        "torus_kernels": ["py.typed"],
        "torus_model": ["py.typed"],
        "torus_kernels.csrc": [f"{folder}*.{suffix}" for folder in ("", "**/") for suffix in ("h", "cpp", "cu")],
    },
    ext_modules=[Extension("torus_kernels._cpu", sources=[])],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
    zip_safe=False,
)
