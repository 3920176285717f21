"Small networks, images and data that several test files share."
import csv
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from adaptive_at.data import datasets as ds
from adaptive_at.base import rng
from adaptive_at.attacks import PGD
from adaptive_at.algorithms.baselines import Training, at
from adaptive_at.networks import NarrowResNet, Network
from adaptive_at.training import Monitor, Run, State, train


def numbers(*shape, seed=0):
    "Uniform numbers in [0,1), float32, the same on every machine."
    return rng.uniform(rng.key("tests", seed), torch.arange(shape[0]), shape[1:])


def labels(n, classes, seed=0): return (numbers(n, seed=seed + 1000) * classes).long()


def noise(n, seed=0, start=0): return rng.RandomStream(rng.key("tests", "noise", seed), torch.arange(start, start + n))


def seeded(seed, make):
    "`make()` with torch's generator at `seed`, and the generator as it was afterwards."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


class Wavy(nn.Module):
    "A strongly curved little classifier that computes in float64: no sign of a gradient hangs on rounding, or on the batch an example is in."
    def __init__(self, classes=3, channels=1, seed=0):
        super().__init__()
        self.conv, self.out = seeded(seed, lambda: (nn.Conv2d(channels, 6, 3, padding=1), nn.Linear(6, classes)))
        self.width, self.middle = 6, 0.
        self.double()

    def features(self, x): return (8 * self.conv(x.double())).sin().sum((2, 3)) / x[0, 0].numel()**0.5
    def forward(self, x): return 5 * (self.out(self.features(x)) - self.middle)


def wavy(n, shape=(1, 5, 4), classes=3, seed=0, wrong=4):
    "A `Wavy` model with all classes in use, `n` images near its boundaries, and labels of which every `wrong`-th contradicts the model."
    model, x = Wavy(classes, shape[0], seed).eval(), numbers(n, *shape, seed=seed)
    with torch.no_grad():
        model.middle = model(numbers(50, *shape, seed=seed + 1)).mean(0) / 5
        y = model(x).argmax(1)
    y[::wrong] = (y[::wrong] + 1) % classes
    return model, x, y


def narrow(classes=10, channels=1, seed=0, width=4): return NarrowResNet(width_factor=width).build(classes, channels, seed)


def buffers(model): return {k: v.clone() for k, v in model.named_buffers()}


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def random_data(n=16, classes=3, side=5, seed=0):
    "A dataset of random images whose class is a bright column."
    x, y = (numbers(n, 1, side, side, seed=seed) * 160).to(torch.uint8), torch.arange(n) % classes
    x[torch.arange(n), 0, :, y] += 95
    info = ds.DatasetInfo("random", "Random", tuple(map(str, range(classes))), (1, side, side), n, 0, n, 0.1, ds.AS_IS, f"random {n} {classes} {side} {seed}")
    return ds.Dataset(info, ds.Split(x, y), None, ds.Split(x, y))


@functools.cache
def digits(): return ds.load("digits", "data")


@dataclass(frozen=True)
class OneLayer(Network):
    "One convolution with batch norm: AutoAttack's 7000 forward passes take seconds."
    label, threads = "one layer", 1

    def parts(self, channels): return nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()), 8 * 16


@functools.cache
def robust_digits(eps=0.15):
    "A small network, adversarially trained on real digits for a second or two; in eval mode."
    data = digits()
    run = Run("digits", data.info.identity, OneLayer(), at(eps, steps=4), Training(epochs=10, batch=64), Monitor(PGD(eps, 1), eps, examples=10, every=10),
              train_examples=600)
    return train(run, data, State(run, data), report_line=lambda line: None).model.eval()


# What a store holds

def plain(value):
    "Nested tensors as comparable values; the seconds, which nobody can repeat, left out."
    if torch.is_tensor(value): return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict): return {k: plain(v) for k, v in value.items() if k != "seconds"}
    if isinstance(value, (list, tuple)): return [plain(v) for v in value]
    return value


def short_autoattack():
    "Within, AutoAttack takes a few steps of each attack."
    from pyautoattack import AutoAttack
    whole = AutoAttack._set_version
    def short(self, version):
        whole(self, version)
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 3
        self.square.n_queries = 30
    return patch.object(AutoAttack, "_set_version", short)


def contents(outputs):
    "All results under `outputs`: file -> what must be equal."
    found = {}
    for path in sorted(Path(outputs).rglob("*")):
        name = path.relative_to(outputs).as_posix()
        if path.suffix == ".pt": found[name] = plain(torch.load(path, weights_only=True))
        if path.suffix == ".npz":
            with np.load(path) as arrays: found[name] = {k: (v.dtype.str, v.shape, v.tobytes()) for k, v in arrays.items()}
        if path.name == "history.csv": found[name] = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(path.open(newline=""))]
        if path.suffix == ".json": found[name] = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("made with", "seconds", "sha256", "history")}  # the last two are checksums that cover seconds
        if path.name == "table.csv": found[name] = path.read_text()
    return found
