"Killed at any moment, the same command ends with the same results; two processes share a store; an edited formula trains anew."
import contextlib, csv, json, multiprocessing, os, random, re, shutil, signal, subprocess, sys, time
from dataclasses import dataclass, replace
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest
import torch
from nbclient import NotebookClient

from adaptive_at import core, runs
from adaptive_at.core import Milestones
from adaptive_at.methods import at
from adaptive_at.objectives import AdversarialCE
from adaptive_at.papers.table1_daat import TABLE
from adaptive_at.tables import run

ROOT = Path(__file__).resolve().parent.parent
SIZE = dict(preset="quick", device="cpu", epochs=6, train_examples=256, test_examples=40, rho=0.002, figures="none")  # so small a rho that the radii move at once
WHOLE = dict(SIZE, rows="DAAT,MART", columns="clean,PGD-20,AA,AT")  # and Standard AT, as a surrogate
SMALL = dict(SIZE, rows="DAAT", columns="clean,FGSM", epochs=4, train_examples=128, test_examples=20)  # best is selected after epochs 3 and 4


# What a store holds

def plain(value):
    "Nested tensors as comparable values; the seconds, which nobody can repeat, left out."
    if torch.is_tensor(value): return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict): return {k: plain(v) for k, v in value.items() if k != "seconds"}
    if isinstance(value, (list, tuple)): return [plain(v) for v in value]
    return value


def contents(outputs):
    "All results under `outputs`: file -> what must be equal."
    found = {}
    for path in sorted(Path(outputs).rglob("*")):
        name = path.relative_to(outputs).as_posix()
        if path.suffix == ".pt": found[name] = plain(torch.load(path, weights_only=True))
        if path.suffix == ".npz":
            with np.load(path) as arrays: found[name] = {k: (v.dtype.str, v.shape, v.tobytes()) for k, v in arrays.items()}
        if path.name == "history.csv": found[name] = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(path.open(newline=""))]
        if path.suffix == ".json": found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("made with", "seconds")}
        if path.name == "table.csv": found[name] = path.read_text()
    return found


def equal(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if a[name] != b[name]]
    assert not different, f"these differ: {', '.join(different)}"


# Processes that can be killed

CONTEXT = multiprocessing.get_context("forkserver")  # children of one process that has imported all: no seconds of imports for each
CONTEXT.set_forkserver_preload(["adaptive_at.papers.table1_daat", "pyautoattack", "sklearn.datasets"])


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
    run(TABLE, **parameters)


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


def ended(child, log):
    child.join(300)
    assert child.exitcode == 0, f"exit code {child.exitcode}:\n{log.read_text()}"


def epochs_done(outputs): return sum(len(p.read_text().splitlines()) - 1 for p in (outputs/"runs").glob("*/history.csv"))


def attacked(outputs):
    "How far the evaluations are: finished ones, and AutoAttack's progress."
    found = []
    for path in sorted((outputs/"runs").glob("*/evals/*.json")):
        with contextlib.suppress(FileNotFoundError): found.append((path.name, path.read_text() if ".part" in path.name else ""))
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
    results = run(TABLE, **parameters, outputs=str(folder))
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

    def after(condition):  # the condition, and a little more
        return lambda child, began: wait_until(condition, child) and not child.join(rng.uniform(0, 0.4))
    def some_epochs(child, began):
        done, more = epochs_done(outputs), rng.randint(1, 2)
        return after(lambda: epochs_done(outputs) >= done + more)(child, began)
    def some_attack(child, began):
        done = attacked(outputs)
        return after(lambda: epochs_done(outputs) == 18 and attacked(outputs) != done)(child, began)
    def some_time(child, began):
        return not child.join(rng.uniform(0.03, 0.15) * seconds)

    for moment in [some_epochs, some_epochs, some_time, some_epochs, some_epochs, some_time, some_attack, some_attack, some_time, some_attack, some_attack]:
        child = process(log, outputs, WHOLE)
        if moment(child, time.perf_counter()) and child.is_alive():
            trained = epochs_done(outputs)
            child.kill()
            child.join()
            assert child.exitcode == -signal.SIGKILL
            landed.append("training" if trained < 18 else "AutoAttack" if list(outputs.rglob("autoattack*.part.json")) else "evaluation")
        else: ended(child, log)
    print(f"killed in {', '.join(landed)}; uninterrupted {seconds:.1f} s")
    assert landed.count("training") >= 3 and landed.count("AutoAttack") >= 2 and len(landed) >= 6, landed
    ended(process(log, outputs, WHOLE), log)
    equal(contents(folder), contents(outputs))
    assert re.search(r"continuing after epoch \d of 6", log.read_text())


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
        try: equal(expected, contents(outputs))
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
        kernels = [p for p in psutil.Process(papermill.pid).children(recursive=True) if any("ipykernel" in part for part in p.cmdline())]
        assert len(kernels) == 1
        kernels[0].kill()
        assert papermill.wait(60) != 0
    assert 3 <= epochs_done(outputs) < 12
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    found, expected = contents(outputs), contents(folder)
    shown = found.pop("table1_daat/quick/table.csv").splitlines()
    equal(found, {name: expected[name] for name in found})
    assert sum(name.endswith("last.pt") for name in found) == 2 and sum("/evals/" in name for name in found) == 4
    assert shown == [l for l in expected["table1_daat/quick/table.csv"].splitlines() if re.match(r"dataset|.*,(natural|PGD-20),", l)]


