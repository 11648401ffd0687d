"""How the site is built: `pip install '.[docs]'`, then `python -m sphinx -W -n docs docs/_build/html`."""

import os
import re
import sys
from pathlib import Path

import numpy_llama

OURS = str(Path(__file__).parent / "_ext")
sys.path.insert(0, OURS)
before = os.environ.get("PYTHONPATH", "")
os.environ["PYTHONPATH"] = os.pathsep.join([OURS, before] if before else [OURS])  # for the cells

project, author, copyright = "numpy_llama", "the numpy_llama authors", "the numpy_llama authors"
version = release = numpy_llama.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton", "sphinx-mathjax-offline"]
extensions += ["commands", "museum", "proofs"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 2

nb_execution_mode = "force"  # every cell runs in every build,
nb_execution_raise_on_error = True  # and an assert that fails stops it
nb_execution_timeout = 300
nb_merge_streams = True

# A signature has the names and the defaults. The docstring has the shapes and the units.
autodoc_typehints = "none"
# Docstrings name types whose pages are on other sites, and this one is built without a network.
nitpick_ignore_regex = [("py:.*", r"(os|pathlib|collections|numpy|numpy_llama\.text\.chat)\..*")]

html_theme = "furo"
html_title = "numpy_llama"
html_static_path = ["_static"]
html_css_files = ["course.css"]
html_show_sourcelink = False
copybutton_exclude = ".linenos, .gp, .go"


def plain(app, what, name, obj, options, lines) -> None:
    """Docstrings are plain text: `names` are code, asterisks are products, indented lines stay unchanged."""
    marked_up: list[str] = []
    for line in lines:
        if line.startswith(" "):
            if marked_up and not marked_up[-1].strip():
                marked_up += ["::", ""]
            marked_up.append(line)
        else:
            if marked_up and marked_up[-1].startswith(" ") and line:
                marked_up.append("")
            marked_up.append(re.sub(r"`([^`]+)`", r"``\1``", line.replace("*", r"\*").replace("|", r"\|")))
    lines[:] = marked_up


def setup(app) -> None:
    app.connect("autodoc-process-docstring", plain)
