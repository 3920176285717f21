"Every table notebook: the paper's rows and columns, the parameters, the plan of the paper's preset. (`.ci/run` executes each of them at a tiny size.)"
import ast, csv, importlib, json, re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from adaptive_at.base.errors import UserError
from adaptive_at.corruptions import Corruption
from adaptive_at.evaluation import encode_verdicts
from adaptive_at.tables.parameters import COMMON, TABLES, about, check_parameters
from adaptive_at.tables.plan import Plan, open_session
from adaptive_at.tables.results import Results, is_comparable, trained_with

ROOT = Path(__file__).resolve().parent.parent
PAPERS = [name for name in TABLES if name.startswith("table")]
every_table = pytest.mark.parametrize("name", PAPERS)


def table(name): return importlib.import_module(f"adaptive_at.papers.{name}").TABLE


def printed(name):
    with open(ROOT/"adaptive_at"/"papers"/f"{name}.csv", newline="") as file: return list(csv.DictReader(file))


def distinct(values): return list(dict.fromkeys(values))


def planned(name, tmp_path, **parameters):
    return Plan(table(name), open_session(check_parameters(name, dict(preset="paper", dry_run=True, device="cpu", outputs=str(tmp_path), **parameters))))


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
        for (b, row, column, checkpoint), line in results.lines.items():
            if b != i or np.isnan(line["paper"]): continue
            for dataset, method, checkpoint, metric, network, value in wanted:
                if (dataset, method, metric) == (block.reference[0], row, column) and checkpoint in ("", checkpoint) and float(value) == line["paper"] and network in (block.reference[1], line["network"]):
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
    plan = Plan(table(name), open_session(check_parameters(name, dict(preset="quick", device="cpu", outputs=str(tmp_path), figures="all"))))
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
    assert any(f"check_parameters('{name}', globals())" in c for c in code) and "results.provenance()" in code[-1]
    first = ["".join(c["source"]) for c in cells(name) if c["cell_type"] == "raw"]
    assert first and "skip_exec: true" in first[0]


# What a reader may take out of a table, or ask of it

DAAT1 = table("table1_daat")


def settled(name, tmp_path, **parameters): return open_session(check_parameters(name, dict(preset="quick", dry_run=True, device="cpu", outputs=str(tmp_path)) | parameters))


def without(row="", column=""):
    return replace(DAAT1, rows=lambda p: {r: m for r, m in DAAT1.rows(p).items() if r != row}, columns=lambda p: {c: a for c, a in DAAT1.columns(p).items() if c != column})


@pytest.mark.parametrize("gone, told", [(dict(row="FAT"), "row 'FAT'"), (dict(column="PGD-20"), "column 'PGD-20'"), (dict(row="Natural"), "row 'Natural'")])
def test_a_figure_whose_row_or_column_was_taken_out_is_left_out(gone, told, tmp_path, capsys):
    plan = Plan(without(**gone), settled("table1_daat", tmp_path, figures="all"))
    left_out = re.findall(rf"(fig\w+) is left out: it is drawn from the {told}, which this table does not have", capsys.readouterr().out)
    assert left_out and plan.figures and set(plan.figures).isdisjoint(left_out)
    with pytest.raises(UserError, match=f"figures names '{left_out[0]}', which is drawn from the {told}"): Plan(without(**gone), settled("table1_daat", tmp_path, figures=left_out[0].upper()))


def test_a_row_whose_start_was_taken_out_is_refused(tmp_path):
    whole = table("table6_dra")
    with pytest.raises(UserError, match="the row 'p=1/6' starts from the row 'p=0', which this table does not have"):
        Plan(replace(whole, rows=lambda p: {r: m for r, m in whole.rows(p).items() if r != "p=0"}), settled("table6_dra", tmp_path))


def test_only_quoted_rows_are_refused(tmp_path):
    with pytest.raises(UserError, match="rows is 'MMA', which the paper quotes"): planned("table4_cat", tmp_path, rows="MMA")


def test_groups_of_figures_and_names_may_be_mixed(tmp_path):
    def figures(asked): return Plan(DAAT1, settled("table1_daat", tmp_path, figures=asked)).figures
    more, = [f for f in figures("all") if f not in figures("main")][:1]
    assert figures(f"main,{more.upper()}") == [*figures("main"), more] and figures("none") == []


