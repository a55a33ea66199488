"""The documentation site: `sphinx-build -W --keep-going -b html docs build/docs`, with the extra `docs` installed.

Every page is Markdown in this folder. Three things are made while it is built: the tables of settings.md
(``settings_page``), the pages of the API below api/ (``reference``), and the last part of the table of contents,
which has the pages that index.md does not name.
"""

import re
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

from docutils.utils.math.latex2mathml import tex2mathml

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS))

import reference  # noqa: E402
import settings_page  # noqa: E402

project = "ase-dist"
author = "the authors of ase-dist"
copyright = author
version = release = installed_version("ase-dist")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["figures"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
nitpicky = False
suppress_warnings = ["ref.python"]  # a class that is defined in a module and exported by its package has two targets

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100
add_module_names = False

html_theme = "furo"
html_title = f"ase-dist {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
copybutton_exclude = ".linenos, .gp"


def _inline_math(translator, node):
    translator.body.append(tex2mathml(node.astext(), as_block=False))
    raise reference.SkipNode


def _display_math(translator, node):
    formula = tex2mathml(node.astext(), as_block=True)
    translator.body.append(f'<div class="formula">{formula}</div>')
    raise reference.SkipNode


def _fill_page(app, name, source):
    """Put the generated parts into a page that has been read."""
    if name == "settings":
        source[0] = source[0].replace("<!-- every setting -->", settings_page.sections())
    if name == "index":
        named = set(re.findall(r"^(\w[\w/]*)$", source[0], re.MULTILINE))
        others = sorted(page for page in app.env.found_docs if "/" not in page and page not in {"index", *named})
        source[0] = source[0].replace("<!-- other pages -->", "\n".join(others))


def setup(app):
    """Connect the generated parts; formulas are MathML, so that no page loads a script from elsewhere."""
    app.add_html_math_renderer("mathml", inline_renderers=(_inline_math, None), block_renderers=(_display_math, None))
    app.connect("config-inited", lambda app, config: reference.write(DOCS / "api"))
    app.connect("autodoc-process-docstring", reference.markdown_to_rst)
    app.connect("env-get-outdated", lambda *event: ["index", "settings"])  # what they are made of may have changed
    app.connect("source-read", _fill_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


html_math_renderer = "mathml"
