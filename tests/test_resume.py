"Killed at any moment, the same command ends with the same results; two processes share a store; an edited formula trains anew."
import contextlib, csv, multiprocessing, os, random, re, signal, subprocess, sys, time
from dataclasses import dataclass, replace
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
import torch
from nbclient import NotebookClient

from adaptive_at.store import runs
from adaptive_at.base.schedules import Milestones
from adaptive_at.algorithms.baselines import at
from adaptive_at.objectives import AdversarialCE
from adaptive_at.papers.table1_daat import TABLE
from adaptive_at.tables.plan import Row
from adaptive_at.tables.results import run
from helpers import contents

ROOT = Path(__file__).resolve().parent.parent
SIZE = dict(preset="quick", device="cpu", epochs=6, train_examples=384, test_examples=20, eps=0.25, rho=0.005, figures="none")  # so small a rho that the radii move at once
WHOLE = dict(SIZE, rows="DAAT,MART", columns="clean,PGD-20,AA,AT")  # and Standard AT, as a surrogate
SMALL = dict(SIZE, rows="DAAT", columns="clean,FGSM", epochs=4, train_examples=128)  # best is selected after epochs 3 and 4
BATCHED = replace(TABLE, columns=lambda p: TABLE.columns(p) | {"AA": replace(TABLE.columns(p)["AA"], batch_size=5)})  # AutoAttack is killed between its batches, too


# What a store holds

def among(found, expected):
    "All that was found is as expected."
    wrong = [f"{name} {'differs' if name in expected else 'is new'}" for name in found if found[name] != expected.get(name)]
    assert not wrong, "; ".join(wrong)


def equal(found, expected):
    among(found, expected)
    assert not expected.keys() - found.keys()


# Processes that can be killed

CONTEXT = multiprocessing.get_context("forkserver")  # children of one process that has imported all: no seconds of imports for each
CONTEXT.set_forkserver_preload("adaptive_at.papers.table1_daat pyautoattack sklearn.datasets torch._dynamo IPython nbclient pytest".split())


def work(log, parameters, kill_at):
    "A child's whole life: one table, what it does written to `log`; SIGKILL just before its `kill_at`-th file takes its place."
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    for name in ("train", "evaluate"): setattr(runs, name, announced(name, getattr(runs, name)))
    replaced, put = 0, os.replace
    def counted(*args):
        nonlocal replaced
        replaced += 1
        if replaced == kill_at: os.kill(os.getpid(), signal.SIGKILL)
        put(*args)
    if kill_at: os.replace = counted
    run(BATCHED, **parameters)


def announced(what, call):
    "`call`, which says when it really works."
    def said(subject, *args):
        print(f"working: {what} {subject.id}")
        return call(subject, *args)
    return said


def process(log, outputs, parameters, kill_at=0):
    child = CONTEXT.Process(target=work, args=(str(log), parameters | {"outputs": str(outputs)}, kill_at))
    child.start()
    return child


def killed(child, victim=None):
    "Kill a process, or only the `victim` among its workers; no worker outlives it."
    workers = psutil.Process(child.pid).children(recursive=True)
    (victim or child).kill()
    child.join()
    assert child.exitcode == (1 if victim else -signal.SIGKILL)
    assert not psutil.wait_procs(workers, 10)[1]


def ended(child, log):
    child.join(300)
    assert child.exitcode == 0, f"exit code {child.exitcode}:\n{log.read_text()}"


def epochs_done(outputs): return sum(len(p.read_text().splitlines()) - 1 for p in (outputs/"runs").glob("*/history.csv"))


def attacked(outputs):
    "How far AutoAttack is in each row."
    found = []
    for path in (outputs/"runs").glob("*/evals/autoattack*.part.json"):
        with contextlib.suppress(FileNotFoundError): found.append(path.read_text())
    return found


def wait_until(condition, *alive):
    "Poll; False when a process ends before."
    while not condition():
        if not all(p.is_alive() for p in alive): return False
        time.sleep(0.002)
    return True