@pytest.mark.parametrize("name, official, same", [("table7_dra", True, True), ("table7_dra", False, False), ("table1_iaat", True, True), ("table1_iaat", False, False)])
def test_corrupted_images_are_compared_with_print_only_where_they_are_the_official_ones(name, official, same, tmp_path):
    if official: (tmp_path/"CIFAR-10-C").mkdir()
    results = Results(planned(name, tmp_path, data_root=str(tmp_path), columns="all"))
    block, = results.plan.blocks[:1]
    corrupted = [c for c in block.shown if isinstance(block.columns[c], Corruption)]
    assert corrupted and {is_comparable(block, c) for c in corrupted} == {same}
    assert is_comparable(block, "natural") is (name == "table1_iaat")   # Table 7 prints no other numbers


def test_rows_are_compared_seed_by_seed_where_one_is_missing(tmp_path):
    "AT's seed 0 is not there yet: FAT's seed 1 is compared with AT's seed 1, and natural accuracy with that of the same seed."
    def result(*right): return {"accuracy": 100 * sum(right) / len(right), "n": len(right), "standing": encode_verdicts(torch.tensor(right) > 0)}
    results = Results(planned("table1_daat", tmp_path, rows="FAT,Standard AT", columns="clean,PGD-20", seeds=2, figures="none", datasets="cifar10"))
    block, = results.plan.blocks
    many = 50
    results.cells = {(0, "FAT", "PGD-20", "last"): [result(*[0, 1] * many), result(*[1, 1] * many)], (0, "Standard AT", "PGD-20", "last"): [None, result(*[0, 1] * many)],
                     (0, "Standard AT", "natural", "last"): [result(*[0, 0] * many), result(*[1, 1] * many)]}
    d = results._difference(block, "FAT", "Standard AT", "PGD-20", "last")
    assert (d["difference"], d["seeds"]) == (50., 1)
    assert not any("natural" in told for told in results._warnings(block, "Standard AT", "PGD-20", "last"))


@pytest.mark.parametrize("outputs, command", [("outputs", "papermill nbs/table1_daat.ipynb outputs/table1_daat.ipynb"), ("{}/b", "mkdir -p {0}/b && papermill nbs/table1_daat.ipynb {0}/b/table1_daat.ipynb"), ("{}/a b", "mkdir -p '{0}/a b' && papermill nbs/table1_daat.ipynb '{0}/a b/table1_daat.ipynb'")])
def test_the_command_of_a_notebook_writes_where_it_was_told_to(outputs, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = check_parameters("table1_daat", dict(preset="quick", rows="Standard AT,DAAT", outputs=outputs.format(tmp_path))).command()
    assert told.startswith(command.format(tmp_path) + " -p preset quick -p rows 'Standard AT,DAAT'")


def test_the_provenance_names_the_versions_that_trained_the_runs_and_not_those_of_the_page(tmp_path):
    plan = planned("table1_daat", tmp_path, rows="FAT,Standard AT", columns="clean", seeds=2, figures="none", datasets="cifar10")
    block, = plan.blocks
    def made(torch, device): return {"python": "3.11.0", "torch": torch, "torchvision": "0.29.1", "numpy": "2.4.6", "adaptive_at": "0.1.0", "device": device, "threads": 1}
    here = [made("2.14.1", "a processor")]
    facts = {run.id: {"made with": here} for run in (*block.runs["FAT"], block.runs["Standard AT"][0])}
    facts[block.runs["Standard AT"][1].id] = {"made with": [*here, made("2.11.0", "another")]}   # stopped, and continued elsewhere
    plan.store.facts = lambda run: facts.get(run.id, {})
    common = "python 3.11.0, torch {}, torchvision 0.29.1, numpy 2.4.6, adaptive_at 0.1.0; {}"
    assert trained_with(plan) == [common.format("2.14.1", "a processor") + " (4 runs)", common.format("2.11.0", "another") + " (1 run)"]
    assert "torch 2.11.0" in Results(plan).provenance().to_html()
    facts.clear()
    assert trained_with(plan) == ["nothing is trained yet"]
