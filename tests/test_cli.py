"`python -m adaptive_at runs`: the list, what needs a run, damage, pruning, export and import."
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file

from adaptive_at.store import audit as inv
from adaptive_at.__main__ import main
from adaptive_at.attacks import PGD
from adaptive_at.base.errors import UserError
from adaptive_at.evaluation import Clean, Transfer, evaluation
from adaptive_at.store.transfer import opened
from adaptive_at.algorithms.baselines import Training
from adaptive_at.algorithms.daat import daat
from adaptive_at.networks import NarrowResNet, fingerprint
from adaptive_at.papers.table1_daat import TABLE
from adaptive_at.tables.parameters import TABLES, check_parameters
from adaptive_at.pretrained import plain, scored
from adaptive_at.tables.plan import FigureInputs, Plan, open_session
from adaptive_at.store.runs import Store
from adaptive_at.store.checksums import checksum
from adaptive_at.jobs.interrupts import Stopped
from adaptive_at.tables.results import execute, run
from adaptive_at.training import Monitor, Run

from helpers import digits, narrow

ROOT = Path(__file__).resolve().parent.parent


def alone(seed=0, start=None):
    "A run that no table has."
    return Run("digits", digits().info.identity, NarrowResNet(width_factor=4), daat(0.1, steps=1), Training(epochs=1), Monitor(PGD(0.05, 1), 0.1, 20), train_examples=60, seed=seed, start=start)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    "A table's run, and three that no table names, one of which is warm-started from another."
    outputs = tmp_path_factory.mktemp("outputs")
    run(TABLE, preset="quick", device="cpu", epochs=1, train_examples=60, test_examples=20, figures="none", rows="Natural", columns="clean", outputs=str(outputs))
    store = Store(outputs/"runs")
    for r in (alone(7), alone(8, start=alone(9))): store.train(r, digits(), report_line=lambda line: None)
    store.evaluate(alone(7), clean(store), digits())
    return outputs


@pytest.fixture
def outputs(kept, tmp_path):
    shutil.copytree(kept, tmp_path/"outputs")
    return tmp_path/"outputs"


def clean(store): return evaluation(Clean(), digits().info.identity, store.facts(alone(7))["weights"]["last"], examples=50)


