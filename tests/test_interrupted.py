"Inside an epoch and inside an evaluation: saved, stopped and gone on with; locks, and what is done while another process holds one."
import copy
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from adaptive_at.base import files
from adaptive_at.tables import plan as plans
from adaptive_at.store import runs
from adaptive_at.base import rng
from adaptive_at import training
from adaptive_at.jobs import pool
from adaptive_at.attacks import PGD
from adaptive_at.base.errors import Busy, UserError
from adaptive_at.base.files import Heartbeat, locked
from adaptive_at.data.datasets import CROP_FLIP
from adaptive_at.evaluation import Column, WhiteBox, evaluate, evaluation
from adaptive_at.algorithms.baselines import Training, at
from adaptive_at.algorithms.daat import daat
from adaptive_at.networks import fingerprint
from adaptive_at.papers.table1_daat import TABLE
from adaptive_at.tables.parameters import check_parameters
from adaptive_at.tables.plan import Plan, open_session
from adaptive_at.store.runs import Store
from adaptive_at.jobs.interrupts import Stopped, defer_interrupt
from adaptive_at.tables.results import execute, run as run_table
from adaptive_at.training import Monitor, Run, State, training_warnings, train
from adaptive_at.jobs.pool import run_jobs
from fingerprints import METHODS
from helpers import OneLayer, digits, random_data, robust_digits

ROOT = Path(__file__).resolve().parent.parent


def equal(a, b):
    "Are two nested states the same to the bit? Seconds may differ."
    if torch.is_tensor(a): return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def written(state):
    "A state as it is after a file."
    file = io.BytesIO()
    torch.save(state.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# Inside an epoch

@pytest.mark.parametrize("name", ["natural", "fat", "daat-trades", "daat-mart", "daat-joint", "saat-up-awp", "iaat", "mixup-at", "cat", "cat-v0", "dra", "trades-awp"])
def test_a_run_goes_on_after_any_batch(name):
    data = random_data(n=20, side=9)
    run = Run("random", "", OneLayer3(), METHODS[name], Training(epochs=3, batch=8), Monitor(PGD(0.1, 1), 0.1, examples=4, every=2))
    saves = []
    whole = train(run, data, State(run, data), lambda s: saves.append(written(s)), lambda line: None, should_save=lambda: True)
    assert [(s["epoch"], s["batch"]) for s in saves] == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (3, 0)]
    unasked = train(run, data, State(run, data), report_line=lambda line: None)
    assert equal(unasked.state_dict(), whole.state_dict())   # looking changes nothing
    for saved in (saves[1], saves[3], saves[7]):
        again = State(run, data)
        again.load_state_dict(copy.deepcopy(saved))
        assert equal(train(run, data, again, report_line=lambda line: None).state_dict(), whole.state_dict()), (saved["epoch"], saved["batch"])


class OneLayer3(OneLayer):
    "For images of 9 pixels."
    def parts(self, channels): return super().parts(channels)[0], 8 * 25


def spec(**changes):
    "Four epochs of three batches; the second epoch is the best (asserted below)."
    return replace(Run("digits", digits().info.identity, OneLayer(), daat(0.1, steps=1), Training(epochs=4, batch=32, lr=0.3), Monitor(PGD(0.05, 1), 0.1, 40), train_examples=96, seed=1), **changes)


def numbers_of(store, run):
    facts = store.facts(run)
    return ([{k: v for k, v in h.items() if k != "seconds"} for h in store.history(run)], facts["weights"], facts["best"], {k: v.tobytes() for k, v in store.radius(run).items()})


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("kept"))
    store.train(spec(), digits(), report_line=lambda line: None)
    assert store.facts(spec())["best"]["epoch"] < 4
    return store


class Killed(BaseException): "Instead of SIGKILL."


def killed_after(store, run, states, monkeypatch):
    "Train with a checkpoint after every batch, until the `states`-th is in place."
    written, counted = runs.write_checkpoint, []
    def dying(path, *args):
        written(path, *args)
        if path.name == "within.pt":
            counted.append(path)
            if len(counted) == states: raise Killed
    with monkeypatch.context() as m:
        m.setattr(runs, "write_checkpoint", dying)
        m.setattr(Store, "every", -1.)
        with pytest.raises(Killed): store.train(run, digits(), report_line=lambda line: None)


