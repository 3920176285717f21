"CAT's five tables: labels and numbers against the printed ones, what the tables share, what their rows and columns are, the toy example."
import ast
import json
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

from adaptive_at.attacks import CrossEntropy, Margin, PGD, UniformStart
from adaptive_at.algorithms.cat import CAT_VGG16, CAT_WRN34, MixedCE, SmoothedCE, adp_adv, adv_ls, cat, cat_v0, cat_v2
from adaptive_at.base.errors import UserError
from adaptive_at.base.identity import spec_hash
from adaptive_at.data.datasets import CROP_FLIP
from adaptive_at.deepfool import DeepFool
from adaptive_at.evaluation import AutoAttack, Clean, Transfer, WhiteBox, scores
from adaptive_at.algorithms.iaat import iaat
from adaptive_at.algorithms.baselines import at, mart, natural, trades
from adaptive_at.papers import table1_cat, table1_daat, table3_cat, table4_cat, table5_cat, table6_cat
from adaptive_at.tables.parameters import COMMON, about, printed, check_parameters
from adaptive_at.tables.plan import Plan, TableContext, open_session
from adaptive_at.tables.results import Results, run

NBS = Path(__file__).resolve().parent.parent/"nbs"
TABLES = {t.TABLE.name: t.TABLE for t in (table1_cat, table3_cat, table4_cat, table5_cat, table6_cat)}
EPS = 8/255
OURS = {"table3_cat": "CAT (ours)", "table4_cat": "CAT (ours)", "table5_cat": "CAT", "table6_cat": "CAT"}  # CAT's row
TINY = dict(preset="quick", device="cpu", network="narrow-4", epochs=1, train_examples=32, test_examples=16)


def planned(name, table=None, **parameters):
    return Plan(table or TABLES[name], open_session(check_parameters(name, dict(preset="paper", device="cpu", dry_run=True) | parameters)))


def method(name, row, **parameters): return planned(name, **parameters).blocks[0].runs[row][0].method


# Against the print

@pytest.mark.parametrize("name", TABLES)
def test_every_printed_number_has_its_cell(name):
    plan, lines = planned(name), printed(name)
    results = Results(plan)
    found = 0
    for block in plan.blocks:
        theirs = [l for l in lines if (l["dataset"], l["network"]) == block.reference]
        assert block.rows == list(dict.fromkeys(l["method"] for l in theirs)) and set(block.shown) == {l["metric"] for l in theirs}
        for line in theirs:
            assert results.paper(block, line["method"], line["metric"]) == float(line["value"]), line
            found += 1
    assert found == len(lines) and plan.table.checkpoints == ("last",)


@pytest.mark.parametrize("name, blocks", [
    ("table1_cat", [("cifar10", "vgg16", 0.03)]), ("table3_cat", [("cifar10", "vgg16", EPS)]), ("table4_cat", [("cifar10", "wrn34-10", EPS)]),
    ("table5_cat", [("cifar10", "vgg16", EPS), ("cifar10", "wrn34-10", EPS)]), ("table6_cat", [("cifar10", "vgg16", EPS)])])
def test_blocks_and_their_training(name, blocks):
    plan = planned(name)
    assert [(b.protocol.dataset, b.protocol.network, b.protocol.eps) for b in plan.blocks] == blocks
    for block in plan.blocks:
        for run_, in block.runs.values():
            assert run_.training == (CAT_VGG16 if block.protocol.network == "vgg16" else CAT_WRN34)
            assert run_.augment == CROP_FLIP and run_.network.mean == ()


# Rows

def test_the_baselines_are_those_of_the_other_tables():
    "In quick the five tables train ten networks, four of which DAAT's table trains too."
    plans = [planned(name, preset="quick", figures="main") for name in TABLES]
    runs = {row: r for plan in plans for row, (r,) in plan.blocks[0].runs.items()}
    assert len({r.id for r in runs.values()}) == 10 and all(len(plan.blocks) == 1 for plan in plans)
    same = [["adversarial training (training eps=0.03)", "Adv train", "Adversarial training"], ["Natural train", "Natural training", "Natural"], list(set(OURS.values()))]
    for rows in same: assert len({runs[row].id for row in rows}) == 1
    daat = planned("table1_daat", table1_daat.TABLE, preset="quick").blocks[0].runs
    for ours, theirs in (("Adv train", "Standard AT"), ("Natural", "Natural"), ("TRADES", "TRADES"), ("MART", "MART")): assert runs[ours].id == daat[theirs][0].id


