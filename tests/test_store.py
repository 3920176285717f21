"The store as a user meets it: parts of a table, damaged or deleted files."
import csv
import errno
import io
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from adaptive_at.attacks import PGD
from adaptive_at.base.errors import Unreadable, UserError
from adaptive_at.base.files import write_json
from adaptive_at.evaluation import Clean, evaluation
from adaptive_at.algorithms.baselines import Training
from adaptive_at.algorithms.daat import daat
from adaptive_at.networks import NarrowResNet, fingerprint
from adaptive_at.papers.table1_daat import TABLE
from adaptive_at.store.runs import Store
from adaptive_at.store.checksums import END, FORMAT, FileLabel, checksum, append_label
from adaptive_at.tables.results import run
from adaptive_at.training import Monitor, Run, State

from helpers import digits

pytestmark = pytest.mark.trains

SIZE = dict(preset="quick", device="cpu", epochs=2, train_examples=96, test_examples=20, figures="none")


@pytest.fixture
def store(tmp_path):
    results = run(TABLE, **SIZE, rows="Natural", columns="clean,FGSM", outputs=str(tmp_path))
    return tmp_path, results


def lines(folder):
    with open(folder/"table1_daat/quick/table.csv", newline="") as f: return {(l["row"], l["column"]): l["value"] for l in csv.DictReader(f)}


def test_a_part_run_keeps_what_the_store_holds(store):
    folder, _ = store
    before = lines(folder)
    assert set(before) == {("Natural", "natural"), ("Natural", "FGSM")}
    part = run(TABLE, **SIZE, rows="Standard AT", columns="PGD-20", outputs=str(folder))
    after = lines(folder)
    assert set(after) == {*before, ("Standard AT", "PGD-20")} and all(after[k] == v for k, v in before.items())
    assert list(part.frame.row) == ["Standard AT"], "the table shown is the part that was asked for"


@pytest.mark.parametrize("pattern", ["runs/*/spec.json", "runs/*/evals/clean-*.json"])
def test_a_damaged_file_is_one_sentence_and_deleting_it_mends_it(store, pattern):
    folder, first = store
    path, = folder.glob(pattern)
    weights = {p: p.stat().st_mtime_ns for p in folder.rglob("best.pt")}
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.raises(UserError) as caught: run(TABLE, **SIZE, rows="Natural", columns="clean,FGSM", outputs=str(folder))
    assert path.name in str(caught.value) and "\n" not in str(caught.value)
    path.unlink()
    again = run(TABLE, **SIZE, rows="Natural", columns="clean,FGSM", outputs=str(folder))
    assert again.frame.value.tolist() == first.frame.value.tolist()
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("best.pt")} == weights, "nothing was trained again"


def test_an_output_folder_that_only_looks_writable_is_refused():
    with pytest.raises(UserError, match="outputs is '/proc/nowhere'"): run(TABLE, **SIZE, rows="Natural", columns="clean", outputs="/proc/nowhere")


def test_a_table_without_its_surrogate_s_row_leaves_the_column_out(tmp_path):
    table = replace(TABLE, rows=lambda p: {"Standard AT": TABLE.rows(p)["Standard AT"]})
    results = run(table, **SIZE, columns="clean", outputs=str(tmp_path))
    assert list(results.frame.column) == ["natural"]
    with pytest.raises(UserError, match="made on the row 'Natural'"): run(table, **SIZE, columns="Non-Robust", outputs=str(tmp_path))


# Damaged files. The run of seed 4 has its best epoch in the middle, so that neither of the two kept states holds those weights.

def tiny(seed=4):
    return Run("digits", digits().info.identity, NarrowResNet(width_factor=4), daat(0.1, steps=1), Training(epochs=4, batch=32, lr=0.3), Monitor(PGD(0.05, 1), 0.1, 40), train_examples=96, seed=seed)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    "A store with two finished runs and one evaluation."
    store = Store(tmp_path_factory.mktemp("kept"))
    for seed in (4, 5): store.train(tiny(seed), digits(), report_line=lambda line: None)
    store.evaluate(tiny(), clean(store), digits())
    assert store.history(tiny())[1]["test_robust"] == max(h["test_robust"] for h in store.history(tiny()))
    return store


@pytest.fixture
def copied(kept, tmp_path):
    shutil.copytree(kept.root, tmp_path/"runs")
    return Store(tmp_path/"runs")


def clean(store, checkpoint="last"): return evaluation(Clean(), digits().info.identity, store.facts(tiny())["weights"][checkpoint], examples=50)