def test_a_killed_run_goes_on_inside_its_epoch(kept, tmp_path, monkeypatch):
    store, said = Store(tmp_path), []
    for states, where in ((1, "batch 1 of epoch 1 of 4"), (4, "batch 1 of epoch 3 of 4")):
        killed_after(store, spec(), states, monkeypatch)
        with monkeypatch.context() as m:   # says where it would go on
            m.setattr(runs, "train", lambda *args: (_ for _ in ()).throw(Killed))
            with pytest.raises(Killed): store.train(spec(), digits(), report_line=said.append)
        assert said[-1] == f"continuing after {where}"
    store.train(spec(), digits(), report_line=said.append)
    assert numbers_of(store, spec()) == numbers_of(kept, spec())
    assert not (store.folder(spec())/"within.pt").exists()


def test_a_damaged_state_inside_an_epoch_is_set_aside(kept, tmp_path, monkeypatch):
    store, said = Store(tmp_path), []
    killed_after(store, spec(), 6, monkeypatch)
    path = store.folder(spec())/"within.pt"
    path.write_bytes(path.read_bytes()[:-100])
    store.train(spec(), digits(), report_line=said.append)
    assert said[0].startswith("within.pt of ") and "set aside as within.damaged" in said[0] and said[1] == "continuing after epoch 2 of 4"
    assert numbers_of(store, spec()) == numbers_of(kept, spec())


@pytest.mark.parametrize("states", [3, 6, 8])
def test_the_best_weights_are_found_again_from_inside_an_epoch(states, kept, tmp_path, monkeypatch):
    store = Store(tmp_path)
    killed_after(store, spec(), states, monkeypatch)
    best = store.folder(spec())/"best.pt"
    if best.exists(): best.write_bytes(b"")
    store.train(spec(), digits(), report_line=lambda line: None)
    assert numbers_of(store, spec()) == numbers_of(kept, spec())


def test_an_older_state_inside_an_epoch_is_not_used(kept, tmp_path, monkeypatch):
    store, said = Store(tmp_path), []
    killed_after(store, spec(), 1, monkeypatch)
    old = (store.folder(spec())/"within.pt").read_bytes()
    killed_after(store, spec(), 3, monkeypatch)
    (store.folder(spec())/"within.pt").write_bytes(old)   # as if the process had died before it could remove it
    store.train(spec(), digits(), report_line=said.append)
    assert said[0] == "continuing after epoch 1 of 4" and numbers_of(store, spec()) == numbers_of(kept, spec())


# Ctrl-C

def interrupting(at, monkeypatch, seconds=0.):
    "Send SIGINT in the `at`-th training step, which takes some time more."
    step, counted = training.train_step, []
    def slow(*args):
        counted.append(1)
        if len(counted) == at:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(seconds)
        return step(*args)
    monkeypatch.setattr(training, "train_step", slow)


def grace(seconds, monkeypatch): monkeypatch.setattr(defer_interrupt.__wrapped__, "__defaults__", (seconds,))   # a busy machine is slow


@pytest.mark.parametrize("at, after", [(1, "batch 1 of epoch 1 of 4"), (3, "epoch 1 of 4"), (5, "batch 2 of epoch 2 of 4")])
def test_ctrl_c_ends_the_step_and_saves(at, after, kept, tmp_path, monkeypatch):
    store, said = Store(tmp_path), []
    with monkeypatch.context() as m:
        interrupting(at, m)
        grace(60., m)
        with pytest.raises(Stopped) as caught: store.train(spec(), digits(), report_line=said.append)
    assert str(caught.value) == f"stopped; run the same command again, {store.folder(spec()).name} goes on after {after}" and caught.value._render_traceback_() == [str(caught.value)]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    store.train(spec(), digits(), report_line=said.append)
    assert f"continuing after {after}" in said and numbers_of(store, spec()) == numbers_of(kept, spec())


def test_ctrl_c_in_a_step_that_takes_too_long_keeps_the_last_checkpoint(kept, tmp_path, monkeypatch):
    store, said = Store(tmp_path), []
    with monkeypatch.context() as m:
        interrupting(5, m, seconds=300)
        grace(0.1, m)
        with pytest.raises(Stopped, match="goes on after epoch 1 of 4$"): store.train(spec(), digits(), report_line=said.append)
    store.train(spec(), digits(), report_line=said.append)
    assert "continuing after epoch 1 of 4" in said and numbers_of(store, spec()) == numbers_of(kept, spec())


