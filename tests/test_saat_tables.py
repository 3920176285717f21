"SAAT's three tables: labels and values against the printed ones, what the tables share, what their figures draw."
import re, sys
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch

from adaptive_at.algorithms import saat
from adaptive_at.attacks import PGD
from adaptive_at.base.errors import UserError
from adaptive_at.base.identity import spec_hash
from adaptive_at.data.datasets import Augment
from adaptive_at.evaluation import AutoAttack, Clean, WhiteBox, encode_verdicts
from adaptive_at.algorithms.baselines import natural
from adaptive_at.networks import CIFAR10_RICE, CIFAR100_SAAT, NETWORKS
from adaptive_at.papers import table1_saat, table2_saat, table3_saat
from adaptive_at.tables.parameters import printed, check_parameters
from adaptive_at.tables.plan import Plan, TableContext, Row, open_session
from adaptive_at.algorithms.saat import StrengthAdaptivePGD, robustness_disparity
from adaptive_at.tables.results import execute
from adaptive_at.training import Monitor
from adaptive_at.awp import AT_AWP, TRADES_AWP
from adaptive_at.jobs.pool import run_jobs

TABLES = {t.TABLE.name: t.TABLE for t in (table1_saat, table2_saat, table3_saat)}
EPS = 8/255
NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "preactresnet18": "PreAct ResNet-18", "wrn34-10": "WideResNet-34-10"}


@pytest.fixture(autouse=True)
def no_window(): matplotlib.use("agg")


def protocol(part, **told): return TableContext(part.dataset, part.network, EPS, "paper", told)


def dry(name, **parameters):
    "The plan of the paper's setting, without data."
    return Plan(TABLES[name], open_session(check_parameters(name, dict(preset="paper", device="cpu", dry_run=True) | parameters)))


def small(name, outputs, **parameters):
    "A table on digits at a size at which a run takes a fraction of a second."
    told = dict(preset="quick", device="cpu", outputs=str(outputs), columns="natural,PGD-20", epochs=1, train_examples=32, test_examples=20) | parameters
    session, said = open_session(check_parameters(name, told)), []
    preset = replace(session.preset, monitor_examples=20, network="narrow-4", max_steps=3)
    results = execute(Plan(TABLES[name], replace(session, preset=preset)), said.append)
    return results, [int(n) for n in re.findall(r"\d+", said[-1])[:4]]   # runs from the store, trained; evaluations from the store, made


# Labels

@pytest.mark.parametrize("name", TABLES)
def test_rows_columns_and_checkpoints_are_those_of_the_paper(name):
    table, lines = TABLES[name], printed(name)
    for part in table.blocks:
        theirs = [l for l in lines if (l["dataset"], l["network"]) == (NAMES[part.dataset], NAMES[part.network])]
        lines = [l for l in lines if l not in theirs]
        rows, columns = table.rows(protocol(part)), table.columns(protocol(part))
        assert list(rows) == list(dict.fromkeys(l["method"] for l in theirs))
        assert list(columns) == list(dict.fromkeys(l["metric"] for l in theirs)) == ["natural", "PGD-20", "AA"]
        assert set(table.checkpoints) == {l["checkpoint"] for l in theirs}
        assert {(l["method"], l["checkpoint"], l["metric"]) for l in theirs} == {(r, w, c) for r in rows for w in table.checkpoints for c in columns}
    assert not lines, "a printed block is missing"


def test_table_1_has_31_rows_as_one_is_printed_twice():
    lines = printed("table1_saat")
    assert len(table1_saat.rows(protocol(table1_saat.TABLE.blocks[0]))) == 31 == len(lines) / 6 - 1
    assert sum(l["method"] == "SAAT_up(eps_max=14,rho=1.5)" for l in lines) == 12


