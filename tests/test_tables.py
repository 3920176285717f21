"Every table notebook: the paper's rows and columns, the parameters, the plan of the paper's preset. (`.ci/run` executes each of them at a tiny size.)"
import ast, csv, importlib, json, re
from pathlib import Path

import numpy as np
import pytest

from adaptive_at.parameters import COMMON, TABLES, about, start
from adaptive_at.plans import Plan, settle
from adaptive_at.tables import Results

ROOT = Path(__file__).resolve().parent.parent
PAPERS = [name for name in TABLES if name.startswith("table")]
every_table = pytest.mark.parametrize("name", PAPERS)


def table(name): return importlib.import_module(f"adaptive_at.papers.{name}").TABLE


def printed(name):
    with open(ROOT/"adaptive_at"/"papers"/f"{name}.csv", newline="") as file: return list(csv.DictReader(file))


def distinct(values): return list(dict.fromkeys(values))


def planned(name, tmp_path, **parameters):
    return Plan(table(name), settle(start(name, dict(preset="paper", dry_run=True, device="cpu", outputs=str(tmp_path), **parameters))))


def cells(name): return json.loads((ROOT/"nbs"/f"{name}.ipynb").read_text())["cells"]


def test_the_registered_tables_are_the_papers_tables_and_the_notebooks():
    assert sorted(PAPERS) == sorted(p.stem for p in (ROOT/"adaptive_at"/"papers").glob("table*.csv")) == sorted(p.stem for p in (ROOT/"nbs").glob("table*.ipynb"))
    assert len(PAPERS) == 22


@every_table
def test_rows_and_columns_are_those_of_the_paper(name, tmp_path):
    results, lines = Results(planned(name, tmp_path)), printed(name)
    assert distinct(results.frame.row) == distinct(l["method"] for l in lines)
    assert set(distinct(results.frame.column)) >= set(l["metric"] for l in lines)
    wanted = sorted({(l["dataset"], l["method"], l["checkpoint"], l["metric"], l["network"], l["value"]) for l in lines})
    found = set()
    for i, block in enumerate(results.plan.blocks):
        for (b, row, column, which), line in results.lines.items():
            if b != i or np.isnan(line["paper"]): continue
            for dataset, method, checkpoint, metric, network, value in wanted:
                if (dataset, method, metric) == (block.reference[0], row, column) and checkpoint in ("", which) and float(value) == line["paper"] and network in (block.reference[1], line["network"]):
                    found.add((dataset, method, checkpoint, metric, network, value))
    assert sorted(found) == wanted  # each printed number stands in its own cell


@every_table
def test_the_paper_preset_is_planned_without_data(name, tmp_path, capsys):
    plan = planned(name, tmp_path)
    shown = plan.show().data
    said = capsys.readouterr().out
    assert re.search(r"about [\d,.]+ h of work", said) and re.search(r"[1-9][\d,.]* MB of disk", said), said
    assert (shown.epochs >= 40).all() and shown.runs.str.contains("1 to train").all()
    assert not list(tmp_path.iterdir())


@every_table
def test_quick_has_every_row_and_column_and_figure(name, tmp_path):
    plan = Plan(table(name), settle(start(name, dict(preset="quick", device="cpu", outputs=str(tmp_path), figures="all"))))
    lines = printed(name)
    assert distinct(row for b in plan.blocks for row in b.rows) == distinct(l["method"] for l in lines)
    assert {c for b in plan.blocks for c in b.shown} >= {l["metric"] for l in lines}
    assert {b.info.name for b in plan.blocks} == {"digits"} and {r.network.threads for b in plan.blocks for runs in b.runs.values() for r in runs} == {1}
    assert {r.training.epochs for b in plan.blocks for runs in b.runs.values() for r in runs} == {20}
    drawn = re.findall(r"results\.(?:figure|compare)\('(\w+)'", "".join("".join(c["source"]) for c in cells(name) if c["cell_type"] == "code"))
    assert sorted(drawn) == sorted(plan.figures)


@every_table
def test_the_parameters_cell_lists_all_parameters_with_their_defaults(name):
    cell, = [c for c in cells(name) if "parameters" in c["metadata"].get("tags", [])]
    tree = ast.parse("".join(cell["source"]))
    wanted = {n: p.default for n, p in (COMMON | about(name)).items()}
    assert {s.target.id: ast.literal_eval(s.value) for s in tree.body} == wanted and [s.target.id for s in tree.body] == list(wanted)
    assert {s.target.id: s.annotation.id for s in tree.body} == {n: type(v).__name__ for n, v in wanted.items()}
    for line in "".join(cell["source"]).splitlines(): assert re.fullmatch(r"\w+: \w+ = [^=#]+ # [^=]+", line), line


@every_table
def test_the_notebook_is_thin_and_its_table_is_its_own(name):
    code = ["".join(c["source"]) for c in cells(name) if c["cell_type"] == "code"]
    assert table(name).name == name and f"#| default_exp papers.{name}" in code[0]
    assert any(f"start('{name}', globals())" in c for c in code) and "results.provenance()" in code[-1]
    first = ["".join(c["source"]) for c in cells(name) if c["cell_type"] == "raw"]
    assert first and "skip_exec: true" in first[0]