def reference(folder, parameters):
    "An uninterrupted run in this process, whose global random state is not the children's."
    torch.manual_seed(1)
    began = time.perf_counter()
    results = run(BATCHED, **parameters, outputs=str(folder))
    return folder, time.perf_counter() - began, results


@pytest.fixture(scope="module")
def whole(tmp_path_factory): return reference(tmp_path_factory.mktemp("whole"), WHOLE)


@pytest.fixture(scope="module")
def small(tmp_path_factory): return reference(tmp_path_factory.mktemp("small"), SMALL)


def test_the_reference_is_worth_comparing_with(whole):
    folder, _, results = whole
    daat = results.plan.blocks[0].runs["DAAT"][0]
    bank = results.plan.store.radius(daat)
    assert len(np.unique(bank["eps"])) > 50 and len({h["mean_eps"] for h in results.plan.store.history(daat)}) > 3  # the radii moved
    assert bank["snapshots"].shape == (6, 1197) and bank["path"].shape == (6, 64)
    found = contents(folder)
    assert sum(name.endswith("last.pt") for name in found) == 3 and sum("/evals/autoattack" in name for name in found) == 2


# Killed

def test_killed_at_random_moments(whole, tmp_path):
    folder, seconds, _ = whole
    outputs, log, rng = tmp_path/"outputs", tmp_path/"log", random.Random(20)
    landed = []

    def an_epoch(child):  # and a little more
        done = epochs_done(outputs)
        return wait_until(lambda: epochs_done(outputs) > done, child) and not child.join(rng.uniform(0, 0.15))
    def an_evaluation(child):
        return wait_until(lambda: list(outputs.rglob("evals/*.json")), child)
    def an_attack(child):
        done = attacked(outputs)
        return wait_until(lambda: set(attacked(outputs)) - set(done), child) and not child.join(rng.uniform(0, 0.3))
    def some_time(child): return not child.join(rng.uniform(0.1, 0.6))

    for moment in [some_time, an_epoch, an_epoch, some_time, an_epoch, an_evaluation, an_attack, an_attack, some_time, an_attack]:
        child = process(log, outputs, WHOLE)
        if moment(child) and child.is_alive():
            killed(child)
            within = "training" if epochs_done(outputs) < 18 else "evaluation"
            landed.append({an_attack: "AutoAttack", an_evaluation: "evaluation"}.get(moment, within))   # rows are evaluated while others train
        else: ended(child, log)
    print(f"killed in {', '.join(landed)}; uninterrupted {seconds:.1f} s")
    assert landed.count("training") >= 3 and landed.count("AutoAttack") >= 2 and len(landed) >= 6, landed
    ended(process(log, outputs, WHOLE), log)
    equal(contents(outputs), contents(folder))
    assert re.search(r"continuing after epoch \d of 6", log.read_text())


def test_only_a_worker_is_killed(whole, tmp_path):
    folder, _, _ = whole
    outputs, log = tmp_path/"outputs", tmp_path/"log"
    parameters = WHOLE | {"columns": "clean"}
    child = process(log, outputs, parameters)
    assert wait_until(lambda: epochs_done(outputs) >= 3, child)
    workers = psutil.Process(child.pid).children()
    if not workers: pytest.skip("one core: no workers")
    killed(child, random.Random(1).choice(workers))
    assert re.search("(training|evaluation) of .*: its process was ended by SIGKILL.*; run the same command again, it goes on where it stopped", log.read_text())
    ended(process(log, outputs, parameters), log)
    found, expected = contents(outputs), contents(folder)
    del found["table1_daat/quick/table.csv"]
    among(found, expected)
    assert epochs_done(outputs) == 12


def test_killed_before_any_single_file_is_in_place(small, tmp_path):
    folder, _, _ = small
    expected = contents(folder)
    for kill_at in range(1, 100):
        outputs, log = tmp_path/str(kill_at), tmp_path/f"{kill_at}.log"
        child = process(log, outputs, SMALL, kill_at)
        child.join()
        if child.exitcode == 0: break
        assert child.exitcode == -signal.SIGKILL, log.read_text()
        ended(process(log, outputs, SMALL), log)
        try: equal(contents(outputs), expected)
        except AssertionError as e: raise AssertionError(f"killed before file {kill_at} was in place, {e}") from None
    assert kill_at > 12  # spec, four epochs of last and history, best, bank, spec again, evaluations, table
    print(f"{kill_at - 1} places to be killed at")


