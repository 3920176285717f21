"Files of the store: whose temporary file is whose, folders that cannot be made, files that may not be read, disks that fail or lose power."
import errno
import json
import os
import platform
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

from adaptive_at.store import audit
from adaptive_at.tables import plan as plans, results as tables
from adaptive_at.base import files
from adaptive_at.__main__ import main
from adaptive_at.base.errors import UserError
from adaptive_at.base.files import locked, read_json, atomic_write, write_json, write_text
from adaptive_at.papers.table1_daat import TABLE
from adaptive_at.tables.parameters import check_parameters
from adaptive_at.store.runs import Store

from helpers import digits
from test_interrupted import spec


# Temporary files

def forked(work):
    "Do something in a child; a function that waits for it and returns what it said, or how it failed."
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.close(reading)
        try: said = work()
        except BaseException: said = traceback.format_exc()
        with os.fdopen(writing, "w") as f: f.write(str(said))
        os._exit(0)
    os.close(writing)
    def heard():
        with os.fdopen(reading) as f: said = f.read()
        os.waitpid(child, 0)
        return said
    return heard


def test_two_containers_with_one_process_id_lose_no_write(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    def writes(name):
        def work():
            for i in range(150): write_json(tmp_path/"shared.json", {"by": name, "text": 3000 * name, "i": i})
            return "all of them"
        return work
    said = [heard() for heard in [forked(writes(name)) for name in "ab"]]
    assert said == ["all of them"] * 2
    found = read_json(tmp_path/"shared.json")
    assert found["text"] == 3000 * found["by"] and [p.name for p in tmp_path.iterdir()] == ["shared.json"]


def test_a_temporary_file_says_whose_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "node", lambda: "Machine_1/übel")
    with atomic_write(tmp_path/"a.json") as one, atomic_write(tmp_path/"a.json") as other:
        assert one != other and one.parent == tmp_path
        for part in (one, other):
            assert part.name.startswith(f".a.json.machine-1-bel.{os.getpid()}.") and part.name.endswith(".part")
            part.write_text("{}")


def test_a_stale_lock_is_put_away_under_a_name_of_its_own(tmp_path, monkeypatch):
    names, rename = [], os.rename
    monkeypatch.setattr(os, "rename", lambda a, b: (names.append(Path(b).name), rename(a, b)))
    for _ in range(2):
        held = tmp_path/"lock.held"
        held.write_text("")
        os.utime(held, (0, 0))
        files.Heartbeat(tmp_path/"lock")._put_away()
    assert len(set(names)) == 2 and not list(tmp_path.iterdir())


# Folders

def sentence(work, *parts):
    with pytest.raises(UserError) as caught: work()
    said = str(caught.value)
    assert said.endswith(".") and "\n" not in said and all(str(p) in said for p in parts), said
    return said


def writing(path):
    def work():
        with atomic_write(path) as part: part.write_text("x")
    return work


def locking(path):
    def work():
        with locked(path): pass
    return work


