"`runs list`, `show`, `verify` and `prune` whatever one file of the store holds: the other runs are told as ever, and nothing is offered that a table may need."
import errno
import io
import os
from contextlib import contextmanager
from pathlib import Path

import pytest

from adaptive_at.store import audit as inv
from adaptive_at.base.errors import UserError
from adaptive_at.base.identity import spec_hash
from adaptive_at.evaluation import Transfer, evaluation
from adaptive_at.attacks import PGD
from adaptive_at.store.runs import Store
from adaptive_at.store.checksums import read_checked_json, write_checked_json

from helpers import digits
from test_cli import alone, cli, kept, outputs  # noqa: F401 - a store of four runs, one of which a table needs


@pytest.fixture(autouse=True)
def plans(monkeypatch, request):
    "No plans, which take seconds, but where a test is about them."
    if "plans" not in request.node.name: monkeypatch.setattr(inv, "planned", lambda *args, **kwargs: {})


def spec_with(**changes):
    "A `spec.json` with the right checksum, of a run that hashes to the folder's new name."
    def spoil(folder):
        facts = read_checked_json(folder/"spec.json")
        run = {k: v for k, v in (facts["run"] | changes).items() if v is not KeyError}
        write_checked_json(folder/"spec.json", facts | {"run": run})
        folder.rename(folder.with_name(f"{folder.name.rpartition('-')[0]}-{spec_hash(run)}"))
    return spoil


def facts_with(**changes):
    def spoil(folder):
        write_checked_json(folder/"spec.json", read_checked_json(folder/"spec.json") | {k.replace("_", " "): v for k,
                                                                            v in changes.items()})
    return spoil


def file(name, content):
    def spoil(folder):
        path, = folder.glob(name)
        path.write_bytes(content)
    return spoil


def evaluation_with(**changes):
    def spoil(folder):
        path, = folder.glob("evals/clean-*.json")
        write_checked_json(path, read_checked_json(path) | changes)
    return spoil


def folder_instead(name):
    def spoil(folder):
        path, = folder.glob(name)
        path.unlink()
        path.mkdir()
    return spoil


SPOILT = {
    "no spec": lambda folder: (folder/"spec.json").unlink(), "empty spec": file("spec.json", b""),
    "no text": file("spec.json", b"\xff\xfe"), "a list": file("spec.json", b"[]"),
    "nested": file("spec.json", b"[" * 10**5), "nan": file("spec.json", b'{"run": NaN}'),
    "no run": file("spec.json", b'{"run": null}'), "a folder for a spec": folder_instead("spec.json"),
    "a run of nothing": spec_with(**{k: KeyError for k in ("method", "network", "training")}),
    "no method": spec_with(method=KeyError), "a method of text": spec_with(method="x"),
    "a method of numbers": spec_with(method={"radius": 1, "attack": 2, "objective": 3, "weights": 4}),
    "pieces of numbers": spec_with(method={k: {"piece": 1} for k in ("radius", "attack", "objective", "weights")}),
    "no network": spec_with(network={"x": 1}),
    "a network of text": spec_with(network="x"), "a seed of text": spec_with(seed="x"),
    "no seed": spec_with(seed=KeyError), "a huge seed": spec_with(seed=10**30), "no start": spec_with(start=KeyError),
    "a start of text": spec_with(start="x"),
    "a start of nothing": spec_with(start={"x": 1}), "no training": spec_with(training=None),
    "epochs of text": spec_with(training={"epochs": "x"}), "control characters": spec_with(dataset="\x1b[2J\nx"),
    "half a character": spec_with(dataset="\ud800"),
    "made by nobody": facts_with(made_with=[]),
    "made with control characters": facts_with(made_with=[{"threads": 1, "device": "\x1b[2J\n\ud800"}]),
    "weights of numbers": facts_with(weights={"last": 1, "best": 2}),
    "weights of lists": facts_with(weights={"last": [], "best": {}}),
    "a diverged number": facts_with(diverged=3), "a diverged run": facts_with(diverged="\x1b[2J\n"),
    "history of bytes": file("history.csv", b"\xff\x00"), "history of nothing": file("history.csv", b""),
    "history of text": file("history.csv", b"a,b\nx,y\n"),
    "history of more cells": file("history.csv", b"epoch\n1,2,3\n"),
    "history of no numbers": file("history.csv", b"epoch,test_natural\n1,nan\n"),
    "a folder for a history": folder_instead("history.csv"),
    "an evaluation of bytes": file("evals/clean-*.json", b"\xff"),
    "an evaluation of a list": file("evals/clean-*.json", b"[]"),
    "an evaluation of nothing": file("evals/clean-*.json", b"{}"),
    "an evaluation of text": evaluation_with(evaluation="x"),
    "an evaluation of a list of sources": evaluation_with(evaluation={"source": []}),
    "no result": evaluation_with(result=None), "a result of text": evaluation_with(result="x"),
    "a result of nan": evaluation_with(result={"accuracy": "nan", "n": 1, "standing": "1"}),
    "a folder for an evaluation": folder_instead("evals/clean-*.json"),
    "an evaluation in depth": file("evals/clean-*.json", b"[" * 10**5),
    "a checkpoint of text": file("last.pt", b"text"), "an empty checkpoint": file("best.pt", b""),
    "a folder for a checkpoint": folder_instead("last.pt"), "a folder for a bank": folder_instead("radius.npz"),
}