def cli(capsys, *arguments):
    "Exit code, output, errors."
    code = main(["runs", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def sentence(capsys, *arguments):
    "What is said of an error: one line, exit code 1, nothing else."
    code, out, err = cli(capsys, *arguments)
    assert (code, out) == (1, "") and err.count("\n") == 1 and "Traceback" not in err
    return err.strip()


def test_the_list_is_aligned_and_names_the_tables(outputs, capsys):
    code, out, _ = cli(capsys, "--outputs", outputs)
    head, *lines, total = out.splitlines()
    assert code == 0 and total.startswith("4 runs, ") and len(lines) == 4
    assert all(line[head.index("method") - 2:head.index("method")] == "  " and line[head.index("needed by") - 2:head.index("needed by")] == "  " for line in lines)
    assert sorted(line[head.index("needed by"):] for line in lines) == ["no table"] * 3 + ["table1_daat quick"]
    mine, = [line for line in lines if line.startswith(alone(7).id)]
    last = Store(outputs/"runs").history(alone(7))[-1]
    assert re.split(r"  +", mine)[1:8] == ["DAAT × PGD × AdversarialCE", "digits", "narrow ResNet (width 4)", "7", "1 of 1", f"{last['test_natural']:.1f}", f"{last['test_robust']:.1f}"]


def test_the_module_runs_from_the_shell(outputs):
    done = subprocess.run([sys.executable, "-m", "adaptive_at", "runs", "show", alone(7).id[:6], "--outputs", outputs], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and alone(7).slug in done.stdout, done.stderr
    assert re.search(r"^clean-\w{12} +\d+\.\d% of 50(; .+)?$", done.stdout, re.M)   # and what its facts say


def test_plans_know_their_runs_before_a_table_is_written(tmp_path):
    found = inv.planned(tmp_path, ROOT/"data", seeds=2)
    assert {table.split()[0] for tables in found.values() for table in tables} == set(TABLES) - {"frontier"}  # which trains nothing
    plan = Plan(TABLE, open_session(check_parameters("table1_daat", dict(preset="quick", device="cpu", figures="all", seeds=2, dry_run=True, outputs=str(tmp_path)))))
    runs = [r for b in plan.blocks for seeds in b.runs.values() for r in seeds]
    assert runs and all("table1_daat quick" in found[r.id] for r in runs)
    assert not list(tmp_path.iterdir()), "looking writes nothing"


def test_a_needed_run_needs_its_start_and_its_surrogate(outputs):
    store = Store(outputs/"runs")
    weights = {i: store.facts(alone(i))["weights"]["last"] for i in (7, 9)} | {8: store.facts(alone(8, start=alone(9)))["weights"]["last"]}
    table = outputs/"table2_saat"/"quick"/"table.csv"
    table.parent.mkdir(parents=True)
    table.write_text(f"row,run\nmine,{alone(8, start=alone(9)).id}\n")
    needed = {s.id: s.tables for s in inv.inventory(outputs)}
    assert needed[alone(8, start=alone(9)).id] == needed[alone(9).id] == ("table2_saat quick",) and needed[alone(7).id] == ()
    e = evaluation(Transfer(PGD(0.05, 1), 0.1), digits().info.identity, weights[8], weights[7], examples=10)
    store.evaluate(alone(8, start=alone(9)), e, digits(), source=store.model(alone(7), digits()))
    assert {s.id: s.tables for s in inv.inventory(outputs)}[alone(7).id] == ("table2_saat quick",)


# verify

def test_verify_finds_what_is_damaged(outputs, capsys):
    code, out, _ = cli(capsys, "verify", "--outputs", outputs)
    assert (code, out) == (0, "4 runs, all intact\n")
    folder = Store(outputs/"runs").folder(alone(7))
    evaluation_, = folder.glob("evals/clean-*.json")
    faults = {"last.pt": lambda b: b[:-1], "best.pt": lambda b: b"", "radius.npz": lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:], f"evals/{evaluation_.name}": lambda b: b.replace(b'"n": 50', b'"n": 51'),
              "history.csv": lambda b: b.replace(b"\n1,", b"\n2,", 1), "spec.json": lambda b: b.replace(b'"epochs": 1', b'"epochs": 2')}
    for name, fault in faults.items():
        whole = (folder/name).read_bytes()
        (folder/name).write_bytes(fault(whole))
        assert (folder/name).read_bytes() != whole, name
        code, out, _ = cli(capsys, "verify", "--outputs", outputs)
        assert code == 1 and len(out.splitlines()) == 2 and Path(name).name in out.splitlines()[0] and folder.name in out.splitlines()[0], (name, out)
        (folder/name).write_bytes(whole)
    (folder/"best.pt").unlink()
    code, out, _ = cli(capsys, "verify", "--outputs", outputs)
    assert code == 1 and f"best.pt of {folder.name} is missing" in out


# prune

def test_prune_asks_and_keeps_what_a_table_needs(outputs, capsys, monkeypatch):
    before = sorted((outputs/"runs").iterdir())
    for answer in ("n", "", "maybe"):
        monkeypatch.setattr("builtins.input", lambda question: answer)
        code, out, _ = cli(capsys, "prune", "--outputs", outputs)
        assert code == 0 and out.endswith("nothing was removed\n") and sorted((outputs/"runs").iterdir()) == before
    (outputs/"runs"/"notes").mkdir()
    (outputs/"runs"/"link-0123456789ab").symlink_to(ROOT)
    monkeypatch.setattr("builtins.input", lambda question: "y")
    with FileLock(Store(outputs/"runs").folder(alone(7))/"lock"): code, out, _ = cli(capsys, "prune", "--outputs", outputs)
    assert code == 0 and "is being worked on and was kept" in out and out.splitlines()[-1].startswith("2 runs removed, ")
    code, out, _ = cli(capsys, "prune", "--outputs", outputs, "--yes")
    assert code == 0 and out.splitlines()[-1].startswith("1 runs removed, ")
    assert {s.tables for s in inv.inventory(outputs)} == {("table1_daat quick",)} and (outputs/"runs"/"notes").exists() and (ROOT/"settings.ini").exists()
    assert cli(capsys, "prune", "--outputs", outputs)[1] == "every run is needed by a table\n"


def test_prune_keeps_a_run_that_is_being_evaluated(outputs, capsys):
    store = Store(outputs/"runs")
    with FileLock(store._path(alone(7), clean(store)).with_suffix(".lock")): code, out, _ = cli(capsys, "prune", "--outputs", outputs, "--yes")
    assert code == 0 and f"{store.folder(alone(7)).name} is being worked on and was kept\n" in out and "\n2 runs removed, " in out
    assert store.finished(alone(7)) and store.verdicts(alone(7), clean(store))["n"] == 50
    assert "\n1 runs removed, " in cli(capsys, "prune", "--outputs", outputs, "--yes")[1] and not store.folder(alone(7)).exists()


def test_prune_keeps_what_figures_and_stopped_commands_need(tmp_path, capsys):
    table = replace(TABLE, figures={"fig3": FigureInputs(("Enlarged DAAT",))})
    def command(report_line=lambda line: None, **changes):
        execute(Plan(table, open_session(check_parameters(TABLE.name, dict(preset="quick", device="cpu", epochs=1, train_examples=60, test_examples=20, figures="fig3", rows="Natural", columns="clean", outputs=str(tmp_path)) | changes))), report_line)
    def stop(line):
        if line.endswith(": trained"): raise KeyboardInterrupt
    with pytest.raises(Stopped): command(stop)
    assert {s.tables for s in inv.inventory(tmp_path)} == {("table1_daat quick",)}
    command()
    command(figures="none", epochs=2)   # whose table.csv names its own run alone
    assert [s.tables for s in inv.inventory(tmp_path)] == 3 * [("table1_daat quick",)]
    capsys.readouterr()
    assert cli(capsys, "prune", "--outputs", tmp_path, "--yes")[1] == "every run is needed by a table\n"
    for again in (command, lambda: None):
        for noted in tmp_path.glob("table1_daat/quick/runs-*.csv"): noted.unlink()   # given up by hand
        again()   # all from the store
        assert "\n1 runs removed, " in cli(capsys, "prune", "--outputs", tmp_path, "--yes")[1]   # of the two epochs; then the figure's


# export and import

@pytest.fixture
def exported(outputs, tmp_path, capsys):
    file = tmp_path/"mine.safetensors"
    assert cli(capsys, "export", alone(7).id, file, "--outputs", outputs)[0] == 0
    return file


def test_an_exported_run_is_imported_whole(outputs, exported, tmp_path, capsys):
    code, out, _ = cli(capsys, "import", exported, "--outputs", tmp_path/"theirs")
    assert code == 0 and alone(7).slug in out
    mine, theirs = Store(outputs/"runs"), Store(tmp_path/"theirs"/"runs")
    assert theirs.finished(alone(7)) and not theirs.train(alone(7), digits()) and theirs.facts(alone(7)) == mine.facts(alone(7)) and theirs.history(alone(7)) == mine.history(alone(7))
    assert theirs.verdicts(alone(7), clean(mine)) == mine.verdicts(alone(7), clean(mine))
    assert {k: (v.dtype, v.tobytes()) for k, v in theirs.radius(alone(7)).items()} == {k: (v.dtype, v.tobytes()) for k, v in mine.radius(alone(7)).items()}
    for checkpoint in ("last", "best"): assert fingerprint(theirs.model(alone(7), digits(), checkpoint)) == mine.facts(alone(7))["weights"][checkpoint]
    assert cli(capsys, "verify", "--outputs", tmp_path/"theirs")[0] == 0
    assert "in the store already" in sentence(capsys, "import", exported, "--outputs", tmp_path/"theirs")
    again = tmp_path/"again.safetensors"
    assert cli(capsys, "export", alone(7).id, again, "--outputs", tmp_path/"theirs")[0] == 0
    assert opened(again).tensors.keys() == opened(exported).tensors.keys()


def forged(file, change):
    "The export, changed by someone who knows how to write checksums."
    with safe_open(file, "pt") as f: told, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    content = {k: json.loads(told[k]) for k in ("folder", "spec", "history", "evaluations")}
    change(content, tensors)
    save_file(tensors, file, {"adaptive_at": told["adaptive_at"]} | {k: json.dumps(v) for k, v in content.items()} | {"sha256": checksum(content)})


def first(content): return next(iter(content["evaluations"].values()))
def moved(content, tensors): content["folder"] = "../../" + content["folder"]
def renamed(content, tensors): content["folder"] = content["folder"].replace("digits", "cifar10")
def other_spec(content, tensors): content["spec"]["run"]["seed"] = 6
def other_weights(content, tensors): tensors["best/classifier.bias"] += 1
def fewer_weights(content, tensors): del tensors["last/classifier.bias"]
def other_bank(content, tensors): tensors["bank/eps"] = tensors["bank/eps"][1:].clone()
def more_tensors(content, tensors): tensors["extra/x"] = torch.zeros(1)
def longer_history(content, tensors): content["history"] += content["history"].splitlines()[1] + "\n"
def better_history(content, tensors): content["history"] = re.sub(r"\n1,", "\n1,1", content["history"])
def better_result(content, tensors): first(content)["result"]["accuracy"] += 5
def other_evaluation(content, tensors): first(content)["evaluation"]["examples"] = 10
def wrong_kinds(content, tensors): content["spec"]["made with"] = "x"
def no_spec(content, tensors): content["spec"] = []
def escaping_evaluation(content, tensors): content["evaluations"] = {f"../../{k}": v for k, v in content["evaluations"].items()}


@pytest.mark.parametrize("change", [moved, renamed, other_spec, other_weights, fewer_weights, other_bank, more_tensors, longer_history, better_history, better_result, other_evaluation, wrong_kinds, no_spec,
                                    escaping_evaluation], ids=lambda f: f.__name__)
def test_an_export_that_contradicts_itself_is_refused(change, exported, tmp_path, capsys):
    forged(exported, change)
    assert "is not imported, because" in sentence(capsys, "import", exported, "--outputs", tmp_path/"theirs")
    assert not (tmp_path/"theirs").exists()


def test_an_export_that_is_damaged_or_no_export_is_refused(exported, tmp_path, capsys):
    whole = exported.read_bytes()
    where = whole.index(b"accuracy") + 14
    for content, said in ((whole[:-1], "no intact"), (b"", "no intact"), (b"\xff" * 100, "no intact"), (whole[:where] + bytes([whole[where] ^ 1]) + whole[where + 1:], "")):
        exported.write_bytes(content)
        assert said in sentence(capsys, "import", exported, "--outputs", tmp_path/"theirs")
    save_file({"x": torch.zeros(1)}, exported)
    assert "no export of a run" in sentence(capsys, "import", exported, "--outputs", tmp_path/"theirs")
    torch.save({"x": torch.zeros(1)}, exported)
    assert "no intact" in sentence(capsys, "import", exported, "--outputs", tmp_path/"theirs")
    assert not (tmp_path/"theirs").exists()


def test_errors_are_one_sentence(outputs, tmp_path, capsys):
    assert "'zzz' is the beginning of no run id" in sentence(capsys, "show", "zzz", "--outputs", outputs)
    assert "holds no runs" in sentence(capsys, "--outputs", tmp_path/"nowhere")
    assert "does not exist" in sentence(capsys, "import", tmp_path/"nowhere.safetensors", "--outputs", outputs)
    last = Store(outputs/"runs").folder(alone(7))/"last.pt"
    last.write_bytes(last.read_bytes()[:-1])
    assert "is not exported, because last.pt of" in sentence(capsys, "export", alone(7).id, tmp_path/"x.safetensors", "--outputs", outputs)
    for wrong in (["mend"], ["show"], ["--nonsense"]):
        with pytest.raises(SystemExit) as caught: main(["runs", *wrong])
        assert caught.value.code == 1 and capsys.readouterr().err.count("\n") == 1


# Weights from elsewhere

def renamed_weights(model, prefix=""):
    "A state_dict under other names, in the same order."
    return {f"{prefix}layer{i}.{k.rpartition('.')[2]}": v for i, (k, v) in enumerate(model.state_dict().items())}


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w, "epoch": 3}, lambda w: {"net": {f"module.{k}": v for k, v in w.items()}}, lambda w: {k: v for k, v in w.items() if "tracked" not in k},
                                  lambda w: w | {"sub_block1.conv.weight": torch.zeros(3)}], ids=["plain", "state_dict", "module", "old", "unused block"])
