"The site builds offline, is whole, and works in a browser, on a desk and on a phone."
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from browser import SIZES, Browser, until

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
import build

@pytest.fixture(scope="module")
def site():
    "The built site; what was executed for the last build and has not changed is taken over."
    done = subprocess.run([sys.executable, ROOT / "docs" / "build.py"], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "docs" / "_build" / "html"


# --- execution

def test_a_notebook_whose_process_dies_is_named_with_its_cell(tmp_path):
    "And one with a fault in a cell; the thread that waits for it says it, whatever the other notebooks do."
    import multiprocessing
    def book(name, *cells):
        nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
        nbformat.write(nb, tmp_path / name)
        return tmp_path / name, tmp_path / "done.ipynb"
    context = multiprocessing.get_context("forkserver")
    with pytest.raises(SystemExit, match=r"^docs: dead.ipynb: its process was ended by SIGABRT, since a library found its memory damaged, in the cell that begins with 'import os'\.$"):
        build.in_a_process(*book("dead.ipynb", "1 + 1", "#| export\nimport os\nos.abort()"), context)
    with pytest.raises(SystemExit, match="^docs: wrong.ipynb failed in the cell that begins with 'x = 1 / 0'"): build.in_a_process(*book("wrong.ipynb", "x = 1 / 0"), context)
    assert build.in_a_process(*book("good.ipynb", "1 + 1"), context) >= 0 and (tmp_path / "done.ipynb").exists()


# --- the pages

def test_every_notebook_has_a_page_that_links_to_it(site):
    for book in build.notebooks():
        page = site / f"{book.page}.html"
        assert page.exists(), book.name
        if book.name != "index":
            assert re.search(rf'<a class="reference download[^>]*href="[^"]*/{book.path.name}"', page.read_text()), book.name
    for name in ("papers/index", *(f"papers/{p}" for p in build.PAPERS), "tables/index", "library/index", "search"):
        assert (site / f"{name}.html").exists(), name


def test_every_exported_name_is_described_on_its_page(site):
    from adaptive_at._modidx import d
    pages, seen = {b.module: site / f"{b.page}.html" for b in build.notebooks() if b.section == "library"}, 0
    for module, symbols in d["syms"].items():
        if (page := pages.get(module.removeprefix("adaptive_at."))) is None: continue  # a table's own cells stay code
        anchors = build.Links(page.read_text()).anchors
        for symbol in symbols:
            name = symbol.removeprefix(f"{module}.")
            if "." in name or name.startswith("_"): continue  # methods are there if they say something
            assert build.anchor(module.removeprefix("adaptive_at."), name) in anchors, symbol
            seen += 1
    assert seen > 100


def test_api_headings_stand_in_the_page_contents_and_parameters_in_a_table(site):
    text = (site / "library" / "attacks.html").read_text()
    contents = text[text.index('class="toc-tree"'):]
    assert 'href="#api-attacks-project"' in contents and 'href="#class-attacks-pgd-call"' in contents
    section = re.search(r'<section id="[^"]*".*?</section>', text[text.index('id="api-attacks-per-example"') - 20:], re.S)[0]
    cells = [re.sub(r"<[^>]+>", "", c).strip() for c in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", section, re.S)]
    assert cells[:9] == ["", "type", "", "eps", "float | Tensor", "one radius, or one per example [B]", "x", "Tensor", "images [B,C,H,W]"] and cells[9] == "returns"


def test_executed_copies_are_preferred(site):
    book = next(b for b in build.notebooks() if b.name == "table1_daat")
    text, executed = (site / f"{book.page}.html").read_text(), nbformat.read(ROOT / "outputs" / book.path.name, 4)
    pictures = sum("image/png" in o.get("data", {}) for c in executed.cells if c.cell_type == "code" for o in c.outputs)
    assert pictures and text.count("<img") >= pictures and "paper 94.63" in text and re.search(r"executed \d{4}-\d\d-\d\d, preset quick", text)


def test_a_table_that_was_not_executed_says_so_and_how(tmp_path):
    books = build.notebooks()
    (tmp_path / "notebooks").mkdir()
    book = next(b for b in books if b.name == "table1_daat")
    text = "\n".join(c.source for c in build.Site(books, {}, tmp_path).page(book).cells)
    assert "Not executed yet" in text and "papermill nbs/table1_daat.ipynb outputs/table1_daat.ipynb -p preset quick" in text
    found = {book.name: ROOT / "outputs" / book.path.name}
    assert "Not executed yet" not in "\n".join(c.source for c in build.Site(books, found, tmp_path).page(book).cells)


def test_a_figure_not_asked_for_is_the_one_an_earlier_run_drew(tmp_path):
    books = build.notebooks()
    book, site = next(b for b in books if b.name == "table1_daat"), build.Site(books, {}, tmp_path)
    path, told = tmp_path / "table1_daat.ipynb", [{"output_type": "stream", "name": "stdout", "text": "fig2: not asked for (figures is 'main')\n"}]
    path.write_text(json.dumps({"metadata": {"papermill": {"parameters": {"preset": "quick"}}}}))
    assert site.drawn(book, path, told) == told
    (picture := tmp_path / "table1_daat" / "quick" / "fig2.png").parent.mkdir(parents=True)
    picture.write_bytes(b"a picture")
    assert [o.get("data", {}).get("image/png") for o in site.drawn(book, path, told)] == [None, "YSBwaWN0dXJl"]


@pytest.mark.parametrize("facts, done", [(None, True), ({"exception": None, "duration": 3.}, True), ({"exception": True, "duration": 3.}, False), ({"exception": None, "duration": None}, False)])
def test_a_notebook_that_failed_or_was_killed_is_not_an_executed_one(tmp_path, facts, done):
    path = tmp_path / "x.ipynb"
    assert not build.finished(path)
    path.write_text(json.dumps({"metadata": {"papermill": facts} if facts else {}}))
    assert build.finished(path) is done


def test_ways_of_writing(tmp_path):
    books = build.notebooks()
    site, radius = build.Site(books, {}, tmp_path), next(b for b in books if b.name == "40_radius")
    for written, read in {
        "::: {.callout-note}\nx\n:::": ":::{note}\nx\n:::",
        "[networks](20_networks.ipynb)": "[networks](/library/networks.ipynb)",
        "[`CONTRIBUTING.md`](CONTRIBUTING.md)": "`CONTRIBUTING.md`",
        "`overstep`": "[`overstep`](#api-radius-overstep)",                    # of this notebook
        "`RadiusRule` and `PGD.step`": "[`RadiusRule`](#class-radius-radiusrule) and `PGD.step`",
        "`UniformStart`": "[`UniformStart`](#class-attacks-uniformstart)",     # of another, and only one
        "`train`": "`train`",                                                  # could be a word
        "`adaptive_at.base.identity`": "[`adaptive_at.base.identity`](/library/identity.ipynb)",
        "# `overstep`": "# `overstep`", "```\n`overstep`\n```": "```\n`overstep`\n```", "[`overstep`](x.md)": "[`overstep`](x.md)",
    }.items(): assert site.linked(written, radius) == read


def test_no_table_is_left_as_text(site):
    "A delimiter row with a column too many makes a paragraph of a Markdown table, here and on GitHub."
    for page in site.rglob("*.html"): assert not re.search(r"<p>\s*\|", page.read_text()), page.name
    for line, below in zip(lines := (ROOT / "README.md").read_text().split("\n"), lines[1:]):
        if re.fullmatch(r"(\|-+)+\|", below): assert line.count("|") == below.count("|"), line


# --- links

def test_no_broken_link_and_nothing_from_outside(site):
    assert build.broken(site) == []
    for css in site.rglob("*.css"): assert not re.search(r"url\(\s*['\"]?(https?:)?//|@import\s+['\"]?(https?:)?//", css.read_text()), css.name


@pytest.mark.parametrize("line, problem", [
    ('<a href="nowhere.html">', "does not exist"), ('<a href="other.html#nothing">', "has no such anchor"), ('<a href="#nothing">', "has no such anchor"),
    ('<img src="nowhere.png">', "does not exist"), ('<script src="https://cdn.example.org/x.js">', "is not part of the site"), ('<link href="//example.org/x.css">', "is not part of the site"),
])
def test_what_is_broken_is_found(tmp_path, line, problem):
    (tmp_path / "other.html").write_text('<p id="there">')
    (tmp_path / "page.html").write_text('<a href="other.html#there"><a href="https://example.org/"><img src="data:image/png;base64,x">')
    assert build.broken(tmp_path) == []
    (tmp_path / "page.html").write_text(line)
    assert len(wrong := build.broken(tmp_path)) == 1 and wrong[0].startswith("page.html: ") and wrong[0].endswith(problem)


# --- in a browser

@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


PAGES = {"home": "index.html", "paper": "papers/daat.html", "table": "tables/table1_daat.html", "library": "library/theory.html", "tables": "tables/index.html"}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_in_a_browser(site, browser, page, size):
    browser.open((site / PAGES[page]).as_uri(), size)
    assert browser.errors() == []
    assert browser.sideways() == []
    assert browser.js("[...document.images].filter(i => !i.naturalWidth).map(i => i.src)") == []
    written, shown = browser.js("document.querySelectorAll('.math').length"), browser.js("document.querySelectorAll('mjx-container').length")
    assert shown >= written and browser.js("document.querySelectorAll('mjx-merror, [data-mjx-error]').length") == 0
    if page in ("paper", "table", "library"): assert written > 2 and browser.js("document.images.length") > 1
    if (page, size) == ("table", "phone"):  # a wide table is wider than its box, which is as wide as the page
        assert browser.js("[...document.querySelectorAll('.text_html')].some(e => e.scrollWidth > e.clientWidth + 100 && e.clientWidth <= innerWidth)")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("word, page", [("DAAT", "papers/daat.html"), ("pgd", "library/attacks.html")])
def test_search_finds(site, browser, word, page, size):
    browser.open(f"{(site / 'search.html').as_uri()}?q={word}", size)
    until(lambda: browser.js("[...document.querySelectorAll('#search-results li a')].some(a => a.href.split(/[?#]/)[0].endsWith(%s))" % json.dumps(page)), f"{word} in the search")
    assert browser.errors() == [] and browser.sideways() == []


def test_tables_can_be_read_in_the_dark(site, browser):
    light = lambda what, of: browser.js("(() => { let e = document.querySelector(%s), c; do c = getComputedStyle(e)['%s']; while ((e = e.parentElement) && /, 0\\)$|transparent/.test(c));"
                                        " return c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0) / 765 })()" % (json.dumps(what), of))
    for dark in (True, False):
        browser.open((site / PAGES["table"]).as_uri(), "desktop", dark)
        for cell in (".text_html td", ".text_html th.row_heading", ".text_html caption", ".cell_input pre"):
            ink, paper = light(cell, "color"), light(cell, "backgroundColor")
            assert (ink - paper if dark else paper - ink) > 0.45, (cell, dark, ink, paper)
