"""The reference, made from the docstrings: `pip install '.[docs]' && sphinx-build -W docs build/docs`."""

import importlib.metadata

project = "fusedclip"
release = importlib.metadata.version("fusedclip")
copyright = "the fusedclip authors"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
html_theme_options = {"description": "Gradient clipping for PyTorch"}

default_role = "code"  # single backticks in docstrings are code
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_type_aliases = {name: name for name in ("Tensors", "Limit", "Group", "Elsewhere")}
napoleon_use_rtype = False  # "Returns" begin with a sentence, not with a type
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links from docs to files of the repository, which these pages lack
