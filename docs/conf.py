"""Sphinx reads this: Markdown by MyST, the book theme."""

project = "jaxalign"
author = "The jaxalign authors"
copyright = "the jaxalign authors"

extensions = ["myst_parser", "sphinx.ext.mathjax"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nitpicky = True

html_theme = "sphinx_book_theme"
html_title = "jaxalign"
html_theme_options = {"show_toc_level": 2}