def test_a_truncated_checkpoint_is_set_aside(small, tmp_path, capsys):
    folder, _, results = small
    outputs, log = tmp_path/"outputs", tmp_path/"log"
    child = process(log, outputs, SMALL, kill_at=8)
    child.join()
    last, = outputs.rglob("last.pt")
    assert 2 <= torch.load(last, weights_only=True)["epoch"] < 4
    last.write_bytes(last.read_bytes()[:last.stat().st_size // 2])
    run(TABLE, **SMALL, outputs=str(outputs))
    said, = [line for line in capsys.readouterr().out.splitlines() if "set aside" in line]
    assert "last.pt" in said and last.parent.name in said and "last.damaged" in said
    assert last.with_suffix(".damaged").exists()
    equal(contents(folder), contents(outputs))


# Two at once

def test_two_processes_share_an_empty_store(whole, tmp_path):
    folder, _, _ = whole
    outputs, logs = tmp_path/"outputs", [tmp_path/"log1", tmp_path/"log2"]
    parameters = WHOLE | {"columns": "clean,PGD-20,AT"}
    children = [process(log, outputs, parameters) for log in logs]
    for child, log in zip(children, logs): ended(child, log)
    said = "".join(log.read_text() for log in logs)
    worked = re.findall(r"working: .*", said)
    assert len(worked) == len(set(worked)) == 3 + 6, worked
    assert len(re.findall(r"^epoch ", said, re.M)) == 3 * 6
    assert "waiting for another process" in said
    found, expected = contents(outputs), contents(folder)
    shown = found.pop("table1_daat/quick/table.csv").splitlines()
    equal(found, {name: expected[name] for name in found})
    assert shown == [l for l in expected["table1_daat/quick/table.csv"].splitlines() if ",AA," not in l]


# Diverged

@dataclass(frozen=True)
class Exploding(AdversarialCE):
    "A cross-entropy that is divided by zero from the second half on."
    divisor: float|Milestones = Milestones(at=(0.5,), values=(1., 0.))

    def losses(self, batch, x_adv, target, eps):
        for loss in super().losses(batch, x_adv, target, eps): yield lambda model: loss(model) / self.divisor


def with_rows(**rows): return replace(TABLE, rows=lambda p: {label.replace("_", " "): make(p) for label, make in rows.items()}, extras=lambda p: {}, figures={})


def test_a_diverged_run_is_marked_and_the_others_go_on(tmp_path, capsys):
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
    capsys.readouterr()
    again = run(table, **parameters)
    assert again.frame.equals(results.frame) and {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.pt")} == before
    assert ", 0 trained;" in capsys.readouterr().out


# Edited formulas

SETUP = f"""
from dataclasses import replace
from adaptive_at.methods import at
from adaptive_at.papers.table1_daat import TABLE
from adaptive_at.radius import RadiusRule
from adaptive_at.tables import run
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
table = replace(TABLE, rows=lambda p: {{'Standard AT': at(p.eps), 'Shrinking AT': at(p.eps, Shrinking(p.eps))}}, extras=lambda p: {{}}, figures={{}})
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
    results = run(TABLE, **SMALL | {"columns": "clean,PGD-20", "epochs": 2, "test_examples": 200}, seeds=2, outputs=str(tmp_path))
    assert "2 trained; 0 evaluations from the store, 4 made" in capsys.readouterr().out
    seeds = results.plan.blocks[0].runs["DAAT"]
    assert [r.seed for r in seeds] == [0, 1]
    for line in results.frame.itertuples():
        values = [results.plan.store.verdicts(r, results.plan.evaluation(results.plan.blocks[0], "DAAT", line.column, r.seed))["accuracy"] for r in seeds]
        assert values[0] != values[1] or line.column != "natural"
        assert line.value == pytest.approx(np.mean(values)) and line.std == pytest.approx(np.std(values, ddof=1))
        assert (line.seeds, line.n) == (2, 200) and line.run == " ".join(r.id for r in seeds)
        assert line.ci_low == pytest.approx(line.value - line.std) and line.ci_high == pytest.approx(line.value + line.std)
    written = list(csv.DictReader((tmp_path/"table1_daat/quick/table.csv").open(newline="")))
    assert [float(l["std"]) for l in written] == pytest.approx(list(results.frame["std"]), rel=1e-4)