@pytest.mark.parametrize("make", [writing, locking, lambda path: lambda: write_text(path, "x"), lambda path: lambda: write_json(path, 1)], ids=["replacing", "locked", "write_text", "write_json"])
def test_a_folder_that_cannot_be_made_is_one_sentence(make, tmp_path, monkeypatch):
    (tmp_path/"taken").write_text("a file")
    sentence(make(tmp_path/"taken"/"below"/"x"), "taken", "could not be written", "Not a directory")
    with monkeypatch.context() as m:
        m.setattr(Path, "mkdir", lambda self, **kwargs: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system")))
        sentence(make(tmp_path/"new"/"x"), "new", "could not be written", "Read-only file system")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


# Power cuts

@pytest.fixture
def disk(monkeypatch):
    "What happens to names and folders, in order."
    done, replace, fsync, mkdir = [], os.replace, os.fsync, os.mkdir
    def synced(fd):
        done.append(("sync", os.path.realpath(f"/proc/self/fd/{fd}")))
        fsync(fd)
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(("replace", os.path.realpath(b))), replace(a, b)))
    monkeypatch.setattr(os, "mkdir", lambda path, *args: (mkdir(path, *args), done.append(("mkdir", os.path.realpath(path))))[0])
    monkeypatch.setattr(os, "fsync", synced)
    return done


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_a_power_cut_undoes_no_replacement(tmp_path, disk):
    write_text(tmp_path/"a"/"b"/"x.csv", "x")
    file, folder = str(tmp_path/"a"/"b"/"x.csv"), str(tmp_path/"a"/"b")
    made = disk.index(("mkdir", folder))
    content = next(i for i, (what, path) in enumerate(disk) if what == "sync" and Path(path).name.startswith(".x.csv."))
    named = disk.index(("replace", file))
    assert {("sync", str(tmp_path/"a")), ("sync", str(tmp_path))} <= set(disk[made:content])   # the names of the new folders
    assert content < named and disk[named + 1:] == [("sync", folder)]                          # the content before its name, and then the name
    disk.clear()
    write_text(tmp_path/"a"/"b"/"x.csv", "y")
    assert [what for what, _ in disk] == ["sync", "replace", "sync"] and disk[-1] == ("sync", folder)   # nothing is new but the file


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_a_file_system_that_cannot_sync_a_folder_is_taken_as_it_is(code, tmp_path, monkeypatch):
    fsync = os.fsync
    def refuse(fd):
        if Path(f"/proc/self/fd/{fd}").is_dir(): raise OSError(code, os.strerror(code))
        fsync(fd)
    monkeypatch.setattr(os, "fsync", refuse)
    write_text(tmp_path/"x", "x")
    assert (tmp_path/"x").read_text() == "x"


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_while_its_folder_is_synced_is_one_sentence(code, tmp_path, monkeypatch):
    fsync = os.fsync
    def refuse(fd):
        if Path(f"/proc/self/fd/{fd}").is_dir(): raise OSError(code, os.strerror(code))
        fsync(fd)
    monkeypatch.setattr(os, "fsync", refuse)
    sentence(writing(tmp_path/"x"), "x could not be written", os.strerror(code))


# Files that may not be read

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A small table in a store."
    outputs = tmp_path_factory.mktemp("trained")/"outputs"
    tables.run(TABLE, **SMALL, outputs=str(outputs))
    return outputs


SMALL = dict(preset="quick", device="cpu", epochs=1, train_examples=64, test_examples=20, rows="Natural", columns="clean", figures="none")


def planned(outputs): return plans.Plan(TABLE, plans.open_session(check_parameters("table1_daat", SMALL | {"outputs": str(outputs), "dry_run": True})))


def cell(plan):
    block = plan.blocks[0]
    return block, block.runs["Natural"][0]


@pytest.fixture
def unreadable(monkeypatch):
    "Files of these names may not be read."
    names = []
    opened = open
    def refuse(path, mode="r", *args, **kwargs):
        if isinstance(path, (str, Path)) and Path(path).name in names and not set(mode) & set("wax"): raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, mode, *args, **kwargs)
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("io.open", refuse)
    return names


@pytest.mark.parametrize("name", ["spec.json", "history.csv", "evals/clean-*.json"])
def test_a_file_that_may_not_be_read_is_one_sentence(name, trained, tmp_path, unreadable):
    shutil.copytree(trained, tmp_path/"outputs")
    plan = planned(tmp_path/"outputs")
    block, run = cell(plan)
    path, = plan.store.folder(run).glob(name)
    assert plan.store.finished(run) and plan.verdict(block, "Natural", "natural", 0)
    before = {p: p.read_bytes() for p in (tmp_path/"outputs").rglob("*") if p.is_file()}
    unreadable.append(path.name)
    for work in (lambda: (plan.store.history(run), plan.store.facts(run), plan.verdict(block, "Natural", "natural", 0)), lambda: tables.run(TABLE, **SMALL, outputs=str(tmp_path/"outputs"))):
        sentence(work, path, "cannot be read (Permission denied)", "may read it", "run the same command again")
    unreadable.clear()
    assert {p: p.read_bytes() for p in (tmp_path/"outputs").rglob("*") if p.is_file()} == before   # nothing is renamed, nothing trained anew


