"Build the site under docs/_build/html: execute the notebooks that have no executed copy in outputs/, write the pages, call Sphinx, check all links."
import argparse
import base64
import hashlib
import inspect
import json
import multiprocessing
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from html.parser import HTMLParser
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import unquote, urlsplit

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: two processes with two threads each would take minutes
root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))

import matplotlib
import nbformat
from fastcore.docments import docments
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line, populate_language, rm_header_dash, strip_ansi, strip_hidden_metadata
from sphinx.cmd.build import build_main

matplotlib.use("Agg")
from adaptive_at.jobs.pool import cores, died
from pictures import draw

WIDGET = "application/vnd.jupyter.widget-view+json"
PARTS = ("the table", "claims", "what would change the numbers", "provenance")  # of a table's notebook, below its code
PAPERS = {"daat": "DAAT", "saat": "SAAT", "iaat": "IAAT", "cat": "CAT", "dra": "DRA"}


# --- notebooks -----------------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Notebook:
    "A notebook of nbs/ and its page."
    path: Path

    @property
    def name(self) -> str: return self.path.stem

    @property
    def place(self) -> str:
        "Its path in the project."
        parts = self.path.parts
        return "/".join(parts[len(parts) - 1 - parts[::-1].index("nbs"):])

    @cached_property
    def source(self) -> nbformat.NotebookNode: return nbformat.read(self.path, 4)

    @property
    def section(self) -> str:
        "The folder of its page."
        if self.name == "index": return ""
        if self.name == "benchmark": return "benchmarks"
        if any("parameters" in c.metadata.get("tags", []) for c in self.source.cells): return "tables"
        return "library" if self.name[0].isdigit() else "guides"

    @property
    def paper(self) -> str:
        "Whose table it is; empty for what compares papers."
        return self.name.rpartition("_")[2] if self.section == "tables" and self.name.rpartition("_")[2] in PAPERS else ""

    @property
    def page(self) -> str:
        "Its page, without suffix: 40_radius is library/radius, guide_own_rule is guides/own_rule."
        return f"{self.section}/".lstrip("/") + re.sub(r"^(\d+|guide)_", "", self.name)

    @property
    def module(self) -> str:
        "The module it exports, empty if none."
        found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(c.source for c in self.source.cells if c.cell_type == "code"), re.M)
        return found[1] if found else ""

    @cached_property
    def head(self) -> tuple[str, str]:
        "Title and one-line description."
        first = next(c.source for c in self.source.cells if c.cell_type == "markdown")
        title, line = re.search(r"^# (.+)", first, re.M), re.search(r"^> (.+)", first, re.M)
        if not title or not line: sys.exit(f"{self.path.name}: the first markdown cell needs '# title' and '> one line'.")
        return title[1].strip(), line[1].strip()

    @property
    def figures(self) -> list[str]:
        "The paper's figures that it draws, as they are printed: Fig. 6b."
        names = dict.fromkeys(re.findall(r"\.figure\(\s*['\"](\w+)", "\n".join(c.source for c in self.source.cells if c.cell_type == "code")))
        return [re.sub(r"^fig(\d+\w*)$", r"Fig. \1", n) for n in names]

    @property
    def skipped(self) -> bool: return any(c.cell_type == "raw" and "skip_exec: true" in c.source for c in self.source.cells)


def notebooks(root: Path = root) -> list[Notebook]:
    "All notebooks, in reading order."
    paths = sorted((root / "nbs").rglob("*.ipynb"), key=lambda p: p.stem)
    paths = [p for p in paths if ".ipynb_checkpoints" not in p.parts]
    if len({p.stem for p in paths}) < len(paths): sys.exit("two notebooks have one name, and the site's pages drop the folder: " + ", ".join(p.stem for p in paths))
    books = [Notebook(p) for p in paths]
    if empty := {"", "benchmarks", "tables", "library", "guides"} - {b.section for b in books}: sys.exit(f"no notebook under nbs/ is a page of {', '.join(sorted(empty))}")
    return books