def test_columns_are_the_papers_evaluations():
    columns = table1_saat.columns(protocol(table1_saat.TABLE.blocks[0]))
    assert columns == {"natural": Clean(), "PGD-20": WhiteBox(PGD(2/255, 20), EPS), "AA": AutoAttack(EPS)}
    assert all(t.TABLE.columns is table1_saat.columns and t.TABLE.recipe is table1_saat.recipe for t in (table2_saat, table3_saat))


# Values

@pytest.mark.parametrize("label", table1_saat.rows(protocol(table1_saat.TABLE.blocks[0])))
def test_a_row_of_table_1_is_what_its_label_says(label):
    method = table1_saat.rows(protocol(table1_saat.TABLE.blocks[0]))[label]
    assert method.weights == (AT_AWP if label.startswith("AWP-") else None)
    assert replace(method, weights=None).attack.mode == "train"
    if label in ("AT", "AWP-AT"):
        assert method.attack == PGD(2/255, 10, mode="train") and method.radius.eps == EPS
        return
    kind, eps_max, rho = re.fullmatch(r"(?:AWP-)?SAAT_(\w+)\(eps_max=(\d+),rho=([\d.]+)\)", label).groups()
    attack = method.attack
    assert isinstance(attack, StrengthAdaptivePGD) and attack.rho == float(rho)
    assert method.radius.eps == pytest.approx(int(eps_max) / 255) and attack.stages[-1] == pytest.approx(int(eps_max) / 255)
    assert (attack.steps, attack.full, attack.stages[0] > EPS) == ((10, EPS, True) if kind == "up" else (0, 0., False))


def table_2(block, **told): return table2_saat.rows(protocol(table2_saat.BLOCKS[block], **told))


def knobs(method): return round(method.radius.eps * 255, 6), round(method.attack.rho, 2)


@pytest.mark.parametrize("block, rho", [(0, 1.7), (1, 3.4), (2, 1.7)])
def test_largest_radius_and_least_loss_of_table_2(block, rho):
    rows = table_2(block)
    assert {l: knobs(m) for l, m in rows.items() if "_up" in l and "TRADES" not in l} == {"SAAT_up": (14, rho), "AWP-SAAT_up": (9, rho)}
    told = table_2(block, eps_max=11., rho=2.)
    assert {knobs(m) for l, m in told.items() if "_up" in l} == {(11, 2)}
    assert {l: spec_hash(m) for l, m in told.items() if "_up" not in l} == {l: spec_hash(m) for l, m in rows.items() if "_up" not in l}


def test_trades_rows_of_table_2():
    rows = table_2(0)
    assert list(rows)[4:] == ["TRADES", "SATRADES_up", "AWP-TRADES", "AWP-SATRADES_up"]
    assert [rows[l].weights for l in list(rows)[4:]] == [None, None, TRADES_AWP, TRADES_AWP]
    assert knobs(rows["SATRADES_up"]) == knobs(rows["AWP-SATRADES_up"]) == (9, 1.7)
    assert {rows[l].objective.beta for l in list(rows)[4:]} == {6.} and {table_2(0, beta=3.)[l].objective.beta for l in list(rows)[4:]} == {3.}


def test_the_papers_training():
    blocks = dry("table2_saat").blocks
    assert {(b.info.label, b.network.label) for b in blocks} == {(NAMES[p.dataset], NAMES[p.network]) for p in table2_saat.BLOCKS} and len(blocks) == 3
    for block in blocks:
        for run in (r for runs in block.runs.values() for r in runs):
            assert run.training == saat.SAAT_TRAINING and run.augment == Augment(4, "reflect", True)
            assert run.monitor == Monitor(PGD(2/255, 20), EPS, 10_000, 1, "test")   # all test images of CIFAR
            theirs = CIFAR100_SAAT if block.info.name == "cifar100" else CIFAR10_RICE
            assert (run.network.mean, run.network.std) == (theirs["mean"], theirs["std"]) and run.network.label == block.network.label


# Figures' rows