def test_a_papermill_kernel_is_killed(whole, tmp_path):
    folder, _, _ = whole
    outputs = tmp_path/"outputs"
    parameters = WHOLE | {"columns": "clean,PGD-20"}
    told = [part for name, value in parameters.items() for part in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", ROOT/"nbs"/"table1_daat.ipynb", "out.ipynb", "--no-progress-bar", *told]
    with open(tmp_path/"papermill.log", "w") as log:
        papermill = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
        while epochs_done(outputs) < 3 and papermill.poll() is None: time.sleep(0.01)
        kernel, = psutil.Process(papermill.pid).children()
        assert any("ipykernel" in part for part in kernel.cmdline())
        workers = kernel.children(recursive=True)
        kernel.kill()
        assert papermill.wait(60) != 0
        assert not psutil.wait_procs(workers, 10)[1]
    assert 3 <= epochs_done(outputs) < 12
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    found, expected = contents(outputs), contents(folder)
    shown = found.pop("table1_daat/quick/table.csv").splitlines()
    among(found, expected)
    assert sum(name.endswith("last.pt") for name in found) == 2 and sum("/evals/" in name for name in found) == 4
    assert shown == [l for l in expected["table1_daat/quick/table.csv"].splitlines() if re.match(r"dataset|.*,(natural|PGD-20),", l)]


def test_a_truncated_checkpoint_is_set_aside(small, tmp_path, capsys):
    folder, _, results = small
    outputs, log = tmp_path/"outputs", tmp_path/"log"
    child = process(log, outputs, SMALL, kill_at=10)
    child.join()
    last, = outputs.rglob("last.pt")
    assert 2 < torch.load(last, weights_only=True)["epoch"] < 4
    last.write_bytes(last.read_bytes()[:last.stat().st_size // 2])
    run(TABLE, **SMALL, outputs=str(outputs))
    told = capsys.readouterr().out
    said, = [line for line in told.splitlines() if "set aside" in line]
    assert "continuing after epoch 2 of 4" in told  # from the checkpoint before
    assert "last.pt" in said and last.parent.name in said and "last.damaged" in said
    assert last.with_suffix(".damaged").exists()
    equal(contents(outputs), contents(folder))


@pytest.mark.parametrize("name, kill_at", [("last.pt", 0), ("best.pt", 12)], ids=["last of a finished run", "best of an unfinished run"])
def test_another_truncated_checkpoint_is_made_anew(name, kill_at, small, tmp_path, capsys):
    outputs, log = tmp_path/"outputs", tmp_path/"log"
    child = process(log, outputs, SMALL | {"columns": "clean"}, kill_at)
    child.join()
    path, = outputs.rglob(name)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    run(TABLE, **SMALL, outputs=str(outputs))
    assert f"{name} of {path.parent.name} is truncated or altered; it is set aside" in capsys.readouterr().out
    equal(contents(outputs), contents(small[0]))


def test_nothing_is_left_of_a_killed_process(small, tmp_path):
    outputs, log = tmp_path/"outputs", tmp_path/"log"
    process(log, outputs, SMALL, kill_at=6).join()
    ended(process(log, outputs, SMALL), log)
    assert not list(outputs.rglob(".*.part"))


# Two at once

@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "Two processes that ran one table on an empty store at once: the store, and what each said."
    folder = tmp_path_factory.mktemp("two")
    logs = [folder/"log1", folder/"log2"]
    children = [process(log, folder/"outputs", WHOLE | {"columns": "clean,PGD-20,AT"}) for log in logs]
    for child, log in zip(children, logs): ended(child, log)
    return folder/"outputs", [log.read_text() for log in logs]


def test_two_processes_share_an_empty_store(whole, two):
    outputs, said = two[0], "".join(two[1])
    worked = re.findall(r"working: .*", said)
    assert len(worked) == len(set(worked)) == 3 + 6, worked
    assert len(re.findall(r"epoch +\d+/6 ", said)) == 3 * 6
    found, expected = contents(outputs), contents(whole[0])
    shown = found.pop("table1_daat/quick/table.csv").splitlines()
    among(found, expected)
    assert shown == [l for l in expected["table1_daat/quick/table.csv"].splitlines() if ",AA," not in l]


def test_two_processes_count_each_run_once(two): assert sum(trained(said) for said in two[1]) == 3


# Diverged

@dataclass(frozen=True)
class Exploding(AdversarialCE):
    "A cross-entropy that is divided by zero after a while."
    divisor: float|Milestones = Milestones(at=(0.75,), values=(1., 0.))

    def losses(self, batch, x_adv, target, eps):
        for loss in super().losses(batch, x_adv, target, eps): yield lambda model: loss(model) / self.divisor


def with_rows(**rows): return replace(TABLE, rows=lambda p: {label.replace("_", " "): make(p) for label, make in rows.items()})


def test_a_diverged_run_is_marked_and_the_others_go_on(tmp_path):
    table = with_rows(Exploding=lambda p: replace(at(p.eps), objective=Exploding()), Standard_AT=lambda p: at(p.eps))
    parameters = SMALL | {"rows": "", "columns": "clean,PGD-20", "outputs": str(tmp_path)}
    results = run(table, **parameters)
    lines = results.frame.set_index(["row", "column"])
    assert lines.value["Exploding"].isna().all() and lines.value["Standard AT"].notna().all()
    assert all(re.fullmatch(r"diverged: the loss was (inf|nan) in epoch 3 of 4", w) for w in lines.warning["Exploding"]), list(lines.warning)
    assert not lines.warning["Standard AT"].str.contains("diverged").any()
    exploded = results.plan.store.folder(results.plan.blocks[0].runs["Exploding"][0])
    assert torch.load(exploded/"last.pt", weights_only=True)["epoch"] == 2  # the last good state
    assert "missing" in results.table().to_html() and "diverged" in results.table().to_html()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")}
    again = run(table, **parameters)
    assert again.frame.equals(results.frame) and {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")} == before


def test_a_diverged_run_is_not_counted_as_trained_again(tmp_path, capsys):
    table = with_rows(Exploding=lambda p: replace(at(p.eps), objective=Exploding()))
    for _ in range(2): run(table, **SMALL | {"rows": "", "columns": "clean"}, outputs=str(tmp_path))
    assert trained(capsys.readouterr().out.splitlines()[-1]) == 0


@pytest.mark.parametrize("at_once", [False, True])
def test_a_row_does_not_start_from_weights_that_diverged(tmp_path, capsys, at_once):
    explosion = Exploding(divisor=0.) if at_once else Exploding()   # with no good checkpoint, or after two epochs
    table = with_rows(Exploding=lambda p: replace(at(p.eps), objective=explosion), Tuned=lambda p: Row(at(p.eps), start="Exploding"), Standard_AT=lambda p: at(p.eps))
    parameters = SMALL | {"rows": "", "columns": "clean", "outputs": str(tmp_path)}
    results = run(table, **parameters)
    lines = results.frame.set_index("row")
    assert lines.value.notna().to_dict() == {"Exploding": False, "Tuned": False, "Standard AT": True}
    assert lines.warning["Tuned"].startswith("diverged: the run that it starts from: the loss was")
    capsys.readouterr()
    again = run(table, **parameters)
    assert "1 runs from the store (2 diverged), 0 trained; 1 evaluations from the store, 0 made" in capsys.readouterr().out
    assert again.plan.seconds() == 0, "what diverged is not planned again"


# Edited formulas

SETUP = """
from dataclasses import replace
from adaptive_at.algorithms.baselines import at
from adaptive_at.papers.table1_daat import TABLE
from adaptive_at.tables.plan import Row
from adaptive_at.radius import RadiusRule
from adaptive_at.tables.results import run
RATE = 0.5
def moved(eps): return RATE * eps
"""
RULE = """
class Shrinking(RadiusRule):
    "Every visit shrinks the radius."
    def after_step(self, bank, batch, x_adv, model):
        bank.eps[batch.index] = moved(bank.eps[batch.index])
"""
REWORDED = """
# the same rule
class Shrinking(RadiusRule):
    '''The same, in other words.'''

    def after_step(self, bank, batch,
                   x_adv, model):  # after each visit
        bank.eps[ batch.index ] = moved(bank.eps[batch.index])
"""
EDITED = RULE.replace("bank.eps[batch.index] = moved", "bank.eps[batch.index] = 0.9 * moved")
TRAIN = f"""
table = replace(TABLE, rows=lambda p: {{'Standard AT': at(p.eps), 'Shrinking AT': at(p.eps, Shrinking(p.eps))}})
results = run(table, **{SMALL | {"rows": "", "columns": "clean", "epochs": 2}})
rule = results.plan.blocks[0].runs['Shrinking AT'][0]
print('radius', results.plan.store.radius(rule)['eps'].min(), results.plan.store.history(rule)[-1]['mean_eps'], list(results.frame.row))
"""


def executed(folder, *cells):
    "A notebook of these cells in a new kernel; what each printed."
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return ["".join(o["text"] for o in c["outputs"] if o["output_type"] == "stream") for c in notebook.cells]


def trained(text): return int(re.search(r"(\d+) trained;", text)[1])


def test_a_rule_in_a_notebook_cell_is_a_new_row_and_trains_anew_when_edited(tmp_path):
    first = executed(tmp_path, SETUP, RULE, TRAIN,                   # a new row
                     REWORDED, TRAIN,                                # comments, docstring and layout only
                     EDITED, TRAIN,                                  # another formula
                     "RATE = 0.25", TRAIN,                           # a number that the formula uses
                     "def moved(eps): return RATE * eps / 2", TRAIN, # a function that it uses
                     "RATE = 0.5\ndef moved(eps): return RATE * eps", RULE, TRAIN)  # as at first
    assert [trained(text) for text in first if "trained" in text] == [2, 0, 1, 1, 1, 0]
    radii = [re.search(r"radius (\S+) (\S+) (.*)", text).groups() for text in first if "radius" in text]
    assert radii[0] == radii[1] == radii[5] and len(set(radii)) == 4
    assert float(radii[0][0]) == pytest.approx(0.25 / 4) and float(radii[2][0]) == pytest.approx(0.25 * 0.45**2)
    assert radii[0][2] == "['Standard AT', 'Shrinking AT']"
    again = executed(tmp_path, SETUP, REWORDED, TRAIN)               # another kernel, other cells
    assert trained(again[-1]) == 0 and radii[0] == re.search(r"radius (\S+) (\S+) (.*)", again[-1]).groups()


# Seeds

def test_two_seeds_give_mean_and_standard_deviation(tmp_path, capsys):
    results = run(TABLE, **SIZE | {"rows": "DAAT", "columns": "clean,PGD-20", "epochs": 4, "test_examples": 200}, seeds=2, outputs=str(tmp_path))
    assert "2 trained; 0 evaluations from the store, 4 made" in capsys.readouterr().out
    seeds = results.plan.blocks[0].runs["DAAT"]
    assert [r.seed for r in seeds] == [0, 1]
    for line in results.frame.itertuples():
        values = [results.plan.store.verdicts(r, results.plan.evaluation(results.plan.blocks[0], "DAAT", line.column, r.seed))["accuracy"] for r in seeds]
        assert values[0] != values[1]
        assert line.value == pytest.approx(np.mean(values)) and line.std == pytest.approx(np.std(values, ddof=1))
        assert (line.seeds, line.n) == (2, 200) and line.run == " ".join(r.id for r in seeds)
        assert line.ci_low == pytest.approx(line.value - line.std) and line.ci_high == pytest.approx(line.value + line.std)
    written = list(csv.DictReader((tmp_path/"table1_daat/quick/table.csv").open(newline="")))
    assert [float(l["std"]) for l in written] == pytest.approx(list(results.frame["std"]), rel=1e-4)
