"A disk that is full, or fails, at one write of a run and its evaluations: every write in turn."
import contextlib
import errno
import os
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

import torch

from adaptive_at.attacks import PGD
from adaptive_at.base.errors import UserError
from adaptive_at.evaluation import Clean, WhiteBox, evaluation
from adaptive_at.algorithms.baselines import Training
from adaptive_at.algorithms.daat import daat
from adaptive_at.store.runs import Store
from adaptive_at.training import Monitor, Run
from helpers import OneLayer, contents, random_data

CODES = errno.ENOSPC, errno.EIO
TORN = "[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0: file write failed"   # how PyTorch says it


class Layer5(OneLayer):
    "For images of 5 pixels."
    def parts(self, channels): return super().parts(channels)[0], 8 * 9


def run(): return Run("random", random_data().info.identity, Layer5(), daat(0.1, rho=0.005, steps=1), Training(epochs=2, batch=8, lr=0.3), Monitor(PGD(0.05, 1), 0.1, 8))


def work(outputs: Path) -> None:
    "Train, saving after every batch, and evaluate batch by batch."
    data, store = random_data(), Store(outputs/"runs")
    with patch.object(Store, "every", -1.):
        store.train(run(), data, report_line=lambda line: None)
        for column in (Clean(), WhiteBox(PGD(0.05, 1), 0.1)):
            e = replace(evaluation(column, data.info.identity, store.facts(run())["weights"]["last"], examples=12), batch=6)
            store.evaluate(run(), e, data, report_line=lambda line: None)


class Disk:
    "Counts what is done to files, and fails at the `at`-th time."
    def __init__(self, at: int = 0, code: int = errno.EIO): self.at, self.code, self.count, self.failed = at, code, 0, ""

    def step(self, what: str, path="") -> None:
        self.count += 1
        if self.count == self.at:
            self.failed = f"{what} {path}"
            raise OSError(self.code, os.strerror(self.code))

    @contextlib.contextmanager
    def used(self):
        "Within, this is the disk."
        opened, save = open, torch.save
        put, fsync, mkdir, low = os.replace, os.fsync, os.mkdir, os.open
        def open_(path, mode="r", *args, **kwargs):
            if not set(mode) & set("wax+") or isinstance(path, int): return opened(path, mode, *args, **kwargs)
            self.step("open", path)
            file = opened(path, mode, *args, **kwargs)
            write = file.write
            def write_(content):
                self.step("write", path)
                return write(content)
            file.write = write_
            return file
        def open_low(path, flags, *args, **kwargs):
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT): self.step("open", path)
            return low(path, flags, *args, **kwargs)
        def save_(value, path):
            try: self.step("save", path)
            except OSError as e: raise RuntimeError(TORN) from e
            save(value, path)
        def before(what, call):
            def done(*args, **kwargs):
                self.step(what, args[0])
                return call(*args, **kwargs)
            return done
        with patch("builtins.open", open_), patch("io.open", open_), patch.object(torch, "save", save_), patch.object(os, "open", open_low), \
             patch.object(os, "replace", before("replace", put)), patch.object(os, "fsync", before("sync", fsync)), patch.object(os, "mkdir", before("mkdir", mkdir)): yield self


@dataclass
class Writes:
    "What came of it."
    writes: int = 0                                     # of an undisturbed run
    refused: int = 0                                    # failures that were one sentence
    borne: int = 0                                      # failures that did not matter
    wrong: list[str] = field(default_factory=list)

    def __str__(self):
        return (f"{self.refused + self.borne + len(self.wrong)} failures of a disk at the {self.writes} writes of a run ({self.refused} refused in a sentence, {self.borne} borne): {len(self.wrong)} wrong numbers or tracebacks"
                + "".join(f"\n  {text}" for text in self.wrong))


def campaign(folder: Path, each=1, report_line=lambda line: None) -> Writes:
    "Fail at every write in turn, or at `each`-th, once with each code or with the codes in turn; run again, and compare."
    with Disk().used() as disk: work(folder/"whole")
    result, expected = Writes(disk.count), contents(folder/"whole")
    for n in range(1, disk.count + 1, each):
        for code in CODES if each == 1 else [CODES[result.refused % 2]]:
            disk = Disk(n, code)
            wrong = one(folder/f"{code}-{n}", disk, expected, result)
            if wrong: result.wrong.append(f"{errno.errorcode[code]} at {n}: {wrong}")
            report_line(f"{errno.errorcode[code]} at write {n}, {disk.failed or 'which was not reached'}: {wrong or 'well'}")
    return result


def one(outputs: Path, disk: Disk, expected: dict, result: Writes) -> str:
    "What was wrong."
    try:
        with disk.used(): work(outputs)
        result.borne += 1
    except UserError as e:
        said = str(e)
        if "\n" in said or "could not be written" not in said and "cannot be read" not in said: return f"{disk.failed}: no good sentence: {said}"
        result.refused += 1
    except Exception: return f"{disk.failed}: {traceback.format_exc()}"
    work(outputs)
    found = contents(outputs)
    different = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
    left = [p.name for p in outputs.rglob(".*.part")]
    return f"{disk.failed}: {different} differ" * bool(different) + f"{disk.failed}: {left} are left" * bool(left)
