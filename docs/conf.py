"""The documentation site: ``sphinx-build -W docs build/site``."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # benchmarks and docs/results.py are not installed

import results  # noqa: E402

import torus_kernels  # noqa: E402

project = "torus-kernels"
version = release = torus_kernels.__version__
html_title = f"{project} {version}"
html_theme = "furo"
html_show_copyright = False
html_copy_source = False

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # the tuning log and CONTRIBUTING.md are pages of their own too

default_role = "py:obj"  # `name` in a docstring is a link where the name has an entry
autodoc_member_order = "bysource"
autodoc_mock_imports = ["transformers"]
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False


def setup(app):
    """Pages of results are filled in as they are read."""
    def fill_in(app, page, source):
        up = "../" * page.count("/") + "../benchmarks/results"
        source[0] = results.fill_in(source[0], up)

    app.connect("source-read", fill_in)
