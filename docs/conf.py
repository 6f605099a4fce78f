"""Settings of the documentation's build; `make docs` runs it. Nothing is fetched from elsewhere."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

from nextblock.version import __version__

project = "nextblock"
release = version = __version__
html_title = f"nextblock {release}"
extensions = ["myst_parser", "sphinx.ext.autodoc", "reference"]
exclude_patterns = ["_build"]

# Headings down to the third level get the anchors that GitHub gives them.
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "deflist"]

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_theme_options = {"sidebar_hide_name": False}
pygments_style = "default"
# `console` blocks show what was typed and printed, by any program.
highlight_language = "text"

nitpicky = True
# Types of other packages: their documentation is not fetched.
nitpick_ignore_regex = [("py:.*", ".*")]
default_role = "code"  # docstrings are written for people: `name` is code
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"