def test_table_1_trains_at_three_radii():
    for preset, eps in (("paper", [0.01, 0.02, 0.03]), ("quick", [0.25 / 3, 0.5 / 3, 0.25])):
        rows = planned("table1_cat", preset=preset).blocks[0].runs
        assert [r.method for r, in rows.values()] == [at(e) for e in eps]


def test_table_4_reproduces_six_rows_and_quotes_three():
    plan = planned("table4_cat")
    block = plan.blocks[0]
    assert [row for row in block.rows if row not in block.runs] == ["Dynamic adversarial training", "Bilateral Adv Training", "MMA"]
    assert [r.method for r, in block.runs.values()] == [natural(), at(EPS), trades(EPS), mart(EPS), iaat(EPS), cat(EPS)]
    frame = Results(plan).frame.set_index(["row", "column"])
    assert frame.paper["MMA", "PGD"] == 47.18 and np.isnan(frame.paper["MMA", "C&W"]) and frame.warning["MMA", "PGD"] == "quoted by the paper, not reproduced here"


def test_table_6_adds_one_idea_at_a_time():
    rows = {row: r.method for row, (r,) in planned("table6_cat").blocks[0].runs.items()}
    assert rows == {"Adv train": at(EPS), "Adv+LS": adv_ls(EPS), "Adp-Adv": adp_adv(EPS), "CAT": cat(EPS)}


@pytest.mark.parametrize("name, row", OURS.items())
def test_cat_has_the_mixed_loss_and_what_the_reader_says(name, row):
    assert method(name, row) == cat(EPS) and type(method(name, row).objective) is MixedCE
    assert method(name, row, eta=0.01, c=5., kappa=20.) == cat(EPS, eta=0.01, c=5., kappa=20.)
    scaled = method(name, row, preset="quick", eta=0.01, c=5.)   # in the paper's unit, also where eps is another
    assert scaled.radius.eta / 0.25 == pytest.approx(0.01 / EPS) and scaled.objective.c * 0.25 == pytest.approx(5 * EPS)


def test_the_ablations_follow_the_reader_too():
    assert method("table6_cat", "Adv+LS", c=5.) == adv_ls(EPS, 5.) and method("table6_cat", "Adp-Adv", eta=0.01) == adp_adv(EPS, eta=0.01)


def test_a_label_cannot_give_away_more_than_all():
    assert method("table3_cat", "CAT (ours)", c=255/8).objective.c * EPS == pytest.approx(1)
    with pytest.raises(UserError, match="c is 40.*31.875"): check_parameters("table3_cat", dict(c=40.))


def test_the_variants_are_seven_methods():
    block = planned("table6_cat", figures="all").blocks[0]
    need = table6_cat.TABLE.figures["variants"]
    methods = {row: block.runs[row][0].method for row in need.rows}
    assert len({spec_hash(m) for m in methods.values()}) == 7
    assert [methods[f"CAT, {o}"].radius.outcome for o in ("minus_eta", "v0", "v2")] == ["minus_eta", "v0", "v2"]
    for outcome in ("minus_eta", "v0", "v2"): assert replace(methods[f"CAT, {outcome}"].radius, outcome="reset") == methods["CAT"].radius
    assert type(methods["CAT, cross-entropy"].objective) is SmoothedCE
    assert methods["authors' code, v0"] == cat_v0(EPS) and methods["authors' code, v2"] == cat_v2(EPS)
    assert all(block.cells[row] == [(c, "last") for c in ("natural", "PGD", "AA")] for row in need.rows if row != "CAT")


# Columns

def columns(name, eps=EPS, network="vgg16"): return TABLES[name].columns(TableContext("cifar10", network, eps, "paper"))


def test_table_1_attacks_both_parts_within_a_third():
    found = columns("table1_cat", 0.03)
    assert found["robust train eps=0.01"] == replace(found["robust test eps=0.01"], part="train")
    column = found["robust test eps=0.01"]
    assert (column.eps, column.part, column.attack.steps, column.attack.alpha) == (0.01, "test", 20, 0.002)
    assert table1_cat.TABLE.more_columns(TableContext("cifar10", "vgg16", 0.03, "paper")) == {"AA": AutoAttack(0.01)}


