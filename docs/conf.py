"""Sphinx builds the site from the pages beside this file and from the docstrings; warnings are errors in CI."""

from importlib.util import find_spec

from detcoll.version import VERSION

project, author, copyright = "detcoll", "the detcoll authors", "the detcoll authors"
version = release = VERSION
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "cyclopts.ext.sphinx"]
html_theme = "furo"
smartquotes = False  # they turn the two dashes of options into one
html_title = f"detcoll {VERSION}"

myst_heading_anchors = 3
default_role = "py:obj"  # docstrings name other things between single backquotes
autodoc_mock_imports = [name for name in ("torch", "torchft") if not find_spec(name)]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"show-inheritance": True}
napoleon_google_docstring = False
napoleon_use_rtype = False