# --- execution -----------------------------------------------------------------------------------------------------------------------

def execute(path: Path, into: Path, tell: Connection) -> None:
    "Run a notebook in this process, as `nbdev_test` does, and keep what it shows. Tells each cell before it is run, and at the end the processor's seconds that all took."
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    multiprocessing.set_start_method(None, force=True)  # the notebook's own processes begin as everywhere, not as this one did
    began = time.process_time()
    os.chdir(path.parent)
    nb = read_nb(path)
    shell = CaptureShell(path)
    for cell in nb.cells:
        if cell.cell_type != "code" or re.search(r"^#\|\s*eval:\s*false", cell.source, re.M): continue
        tell.send(cell.source)
        shell.cell(cell)
        if shell.exc: raise RuntimeError(f"{path.name} failed in the cell\n{cell.source}") from shell.exc
    matplotlib.pyplot.close("all")
    part = into.with_suffix(".part")
    write_nb(nb, part)
    part.replace(into)
    tell.send(time.process_time() - began)


def in_a_process(path: Path, into: Path, context: multiprocessing.context.BaseContext) -> float:
    "Run a notebook in a fresh process; the processor's seconds that it took. `SystemExit` with a sentence where it did not come to its end."
    hears, tells = context.Pipe(duplex=False)
    process = context.Process(target=execute, args=(path, into, tells))
    process.start()
    tells.close()
    told = None
    with suppress(EOFError):
        while True: told = hears.recv()
    process.join()
    if isinstance(told, float): return told
    cell = next((line for line in (told or "").splitlines() if line.strip() and not line.startswith("#|")), "its first cell")
    if process.exitcode == 1: raise SystemExit(f"docs: {path.name} failed in the cell that begins with {cell!r}; the error stands above.")
    raise SystemExit(f"docs: {died(path.name, process.exitcode)}, in the cell that begins with {cell!r}.")


def executed(books: list[Notebook], folder: Path) -> dict[str, Path]:
    "Where the executed copy of each notebook is; those without one in outputs/ are run, unless nothing they stand on has changed since."
    library = b"".join(p.read_bytes() for p in sorted((root / "adaptive_at").rglob("*.*")) if p.suffix in (".py", ".csv"))
    folder.mkdir(parents=True, exist_ok=True)
    found, waiting = {}, {}
    for b in books:
        if finished(there := root / "outputs" / b.path.name): found[b.name] = there
        elif not b.skipped:
            found[b.name] = folder / f"{b.name}-{hashlib.sha256(library + b.path.read_bytes()).hexdigest()[:16]}.ipynb"
            if not found[b.name].exists(): waiting[b.name] = b
    for old in set(folder.iterdir()) - set(found.values()): old.unlink()
    context = multiprocessing.get_context("forkserver")  # a fresh process for each, with the libraries imported once
    context.set_forkserver_preload(["nbformat", "nbdev.processors", "sphinx.cmd.build", "execnb.shell", "torch._dynamo", "torchvision", "sklearn.datasets", "seaborn", "pandas.io.formats.style", "filelock"])  # what this file and notebooks import
    with ThreadPoolExecutor(cores()) as pool:   # a thread waits for each process
        names = {pool.submit(in_a_process, b.path, found[b.name], context): b.name for b in sorted(waiting.values(), key=lambda b: -b.path.stat().st_size)}
        try: took = {names[job]: job.result() for job in as_completed(names)}
        except BaseException: pool.shutdown(cancel_futures=True); raise
    if took: print(f"{len(took)} notebooks executed, {sum(took.values()):.0f} s of processor time; the longest: " + ", ".join(f"{n} {took[n]:.0f} s" for n in sorted(took, key=took.get)[:-5:-1]))
    return found


# --- API ------------------------------------------------------------------------------------------------------------------------------

def spelled(annotation) -> str:
    "A type as it is written in the source: `float | Tensor`."
    if annotation is inspect.Parameter.empty or annotation is None: return ""
    text = annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", text)


