"The frontier: which points are on it, what they cost, and where they come from."
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from adaptive_at.base.errors import UserError
from adaptive_at.algorithms.dra import dra_finetune
from adaptive_at.tables.frontier import cost, draw, front, listing, measure, trained
from adaptive_at.algorithms.baselines import Training, at, natural, trades
from adaptive_at.networks import NarrowResNet
from adaptive_at.tables.parameters import check_parameters
from adaptive_at.tables.plan import open_session
from adaptive_at.tables.results import run
from adaptive_at.attacks import PGD
from adaptive_at.training import Monitor, Run
from adaptive_at.awp import AT_AWP

TINY = dict(preset="quick", device="cpu", epochs=1, train_examples=300, test_examples=10)


def test_the_front_is_what_no_other_point_beats():
    natural_, robust = np.array([90., 80, 85, 80, 90]), np.array([40., 50, 39, 45, 40])
    assert front(natural_, robust).tolist() == [True, True, False, False, True]  # equal points do not beat each other
    points = np.random.default_rng(0).random((2, 60))
    on = front(*points)
    for i in range(60): assert on[i] == (not any((points[:, j] >= points[:, i]).all() and (points[:, j] > points[:, i]).any() for j in range(60)))


def test_cost_counts_every_gradient_and_the_run_it_starts_from():
    def spec(method, epochs, start=None): return Run("digits", "", NarrowResNet(), method, Training(epochs=epochs), Monitor(PGD(0.1, 1), 0.1), start=start)
    assert [cost(spec(m, 10)) for m in (natural(), at(0.1), trades(0.1), replace(at(0.1), weights=AT_AWP))] == [10, 110, 120, 120]
    assert cost(spec(dra_finetune(0.1), 6, spec(natural(), 20))) == 6 * (5 + 2) + 20


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    from adaptive_at.papers.table1_daat import TABLE
    folder = tmp_path_factory.mktemp("frontier")
    run(TABLE, **TINY, rows="Natural,Standard AT", columns="clean", figures="none", outputs=str(folder))
    return folder


def session(outputs, **parameters): return open_session(check_parameters("frontier", TINY | {"outputs": str(outputs)} | parameters))


def test_it_draws_what_the_store_holds_and_trains_nothing(outputs):
    runs = {p.name for p in (outputs/"runs").iterdir()}
    s = session(outputs)
    found = trained(s)
    assert sorted(t.label for t in found.values()) == ["Natural", "Standard AT"] and {t.table for t in found.values()} == {"table1_daat"}
    frame = measure(found, s, report_line=lambda line: None)
    assert {p.name for p in (outputs/"runs").iterdir()} == runs and set(frame.run) == set(found)
    assert (frame.AA <= frame.natural).all() and (frame.AA_low <= frame.AA).all() and (frame.AA <= frame.AA_high).all() and frame.front.any()
    draw(frame)
    assert listing(frame, s).data.shape == (2, 4)
    assert [t.label for t in trained(session(outputs, rows="standard at")).values()] == ["Standard AT"]
    assert all(text.startswith(("natural: ", "AA: ")) for text in frame.warning if text)


def test_the_listing_marks_a_doubtful_point():
    points = pd.DataFrame([dict(row=row, table="table1_daat", natural=90., natural_low=88., natural_high=92., natural_n=100, AA=aa, AA_low=aa - 2, AA_high=aa + 2, AA_n=50, cost=10, front=True, warning=warning)
                           for row, aa, warning in (("Natural", 60., "AA: zero gradients"), ("Standard AT", 50., ""))])
    table = listing(points, SimpleNamespace(preset=SimpleNamespace(name="quick")))
    assert list(table.data.index.get_level_values("row")) == ["Natural ⚠", "Standard AT"] and "⚠ Natural (table1_daat): AA: zero gradients." in table.to_html()


def test_bad_input(outputs, tmp_path):
    for parameters, text in ((dict(datasets="digits,mnist"), "one dataset"), (dict(rows="DAAT"), "'daat', which is not a trained row on digits; trained are Natural, Standard AT")):
        with pytest.raises(UserError, match=text): trained(session(outputs, **parameters))
    assert trained(session(tmp_path)) == {}