def test_every_row_and_column_that_a_figure_needs_exists():
    for p in (protocol(table1_saat.TABLE.blocks[0]), TableContext("digits", "preactresnet18", 0.25, "quick")):
        rows, columns = table1_saat.rows(p) | table1_saat.extra_rows(p), table1_saat.columns(p) | table1_saat.extra_columns(p)
        for name, need in table1_saat.TABLE.figures.items():
            assert set(need.rows) <= set(rows) and set(need.columns) <= set(columns), name


def test_figures_rows_are_what_they_say():
    p = protocol(table1_saat.TABLE.blocks[0])
    rows = table1_saat.rows(p) | table1_saat.extra_rows(p)
    for e in table1_saat.BUDGETS:
        method = rows[table1_saat.trained_at(e)]
        assert method.radius.eps == pytest.approx(e / 255) and method.attack == rows["AT"].attack
    for rho, e in [(rho, 128) for rho in table1_saat.RHOS] + [(1.5, e) for e in table1_saat.EPS_MAX]:
        method = rows[table1_saat.adaptive(rho, e)]
        assert method == natural() if 0 in (rho, e) else (knobs(method), method.attack.steps) == ((e, rho), 0)
    assert [rows[table1_saat.wide("SAAT", x)].method for x in table1_saat.WIDTHS] == [rows[table1_saat.adaptive(1.5)]] * 4
    assert {e: (c.eps, c.attack.steps) for e in table1_saat.RADII if isinstance(c := (table1_saat.columns(p) | table1_saat.extra_columns(p))[table1_saat.tested(e)], WhiteBox)} == \
           {e: (pytest.approx(e / 255), 2.5 * e) for e in range(2, 22, 2)}


def test_saat_needs_no_radius_beyond_the_box():
    rows = {eps: table1_saat.extra_rows(TableContext("any", "preactresnet18", eps, "quick")) for eps in (EPS, 0.25, 0.3)}
    largest = {eps: rows[eps][table1_saat.adaptive(1.5)].radius.eps for eps in rows}
    assert largest == {EPS: pytest.approx(128/255), 0.25: pytest.approx(1), 0.3: pytest.approx(1)}
    assert [len(rows[eps][table1_saat.adaptive(1.5)].attack.stages) for eps in rows] == [64, 16, 14]


def test_stand_ins_grow_as_the_papers_networks_do():
    extra = table1_saat.extra_rows(protocol(table1_saat.TABLE.blocks[0]))
    theirs = [row.network for row in extra.values() if isinstance(row, Row)][:4]
    widths = [[NETWORKS[n].width_factor for n in names] for names in (theirs, [table1_saat.TABLE.stand_ins[n] for n in theirs])]
    assert theirs == ["wrn34-1", "wrn34-3", "wrn34-5", "wrn34-7"] and all(w == sorted(set(w)) for w in widths)


# What is shared

def test_tables_share_their_runs():
    one, two, three = (dry(name) for name in TABLES)
    def ids(plan, block): return {label: [r.id for r in runs] for label, runs in plan.blocks[block].runs.items()}
    first = ids(one, 0)
    shared = {"AT": "AT", "SAAT_up": "SAAT_up(eps_max=14,rho=1.7)", "AWP-AT": "AWP-AT", "AWP-SAAT_up": "AWP-SAAT_up(eps_max=9,rho=1.7)"}
    assert {l: ids(two, 0)[l] for l in shared} == {l: first[t] for l, t in shared.items()}
    assert [ids(two, b) for b in range(3)] == [ids(three, b) for b in range(3)]
    assert {b.reference: len(b.rows) for b in two.blocks} == {("CIFAR-10", "PreAct ResNet-18"): 8, ("CIFAR-100", "PreAct ResNet-18"): 4, ("CIFAR-10", "WideResNet-34-10"): 4} and len(first) == 34  # three more for Fig. 1
    assert len({i for b in range(3) for runs in ids(two, b).values() for i in runs}) == 16