def test_ctrl_c_reaches_the_workers_and_what_they_say_is_heard(monkeypatch):
    monkeypatch.setattr(pool, "LONGEST", 60.)
    def job(report_line):
        with defer_interrupt(60.) as asked:
            report_line("begun")
            while not asked(): time.sleep(0.01)
            report_line("saved")
    said = []
    def heard(line):
        said.append(line)
        if said == ["begun"] * 2: os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Stopped, match="run the same command again"): run_jobs([job] * 3, 2, heard)
    assert said == ["begun"] * 2 + ["saved"] * 2


def test_a_stopped_table_is_one_sentence_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "cores", lambda: 1)
    size = dict(preset="quick", device="cpu", rows="Natural", columns="clean", figures="none", epochs=2, train_examples=64, test_examples=20, outputs=str(tmp_path))
    with monkeypatch.context() as m:
        m.setattr(runs, "evaluate", lambda *args: os.kill(os.getpid(), signal.SIGINT) or time.sleep(1))
        with pytest.raises(Stopped) as caught: run_table(TABLE, **size)
    assert str(caught.value) == "stopped; run the same command again, it goes on from there"
    assert run_table(TABLE, **size).frame.value.notna().all()


# Inside an evaluation

class Scores(Column):
    "A score per example."
    def batch(self, model, x, y, noise, source): return model(x).softmax(1)[torch.arange(len(y)), y]


@pytest.mark.parametrize("column", [WhiteBox(PGD(0.05, 3), 0.12, restarts=2), Scores()], ids=lambda c: type(c).__name__)
def test_an_evaluation_goes_on_after_any_batch(column, tmp_path):
    model, data, saves, batches = robust_digits(), digits(), [], []
    e = replace(evaluation(column, data.info.identity, fingerprint(model), examples=45), batch=10)
    whole = evaluate(e, model, data, save=lambda p: saves.append(json.loads(json.dumps(p))))
    assert [s["batch"] for s in saves] == [1, 2, 3, 4] and 5 < whole["accuracy"] < 95
    counted = lambda p: batches.append(p["batch"])
    for saved in saves: assert evaluate(e, model, data, saved=saved, save=counted) == whole
    assert batches == [2, 3, 4, 3, 4, 4]   # nothing is attacked twice


# Locks

@pytest.fixture
def without_locks(monkeypatch):
    "A file system that has no locks."
    class None_(files.FileLock):
        def acquire(self, *args, **kwargs): raise OSError(38, "Function not implemented")
    monkeypatch.setattr(files, "FileLock", None_)


def test_a_lock_says_who_holds_it(tmp_path):
    with locked(tmp_path/"run"/"lock"):
        with pytest.raises(Busy, match=rf"works on run \(process {os.getpid()} on \S+ since \d{{4}}-"):
            with locked(tmp_path/"run"/"lock", wait=False): pass
    with locked(tmp_path/"run"/"lock", wait=False): pass


def test_a_file_system_without_locks_gets_a_heartbeat(tmp_path, without_locks, monkeypatch):
    monkeypatch.setattr(files, "BEAT", 0.05)
    path, held = tmp_path/"lock", tmp_path/"lock.held"
    with locked(path):
        first = held.stat().st_mtime_ns
        with pytest.raises(Busy, match="process"):
            with locked(path, wait=False): pass
        time.sleep(0.3)
        assert held.stat().st_mtime_ns > first
    assert not held.exists()


def test_a_heartbeat_that_stopped_is_taken_over_and_a_fresh_one_is_not(tmp_path, without_locks):
    path, held = tmp_path/"lock", tmp_path/"lock.held"
    held.write_text("")
    os.utime(held, (time.time() - 590,) * 2)
    with pytest.raises(Busy):
        with locked(path, wait=False): pass
    os.utime(held, (time.time() - 610,) * 2)
    with locked(path, wait=False): assert time.time() - held.stat().st_mtime < 60
    Heartbeat(path)._begin(os.open(held, os.O_CREAT))
    other = Heartbeat(path)
    other._put_away()   # by a waiter that looked before the holder came
    assert held.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_one_sentence(tmp_path):
    (tmp_path/"closed").mkdir(mode=0o555)
    with pytest.raises(UserError, match="could not be written"):
        with locked(tmp_path/"closed"/"run"/"lock"): pass