def test_steps_are_a_fifth_of_the_radius_and_the_margin_saturates():
    step = EPS / 5
    expected = {"natural": Clean(), "DeepFool": WhiteBox(DeepFool(), EPS), "PGD-100": WhiteBox(PGD(step, 100), EPS), "C&W-100": WhiteBox(PGD(step, 100, Margin(0)), EPS),
                "PGD-1000x20": WhiteBox(PGD(step, 1000), EPS, 20), "C&W-1000x20": WhiteBox(PGD(step, 1000, Margin(0)), EPS, 20)}
    assert columns("table3_cat") == expected
    assert columns("table4_cat") == {"natural": Clean(), "PGD": WhiteBox(PGD(step, 20), EPS), "C&W": WhiteBox(PGD(step, 20, Margin(0)), EPS)}
    assert columns("table5_cat") == {"transfer (natural model)": Transfer(PGD(step, 20), EPS, "Natural")}
    assert columns("table6_cat") == {"natural": Clean(), "PGD": expected["PGD-100"]}
    assert expected["PGD-100"].attack.start == UniformStart() and expected["PGD-100"].attack.loss == CrossEntropy()


def test_quick_limits_the_long_attacks_and_keeps_the_labels():
    limited = planned("table3_cat", preset="quick").blocks[0].columns
    for label in ("PGD-1000x20", "C&W-1000x20"): assert (limited[label].attack.steps, limited[label].restarts) == (100, 5)


def test_the_surrogate_is_a_natural_network_of_the_rows_own_kind():
    for block in planned("table5_cat").blocks:
        assert block.runs["Natural"][0].method == natural() and block.runs["Natural"][0].network == block.runs["CAT"][0].network
        assert "Natural" not in block.rows and set(block.cells) == {"Adv train", "TRADES", "CAT"}
    assert planned("table5_cat", columns="transfer").blocks[0].shown == ["transfer (natural model)"]


# The notebooks