def test_rows_that_only_some_blocks_have_may_be_asked_for():
    plan = dry("table2_saat", rows="AWP-AT,TRADES")
    assert {b.reference: b.rows for b in plan.blocks} == {("CIFAR-10", "PreAct ResNet-18"): ["AWP-AT", "TRADES"], ("CIFAR-100", "PreAct ResNet-18"): ["AWP-AT"], ("CIFAR-10", "WideResNet-34-10"): ["AWP-AT"]}
    assert [b.rows for b in dry("table2_saat", rows="TRADES").blocks] == [["TRADES"]]
    assert [b.rows for b in dry("table2_saat", rows="AT", network="wrn34-10").blocks] == [["AT"]]
    for refused in (dict(rows="TRADES", datasets="cifar100"), dict(rows="MART")):
        with pytest.raises(UserError, match=rf"^rows .*'{refused['rows']}'.*\.$"): dry("table2_saat", **refused)


def test_jobs_find_what_every_optimiser_imports():
    said = []
    def job(report_line): report_line(str("torch._dynamo" in sys.modules))
    run_jobs([job, job], 2, said.append)
    assert said == ["True", "True"]


# Small runs

@pytest.fixture(scope="module")
def first(tmp_path_factory):
    "Table 1 with all its figures."
    folder = tmp_path_factory.mktemp("saat")
    return folder, *small("table1_saat", folder, figures="all")


def test_a_small_run_fills_table_1(first):
    folder, results, counts = first
    frame = results.frame
    assert [(l.row, l.checkpoint, l.column) for l in frame.itertuples()] == [(r, w, c) for r in results.plan.blocks[0].rows for w in ("best", "last") for c in ("natural", "PGD-20")]
    assert len(frame) == 124 and frame.value.notna().all() and frame.paper.notna().all() and frame.difference.isna().all()
    def at(checkpoint): return frame[(frame.row == "SAAT_up(eps_max=14,rho=1.7)") & (frame.checkpoint == checkpoint)].paper.tolist()
    assert (at("best"), at("last")) == ([76.37, 56.31], [76.38, 53.86])
    assert counts[:2] == [0, 31 + 3 + 1 + 4 + 3 + 3]   # rows; training eps; natural; SAAT; and the networks with AT and SAAT, one of which is the block's own
    html = results.table().to_html()
    assert html.count("row_heading level1") == 31 and "best: natural" in html and "last: PGD-20" in html


def test_what_is_best_and_last_at_once_is_evaluated_once(first):
    folder, results, counts = first
    block = results.plan.blocks[0]
    for row, cells in block.cells.items():
        run = block.runs[row][0]
        made = {p.name for p in (results.plan.store.folder(run)/"evals").glob("*.json")}
        weights = results.plan.store.facts(run)["weights"]
        assert weights["best"] == weights["last"]   # one epoch
        ids = {results.plan.evaluation(block, row, c, 0, w).id for c, w in cells}
        assert len(ids) == len({c for c, _ in cells}) and all(any(i in name for name in made) for i in ids)
        others = {c for l, pairs in block.cells.items() if block.runs[l][0] == run for c, _ in pairs}
        assert len(made) == len(others)


def test_tables_2_and_3_find_what_table_1_has_trained(first):
    folder, _, _ = first
    second, counts = small("table2_saat", folder)
    assert counts[:2] == [4, 4] and counts[2] == 8   # AT, SAAT_up and their AWP rows, natural and PGD-20
    third, counts = small("table3_saat", folder)
    assert counts == [8, 0, 16, 0]                   # one epoch: the last is the best
    for results, checkpoint in ((second, "best"), (third, "last")):
        assert list(dict.fromkeys(results.frame.row)) == list(table_2(0)) and set(results.frame.checkpoint) == {checkpoint}
        assert results.frame.value.notna().all() and results.frame.paper.notna().all()
    assert third.frame.paper.tolist()[:2] == [83.89, 45.28] and third.frame.value.tolist() == second.frame.value.tolist()


