"Write README.md from nbs/index.ipynb; with --check, only compare the two."
import argparse
import sys
from pathlib import Path

import nbformat
from execnb.nbio import nb2str
from nbconvert import MarkdownExporter
from nbdev.process import NBProcessor
from nbdev.processors import (clean_magics, filter_stream_, hide_, hide_line, insert_warning, populate_language,
                              rm_export, rm_header_dash, strip_ansi, strip_hidden_metadata)

root = Path(__file__).resolve().parent.parent
index, readme = root / "nbs" / "index.ipynb", root / "README.md"

# nbdev's own list less what serves a site: front matter (it takes the title away), API pages, links to pages.
filters = [populate_language, insert_warning, strip_ansi, hide_line, filter_stream_, rm_header_dash,
           rm_export, clean_magics, hide_, strip_hidden_metadata]


def render() -> str:
    "The home page as Markdown."
    processor = NBProcessor(index, procs=filters)
    processor.process()
    nb = nbformat.reads(nb2str(processor.nb), as_version=4)
    nb.metadata["language_info"] = {"name": processor.lang}  # else code fences lose their language
    text, resources = MarkdownExporter().from_notebook_node(nb)
    if resources.get("outputs"):
        sys.exit("nbs/index.ipynb has image outputs, which README.md cannot hold: clear them.")
    return text.strip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if README.md differs, and write nothing")
    check, text = parser.parse_args().check, render()
    if not check:
        readme.write_text(text, encoding="utf-8")
    elif not readme.exists() or readme.read_text(encoding="utf-8") != text:
        sys.exit("README.md differs from nbs/index.ipynb: run `python docs/readme.py`.")


if __name__ == "__main__":
    main()