def folders(root): return sorted(p.name for p in (root/"runs").iterdir())


@pytest.mark.parametrize("name", SPOILT)
def test_one_bad_file_hides_no_other_run(name, outputs, capsys):  # noqa: F811
    before = {line.split()[0]: line for line in cli(capsys, "list", "--outputs", outputs)[1].splitlines()[1:-1]}
    SPOILT[name](Store(outputs/"runs").folder(alone(7)))
    theirs, = {n[-12:] for n in folders(outputs)} - (before.keys() - {alone(7).id})
    code, out, err = cli(capsys, "list", "--outputs", outputs)
    lines = {line.split()[0]: line for line in out.splitlines()[1:-1]}
    def told(line): return line.split()   # the columns' widths may have changed
    assert code == 0 and lines.keys() == (before.keys() - {alone(7).id}) | {theirs} and "\x1b" not in out
    assert all(told(lines[i]) == told(before[i]) for i in before if i != alone(7).id)
    out.encode()   # can be printed
    code, out, err = cli(capsys, "show", theirs, "--outputs", outputs)
    assert (code, err) == (0, "") and theirs in out and "\x1b" not in out
    out.encode()
    code, out, err = cli(capsys, "verify", "--outputs", outputs)
    assert err == "" and all(theirs in line
                             or line.endswith(("damaged files: run the tables that need them again, and they are made anew", "all intact")) for line in out.splitlines()), out
    code, out, err = cli(capsys, "prune", "--yes", "--outputs", outputs)
    assert {s.tables for s in inv.inventory(outputs) if not s.problem} == {("table1_daat quick",)}
    assert "Traceback" not in err


@contextmanager
def another_users(name, monkeypatch):
    "Within, no file of this name can be opened, as when it belongs to somebody else."
    whole = io.open
    def opened(file, *args, **kwargs):
        if not isinstance(file, int) and Path(os.fsdecode(file)).match(name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), file)
        return whole(file, *args, **kwargs)
    with monkeypatch.context() as theirs:
        theirs.setattr(io, "open", opened)
        theirs.setattr("builtins.open", opened)
        yield


@pytest.mark.parametrize("name", ["spec.json", "history.csv", "last.pt", "best.pt", "radius.npz", "clean-*.json"])
def test_a_file_that_may_not_be_read_hides_no_other_run(name, outputs, capsys, monkeypatch):  # noqa: F811
    mine = Store(outputs/"runs").folder(alone(7)).name
    before = folders(outputs)
    with another_users(f"{mine}/{'evals/' * name.startswith('clean')}{name}", monkeypatch):
        code, out, _ = cli(capsys, "list", "--outputs", outputs)
        line, = [line for line in out.splitlines() if line.startswith(alone(7).id)]
        assert code == 0 and out.splitlines()[-1].startswith("4 runs, ")
        assert ("unreadable" in line) == (name in ("spec.json", "history.csv"))
        code, out, _ = cli(capsys, "show", alone(7).id, "--outputs", outputs)
        assert code == 0 and (name.endswith((".pt", ".npz")) or "unreadable" in out or "Permission denied" in out)
        code, out, err = cli(capsys, "verify", "--outputs", outputs)
        assert code == 1 and len(out.splitlines()) == 2 and "Permission denied" in out.splitlines()[0] and not err
        if name == "spec.json":   # nobody can say what it is
            code, out, _ = cli(capsys, "prune", "--yes", "--outputs", outputs)
            assert code == 0 and f"{mine} was kept" in out and mine in folders(outputs)
    assert before == folders(outputs) or name == "spec.json"


# What tables need

def noted(outputs, text, name="runs-0123456789ab.csv"):  # noqa: F811
    path = outputs/"table2_saat"/"quick"/name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def refuses_to_prune(outputs, capsys, *says):  # noqa: F811
    before = folders(outputs)
    code, out, err = cli(capsys, "prune", "--yes", "--outputs", outputs)
    assert code == 1 and out == "" and all(word in err
                                           for word in says) and err.endswith("nothing was removed, because not all that tables need is known\n"), err
    assert folders(outputs) == before
    assert cli(capsys, "list", "--outputs", outputs)[0] == 0