def test_plain_weights_give_their_network(wrap, tmp_path):
    model = narrow(seed=5)
    torch.save(wrap(renamed_weights(model)), tmp_path/"theirs.pt")
    loaded = plain(tmp_path/"theirs.pt", NarrowResNet(width_factor=4), digits().info)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values())) and not loaded.training


def test_their_normalisation_is_taken_over(tmp_path):
    inner = narrow(seed=5)
    torch.save({"mu": torch.full((1, 1, 1), 0.25), "sigma": torch.full((1, 1, 1), 0.5)} | renamed_weights(inner), tmp_path/"theirs.pt")
    x = digits().test.x[:8] / 16
    with torch.no_grad(): assert torch.equal(plain(tmp_path/"theirs.pt", NarrowResNet(width_factor=4), digits().info)(x), inner.eval()((x - 0.25) / 0.5))


def test_weights_of_another_network_or_none_are_refused(tmp_path):
    file, trap = tmp_path/"theirs.pt", tmp_path/"executed"
    class Payload:
        def __reduce__(self): return Path.mkdir, (trap,)
    for content, said in ((renamed_weights(narrow(width=8)), r"is not a narrow ResNet \(width 4\) for 10 classes: layer0.weight"), ({"epoch": 3}, "no state_dict"), ([1], "no state_dict"), ({}, "no state_dict"),
                          (dict(list(renamed_weights(narrow()).items())[:-1]), "tensors, and that network"), ({"w": Payload()}, "cannot be read as plain tensors")):
        torch.save(content, file)
        with pytest.raises(UserError, match=said) as caught: plain(file, NarrowResNet(width_factor=4), digits().info)
        assert "\n" not in str(caught.value)
    assert not trap.exists()


def test_plain_weights_are_scored_as_the_tables_score_them(outputs):
    store = Store(outputs/"runs")
    model = plain(store.folder(alone(7))/"best.pt", NarrowResNet(width_factor=4), digits().info)
    assert scored(model, {"natural": Clean()}, digits(), examples=50).accuracy["natural"] == store.verdicts(alone(7), clean(store))["accuracy"]  # one epoch: the best is the last


def test_our_own_export_is_scored_as_the_run_is(outputs, exported):
    store, info = Store(outputs/"runs"), digits().info
    for checkpoint in ("last", "best"):
        ours = store.model(alone(7), digits(), checkpoint)
        loaded = plain(exported, NarrowResNet(width_factor=4), info, checkpoint=checkpoint)
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), ours.state_dict().values(), strict=True))
    with pytest.raises(UserError, match="checkpoint is 'worst'"): plain(exported, NarrowResNet(width_factor=4), info, checkpoint="worst")
