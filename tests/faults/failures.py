"Let a file of a store fail for a while, though it is as good as ever: one sentence, nothing renamed or lost, and the same command goes on afterwards."
import builtins
import contextlib
import errno
import io
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from .bench import Process, contents, differences, table_of
from .damage import ATTACKED, BEGUN, FINISHED, METHOD, Bases, one


def short_of_memory(path): torch.empty(2**50)   # in PyTorch's own words
def disk_error(path): raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
def not_permitted(path): raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


# 'loading': when its checksum has passed; 'opening': before
FAILURES = {
    "short memory": ("loading", short_of_memory), "I/O error after the checksum": ("loading", disk_error),
    "I/O error": ("opening", disk_error), "unreadable": ("opening", not_permitted),
}
UNREAD = [   # by a table, or not loaded: the newest state is
    ("finished", "radius.npz"), ("finished", "table1_daat/quick/table.csv"), ("finished", "previous.pt"), ("finished",
                                                                                                           "best.pt"),
    ("begun", "previous.pt"),
]


def cases():
    for state, names in (("finished", FINISHED), ("begun", BEGUN), ("attacked", ATTACKED)):
        for name in names:
            if (state, name) in UNREAD: continue
            for fault, (when, _) in FAILURES.items():
                loaded = name.endswith(".pt") and name != "within.pt"   # which is older than the last one here
                if when == "opening" or loaded: yield state, name, fault


CASES = list(cases())


@dataclass
class Failures:
    "What came of it."
    outcomes: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __str__(self):
        n = sum(self.outcomes.values()) + len(self.wrong)
        return f"{n} files that failed for a while ({', '.join(f'{n} {k}' for k, n in self.outcomes.most_common())}): {len(self.wrong)} lost something or gave a traceback" + "".join(f"\n  {text}" for text in self.wrong)


@contextlib.contextmanager
def failing(path: Path, fault: str):
    "Within, one file fails."
    when, fail = FAILURES[fault]
    def guarded(call):
        def read(file, *args, **kwargs):
            writes = isinstance(args[0] if args else kwargs.get("mode"), str) and set(args[0]
                if args else kwargs["mode"]) & set("wax+")
            if not isinstance(file, int) and not writes and os.path.abspath(file) == str(path): fail(path)
            return call(file, *args, **kwargs)
        return read
    where = ((torch, "load"), (np, "load")) if when == "loading" else ((builtins, "open"), (io, "open"))
    with contextlib.ExitStack() as held:
        for module, name in where: held.enter_context(patch.object(module, name, guarded(getattr(module, name))))
        yield


def held_by(outputs: Path) -> dict[str, bytes]:
    "What must still be there."
    return {p.relative_to(outputs).as_posix(): p.read_bytes() for p in outputs.rglob("*") if p.is_file()
            and not p.name.endswith("lock")}


def failed(bases: Bases, state: str, name: str, fault: str, outputs: Path) -> tuple[str, str]:
    "Let one file fail; the outcome, and what was wrong with it."
    shutil.copytree(bases.folder/state, outputs)
    path, log = one(outputs, name), outputs.with_suffix(".log")
    if path.suffix == ".pt" and state == "finished":
        for p in outputs.glob("runs/*daat*/evals/*"): p.unlink()   # so that the weights are needed again
    before = held_by(outputs)
    def work():
        with failing(path, fault): table_of(outputs, METHOD)()
    code = Process(log, work).wait()
    said, after = log.read_text(), held_by(outputs)
    if code:
        last = said.splitlines()[-1]
        if "Traceback" in said or not last.startswith("refused: ") or path.name not in last:
            return "", f"no good sentence: {said[-1000:]}"
        if lost := [name for name, content in before.items() if after.get(name) != content]:
            return "", f"{', '.join(lost)} changed or went (said: {last})"
        if new := [name for name in after if name.endswith(".damaged")]: return "", f"{', '.join(new)} was set aside"
    if Process(log, table_of(outputs, METHOD)).wait():
        return "", f"the same command does not go on: {log.read_text()[-1000:]}"
    if different := differences(contents(outputs), bases.expected.contents): return "", "; ".join(different)
    return "refused in a sentence, then as if nothing had happened" if code else "not needed", ""


def campaign(folder: Path, cases=CASES, report_line=lambda line: None, bases: Bases|None = None) -> Failures:
    "Every case once."
    result, bases = Failures(), bases or Bases(folder)
    for i, (state, name, fault) in enumerate(cases):
        outcome, wrong = failed(bases, state, name, fault, folder/f"failure {i}")
        if wrong: result.wrong.append(f"{fault}, {name} of a {state} store: {wrong}")
        else: result.outcomes[outcome] += 1
        shutil.rmtree(folder/f"failure {i}")
        report_line(f"{i + 1:>3}  {fault}, {name} ({state}): {wrong or outcome}")
    return result
