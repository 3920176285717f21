"Text from a store, a folder or a parameter is shown as text: it never becomes a tag of a notebook or of the site."
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from adaptive_at.figures import Html, lines_of, number, styled, tag
from adaptive_at.papers.table1_daat import TABLE
from adaptive_at.tables.parameters import check_parameters
from adaptive_at.tables.plan import FigureInputs, Plan, open_session
from adaptive_at.store.checksums import read_checked_json, write_checked_json
from adaptive_at.tables.results import Results, execute

ROOT = Path(__file__).resolve().parent.parent
TAG = "<script>alert('x')</script>"


def is_text(shown):
    "The tag is there, and is no tag."
    page = shown.to_html()
    assert "<script" not in page and re.search("&lt;script&gt;alert\\(('|&#x27;)x", page), page   # quotes are escaped in attributes alone
    return page


@pytest.mark.parametrize("frame", [pd.DataFrame({"a": [TAG]}), pd.DataFrame({TAG: ["a"]}),
                                   pd.DataFrame({"a": [1.5]}, index=[TAG]),
                                   pd.DataFrame({"a": [1]}, index=pd.Index(["b"], name=TAG)),
                                   pd.DataFrame([[1]], columns=pd.Index(["b"], name=TAG)),
                                   pd.DataFrame({"a": [1]},
                                                index=pd.MultiIndex.from_tuples([("x", TAG)], names=["b", TAG])),
                                   pd.DataFrame({("a", TAG): [1]}), pd.DataFrame({"a": [tag("b", TAG)]}),
                                   pd.DataFrame({"a": [number(1., 0., 2.) + TAG]}),
                                   pd.DataFrame({"a": [TAG + tag("b", 1)]}),
                                   pd.DataFrame({"a": [lines_of([TAG, "b"])]}), pd.DataFrame({"a": [tag("sup", "!",
                                                                                                        title=TAG)]})],
                         ids="cell column row row-name column-name rows columns tag number before lines attribute".split())
def test_every_place_of_a_table_shows_text(frame): is_text(styled(frame, "caption", ["note"]))


def test_captions_and_notes_show_text():
    is_text(styled(pd.DataFrame({"a": [1]}), TAG, []))
    assert "<br>second" in is_text(styled(pd.DataFrame({"a": [1]}), "caption", [TAG, "second"]))


def test_what_says_that_it_is_html_is_html():
    page = styled(pd.DataFrame({"a": [number(84.66, 84., 85.), Html("<i>x</i>"), 0.5, np.nan]},
                               index=["DAAT", "b", "c", "d"]), "caption", []).to_html()
    assert "<b>84.7</b> ± 0.5" in page and "<i>x</i>" in page and ">0.5" in page and ">nan" in page


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    "A table whose runs, rows, columns and dataset all have a tag in them, as far as they can."
    outputs, rows = tmp_path_factory.mktemp("outputs"), TABLE.rows
    named = lambda p: {f"{name} {TAG}": rows(p)[name] for name in ("Natural", "Standard AT")}
    table = replace(TABLE, title=f"Title {TAG}.", rows=named,
                    columns=lambda p: {f"{c} {TAG}": TABLE.columns(p)[c]
                                       for c in ("natural", "FGSM")} | {"natural": TABLE.columns(p)["natural"]},
                    more_columns=lambda p: {}, extra_rows=lambda p: {}, extra_columns=lambda p: {}, figures={"fig3": FigureInputs((f"Natural {TAG}", f"Standard AT {TAG}"), (f"FGSM {TAG}",))})
    def plan():
        return Plan(table, open_session(check_parameters(TABLE.name,
                                        dict(preset="quick", device="cpu", epochs=1, train_examples=60,
                                             test_examples=20, figures="fig3", outputs=str(outputs)))))
    execute(plan(), report_line=lambda line: None)
    for path in outputs.glob("runs/*/spec.json"):   # as somebody who shares a run may write it
        facts = read_checked_json(path)
        made = [made | {"device": f"{n} {TAG}", "path": f"{n} {TAG}"} for n, made in enumerate(2 * facts["made with"])]
        write_checked_json(path, facts | {"made with": made} | ({"diverged": TAG} if "natural" in path.parent.name
                                                          or "fixed-noattack" in path.parent.name else {}))
    found = plan()
    block = found.blocks[0]
    found.blocks[0] = replace(block, info=replace(block.info, label=f"Digits {TAG}"),
                              columns={c: replace(column) for c, column in block.columns.items()})
    return found


def test_a_shared_run_puts_no_tag_into_a_table(shared):
    results = Results(shared)
    warnings = set(results.frame.warning)
    assert any("diverged" in w and TAG in w for w in warnings)
    assert any("another device" in w and TAG in w and "execution path" in w for w in warnings)
    page = is_text(results.table())
    assert page.count("alert(") > 10
    rows = [f"{name} {TAG}" for name in ("Natural", "Standard AT")]
    for shown in (results.claims([(f"a claim {TAG}", *rows, f"FGSM {TAG}")], caption=TAG),
                  results.compare("fig3", TAG, {rows[1]: rows[0]}), results.provenance(), shared.show()):
        is_text(shown)


def test_one_function_makes_html_of_text():
    "No other place styles a frame, or gives a page or a notebook HTML of its own. (Lessons hide the index of a few frames of constants.)"
    makes = re.compile(r"(?<!formats)\.style\b(?!\.hide)|\.to_html\(|_repr_html_|\bHTML\(|\bMarkdown\(|f['\"][^'\"]*</?(?:b|i|br|sup|sub|span|code|a|img|div)\b")
    sources = {path.name: path.read_text(encoding="utf-8")
               for path in [*ROOT.glob("adaptive_at/**/*.py"), *ROOT.glob("nbs/**/*.ipynb")] if "figures" not in path.name}
    assert len(sources) > 100
    found = {name: lines for name, text in sources.items()
             if (lines := [line for line in text.splitlines() if makes.search(line) and "image/png" not in line])}
    assert not found
