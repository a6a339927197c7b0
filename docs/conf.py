"""The documentation site: `make docs` builds it with Sphinx into build/docs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "packages/pytest-speedgate")]

from benchmarks.study.quality_map import write_page  # noqa: E402 - the path is set above
from grasp.version import __version__  # noqa: E402 - as above

project = "grasp"
copyright = "the authors of grasp, Apache-2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_static"]

# Markdown: a link `page.md#a-heading` works on the site as it does in a repository browser.
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4

# API pages: Google-style docstrings, types in the signature.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88
# References must lead somewhere, except names of other libraries and types inside the package, which have no page.
nitpick_ignore_regex = [
    ("py:.*", r"(?!grasp).*"),
    ("py:class", r"grasp[\w.]*\._\w+"),
    ("py:class", r"grasp\.(bench|checkpoint|method|model|statistics|training_data)\..*"),
    ("py:class", r"grasp_kernels\.roofline\..*"),
]

html_theme = "furo"
html_title = f"grasp {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_sourcelink = False
html_copy_source = False
# The summaries of search results are fetched pages, which a browser refuses for file:// addresses.
html_show_search_summary = False


def setup(app: Any) -> None:
    """Write the map of the study beside the static files that the site has by then."""
    app.connect("build-finished", lambda app, error: error or write_page(Path(app.outdir, "_static/map.html")))