@pytest.mark.parametrize("name, curves", [("fig1", {0: 1, 1: 4, 2: 4, 3: 2}), ("fig2", {0: 4, 2: 4, 3: 3}), ("fig3", {0: 4, 1: 4, 2: 4, 3: 4, 4: 4, 5: 1})])
def test_figures(first, name, curves):
    "Panels and their lines, of which one more may be a reference."
    _, results, _ = first
    block = results.plan.blocks[0]
    drawn = []
    results.figure(name, lambda *given: drawn.append(getattr(table1_saat, name)(*given)) or drawn[0])
    assert (results.plan.folder/f"{name}.png").stat().st_size > 20_000
    axes = drawn[0].axes
    assert {i: len(axes[i].lines) for i in curves} == curves
    sweeps = {"fig1": (0, 1, 3), "fig2": (0,), "fig3": (0, 1, 2)}[name]
    for line in (line for i in sweeps for line in axes[i].lines):
        assert list(line.get_xdata()) == list(range(0, 22, 2)) and np.isfinite(line.get_ydata()).all()
    assert all("0.0312" in axes[i].get_xlabel() for i in sweeps)   # an eighth of the digits' radius
    if name == "fig1": assert axes[0].lines[0].get_ydata()[[0, 4]].tolist() == [results.interval(block, "AT", c, "last")[0] for c in ("natural", "PGD-20")]


# Disparity and overfitting

def test_disparity_on_hand_made_numbers():
    assert robustness_disparity(80., {2: 70., 4: 40.}) == (10 / 2 + 40 / 4) / 2
    assert robustness_disparity(80., {8: 80.}) == 0
    image = robustness_disparity(torch.tensor([1., 1.]), {2.: torch.tensor([1., 0.]), 4.: torch.tensor([0., 0.])})
    assert torch.allclose(image, torch.tensor([1/8, (1/2 + 1/4) / 2]))


class Stored:
    "Stands for results: fixed verdicts."
    def __init__(self, cells): self.cells = cells
    def of(self, block, row, column, checkpoint="last"): return [{"standing": encode_verdicts(torch.tensor(v, dtype=torch.bool))} for v in self.cells[row, column, checkpoint]]


def test_disparity_of_a_row_and_its_interval():
    broken_at = [3, 5, 11, 21]   # four images, each right below one radius
    cells = {("AT", table1_saat.tested(e), "last"): [[e < b for b in broken_at]] for e in (0, *table1_saat.RADII)}
    value, half = table1_saat.disparity(Stored(cells), None, "AT")
    image = [np.mean([100 * (e >= b) / e for e in range(2, 22, 2)]) for b in broken_at]
    assert value == pytest.approx(np.mean(image)) and half == pytest.approx(1.96 * np.std(image, ddof=1) / 2)
    accuracy = [np.mean([e < b for b in broken_at]) * 100 for e in range(0, 22, 2)]
    assert value == pytest.approx(np.mean([(100 - a) / e for a, e in zip(accuracy[1:], range(2, 22, 2))]))


def test_overfitting_is_best_minus_last(first, monkeypatch):
    _, results, _ = first
    frame = table1_saat.overfitting(results).data
    assert len(frame) == 31 and set(frame["best - last"]) == {"<b>+0.0</b> [+0.0, +0.0]"}
    assert frame["paper"].iloc[0] == "+7.31"   # 52.59 and 45.28
    told = {"best": [[1, 1, 1, 0] * 25], "last": [[1, 0, 0, 0] * 25]}
    stored = Stored({("AT", "PGD-20", w): v for w, v in told.items()})
    monkeypatch.setattr(results, "of", lambda block, row, column, checkpoint: stored.of(block, row, column, checkpoint) if row == "AT" else [])
    assert table1_saat.overfitting(results).data["best - last"].tolist() == ["<b>+50.0</b> [+40.2, +59.8]"]