def value(default) -> str:
    "A default as code; dots for what has no readable form."
    if callable(default) and hasattr(default, "__name__") and default.__name__.isidentifier(): return default.__name__
    text = f"{default:.4g}" if isinstance(default, float) and len(repr(default)) > 8 else repr(default)
    return "..." if "<" in text or len(text) > 60 else text


def defined(source: str) -> list[str]:
    "The public functions and classes that a cell defines; patched methods as Class.method."
    import ast
    names = []
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"): continue
        patched = isinstance(node, ast.FunctionDef) and any(getattr(d, "id", "") == "patch" for d in node.decorator_list)
        names.append(f"{node.args.args[0].annotation.id}.{node.name}" if patched else node.name)
    return names


def anchor(module: str, name: str) -> str:
    "Where a name is described; anchors know no capitals, and modules have `Network` beside `network`."
    return re.sub(r"[._]", "-", f"{'class' if name[0].isupper() else 'api'}-{module}-{name}").lower().rstrip("-")


def signature(name: str, call: inspect.Signature, types: bool) -> str:
    "Names and defaults, and the types where no table below gives them."
    parts, parameters = [], [p for p in call.parameters.values() if p.name != "self"]
    for p in parameters:
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        kind = f": {spelled(p.annotation)}" if types and p.annotation is not p.empty else ""
        parts.append(star + p.name + kind + ("" if p.default is p.empty else f" = {value(p.default)}" if kind else f"={value(p.default)}"))
        if p.kind == p.KEYWORD_ONLY and "*" not in parts and not any(q.startswith("*") for q in parts): parts.insert(-1, "*")
    result = f" -> {spelled(call.return_annotation)}" if types and spelled(call.return_annotation) else ""
    line = f"{name}({', '.join(parts)}){result}"
    return line if len(line) <= 90 else f"{name}(\n    " + ",\n    ".join(parts) + f"\n){result}"


def parameters(thing, call: inspect.Signature) -> str:
    "A table of parameters and result from docments, as Markdown; empty where none says anything."
    documented = docments(thing, full=True, returns=True)
    if not any(p.get("docment") for p in documented.values()): return ""
    lines = []
    for p in call.parameters.values():
        if p.name == "self": continue
        text = documented.get(p.name, {}).get("docment") or ""
        lines.append((f"`{p.name}`", code(spelled(p.annotation)), code("" if p.default is p.empty else value(p.default)), text))
    result = documented.get("return", {}).get("docment")
    if result and inspect.isfunction(thing): lines.append(("*returns*", code(spelled(call.return_annotation)), "", result))
    if not lines: return ""
    columns = [i for i, name in enumerate(("", "type", "default", "")) if i == 0 or any(line[i] for line in lines)]
    rows = [("", "type", "default", ""), None, *lines]
    return "\n".join("| " + " | ".join("---" if r is None else r[i].replace("|", "\\|").replace("\n", " ") for i in columns) + " |" for r in rows)


def code(text: str) -> str: return text and f"`{text}`"


def described(module: str, name: str, level: int) -> str:
    "Heading, signature, docstring and parameters of a function or class, then of its methods that have something to say."
    thing = import_module(f"adaptive_at.{module}")
    for part in name.split("."): thing = getattr(thing, part)
    parts = [f"({anchor(module, name)})=\n{'#' * min(level, 6)} `{name}`"]
    doc = (vars(thing).get("__doc__") if isinstance(thing, type) else thing.__doc__) or ""
    if re.fullmatch(rf"{getattr(thing, '__name__', '')}\(.*\)", doc, re.S): doc = ""  # what @dataclass writes where there is no docstring
    if isinstance(thing, property) or not callable(thing): return "\n\n".join([*parts, inspect.cleandoc(doc)])
    try: call = inspect.signature(thing)
    except ValueError: call = None
    if call:
        table = parameters(thing, call)
        parts += [f"```python\n{signature(name, call, types=not table)}\n```", inspect.cleandoc(doc), table]
    else: parts.append(inspect.cleandoc(doc))
    if isinstance(thing, type):
        for method, of in vars(thing).items():
            own = of.fget if isinstance(of, property) else getattr(of, "__func__", of)
            if (method.startswith("_") and method != "__call__") or not inspect.isfunction(own) or own.__module__ != thing.__module__ or not own.__doc__: continue
            if "patch" in inspect.getsource(own).split("def ")[0]: continue  # described where it is defined
            parts.append(described(module, f"{name}.{method}", level + 1))
    return "\n\n".join(p for p in parts if p)


