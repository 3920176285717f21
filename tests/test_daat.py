"What the figures and claims of DAAT's Table 1 rest on."
import numpy as np
import pandas as pd
import pytest
import torch
from adaptive_at.data import datasets
from adaptive_at.attacks import PGD
from adaptive_at.evaluation import encode_verdicts
from adaptive_at.algorithms.baselines import Training, at, fat
from adaptive_at.algorithms.daat import daat
from adaptive_at.networks import NarrowResNet
from adaptive_at.papers.table1_daat import TABLE, fixed
from adaptive_at.tables.plan import TableContext
from adaptive_at.tables.results import auc_with_ci
from adaptive_at.training import Monitor, Run, State, threads, train

EPS = 0.25


@pytest.fixture(scope="module")
def banks():
    "The banks of four short runs on 300 digits."
    data, found = datasets.load("digits", "data"), {}
    methods = {"AT": at(EPS), "FAT": fat(EPS), "DAAT": daat(EPS), "enlarged": daat(EPS, cap=1.25)}
    for name, method in methods.items():
        run = Run("digits", data.info.identity, NarrowResNet(width_factor=8), method, Training(epochs=6, batch=50), Monitor(PGD(0.05, 1), EPS, 10, 6, "val"), train_examples=300)
        with threads(1):
            state = train(run, data, State(run, data), report_line=lambda line: None)
        found[name] = {k: getattr(state.bank, k)[state.subset].numpy() for k in ("eps", "used", "realised")}
    return found


def test_fig4_fixed_radius_lies_on_the_surface(banks):
    for name in ("AT", "FAT"):
        realised = banks[name]["realised"]
        assert realised.max() <= EPS + 1e-6
        assert (realised >= 0.9 * EPS).mean() > 0.95  # an 8x8 image has 64 pixels: a uniform start alone reaches .9 eps nearly always


def test_fig4_at_ends_exactly_on_the_surface(banks):
    assert (np.abs(banks["AT"]["realised"] - EPS) < 1e-6).mean() > 0.95


def test_fig4_daat_stays_inside_and_spreads(banks):
    bank = banks["DAAT"]
    assert (bank["realised"] <= bank["used"] + 1e-6).all() and bank["used"].max() <= EPS + 1e-7
    inside = bank["realised"] < 0.99 * EPS
    assert 0 < inside.sum() < len(inside)
    assert len(np.unique(bank["realised"][inside].round(4))) > inside.sum() / 2, "a spread, not a few levels"


def test_fig4_enlarged_reaches_beyond_eps_and_not_beyond_its_cap(banks):
    bank = banks["enlarged"]
    assert (bank["realised"] <= bank["used"] + 1e-6).all() and bank["used"].max() <= 1.25 * EPS + 1e-7
    assert (bank["realised"] > 1.01 * EPS).any()


def test_every_row_a_figure_needs_exists():
    p = TableContext("digits", "resnet18", EPS, "quick")
    rows, columns = TABLE.rows(p) | TABLE.extra_rows(p), TABLE.columns(p) | TABLE.extra_columns(p)
    for name, need in TABLE.figures.items():
        assert set(need.rows) <= set(rows), name
        assert set(need.columns) <= set(columns), name
    assert rows[fixed(0.05, 2)].radius.rho == 0.05 and rows[fixed(0.4, 3)].radius.tau == 3
    assert rows["AT, 4/8 eps"].radius.eps == EPS / 2 and rows["AT, 4/8 eps"].attack.alpha == pytest.approx(rows["Standard AT"].attack.alpha / 2)


@pytest.mark.parametrize("a, b, share", [([1, 2], [3, 4], 1.0), ([3, 4], [1, 2], 0.0), ([1, 2], [1, 2], 0.5), ([0, 5], [1, 2, 3], 0.5)])
def test_effect_size_counts_pairs(a, b, share):
    assert auc_with_ci(np.array(a, float), np.array(b, float))[0] == pytest.approx(share)


def test_effect_size_interval_covers_the_truth():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        area, half = auc_with_ci(rng.normal(0, 1, 40), rng.normal(1, 1, 60))
        hits += abs(area - 0.7602) < half  # P(N(0,1) < N(1,1)) = Phi(1/sqrt 2)
    assert 0.9 < hits / 200 <= 1


class Stored:
    "Stands for a plan and its results: fixed verdicts per row."
    def __init__(self, folder, **verdicts):
        from types import SimpleNamespace as Name
        from adaptive_at.tables.results import Results
        self.results = object.__new__(Results)
        block = Name(info=Name(name="digits", label="digits"))
        self.results.plan = Name(parameters=Name(dry_run=False), blocks=[block], table=Name(checkpoints=("last",)), named=lambda block: "digits", folder=folder, whole=lambda: self.results.plan)
        self.results.cells = {(0, row, "natural", "last"): [{"standing": encode_verdicts(torch.tensor(v, dtype=torch.bool)), "n": len(v), "accuracy": 100 * np.mean(v)}] for row, v in verdicts.items()}

    def verdict(self, higher, lower):
        return self.results.claims([("c", higher, lower, "natural")]).data["this run"].iloc[0]


def test_claims_are_computed(tmp_path):
    high, low, close = [1] * 90 + [0] * 10, [0] * 40 + [1] * 60, [1] * 91 + [0] * 9
    stored = Stored(tmp_path, high=high, low=low, close=close)
    assert stored.verdict("high", "low") == "holds"
    assert stored.verdict("low", "high") == "does not hold"
    assert stored.verdict("close", "high") == "cannot tell at this size"
    assert stored.verdict("high", "absent") == "not run" and len(pd.read_csv(tmp_path/"claims.csv")) == 0
    stored.results.claims([("c", "high", "low", "natural"), ("d", "high", "absent", "natural")], "last")
    line, = pd.read_csv(tmp_path/"claims-last.csv").to_dict("records")
    assert (line["claim"], line["verdict"], line["difference"], line["n"], line["seeds"]) == ("c", "holds", 30, 100, 1) and line["low"] < 30 < line["high"]