def test_a_keep_list_that_is_cut_anywhere_offers_nothing(outputs, capsys):  # noqa: F811
    from adaptive_at.tables.results import _note
    class Told:
        class parameters:
            def command(): return "x"
        class block: runs = {"a": [alone(7), alone(8, start=alone(9))], "b": [alone(9)]}
        blocks, folder = [block], outputs/"table2_saat"/"quick"
    _note(Told)
    path, = Told.folder.glob("runs-*.csv")
    whole = path.read_text()
    assert inv.listed_runs(path) == [r.id for r in (alone(7), alone(8, start=alone(9)), alone(9))]
    assert {s.tables for s in inv.inventory(outputs)} == {("table1_daat quick",), ("table2_saat quick",)}
    for length in range(len(whole)):
        path.write_text(whole[:length])
        with pytest.raises(UserError, match="was cut"): inv.listed_runs(path)
    path.write_text("".join(whole.splitlines(True)[:-1]))
    refuses_to_prune(outputs, capsys, path.name, "was cut", "run table2_saat quick again, or delete the file")
    path.unlink()
    assert "3 runs removed" in cli(capsys, "prune", "--yes", "--outputs", outputs)[1]


@pytest.mark.parametrize("text, name", [(f"run\n{alone(7).id}", "runs-1.csv"),
                                        (f"run\n{alone(7).id[:5]}\n", "runs-1.csv"), ("run\n", "runs-1.csv"),
                                        ("", "runs-1.csv"), ("row,value,run\nDAAT,3", "table.csv"),
                                        ("row,value,run\nDAAT,3\n", "table.csv"), (f"row,run\nDAAT,{alone(7).id}",
                                            "table.csv"), ("row,r", "table.csv"), ("row,run\nx,\0\n",
                                            "table.csv"), ("", "table.csv")])
def test_a_list_that_may_be_cut_offers_nothing(text, name, outputs, capsys):  # noqa: F811
    path = noted(outputs, text, name)
    refuses_to_prune(outputs, capsys, f"{path.parent.name}/{name}")


def test_an_older_keep_list_and_other_tables_are_read_as_ever(outputs, capsys):  # noqa: F811
    noted(outputs, f"run\n{alone(7).id}\n")
    noted(outputs, "claim,verdict\nx,holds\n", "claims.csv")
    noted(outputs, f"row,run\nmine,{alone(9).id} {alone(8, start=alone(9)).id}\nother,\n", "table.csv")
    assert cli(capsys, "prune", "--yes", "--outputs", outputs)[1] == "every run is needed by a table\n"


def test_a_list_that_may_not_be_read_offers_nothing(outputs, capsys, monkeypatch):  # noqa: F811
    path = noted(outputs, f"run\n{alone(7).id}\n")
    with another_users(path.name, monkeypatch): refuses_to_prune(outputs, capsys, path.name, "Permission denied")
    path.write_bytes(b"\xff\n")
    refuses_to_prune(outputs, capsys, path.name, "it is no text")


@pytest.mark.parametrize("name", ["spec.json", "evals/transfer-*.json"])
def test_what_a_needed_run_needs_is_not_offered_where_its_file_is_bad(name, outputs, capsys):  # noqa: F811
    store, run = Store(outputs/"runs"), alone(8, start=alone(9))
    weights = [store.facts(r)["weights"]["last"] for r in (run, alone(7))]
    store.evaluate(run, evaluation(Transfer(PGD(0.05, 1), 0.1), digits().info.identity, *weights, examples=10),
                   digits(), source=store.model(alone(7), digits()))
    noted(outputs, f"run\n{run.id}\n")
    assert {s.id: s.tables for s in inv.inventory(outputs)}[alone(7).id] == ("table2_saat quick",)
    path, = store.folder(run).glob(name)
    path.write_text("{")
    refuses_to_prune(outputs, capsys, store.folder(run).name, path.name)


def test_a_broken_dataset_folder_hides_no_run_from_the_plans(outputs, capsys, tmp_path, monkeypatch):  # noqa: F811
    from adaptive_at import __main__ as command
    for part in ("train", "val"): (tmp_path/"data"/"imagenet"/part/"n01").mkdir(parents=True)
    (tmp_path/"data"/"imagenet"/"train"/"n01"/"x.JPEG").write_bytes(b"")   # and val holds nothing
    monkeypatch.setattr(command, "project_root", lambda: tmp_path)
    code, out, err = cli(capsys, "list", "--outputs", outputs)
    assert code == 0 and out.splitlines()[-1].startswith("4 runs, ")
    assert "what table3_iaat needs in preset paper is not known: " in err and "table1_daat quick" in out
    refuses_to_prune(outputs, capsys, "what table3_iaat needs")


def test_plans_keep_a_run_of_any_seed_without_planning_them_all(tmp_path):
    from adaptive_at.base.identity import to_spec
    one, seeds = inv.planned(tmp_path, Path("data"), 1), inv.planned(tmp_path, Path("data"), 3)
    from test_tables import planned
    run = next(iter(planned("table2_saat", tmp_path, seeds=3).blocks[0].runs.values()))[2]
    assert run.id in seeds and run.id not in one and one[spec_hash(inv.first_seed(to_spec(run)))] == seeds[run.id]