# --- pages ---------------------------------------------------------------------------------------------------------------------------

class Site:
    "All notebooks and how to refer to them."
    def __init__(self, books: list[Notebook], found: dict[str, Path], source: Path):
        self.books, self.found, self.source = books, found, source
        self.symbols: dict[str, set[str]] = {}  # name -> the modules that export it
        for b in books:
            if b.section == "library" and b.module:
                for cell in b.source.cells:
                    if cell.cell_type == "code" and re.match(r"\s*#\|\s*export\b", cell.source):
                        for name in defined(re.sub(r"^\s*[%!].*$", "", cell.source, flags=re.M)): self.symbols.setdefault(name, set()).add(b.module)
        self.modules = {b.module: b for b in books if b.module}

    def linked(self, text: str, book: Notebook) -> str:
        "Markdown with nbdev's and Quarto's ways of writing turned into MyST's."
        text = re.sub(r"^(:{3,})\s*\{\.callout-(\w+)[^}]*\}", r"\1{\2}", text, flags=re.M)
        text = re.sub(r"\[([^]]*)\]\(CONTRIBUTING\.md\)", r"\1", text)  # no page of the site
        pages = {b.path.name: b.page for b in self.books}
        text = re.sub(r"\]\((?:[./\w-]*/)?([\w-]+\.ipynb)(#[^)]*)?\)", lambda m: f"](/{pages[m[1]]}{'.ipynb' if m[1] in pages else ''}{m[2] or ''})" if m[1] in pages else m[0], text)
        parts = re.split(r"(^```.*?^```|\[[^\]]*\]\([^)]*\)|^#+ .*?$)", text, flags=re.M | re.S)  # not inside code blocks, links and headings
        return "".join(p if i % 2 else re.sub(r"(?<!`)`([A-Za-z_][\w.]*)`(?!`)", lambda m: self._symbol(m[1], book), p) for i, p in enumerate(parts))

    def _symbol(self, name: str, book: Notebook) -> str:
        "A name in backticks, linked to where it is described if it can mean only one thing."
        if name.startswith("adaptive_at.") and name[12:] in self.modules: return f"[`{name}`](/{self.modules[name[12:]].page}.ipynb)"
        homes = self.symbols.get(name, set())
        here = book.module in homes
        if not here and (len(homes) != 1 or not re.search(r"[A-Z_.]", name)): return f"`{name}`"
        return f"[`{name}`](#{anchor(book.module if here else next(iter(homes)), name)})"

    def page(self, book: Notebook) -> nbformat.NotebookNode:
        "The notebook as the site shows it."
        path = self.found.get(book.name, book.path)
        processor = NBProcessor(path, procs=[populate_language, strip_ansi, hide_line, filter_stream_, rm_header_dash, hide_, clean_magics, strip_hidden_metadata])
        for cell in processor.nb.cells:  # what nbdev's filters drop by directive, they must not drop before this is known
            cell.exported = bool({"export", "exports", "exporti"} & cell.directives_.keys())
        processor.process()
        cells, level, top, shown = [], 1, True, set()
        for cell in processor.nb.cells:
            if cell.cell_type == "raw" or "default_exp" in cell.directives_: continue
            if cell.cell_type == "markdown":
                levels = [len(m) for m in re.findall(r"^(#+) ", re.sub(r"^```.*?^```", "", cell.source, flags=re.M | re.S), re.M)]
                level = levels[-1] if levels else level
                cells.append(nbformat.v4.new_markdown_cell(self.linked(cell.source, book)))
                if top: cells += [nbformat.v4.new_markdown_cell(text) for text in ([self.cards()] if book.name == "index" else self.notes(book, path))]
                top = False
                continue
            if asked := re.match(r"show_doc\(([\w.]+)", cell.source):
                cells.append(self._api(book, [asked[1]], level)); shown.add(asked[1])
                continue
            lesson = book.section == "library" and cell.exported
            if lesson and (names := [n for n in defined(cell.source) if n not in shown]): cells.append(self._api(book, names, level))
            if not cell.source.strip() and not cell.get("outputs"): continue
            outputs = json.loads(json.dumps(cell.get("outputs", [])))
            live = any(WIDGET in o.get("data", {}) for o in outputs)  # controls need a kernel; nothing of them is on the page
            new = nbformat.from_dict({"cell_type": "code", "id": cell.get("id") or "x", "source": cell.source, "execution_count": None,
                                      "metadata": {"tags": ["hide-input"] if lesson or "hide-input" in cell.metadata.get("tags", []) else []}, "outputs": [] if live else self.drawn(book, path, outputs)})
            cells.append(new)
            if live: cells.append(nbformat.v4.new_markdown_cell(":::{note}\nThe controls are live in Jupyter: open this notebook there.\n:::"))
        if book.name == "index": cells.append(nbformat.v4.new_markdown_cell(self.contents()))
        for i, cell in enumerate(cells): cell["id"] = f"c{i}"
        return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}, "language_info": {"name": "python", "pygments_lexer": "ipython3"}})

    def _api(self, book: Notebook, names: list[str], level: int):
        return nbformat.v4.new_markdown_cell(self.linked("\n\n".join(described(book.module, n, level + 1) for n in names), book))

    def drawn(self, book: Notebook, path: Path, outputs: list[dict]) -> list[dict]:
        "A cell's outputs; a figure that this run was not asked for is the one that an earlier run left in outputs/."
        shown = []
        for o in outputs:
            asked = re.match(r"(fig\w+): not asked for", "".join(o.get("text", "")))
            picture = asked and path.parent / book.name / noted(path).get("parameters", {}).get("preset", "") / f"{asked[1]}.png"
            if not picture or not picture.exists(): shown.append(o); continue
            shown += [o | {"text": f"{asked[1]}: as an earlier run with -p figures all drew it\n"},
                      {"output_type": "display_data", "metadata": {}, "data": {"image/png": base64.b64encode(picture.read_bytes()).decode()}}]
        return shown

    def notes(self, book: Notebook, path: Path) -> list[str]:
        "What stands below a page's title: where it comes from, and what was run."
        facts = [f"{{download}}`{book.place} </notebooks/{book.path.name}>`"]
        if book.section == "library" and book.module: facts.append(f"exports `adaptive_at.{book.module}`")
        made = path.parent == root / "outputs"
        if made:
            shutil.copy(path, self.source / "notebooks" / f"executed-{path.name}")
            facts[0] += f" · {{download}}`outputs/{path.name} (executed) </notebooks/executed-{path.name}>`"
            if done := ran(path): facts.append(done)
        shutil.copy(book.path, self.source / "notebooks" / book.path.name)
        notes = ["{.provenance}\n" + " · ".join(facts)]
        if made and book.paper: notes[0] += "\\\nGo to " + " · ".join(f"[{p}](#{p.replace(' ', '-')})" for p in PARTS)
        if book.section == "tables" and not made:
            notes.append(f":::{{admonition}} Not executed yet\n:class: note\nThis page shows the notebook as it is in the repository, without results. This command makes them, on digits within minutes:\n\n"
                         f"```bash\npapermill {book.place} outputs/{book.path.name} -p preset quick\n```\n:::")
        elif made and moved(book, path):
            notes.append(":::{note}\nThe notebook has changed since it was executed; this page shows it as it was then.\n:::")
        elif made and (told := refreshed(path)): notes.append(f":::{{note}}\n{told}\n:::")
        return notes

    def of(self, section: str) -> list[Notebook]: return [b for b in self.books if b.section == section]

    def cards(self) -> str:
        "The home page's way into the sections."
        return "::::{container} cards\n" + "\n".join(f"- [{title}](/{section}/index.md)\n\n  {text}" for section, title, text in CARDS if section == "papers" or self.of(section)) + "\n::::"

    def contents(self) -> str:
        "The site's table of contents, for the sidebar."
        sections = ["papers/index", "tables/index", "library/index", *(["guides/index"] if self.of("guides") else []), *(b.page for b in self.of("benchmarks"))]
        return "```{toctree}\n:hidden:\n\n" + "\n".join(sections) + "\n```"

    def tables(self, paper: str) -> str:
        "A paper's tables and whether they were executed; without a paper, what compares them all."
        books = [b for b in self.of("tables") if b.paper == paper]
        if not books: return "None of its tables has a notebook yet."
        lines = [f"| [{b.head[0]}](/{b.page}.ipynb) | {b.head[1].replace('|', '&#124;')} | {', '.join(b.figures).replace('Fig. ', '')} | {ran(self.found[b.name]).replace('executed ', '').replace('preset ', '') if b.name in self.found else 'not yet'} |" for b in books]
        return "\n".join(["| table | what it shows | figures | executed |", "| --- | --- | --- | --- |", *lines])

    def paper(self, page: Path) -> str:
        "A page of docs/papers with what it asks for: its picture, its tables, links to modules."
        picture = "".join(f"```{{image}} {page.stem}-{n}-{theme}.svg\n:class: only-{theme}\n:alt: {page.stem.upper()}, panel {n}\n```\n" for n in (1, 2) for theme in ("light", "dark"))
        text = re.sub(r"<!-- picture: (.*?) -->", lambda m: f"::::{{container}} picture\n{picture}::::\n\n{{.caption}}\n{m[1]}", page.read_text(encoding="utf-8"), flags=re.S)
        text = text.replace("<!-- tables -->", self.tables(page.stem))
        text = re.sub(r"\{py\}`([\w.]+)`", lambda m: f"[`adaptive_at.{m[1]}`](/{self.modules[m[1]].page}.ipynb)", text)
        return self.linked(text, self.books[0])

    def write(self) -> None:
        "All pages."
        for folder in ("papers", "tables", "library", "guides", "benchmarks", "notebooks"): (self.source / folder).mkdir(parents=True, exist_ok=True)
        for b in self.books: nbformat.write(self.page(b), self.source / f"{b.page}.ipynb")
        for name in re.findall(r"!\[[^]]*\]\((outputs/[^)]+)\)", (root / "nbs" / "index.ipynb").read_text(encoding="utf-8")):  # the home page's pictures
            (self.source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, self.source / name)
        for page in sorted((root / "docs" / "papers").glob("*.md")): (self.source / "papers" / page.name).write_text(self.paper(page), encoding="utf-8")
        index = lambda section, title, text, pages: (self.source / section / "index.md").write_text(
            f"# {title}\n\n{text}\n\n```{{toctree}}\n:hidden:\n\n" + "\n".join(f"/{p}" for p in pages) + "\n```\n", encoding="utf-8")
        groups = {**PAPERS, **({"": "All papers"} if any(not b.paper for b in self.of("tables")) else {})}
        index("tables", "Tables", TABLES + "\n\n".join(f"## {label}\n\n{self.tables(p)}" for p, label in groups.items()), [b.page for p in groups for b in self.of("tables") if b.paper == p])
        for section, title, text in (("library", "Library", LIBRARY), ("guides", "Guides", GUIDES)):
            if books := self.of(section):
                index(section, title, text + "| | |\n| --- | --- |\n" + "\n".join(f"| [{b.head[0]}](/{b.page}.ipynb) | {b.head[1].replace('|', '&#124;')} |" for b in books), [b.page for b in books])


