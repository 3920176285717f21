"What makes a step fast, told by counts and equalities; no clock decides."
import subprocess, sys
from dataclasses import replace

import pytest
import torch

from adaptive_at.tables import plan as plans
from adaptive_at.attacks import PGD
from adaptive_at.data.datasets import DIGITS
from adaptive_at.algorithms.baselines import Training, at, natural, trades
from adaptive_at.algorithms.daat import daat
from adaptive_at.networks import NarrowResNet
from adaptive_at.tables.parameters import check_parameters
from adaptive_at.tables.plan import Cost
from adaptive_at.tables.results import execute
from adaptive_at.training import Monitor, Run
from adaptive_at.awp import AT_AWP


def faults(kept):
    "Page faults of five times five 24 MB tensors, after a first time, in a process of its own."
    code = f"""
import resource, torch
from adaptive_at.training import threads
def work():
    for _ in range(5): [torch.ones(6 * 2**20) for _ in range(5)]
def count(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
if {kept}:
    with threads(1): pass
work(); before = count(); work(); print(count() - before)"""
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_memory_is_kept_for_the_next_pass():
    assert faults(kept=True) < 100   # without it 30,000 here; where the system keeps memory anyway, none


# --- the cost model -----------------------------------------------------------------------------------------------------------------

def test_an_epoch_costs_its_passes_of_both_kinds():
    cost = Cost(attack=1., update=10., judging=3.)
    assert [cost.epoch(m, 3) / 3 for m in (natural(), at(0.1), daat(0.1), trades(0.1), replace(at(0.1), weights=AT_AWP))] == [10, 20, 21, 30, 30]
    run = Run("digits", "", NarrowResNet(), at(0.1), Training(epochs=4), Monitor(PGD(0.1, 4), 0.1, examples=60, every=2), train_examples=100)
    assert cost.run(run, DIGITS) == 4 * (100 * 20 + (2 * 60 + 60) * 5 / 2 * 3)   # training, validation and test part; four steps and the natural pass, in fp32


def test_the_estimate_is_of_what_is_left_and_stands_beside_what_it_took(tmp_path, monkeypatch, capsys):
    from adaptive_at.papers.table1_daat import TABLE
    asked = []
    def measured(network, info, device, batch, precision):
        asked.append((network, batch, precision))
        return Cost(1e-4, 2e-4, 4e-4)
    monkeypatch.setattr(plans, "measured_cost", measured)
    def plan(rows): return plans.Plan(TABLE, plans.open_session(check_parameters("table1_daat", dict(preset="quick", device="cpu", epochs=2, train_examples=100, test_examples=20, rows=rows, columns="natural", figures="none", outputs=str(tmp_path)))))
    both = plan("Natural,Standard AT")
    block = both.blocks[0]
    before = {row: both.left(block, row) for row in block.runs}
    assert set(asked) == {(NarrowResNet(), 128, "fp32")}
    natural_, = block.runs["Natural"]
    assert before["Natural"] == plans.Remaining([(natural_, 0)], ["natural"], pytest.approx(Cost(1e-4, 2e-4, 4e-4).run(natural_, block.info)), pytest.approx(20 * 4e-4))
    assert both.seconds() == pytest.approx(sum(left.seconds for left in before.values()) / both.workers(block))
    results = execute(plan("Natural"), lambda line: None)
    assert "estimated" in results.estimated and results.provenance().data.loc["training and evaluating", "this run"] == results.estimated
    assert both.left(block, "Natural") == plans.Remaining([], []) and both.left(block, "Standard AT") == before["Standard AT"]
    again = execute(plan("Natural"), lambda line: None)
    assert again.estimated == "" and "training and evaluating" not in again.provenance().data.index   # nothing was done


def test_a_plan_does_not_need_the_memory_of_a_large_batch(tmp_path, monkeypatch):
    from adaptive_at.papers.table1_daat import TABLE
    asked = []
    monkeypatch.setattr(plans, "measured_cost", lambda network, info, device, batch, precision: asked.append(batch) or Cost(1e-4, 2e-4, 4e-4))
    plan = plans.Plan(TABLE, plans.open_session(check_parameters("table1_daat", dict(preset="quick", device="cpu", outputs=str(tmp_path)))))
    run = plan.blocks[0].runs["Natural"][0]
    for batch in (16, 2048): plan.cost(replace(run, training=replace(run.training, batch=batch)), plan.blocks[0].info)
    assert asked == [16, 128]


def test_a_cost_is_measured():
    cost = plans.measured_cost(NarrowResNet(width_factor=4), DIGITS, torch.device("cpu"), 16, "bf16")
    assert 0 < cost.attack and 0 < cost.update and 0 < cost.judging
    assert plans.measured_cost(NarrowResNet(width_factor=4), DIGITS, torch.device("cpu"), 16, "bf16") is cost   # once for each network, batch and precision


def test_what_judges_a_run_is_priced_in_fp32(monkeypatch):
    lowered = []
    class Watched(NarrowResNet):
        def build(self, *args):
            model = super().build(*args)
            model.register_forward_pre_hook(lambda module, _: lowered.append((torch.is_autocast_enabled("cpu"), module.training)))
            return model
    def measured(precision):
        lowered.clear()
        return plans.measured_cost.__wrapped__(Watched(width_factor=4), DIGITS, torch.device("cpu"), 4, precision), set(lowered)
    cost, seen = measured("bf16")
    assert seen == {(True, False), (True, True), (False, False)} and cost.judging != cost.attack   # attack, update, evaluation
    cost, seen = measured("fp32")
    assert seen == {(False, False), (False, True)} and cost.judging == cost.attack