def numbers_of(store):
    "What must be equal, the seconds left out."
    facts = store.facts(tiny())
    return ([{k: v for k, v in h.items() if k != "seconds"} for h in store.history(tiny())], facts["weights"], facts["best"],
            {k: v.tobytes() for k, v in store.radius(tiny()).items()}, *(fingerprint(store.model(tiny(), digits(), w)) for w in ("last", "best")))


def resealed(path, **changes):
    "Give a file another seal, with a right checksum."
    content = path.read_bytes()
    end = content.rfind(END)
    path.write_bytes(content[:end + 20] + b"\0\0")
    append_label(path, replace(FileLabel(tiny().id, {"last": "state", "previous": "state", "best": "weights"}.get(path.stem, path.stem), 4), **changes))


def truncated(path): path.write_bytes(path.read_bytes()[:-500])
def cut_by_one(path): path.write_bytes(path.read_bytes()[:-1])
def emptied(path): path.write_bytes(b"")
def deleted(path): path.unlink()
def swapped(path): shutil.copy(next(p for p in path.parent.parent.iterdir() if p.name.endswith(tiny(5).id))/path.name, path)
def newer(path): resealed(path, format=FORMAT + 1)
def foreign(path): path.write_text("not ours")
def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("fault", [truncated, cut_by_one, emptied, deleted, swapped, newer, foreign, flipped])
@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_a_damaged_checkpoint_is_named_and_trained_again_to_the_same_weights(name, fault, kept, copied):
    path, said = copied.folder(tiny())/name, []
    fault(path)
    again = copied.model(tiny(), digits(), path.stem, report_line=said.append)
    assert fingerprint(again) == kept.facts(tiny())["weights"][path.stem]
    assert said[0].startswith(f"{name} of {path.parent.name} ") and "\n" not in said[0]
    assert fault is deleted or (f"set aside as {path.stem}.damaged" in said[0] and path.with_suffix(".damaged").exists())
    assert ("continuing after epoch 3 of 4" in said) == (name == "last.pt") and any("starts again" in line for line in said) == (name == "best.pt")
    assert numbers_of(copied) == numbers_of(kept)


def test_a_begun_run_goes_on_from_the_checkpoint_before(kept, tmp_path):
    store, said = Store(tmp_path), []
    def stop(line):
        if line.startswith("epoch   3/4"): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): store.train(tiny(), digits(), report_line=stop)
    flipped(store.folder(tiny())/"last.pt")
    assert store.train(tiny(), digits(), report_line=said.append)
    assert "its checksum differs; it is set aside as last.damaged" in said[0] and said[1] == "continuing after epoch 2 of 4"
    assert numbers_of(store) == numbers_of(kept)


def test_without_any_good_checkpoint_the_run_starts_again(kept, copied):
    said = []
    for name in ("last.pt", "previous.pt"): truncated(copied.folder(tiny())/name)
    copied.model(tiny(), digits(), report_line=said.append)
    assert [line.partition(" of ")[0] for line in said[:2]] == ["last.pt", "previous.pt"] and said[2].endswith("the run starts again")
    assert numbers_of(copied) == numbers_of(kept)


@pytest.mark.parametrize("fault", [truncated, emptied, deleted, swapped, newer, flipped])
def test_a_damaged_bank_is_made_anew_without_training(fault, kept, copied):
    fault(copied.folder(tiny())/"radius.npz")
    with pytest.raises(UserError, match="^radius.npz of .* run the same command again") as caught: copied.radius(tiny())
    assert "\n" not in str(caught.value)
    said = []
    assert copied.train(tiny(), digits(), report_line=said.append) and said == ["continuing after epoch 4 of 4"]
    assert numbers_of(copied) == numbers_of(kept)


def test_an_altered_history_is_written_anew(kept, copied):
    path, said = copied.folder(tiny())/"history.csv", []
    path.write_text(path.read_text().replace("4,", "5,", 1))
    assert not copied.finished(tiny())
    copied.train(tiny(), digits(), report_line=said.append)
    assert said[0].startswith("history.csv of ") and "made anew" in said[0] and numbers_of(copied) == numbers_of(kept)