def test_what_another_process_trains_is_waited_for_last(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "cores", lambda: 1)
    size = dict(preset="quick", device="cpu", rows="Natural,Standard AT,TRADES", columns="clean", figures="none", epochs=1, train_examples=64, test_examples=20, outputs=str(tmp_path))
    plan, said = Plan(TABLE, open_session(check_parameters("table1_daat", size))), []
    first = plan.store.folder(plan.blocks[0].runs["Natural"][0])
    table = threading.Thread(target=execute, args=(plan, said.append))
    with locked(first/"lock"):
        table.start()
        for _ in range(600):
            if any("waiting" in line for line in said): break
            time.sleep(0.05)
        before = list(said)
    table.join(60)
    assert [line for line in before if line.endswith(": trained")] == ["Standard AT: trained", "TRADES: trained"]
    assert [line for line in said if "waiting" in line] == [line for line in before[-1:]] and f"works on {first.name} (process" in before[-1]
    assert "Natural: trained" in said and not any("waiting" in line for line in said[len(before):])


# Guards

def history(**columns): return [dict(epoch=i + 1., mean_realised=0.1, top_class=20., test_robust=30., least_eps=0.05, most_eps=0.1) | {k: v[i] for k, v in columns.items()} for i in range(4)]


@pytest.mark.parametrize("columns, said", [
    ({}, []),
    (dict(top_class=(20., 20., 20., 95.)), ["collapsed in training: 95% of the predictions were one class after the last epoch"]),
    (dict(top_class=(95., 95., 95., 20.)), []),
    (dict(test_robust=(5., 0., 0., 0.)), ["robust accuracy was 0 the last 3 times it was measured in training"]),
    (dict(test_robust=(0., 0., 0., 5.)), []),
    (dict(test_robust=(0., 0., 0., 0.), mean_realised=(0., 0., 0., 0.)), []),   # natural training
    (dict(least_eps=(0., 0., 0., 0.), most_eps=(0.1, 0., 0., 0.)), ["the radii did not adapt: all stood at 0 in the last 3 epochs"]),
    (dict(least_eps=(0.1,) * 4), ["the radii did not adapt: all stood at 0.1 in the last 3 epochs"]),
    (dict(least_eps=(0., 0.1, 0.1, 0.09)), [])])
def test_what_a_history_makes_suspicious(columns, said):
    assert training_warnings(spec(), history(**columns)) == said
    assert training_warnings(spec(method=at(0.1)), history(**columns)) == [text for text in said if "adapt" not in text]   # a fixed radius is where it should be


class Sharp(type(at(0.1).objective)):
    "Once, a loss that is a number with a gradient that is none."
    version = 1
    def losses(self, batch, x_adv, target, eps):
        for loss in super().losses(batch, x_adv, target, eps):
            yield lambda model: (lambda logits: loss(model) + 0 * (logits - logits.detach()).abs().sum().sqrt())(model(x_adv))


def test_a_gradient_that_is_no_number_ends_the_run_at_its_last_good_state(tmp_path, monkeypatch):
    store, said, good = Store(tmp_path), [], spec()
    step = training.train_step
    counted = []
    def spoilt(method, *args):
        counted.append(1)
        return step(replace(method, objective=Sharp()) if len(counted) == 9 else method, *args)   # the last step of the third epoch: its loss is a number
    monkeypatch.setattr(training, "train_step", spoilt)
    monkeypatch.setattr(Store, "every", -1.)
    assert not store.train(good, digits(), report_line=said.append)
    assert store.facts(good)["diverged"] == "weights or radii were not finite after epoch 3 of 4" and said[-1].startswith("diverged: ")
    saved = torch.load(store.folder(good)/"last.pt", weights_only=True)
    assert saved["epoch"] == 2 and all(v.isfinite().all() for v in saved["model"].values())
    within = torch.load(store.folder(good)/"within.pt", weights_only=True)
    assert (within["epoch"], within["batch"]) == (2, 2) and all(v.isfinite().all() for v in within["model"].values())
    assert len(store.history(good)) == 2


