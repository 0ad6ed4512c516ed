"""Configuration of the documentation, built by `sphinx-build -W docs docs/_build/html`."""

import superlora

project = "superlora"
author = "the superlora developers"
copyright = "2026, the superlora developers"
version = release = superlora.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "matplotlib.sphinxext.plot_directive",
    "numpydoc",
    "myst_parser",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",  # MathJax from the package, so that no page needs the network
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "gallery"]
templates_path = ["_templates"]
nitpicky = False
default_role = "py:obj"  # `name` in a docstring links to its page where it has one

# Markdown with $...$ for mathematics; headings are link targets.
myst_enable_extensions = ["amsmath", "attrs_block", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "none"  # the Parameters sections give shapes, which the annotations cannot
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False
numpydoc_xref_param_type = False

# Figures that a page's own functions draw while the page is built.
plot_formats = ["svg"]
plot_html_show_formats = False
plot_html_show_source_link = False
plot_include_source = False

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_gallery",
    "within_subsection_order": "FileNameSortKey",
    "capture_repr": (),
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,  # such a page loads scripts from the network
}

# Copied are the lines after a prompt without it, or all lines where none has one; no outputs.
copybutton_prompt_text = r">>> |\.\.\.(?: |$)|\$ "
copybutton_prompt_is_regexp = True
copybutton_selector = "div:not(.sphx-glr-script-out) > div.highlight > pre"

html_theme = "furo"
html_static_path = ["_static/site.css"]
html_css_files = ["site.css"]
html_title = f"superlora {release}"
html_show_sourcelink = False
html_copy_source = False