def cells(name): return ["".join(c["source"]) for c in json.loads((NBS/f"{name}.ipynb").read_text())["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("name", TABLES)
def test_the_parameters_cell_is_what_is_registered(name):
    cell, = (c for c in cells(name) if c.startswith("preset: str"))
    told = {node.target.id: ast.literal_eval(node.value) for node in ast.parse(cell).body}
    known = COMMON | about(name)
    assert list(told) == list(known) and told == {n: p.default for n, p in known.items()}
    assert all(line.count("=") == 1 and "  # " in line for line in cell.splitlines())


@pytest.mark.parametrize("name", TABLES)
def test_claims_name_rows_and_columns_of_the_table(name):
    cell, = (c for c in cells(name) if c.startswith("results.claims("))
    p, table = TableContext("cifar10", "vgg16", EPS, "paper"), TABLES[name]
    rows, known = {**table.rows(p), **table.extra_rows(p)}, {**table.columns(p), **table.more_columns(p)}
    claims = ast.literal_eval(ast.parse(cell).body[0].value.args[0])
    assert claims
    for text, higher, lower, column in claims:
        assert {higher, lower} <= set(rows) and higher != lower and column in known
        assert ("columns=\"all\"" in text) == (column not in table.columns(p))


# Tiny runs

@pytest.fixture(scope="module")
def outputs(tmp_path_factory): return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def tiny(outputs):
    "All five tables, one after the other, from one store."
    matplotlib.use("agg")
    without = {"variants": replace(table6_cat.TABLE.figures["variants"], rows=("CAT", "CAT, v2", "authors' code, v0"), columns=("natural", "PGD"))}  # AutoAttack has tests of its own
    tables = TABLES | {"table6_cat": replace(table6_cat.TABLE, figures=without)}
    return {name: run(table, **TINY, figures="all", outputs=str(outputs)) for name, table in tables.items()}


@pytest.mark.parametrize("name", TABLES)
def test_a_tiny_run_fills_the_table(name, tiny):
    results = tiny[name]
    block, = results.plan.blocks
    assert list(zip(results.frame.row, results.frame.column)) == [(r, c) for r in block.rows for c in block.shown]
    filled = results.frame[results.frame.row.isin(block.runs)]
    assert (filled.n == 16).all() and filled.value.between(0, 100).all() and len(filled) == len(set(block.runs) & set(block.rows)) * len(block.shown)
    text = results.table().to_html()
    for line in printed(name):
        if (line["dataset"], line["network"]) == block.reference: assert f"paper {float(line['value']):g}" in text


def test_the_gap_is_training_less_test(tiny):
    results = tiny["table1_cat"]
    shown = table1_cat.gaps(results).data
    assert list(shown.paper) == ["30.2", "30.9", "33.1"]
    values = results.frame.value.to_numpy().reshape(3, 2)
    assert [float(v[3:v.index("</b>")]) for v in shown["this run"]] == pytest.approx(list(values[:, 0] - values[:, 1]), abs=0.051)
    nothing = Results(planned("table1_cat", columns="AA"))
    assert table1_cat.gaps(nothing) == "gap: the two columns were not run"


def test_the_variants_are_compared(tiny):
    shown = tiny["table6_cat"].compare("variants", "Versions of CAT").data
    assert len(shown) == 3 and list(shown.columns) == ["natural", "PGD"] and not (shown == "missing").any().any()


def test_variants_stand_beside_what_they_are_variants_of(tiny, outputs):
    results = tiny["table6_cat"]
    shown = results.compare("variants", "Versions of CAT", {"CAT, v2": "CAT", "authors' code, v0": "CAT, v2"}).data.xs("last", level=2).droplevel(0)
    table = pd.read_csv(outputs/"table6_cat/quick/variants.csv")
    assert list(shown.columns) == ["less", "natural", "PGD"] and shown.less.to_dict() == {"CAT": "", "CAT, v2": "CAT", "authors' code, v0": "CAT, v2"}
    block = results.plan.blocks[0]
    assert [(r.row, r.less, r.column, r.n) for r in table.assign(less=table.less.fillna("")).itertuples()] == [(row, less, c, len(scores(results.of(block, row, c)[0]))) for row, less in (("CAT", ""), ("CAT, v2", "CAT"), ("authors' code, v0", "CAT, v2")) for c in ("natural", "PGD")]
    assert table.seeds.eq(1).all() and table.groupby("row").difference.count().to_dict() == {"CAT": 0, "CAT, v2": 2, "authors' code, v0": 2}
    for line in table.itertuples():
        assert (line.value, line.ci_low, line.ci_high) == pytest.approx(results.interval(block, line.row, line.column), abs=1e-3)
    for line in table[table.row != "CAT"].itertuples():
        assert line.difference == pytest.approx(line.value - results.interval(block, line.less, line.column)[0], abs=1e-3) and line.low <= line.difference <= line.high
        assert shown.loc[line.row, line.column].endswith(f'<span class="difference">{line.difference:+.1f} [{line.low:+.1f}, {line.high:+.1f}]</span>')
    assert "difference" not in "".join(shown.loc["CAT"])


# The toy example

@pytest.fixture(scope="module")
def toy(tiny, outputs):
    "Fig. 1 as the notebook draws it, with the planes and radii of its panels."
    panels, fitted = [], table1_cat.fitted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table1_cat, "fitted", lambda *args: panels.append(fitted(*args)) or panels[-1])
        tiny["table1_cat"].figure("fig1", lambda results, block: table1_cat.fig1())
    return outputs/"table1_cat/quick/fig1.png", panels


def test_fig1_is_drawn(toy):
    picture = toy[0].read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 20_000


def test_the_toy_has_the_papers_margin():
    z, y = table1_cat.toy("train")
    side = torch.where(y == 1, 1., -1.)
    assert (side * z[:, 0]).min() == 1.75 and torch.bincount(y).tolist() == [80, 80]
    for k, s in ((0, -1.), (1, 1.)):   # at both ends of both sides: no other line is farther from all of them
        for end in (-10., 10.): assert (z[y == k] == torch.tensor([s * 1.75, end])).all(1).any()
    assert z.abs().max() + 4 < table1_cat.SIDE / 2   # no ball reaches the edge of the unit square
    assert not torch.equal(z, table1_cat.toy("test")[0])


def test_a_large_radius_ruins_adversarial_training_and_not_cat(toy):
    def tilt(model):
        w = (model.out.weight[1] - model.out.weight[0]).tolist()
        return abs(np.degrees(np.arctan2(w[1], w[0])))
    standard, small, large, ours = (model for model, _ in toy[1])
    for model in (standard, small, ours):
        assert all(table1_cat.right(model, *table1_cat.toy(name)).all() for name in ("train", "test")) and tilt(model) < 5
    assert table1_cat.right(large, *table1_cat.toy("train")).float().mean() < 0.95 and tilt(large) > 20


def test_cat_goes_to_4_only_where_it_can(toy):
    (_, radius), (z, _) = toy[1][3], table1_cat.toy("train")
    beside = z[:, 0].abs() < 3
    assert radius[~beside] == pytest.approx(4, abs=1e-5) and radius[beside].max() < 3.5 and radius[beside].mean() < 2
    assert np.allclose(toy[1][2][1], 4) and not toy[1][0][1].any()
