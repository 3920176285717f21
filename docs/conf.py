"Sphinx settings of the site; `docs/build.py` writes the pages and calls Sphinx."
from configparser import ConfigParser
from importlib.metadata import files
from pathlib import Path

root = Path(__file__).resolve().parent.parent
settings = ConfigParser(delimiters=["="])
settings.read(root / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

project = settings["lib_name"]
release = version = settings["version"]
author = settings["author"]
copyright = f"{settings['copyright']}, {settings['license']}"
html_title = project
html_short_title = project

extensions = ["myst_nb", "sphinx_copybutton"]
exclude_patterns = ["notebooks"]  # copies that pages offer for download
nitpicky = True

nb_execution_mode = "off"  # build.py executes what is not in outputs/ already
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_number_source_lines = False
nb_code_prompt_show = "Source"
nb_code_prompt_hide = "Source"
nb_mime_priority_overrides = [("html", "text/html", 0), ("html", "image/png", 5)]
myst_enable_extensions = ["amsmath", "attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 4
myst_links_external_new_tab = True

# The whole of MathJax in one file, from a package that holds nothing else of use: loading it as an extension would copy 24 MB.
mathjax = next(f.locate() for f in files("sphinx-mathjax-offline") if f.name == "tex-svg-full.js")
html_static_path = [str(root / "docs" / "static"), str(mathjax)]
mathjax_path = "tex-svg-full.js"
mathjax3_config = {"tex": {"inlineMath": [["\\(", "\\)"]], "displayMath": [["\\[", "\\]"]]}, "options": {"enableMenu": False}}

html_theme = "furo"
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_favicon = "static/icon.svg"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0a5c8f", "color-brand-content": "#0a5c8f", "color-brand-visited": "#0a5c8f"},
    "dark_css_variables": {"color-brand-primary": "#74b9e6", "color-brand-content": "#74b9e6", "color-brand-visited": "#74b9e6"},
    "light_logo": "icon.svg", "dark_logo": "icon.svg",
}
pygments_style = "friendly"
pygments_dark_style = "github-dark"
copybutton_exclude = ".linenos, .gp, .go"
html_show_search_summary = False  # they are fetched, which a browser refuses for pages opened from disk