CARDS = (("papers", "Papers", "Five methods: the idea in a picture, the maths, what was left open."), ("tables", "Tables", "The printed numbers and ours, figures and claims."),
         ("library", "Library", "Every module as a lesson, with its reference."), ("guides", "Guides", "Own rules, own data, a GPU, and how not to be fooled."))
TABLES = "One page per table: the printed number beside ours, the paper's figures, its claims, and what was run.\n\n"
LIBRARY = "One notebook is one module: a lesson, its code, its checks. In reading order; each stands only on those above it.\n\n"
GUIDES = "Notebooks that start with a task.\n\n"


def noted(path: Path) -> dict:
    "What papermill noted in a notebook that it executed."
    return json.loads(path.read_text(encoding="utf-8"))["metadata"].get("papermill", {})


def finished(path: Path) -> bool:
    "Is there an executed notebook, and did papermill come to its end?"
    return path.exists() and (not (facts := noted(path)) or (not facts.get("exception") and facts.get("duration") is not None))


def ran(path: Path) -> str:
    "When, how and how long a notebook was executed."
    if not (facts := noted(path)): return ""
    took = f"{facts['duration'] / 60:.0f} min" if facts["duration"] >= 60 else f"{facts['duration']:.0f} s"
    return f"executed {facts['end_time'][:10]}, preset {facts['parameters'].get('preset', 'auto')}, {took}"


