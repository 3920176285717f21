"Any value for any parameter of any table: a plan, or one sentence that names the parameter; never anything else, and nothing is written."
import importlib
import math
import os

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from adaptive_at.data import datasets
from adaptive_at.base.errors import UserError
from adaptive_at.tables.parameters import COMMON, TABLES, about, check_parameters
from adaptive_at.tables.plan import Plan, open_session

WORDS = ["", " ", ",", "all", "auto", "quick", "fast", "paper", "digits", "cifar10", "cifar100,svhn", "mnist", "imagenet", "imagefolder:nowhere", "imagefolder:", "natural", "clean,AA", "Natural", "Standard AT,DAAT", "AT (",
         "PGD-20", "main", "none", "fig2,fig3", "cpu", "cuda", "cuda:7", "mps", "tpu", "fp32", "bf16", "narrow", "local", "ray", "resnet18", "wrn34-10", "data", "/proc/nowhere", "../..", "a\0b", "~", "é☃", "None", "0"]
values = (st.sampled_from(WORDS) | st.text(max_size=6) | st.booleans() | st.none() | st.integers(-3, 6) | st.sampled_from([10**6, 10**18, -10**18]) | st.floats() | st.floats(0, 1)
          | st.lists(st.integers(), max_size=2) | st.just({}) | st.tuples(st.integers()))


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        m.setattr(datasets, "reachable", lambda url: False)
        yield folder


@pytest.mark.parametrize("table", [t for t in TABLES if t != "frontier"])
def test_any_parameters_are_a_plan_or_a_sentence(table, elsewhere, capsys):
    known, module = COMMON | about(table), importlib.import_module(f"adaptive_at.papers.{table}").TABLE
    outcomes = {"plan": 0, "sentence": 0}

    @settings(max_examples=40, suppress_health_check=list(HealthCheck))
    @given(st.dictionaries(st.sampled_from([*known, *about(table), "epoch"]), values, min_size=1, max_size=2))
    def fuzzed(told):
        parameters = dict(preset="quick", dry_run=True, device="cpu") | told
        try: plan = Plan(module, open_session(check_parameters(table, dict(parameters))))
        except UserError as e:
            text = str(e)
            assert text.endswith(".") and "\n" not in text and len(text) < 1500, text
            assert any(name in text for name in told) or any(str(v) in text for v in told.values()), (text, told)
            outcomes["sentence"] += 1
        else:
            assert plan.blocks and all(b.rows and b.runs for b in plan.blocks) and 0 < plan.blocks[0].protocol.eps < 1
            assert all(r.training.epochs >= 1 and not math.isnan(r.training.lr) for b in plan.blocks for runs in b.runs.values() for r in runs)
            outcomes["plan"] += 1
        assert not os.listdir(elsewhere), told
    fuzzed()
    assert min(outcomes.values()) > 2, outcomes