def test_an_altered_evaluation_gives_no_number(copied):
    path, = copied.folder(tiny()).glob("evals/clean-*.json")
    stored = json.loads(path.read_text())
    right = stored["result"]["accuracy"]
    path.write_text(path.read_text().replace(f'"accuracy": {right}', f'"accuracy": {right + 2}'))
    with pytest.raises(UserError, match="checksum differs"): copied.verdicts(tiny(), clean(copied))
    stored["result"]["accuracy"] += 2  # by someone who knows how to write checksums
    del stored["sha256"]
    write_json(path, stored | {"sha256": checksum(stored)})
    with pytest.raises(UserError, match="contradict each other"): copied.evaluate(tiny(), clean(copied), digits())
    path.unlink()
    assert copied.evaluate(tiny(), clean(copied), digits())["accuracy"] == right


@pytest.mark.parametrize("change", [{"run": {"piece": "os.system"}}, {"made with": [{"threads": 10**9}]}, {"made with": "rm"}, {"weights": {"last": "../../x"}}, {"weights": [1]}, {"best": "x"}, {"history": 3}],
                         ids=lambda change: " ".join(f"{k} {v}" for k, v in change.items()))
def test_a_spec_that_no_run_writes_is_refused(change, copied):
    path = copied.folder(tiny())/"spec.json"
    spec = {k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"} | change
    write_json(path, spec | {"sha256": checksum(spec)})
    with pytest.raises(UserError, match="spec.json .*; delete it and run the same command again") as caught: copied.train(tiny(), digits())
    assert "\n" not in str(caught.value)


def test_files_without_seals_are_read_as_they_are(kept, copied):
    folder, said = copied.folder(tiny()), []
    for path in folder.glob("*.[pn][tp]*"):
        content = path.read_bytes()
        path.write_bytes(content[:content.rfind(END) + 20] + b"\0\0")
    for path in folder.rglob("*.json"): write_json(path, {k: v for k, v in json.loads(path.read_text()).items() if k not in ("sha256", "history")})
    (folder/"previous.pt").unlink()
    assert numbers_of(copied) == numbers_of(kept) and copied.verdicts(tiny(), clean(copied))["n"] == 50
    (folder/"history.csv").unlink()
    assert copied.train(tiny(), digits(), report_line=said.append) and said == ["continuing after epoch 4 of 4"]
    assert numbers_of(copied) == numbers_of(kept)


# Nothing in a store is run as code

class Payload:
    "Touches a file when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("with_seal", [False, True])
@pytest.mark.parametrize("name", ["last.pt", "best.pt", "radius.npz"])
def test_a_malicious_file_is_refused_and_not_executed(name, with_seal, kept, copied, tmp_path):
    path, trap, said = copied.folder(tiny())/name, tmp_path/"executed", []
    if path.suffix == ".pt": torch.save({"model": {"w": Payload(trap)}, "epoch": 4}, path)
    else:
        with open(path, "wb") as f: np.savez(f, eps=np.array([Payload(trap)], dtype=object))
    if with_seal: resealed(path)
    if path.suffix == ".pt": copied.model(tiny(), digits(), path.stem, report_line=said.append)
    else:
        with pytest.raises(UserError) as caught: copied.radius(tiny())
        said.append(str(caught.value))
        copied.train(tiny(), digits(), report_line=said.append)
    assert said[0].startswith(f"{name} of ") and "cannot be read as plain" in said[0] and not trap.exists()
    assert numbers_of(copied) == numbers_of(kept) and not trap.exists()


# Failures that say nothing of a file: nothing is renamed, and the same command goes on when they are over

ALLOCATOR = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)")
FAILURES = {"memory": MemoryError(), "allocator": ALLOCATOR,
            "GPU memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
            "disk": OSError(errno.EIO, "Input/output error"),
            "GPU": torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
            "read": RuntimeError("PytorchStreamReader failed reading file data/0: file read failed"),
            "copy": RuntimeError('Error(s) in loading state_dict for Sequential:\n\tWhile copying the parameter named "0.weight", an exception occurred : (\'CUDA error: unknown error\',).')}


def failing(failure):
    def fail(*args, **kwargs): raise failure
    return fail


def files(store):
    return {p.relative_to(store.root): p.read_bytes() for p in store.root.rglob("*") if p.is_file()
            and "lock" not in p.name}


def refused_for_now(work, name):
    "One sentence, which says that nothing was done to the file."
    with pytest.raises(Unreadable) as caught: work()
    text = str(caught.value)
    assert "\n" not in text and name in text and text.endswith("run the same command again."), text
    assert "no file was changed" in text or "cannot be read (Input/output error)" in text, text