@pytest.mark.parametrize("code, said", [(errno.EIO, "Input/output error"), (errno.ESTALE, "Stale file handle")])
def test_a_failing_disk_is_no_damage(code, said, trained, monkeypatch):
    plan = planned(trained)
    block, run = cell(plan)
    monkeypatch.setattr(Path, "read_bytes", lambda self: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
    for work in (lambda: plan.store.history(run), lambda: plan.store.facts(run), lambda: plan.verdict(block, "Natural", "natural", 0)):
        sentence(work, "cannot be read", said)


def test_what_is_not_there_is_not_unreadable(tmp_path):
    store = Store(tmp_path)
    assert store.history(spec()) == [] and store.facts(spec()) == {} and not store.finished(spec())
    (tmp_path/"runs").write_text("a file")
    assert Store(tmp_path/"runs").facts(spec()) == {}
    with pytest.raises(FileNotFoundError): read_json(tmp_path/"nothing")


# A store that may be read and not written

def as_nobody(work):
    "What a function returns in a process without root's rights. Skips where that process could not even read the code: the folder of a root's own checkout or environment."
    closed = "closed to others than root"
    def dropped():
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        if not all(os.access(p, os.R_OK) for p in (__file__, files.__file__, pytest.__file__)): return closed
        sys.stdout = sys.stderr = open(os.devnull, "w")
        return work()
    said = forked(dropped)()
    if said == closed: pytest.skip("the checkout or the environment may be read by root alone")
    return said


@pytest.fixture
def read_only(trained):
    "A copy that everyone may read and nobody but root may write."
    folder = Path(tempfile.mkdtemp())
    shutil.copytree(trained, folder/"outputs")
    for p in (folder, *folder.rglob("*")): p.chmod(0o555 if p.is_dir() else 0o444)
    yield folder/"outputs"
    for p in (folder, *folder.rglob("*")): p.chmod(0o755)
    shutil.rmtree(folder)


def test_a_read_only_store_can_be_viewed(read_only):
    def view():
        plan = planned(read_only)
        block, run = cell(plan)
        model = plan.store.model(run, digits())
        return json.dumps([len(plan.store.history(run)), sorted(plan.store.facts(run)), plan.verdict(block, "Natural", "natural", 0)["n"], len(plan.store.radius(run)["eps"]) > 0, model.training])
    view()   # what is imported late is imported by now
    assert json.loads(as_nobody(view)) == [1, ["best", "history", "made with", "run", "weights"], 20, True, False]
    for arguments in (["list"], ["show", audit.everything(read_only)[0].id], ["verify"]):
        assert as_nobody(lambda: main(["runs", *arguments, "--outputs", str(read_only)])) == "0", arguments


def test_a_table_is_shown_from_a_read_only_store(read_only, trained):
    tables.run(TABLE, **SMALL, outputs=str(trained)).table().to_html()   # what is imported late is imported by now
    def shown():
        results = tables.run(TABLE, **SMALL, outputs=str(read_only))
        assert "Natural" in results.table().to_html()
        return f"{results.frame.n.tolist()} {results.plan.folder}"
    numbers, _, folder = as_nobody(shown).partition(" ")
    assert numbers == "[20]", folder
    assert (Path(folder)/"table.csv").exists() and not Path(folder).is_relative_to(read_only)
    shutil.rmtree(Path(folder).parent.parent)


def test_a_read_only_store_takes_no_new_run(read_only):
    def trains():
        try: tables.run(TABLE, **SMALL | {"rows": "DAAT"}, outputs=str(read_only))
        except UserError as e: return e
    said = as_nobody(trains)
    assert said.startswith("outputs is ") and "cannot be written" in said and "choose a folder you may write to" in said and said.count("\n") == 0


def test_a_folder_that_may_not_even_be_looked_into_is_refused(tmp_path):
    folder = Path(tempfile.mkdtemp())
    (folder/"closed").mkdir(mode=0o700)
    folder.chmod(0o755)
    def starts():
        try: check_parameters("table1_daat", dict(outputs=str(folder/"closed"/"outputs")))
        except UserError as e: return e
    said = as_nobody(starts)
    shutil.rmtree(folder)
    assert said.startswith("outputs is ") and "cannot be written" in said and said.count("\n") == 0


# Links in a folder that others may write

@pytest.mark.parametrize("locks", [True, False])
def test_a_lock_that_somebody_made_a_link_writes_nothing_elsewhere(locks, tmp_path, monkeypatch):
    class None_(files.FileLock):
        def acquire(self, *args, **kwargs): raise OSError(errno.ENOSYS, "Function not implemented")
    if not locks: monkeypatch.setattr(files, "FileLock", None_)
    (tmp_path/"mine.txt").write_text("mine")
    (tmp_path/"lock").symlink_to(tmp_path/"mine.txt")
    try:
        with locked(tmp_path/"lock"): pass
    except UserError as e: assert "could not be written" in str(e)
    assert (tmp_path/"mine.txt").read_text() == "mine"