def refreshed(path: Path) -> str:
    "Which version executed a notebook whose code cells were replaced by today's; empty where none were."
    told = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("adaptive_at")
    if not told: return ""
    why = "their code has changed since it was executed" if told["changed"] else "other names and imports, the same computation"
    return f"Executed by adaptive_at {told['version']} (commit {told['commit']}). The code cells were replaced by today's on {told['refreshed']}: {why}. The outputs are as they were."


def moved(book: Notebook, path: Path) -> bool:
    "Has the notebook's code changed since `path` was executed?"
    code = lambda nb: [c.source.strip() for c in nb.cells if c.cell_type == "code" and "injected-parameters" not in c.metadata.get("tags", [])]
    return code(book.source) != code(nbformat.read(path, 4))


# --- links ---------------------------------------------------------------------------------------------------------------------------

class Links(HTMLParser):
    "What a page refers to, and what in it can be referred to."
    def __init__(self, text: str):
        super().__init__()
        self.anchors, self.hrefs, self.resources = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        if tag == "a" and attrs.get("href"): self.hrefs.append(attrs["href"])
        elif tag == "link" and attrs.get("href"): self.resources.append(attrs["href"])
        if attrs.get("src"): self.resources.append(attrs["src"])


def broken(html: Path) -> list[str]:
    "Links that lead nowhere, and resources that are not part of the site."
    pages = {p: Links(p.read_text(encoding="utf-8")) for p in html.rglob("*.html")}
    wrong = []
    for page, links in pages.items():
        for ref in links.hrefs + links.resources:
            url = urlsplit(ref)
            if ref.startswith("data:") or (url.scheme and ref not in links.resources): continue
            target = (page.parent / unquote(url.path)).resolve() if url.path else page
            if url.scheme or url.netloc: problem = "is not part of the site"
            elif not target.is_file(): problem = "does not exist"
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].anchors: problem = "has no such anchor"
            else: continue
            wrong.append(f"{page.relative_to(html)}: {ref} {problem}")
    return wrong


def build(out: Path) -> None:
    "The site, in `out/html`."
    began = time.time()
    books = notebooks()
    found = executed(books, out / "executed")
    print(f"notebooks ready ({time.time() - began:.0f} s)", flush=True)
    for folder in ("source", "html"): shutil.rmtree(out / folder, ignore_errors=True)
    Site(books, found, out / "source").write()
    draw(out / "source" / "papers")
    if build_main(["-W", "--keep-going", "-q", "-E", "-b", "html", "-c", str(root / "docs"), "-d", str(out / "doctrees"), str(out / "source"), str(out / "html")]): sys.exit("Sphinx has warnings, see above.")
    if wrong := broken(out / "html"): sys.exit("\n".join(["Broken links:", *wrong]))
    print(f"{out / 'html' / 'index.html'} ({time.time() - began:.0f} s)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=root / "docs" / "_build", help="default: docs/_build")
    build(parser.parse_args().out.resolve())