@pytest.mark.parametrize("where", [(torch, "load"), (torch.nn.Module, "load_state_dict"), (torch.nn.Module, "to")],
                         ids=["reading", "copying", "moving"])
def test_weights_that_cannot_be_loaded_now_stay_where_they_are(where, kept, copied, monkeypatch):
    before, built = files(copied), tiny().network.build(10, 1)
    monkeypatch.setattr(NarrowResNet, "build", Mock(return_value=built))   # a function would be a part of the run's spec
    for failure in FAILURES:
        with monkeypatch.context() as broken:
            broken.setattr(*where, failing(FAILURES[failure]))
            refused_for_now(lambda: copied.model(tiny(), digits(), report_line=print), "last.pt")
        assert files(copied) == before, failure
    assert fingerprint(copied.model(tiny(), digits())) == kept.facts(tiny())["weights"]["last"]


@pytest.mark.parametrize("where", [(torch, "load"), (State, "__init__"), (State, "load_state_dict")],
                         ids=["reading", "making", "copying"])
def test_a_state_that_cannot_be_loaded_now_stays_where_it_is(where, kept, copied, monkeypatch):
    (copied.folder(tiny())/"history.csv").unlink()   # the run counts as begun
    before, said = files(copied), []
    for failure in FAILURES:
        if where[1] == "__init__" and failure in ("read", "copy", "disk"): continue   # nothing is read there
        with monkeypatch.context() as broken:
            broken.setattr(*where, failing(FAILURES[failure]))
            refused_for_now(lambda: copied.train(tiny(), digits(), report_line=said.append), "last.pt")
        assert files(copied) == before and not said, failure
    assert copied.train(tiny(), digits(), report_line=said.append) and said == ["continuing after epoch 4 of 4"]
    assert numbers_of(copied) == numbers_of(kept)


def test_a_bank_that_cannot_be_loaded_now_stays_where_it_is(copied, monkeypatch):
    before = files(copied)
    for failure in ("memory", "disk"):
        with monkeypatch.context() as broken:
            broken.setattr(np, "load", failing(FAILURES[failure]))
            refused_for_now(lambda: copied.radius(tiny()), "radius.npz")
        assert files(copied) == before
    assert copied.radius(tiny())["eps"].shape == (len(digits().train.y),)


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "radius.npz", "history.csv", "spec.json", "evals/clean-*.json"])
def test_a_file_that_the_system_does_not_let_us_read_stays_where_it_is(name, kept, copied, monkeypatch):
    "The disk fails at the first, or at a later, read of the file."
    path, = copied.folder(tiny()).glob(name)
    e, before = clean(kept), files(copied)
    def all_of_it():
        return copied.history(tiny()), copied.radius(tiny()), [copied.model(tiny(), digits(), w)
                                                               for w in ("last", "best")], copied.verdicts(tiny(), e)
    for place in (0, 1):
        if place and path.suffix in (".csv", ".json"): continue   # one read
        with unreadable(path, place, monkeypatch): refused_for_now(all_of_it, path.name)
        assert files(copied) == before
    assert all_of_it()[0] == kept.history(tiny())


def test_a_state_of_other_shapes_is_damaged(kept, copied):
    "Also where PyTorch would stretch one value over the whole bank."
    path, said = copied.folder(tiny())/"last.pt", []
    (path.parent/"history.csv").unlink()
    saved = torch.load(path, weights_only=True)
    saved["bank"]["eps"] = saved["bank"]["eps"][:1].clone()
    torch.save(saved, path)
    resealed(path)
    assert copied.train(tiny(), digits(), report_line=said.append) and "does not fit this run" in said[0]
    assert "set aside as last.damaged" in said[0]
    assert numbers_of(copied) == numbers_of(kept)


@contextmanager
def unreadable(path, place, monkeypatch):
    "Within, the disk fails at the n-th read of one file, and at all that follow."
    class Failing(io.FileIO):
        reads = 0
        def readinto(self, buffer):
            self.reads += 1
            if self.reads > place: raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().readinto(buffer)
        def readall(self): return self.readinto(bytearray(1)) and b""
    def opened(file, mode="r", *args, **kwargs):
        if Path(str(file)) != path or set(mode) & set("wa+"): return whole(file, mode, *args, **kwargs)
        raw = io.BufferedReader(Failing(file), 512)
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding="utf-8")
    whole = io.open
    with monkeypatch.context() as broken:
        broken.setattr(io, "open", opened)
        broken.setattr("builtins.open", opened)
        yield