def test_a_state_that_is_spoilt_is_not_saved_inside_an_epoch(tmp_path, monkeypatch):
    store = Store(tmp_path)
    step, counted = training.train_step, []
    def spoilt(method, *args):
        counted.append(1)
        return step(replace(method, objective=Sharp()) if len(counted) == 5 else method, *args)   # the second step of the second epoch
    monkeypatch.setattr(training, "train_step", spoilt)
    monkeypatch.setattr(Store, "every", -1.)
    store.train(spec(), digits(), report_line=lambda line: None)
    within = torch.load(store.folder(spec())/"within.pt", weights_only=True)
    assert (within["epoch"], within["batch"]) == (1, 1) and "diverged" in store.facts(spec())


# A notebook

def test_an_interrupted_notebook_is_one_sentence(tmp_path):
    told = dict(preset="quick", device="cpu", rows="DAAT", columns="clean", figures="none", epochs=400, train_examples=256, test_examples=20)
    command = [sys.executable, "-m", "papermill", ROOT/"nbs"/"table1_daat.ipynb", "out.ipynb", "--no-progress-bar", *(part for k, v in told.items() for part in ("-p", k, str(v)))]
    papermill = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("outputs/runs/*/history.csv")) and papermill.poll() is None: time.sleep(0.02)
    kernel, = psutil.Process(papermill.pid).children()
    kernel.send_signal(signal.SIGINT)   # what a cluster's queue is to send
    said = papermill.communicate(timeout=120)[1]
    assert papermill.returncode != 0
    cells = json.loads((tmp_path/"out.ipynb").read_text())["cells"]
    error, = [o for c in cells for o in c.get("outputs", []) if o["output_type"] == "error"]
    sentence, = error["traceback"]
    assert re.fullmatch(r"stopped; run the same command again, digits-\S+ goes on after (batch 1 of )?epoch \d+ of 400", sentence), sentence
    assert said.rstrip().endswith(sentence)


# What else the process does

def disturb(seed):
    "Move every generator of the process, and leave another shuffled loader half read."
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    loader = iter(torch.utils.data.DataLoader(torch.arange(20), batch_size=3, shuffle=True))
    next(loader)
    random.random(), np.random.rand(3), torch.rand(5), torch.randperm(7)
    return loader


def resumed(saved, run, data, seed, stop=None):
    "Go on from a saved state in a process that does other things too; the state after `stop` saves, or at the end."
    state, saves = State(run, data), []
    state.load_state_dict(copy.deepcopy(saved))
    loader = disturb(seed)
    def noted(s):
        saves.append(written(s))
        next(loader, None), torch.rand(3)
        if len(saves) == stop: raise Killed
    try: return train(run, data, state, noted, lambda line: disturb(seed + 1), should_save=lambda: True).state_dict()
    except Killed: return saves[-1]


def disturbed_twice(name):
    "A run that was stopped twice, and one that was not."
    data = random_data(n=20, side=9)
    run = Run("random", "", OneLayer3(), METHODS[name], Training(epochs=3, batch=8), Monitor(PGD(0.1, 1), 0.1, examples=4, every=2), augment=CROP_FLIP)
    saves = []
    whole = train(run, data, State(run, data), lambda s: saves.append(written(s)), lambda line: None, should_save=lambda: True)
    second = resumed(saves[1], run, data, 1, stop=3)   # from batch 2 of epoch 1 to batch 2 of epoch 2
    assert (second["epoch"], second["batch"]) == (1, 2)
    return resumed(second, run, data, 2), whole.state_dict()


@pytest.mark.parametrize("name", ["fat", "daat-trades", "saat-up-awp", "iaat", "mixup-at", "cat", "dra"])
def test_going_on_does_not_depend_on_what_else_the_process_does(name):
    again, whole = disturbed_twice(name)
    assert equal(again, whole)


@pytest.mark.parametrize("generator", [lambda n: torch.randperm(n), lambda n: torch.from_numpy(np.random.permutation(n)), lambda n: torch.tensor(random.sample(range(n), n))], ids=["torch", "numpy", "random"])
def test_an_order_from_a_global_generator_would_be_noticed(generator, monkeypatch):
    monkeypatch.setattr(rng, "permutation", lambda key, n, device="cpu": generator(n))
    again, whole = disturbed_twice("fat")
    assert not equal(again, whole)
