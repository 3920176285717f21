"A tiny table of eight methods, and processes that run it: forked from one that has imported everything, so that a kill costs a fraction of a second."
import contextlib
import mmap
import os
import random
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

from adaptive_at import networks
from adaptive_at.tables import plan as plans, results as tables
from adaptive_at.store import runs
from adaptive_at.algorithms.cat import cat
from adaptive_at.base.errors import UserError
from adaptive_at.algorithms.dra import dra_finetune
from adaptive_at.algorithms.iaat import iaat
from adaptive_at.algorithms.baselines import at, fat, mart, natural, trades
from adaptive_at.radius import DAAT
from adaptive_at.papers.table1_daat import TABLE
from adaptive_at.tables.plan import PRESETS, Row
from adaptive_at.store.runs import Store
from adaptive_at.algorithms.saat import saat_up
from adaptive_at.awp import AT_AWP
from helpers import OneLayer, contents, short_autoattack

METHODS = ["DAAT", "DAAT-TRADES", "MART", "FAT", "SAAT_up with AWP", "IAAT", "CAT", "DRA"]   # and Natural, which DRA starts from
COLUMNS = ["natural", "PGD-20", "AA", "transfer"]
SIZE = dict(preset="quick", device="cpu", eps=0.25, epochs=3, train_examples=96, test_examples=24, figures="none")


def rows(p):
    moving = DAAT(p.eps, rho=0.005)   # so small a margin that the radii move at once
    return {"Natural": natural(), "DAAT": at(p.eps, moving, steps=3), "DAAT-TRADES": trades(p.eps, moving, steps=3), "MART": mart(p.eps, steps=3), "FAT": fat(p.eps, steps=3),
            "SAAT_up with AWP": saat_up(p.eps, weights=AT_AWP), "IAAT": iaat(p.eps, warmup=67), "CAT": cat(p.eps), "DRA": Row(dra_finetune(p.eps), start="Natural")}


def columns(p):
    found = TABLE.columns(p)
    return {"natural": found["natural"], "PGD-20": found["PGD-20"], "AA": replace(found["AA"], batch_size=5), "transfer": found["transfer PGD-20 (Non-Robust)"]}


FAULTY = replace(TABLE, rows=rows, columns=columns, more_columns=lambda p: {}, extra_rows=lambda p: {}, extra_columns=lambda p: {}, figures={})


@contextlib.contextmanager
def tiny():
    "A preset that takes seconds: one layer, batches of 32, every evaluation in batches of 7, checkpoints after every batch, AutoAttack with a few steps, one core."
    def batched(*args, **kwargs): return replace(evaluation(*args, **kwargs), batch=7)
    evaluation, quick = plans.evaluation, PRESETS["quick"]
    small = replace(quick, network="one layer", training=replace(quick.training, batch=32), monitor_examples=20, monitor_every=1, aa_examples=10)
    with patch.dict(networks.NETWORKS, {"one layer": OneLayer()}), patch.dict(PRESETS, {"quick": small}), short_autoattack(), \
         patch.object(plans, "evaluation", batched), patch.object(plans, "cores", lambda: 1), patch.object(Store, "every", -1.): yield


def parameters(outputs, *methods): return SIZE | {"rows": ",".join(methods), "outputs": str(outputs)}


# What a store holds

def differences(found, expected):
    "File by file, in words."
    return [f"{name} {'is missing' if name not in found else 'is new' if name not in expected else 'differs'}" for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]


# Processes

PHASES = ["training", "checkpointing", "evaluation", "table writing"]


@dataclass(frozen=True)
class Kill:
    "When a process dies."
    how: str           # 'time': after so many seconds of computing; 'before', 'after': a file took its place; 'torn': half of a file was written
    when: float        # seconds, or the number of the file
    share: float = 0.5 # of a torn file that was written


class Process:
    "A forked child that runs a table, or some rows of it."
    def __init__(self, log: Path, work, kill: Kill|None = None, called: int|None = None):   # the last: the process id that it believes to have, as in a container
        self.log, self.phase, self.files = log, mmap.mmap(-1, 1), mmap.mmap(-1, 2)
        sys.stdout.flush()
        sys.stderr.flush()
        if pid := os.fork():
            self.pid = pid
            return
        status = 1
        try:
            with open(log, "a", buffering=1) as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                sys.stdout = sys.stderr = out
                signal.signal(signal.SIGINT, signal.default_int_handler)
                self._watched()
                if kill: self._armed(kill)
                if called: os.getpid = lambda: called
                try:
                    work()
                    status = 0
                except UserError as e: print(f"refused: {e}")
                except BaseException: traceback.print_exc()
        finally: os._exit(status)

    def _watched(self):
        "Note what is being done, and each run and evaluation that is begun."
        def within(number, call):
            def noted(*args, **kwargs):
                before = self.phase[0]
                self.phase[0] = number
                try: return call(*args, **kwargs)
                finally: self.phase[0] = before
            return noted
        def announced(what, call):
            def said(subject, *args):
                print(f"working: {what} {subject.id}")
                return call(subject, *args)
            return said
        runs.train, runs.evaluate = announced("train", runs.train), within(2, announced("evaluate", runs.evaluate))
        Store._save, runs.write_checkpoint = within(1, Store._save), within(1, runs.write_checkpoint)
        tables.Results.write = within(3, tables.Results.write)

    def _armed(self, kill):
        def die(): os.kill(os.getpid(), signal.SIGKILL)
        def watch():
            while time.process_time() < kill.when: time.sleep(0.0005)
            die()
        if kill.how == "time": return threading.Thread(target=watch, daemon=True).start()
        put, sync, files = os.replace, os.fsync, [0, 0]
        def replaced(*args):
            files[0] += 1
            if kill.how == "before" and files[0] == kill.when: die()
            put(*args)
            if kill.how == "after" and files[0] == kill.when: die()
        def synced(fd):
            path = os.readlink(f"/proc/self/fd/{fd}")
            files[1] += not os.path.isdir(path)   # a folder is synced after its file took its place
            if kill.how == "torn" and files[1] == kill.when:
                os.truncate(path, int(kill.share * os.path.getsize(path)))
                die()
            sync(fd)
        os.replace, os.fsync = replaced, synced

    def wait(self, seconds=300.):
        "The exit code, negative for a signal."
        until = time.monotonic() + seconds
        while not (done := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"not ended after {seconds:.0f} s:\n{self.log.read_text()}")
            time.sleep(0.002)
        return os.waitstatus_to_exitcode(done[1])

    @property
    def doing(self): return PHASES[self.phase[0]]


def table_of(outputs, *methods): return lambda: tables.run(FAULTY, **parameters(outputs, *methods))


@dataclass(frozen=True)
class Reference:
    "An undisturbed run of one method: what its store holds, and how long it computes and how many files it writes."
    folder: Path
    contents: dict
    seconds: float
    files: int


def reference(method, folder):
    "Run a method in this process."
    count, put = [], os.replace
    def counted(*args):
        count.append(1)
        put(*args)
    began = time.process_time()
    with patch.object(os, "replace", counted), contextlib.redirect_stdout(open(os.devnull, "w")): table_of(folder, method)()
    return Reference(folder, contents(folder), time.process_time() - began, len(count))


def drawn(rng: random.Random, how: str, expected: Reference) -> Kill:
    "A random moment."
    if how == "time": return Kill(how, rng.uniform(0, expected.seconds))
    if how == "table": return Kill(rng.choice(["before", "torn", "after"]), expected.files, rng.random())
    return Kill(how, rng.randint(1, expected.files), rng.random())
