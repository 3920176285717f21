"Crafted exports, by somebody who knows how to write checksums: each is refused in a sentence before anything is written, or is a run like any other, with its own numbers."
import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from adaptive_at.store import audit as inv
from adaptive_at.base.identity import spec_hash
from adaptive_at.base.files import slug
from adaptive_at.networks import fingerprint
from adaptive_at.store.runs import Store, fingerprint_of
from adaptive_at.store.checksums import checksum
from adaptive_at.training import training_warnings

from helpers import digits
from test_cli import alone, clean, cli, kept  # noqa: F401

PIECE = {"piece": "adaptive_at.attacks.PGD", "version": 1}


@pytest.fixture(scope="module")
def mine(kept, tmp_path_factory):  # noqa: F811
    "A finished run as a file, and the store it is of."
    from adaptive_at.store.transfer import export
    store, path = Store(kept/"runs"), tmp_path_factory.mktemp("exported")/"mine.safetensors"
    export(store.folder(alone(7)), path)
    return store, path


@pytest.fixture(scope="module")
def other(mine, kept, tmp_path_factory):  # noqa: F811
    "A store with another run, in which the crafted files are imported."
    root = tmp_path_factory.mktemp("theirs")
    shutil.copytree(Store(kept/"runs").folder(alone(9)), root/"runs"/Store(kept/"runs").folder(alone(9)).name)
    return root


class Crafted:
    "An export, open: `spec`, `history`, `evaluations` and `folder` as JSON, the tensors, and what stands beside them."
    def __init__(self, path):
        with safe_open(path, "pt") as f: self.told, self.tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
        self.content = {k: json.loads(self.told[k]) for k in ("folder", "spec", "history", "evaluations")}

    @property
    def spec(self): return self.content["spec"]

    @property
    def run(self): return self.spec["run"]

    @property
    def evaluation(self): return next(iter(self.content["evaluations"].values()))

    def history(self, text):
        self.content["history"] = text
        if isinstance(text, str):
            self.spec["history"] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def weights(self, checkpoint, **changes):
        self.tensors |= {f"{checkpoint}/{k}": v for k, v in changes.items()}
        self.spec["weights"][checkpoint] = fingerprint_of({k.partition("/")[2]: v for k, v in self.tensors.items()
                                                      if k.startswith(f"{checkpoint}/")})

    def renamed(self):
        "Everything that is named after a hash gets its new name."
        told = json.dumps(self.run, sort_keys=True, separators=(",", ":"))
        self.content["folder"] = f"{self.content['folder'].rpartition('-')[0]}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"
        if isinstance(self.content["evaluations"], dict):
            named = {name: stored.get("evaluation") if isinstance(stored, dict) else None for name,
                     stored in self.content["evaluations"].items()}
            self.content["evaluations"] = {f"clean-{hashlib.sha256(json.dumps(named[name], sort_keys=True, separators=(',', ':')).encode()).hexdigest()[:12]}.json": stored
                                           for name, stored in self.content["evaluations"].items()}
        return self

    def write(self, path):
        save_file({k: v.contiguous() for k, v in self.tensors.items()}, path,
                  {"adaptive_at": self.told["adaptive_at"]} | {k: json.dumps(v) for k,
                      v in self.content.items()} | {"sha256": checksum(self.content)})


def at(*way, value):
    "Another value at one place of the spec, the evaluation or the content."
    def change(crafted):
        *before, last = way[1:]
        place = getattr(crafted, way[0])
        for name in before: place = place[name]
        if value is KeyError: del place[last]
        else: place[last] = value
    return change


def lines(change):
    def edit(crafted): crafted.history(change(crafted.content["history"]))
    return edit


def column(name, value):
    "Another value in a column of the history."
    def edit(text):
        head, line = text.splitlines()
        cells = line.split(",")
        cells[head.split(",").index(name)] = value
        return f"{head}\n{','.join(cells)}\n"
    return lines(edit)


def tensor(name, change):
    def edit(crafted): crafted.tensors[name] = change(crafted.tensors[name].clone())
    return edit


def weights(change):
    def edit(crafted):
        for checkpoint in ("last", "best"):
            crafted.weights(checkpoint, **{"classifier.bias": change(crafted.tensors[f"{checkpoint}/classifier.bias"].clone())})
    return edit


def result(**values):
    def edit(crafted): crafted.evaluation["result"] |= values
    return edit


def more_weights(crafted):
    for checkpoint in ("last", "best"): crafted.weights(checkpoint, extra=torch.zeros(3))


def nested(value, depth):
    for _ in range(depth): value = [value]
    return value


def without_nan(crafted):
    crafted.evaluation["result"]["standing"] = "1" * 50
    crafted.evaluation["result"]["accuracy"] = float("nan")


REFUSED = {
    # the spec
    "no method": at("run", "method", value=KeyError), "a method of text": at("run", "method", value="DAAT"),
    "a method of a list": at("run", "method", value=[PIECE]),
    "no attack": at("run", "method", "attack", value=KeyError),
    "an attack of none": at("run", "method", "attack", value=None),
    "a piece of a number": at("run", "method", "weights", value={"piece": 3, "version": 1}),
    "a piece without a name": at("run", "method", "weights", value={"version": 1}),
    "no network": at("run", "network", value=KeyError), "a network of text": at("run", "network", value="resnet"),
    "no seed": at("run", "seed", value=KeyError), "a seed of none": at("run", "seed", value=None),
    "no start": at("run", "start", value=KeyError),
    "a start of text": at("run", "start", value="x"), "a start of nothing": at("run", "start", value={}),
    "no training": at("run", "training", value=None), "epochs of text": at("run", "training", "epochs", value="1"),
    "half an epoch": at("run", "training", "epochs", value=1.5),
    "no epochs": at("run", "training", "epochs", value=0), "more epochs": at("run", "training", "epochs", value=2),
    "no monitor": at("run", "monitor", value=KeyError), "another part": at("run", "monitor", "select", value="train"),
    "no content": at("run", "content", value=KeyError),
    "a dataset of a list": at("run", "dataset", value=["digits"]), "no dataset": at("run", "dataset", value=""),
    "another piece": at("run", "piece", value="os.system"),
    "a number that is none": at("run", "method", "radius", "eps", value=float("nan")),
    "an infinite number": at("run", "method", "radius", "eps", value=float("inf")),
    "control characters": at("run", "content", value="\x1b[2J\n"),
    "half a character": at("run", "content", value="\ud800"),
    "depth": at("run", "method", "radius", "eps", value=nested(0, 800)),
    # the facts
    "made by text": at("spec", "made with", value="me"), "made with text": at("spec", "made with", value=["me"]),
    "no threads": at("spec", "made with", value=[{}]),
    "too many threads": at("spec", "made with", value=[{"threads": 10**9}]),
    "threads that are true": at("spec", "made with", value=[{"threads": True}]),
    "a path of a list": at("spec", "made with", value=[{"threads": 1, "path": ["eager"]}]),
    "batch norm of nobody": at("spec", "made with", value=[{"threads": 1, "batch norm": "per process"}]),
    "processes of text": at("spec", "made with", value=[{"threads": 1, "processes": "2"}]),
    "a device that moves the cursor": at("spec", "made with", value=[{"threads": 1, "device": "\x1b[2J"}]),
    "a device of half a character": at("spec", "made with", value=[{"threads": 1, "device": "\udfff"}]),
    "no weights": at("spec", "weights", value=KeyError),
    "one kind of weights": at("spec", "weights", value={"last": "0" * 16}),
    "weights of lists": at("spec", "weights", value={"last": [], "best": {}}),
    "weights elsewhere": at("spec", "weights", value={"last": "../../x", "best": "../../y"}),
    "a best of text": at("spec", "best", value="x"), "a best epoch of text": at("spec", "best", value={"epoch": "1"}),
    "a best epoch that is not there": at("spec", "best", value={"epoch": 7}),
    "a better best": at("spec", "best", "robust", value=99.0), "a diverged run": at("spec", "diverged", value="no"),
    "unknown facts": at("spec", "unknown", value=1), "facts of a list": at("content", "spec", value=[]),
    "a run of nothing": at("spec", "run", value={}), "a checksum of text": at("spec", "history", value="x"),
    # the history
    "a history of a list": at("content", "history", value=[]), "no history": lines(lambda text: ""),
    "a history of a header": lines(lambda text: text.splitlines()[0] + "\n"),
    "a longer history": lines(lambda text: text + text.splitlines()[1] + "\n"),
    "more cells": lines(lambda text: text[:-1] + ",1,2\n"), "cells of text": column("loss", "low"),
    "a loss that is no number": column("loss", "nan"), "an infinite radius": column("mean_eps", "inf"),
    "a negative radius": column("mean_eps", "-0.1"),
    "more than all": column("test_natural", "400"), "less than nothing": column("test_robust", "-3"),
    "no robust accuracy": column("test_robust", ""), "no realised radius": column("mean_realised", ""),
    "another epoch": column("epoch", "2"),
    "columns of one name": lines(lambda text: text.replace("loss", "lr", 1)),
    "no columns": lines(lambda text: "a,b\n1,2\n"),
    "a null character": lines(lambda text: text.replace("loss", "lo\0ss")),
    "foreign digits": column("test_natural", "４０"),
    "a half character of history": lines(lambda text: text + "\ud800"), "one end of the radii": column("least_eps", ""),
    "other robust accuracy": column("test_robust", "1.25"),
    # the evaluations
    "evaluations of a list": at("content", "evaluations", value=[]),
    "an evaluation of text": at("content", "evaluations", value={"clean-0123456789ab.json": "x"}),
    "no result": at("evaluation", "result", value=None),
    "no column": at("evaluation", "evaluation", "column", value=KeyError),
    "a column of text": at("evaluation", "evaluation", "column", value="Clean"),
    "a source of a list": at("evaluation", "evaluation", "source", value=["x"]),
    "an evaluation of another kind": at("evaluation", "evaluation", "piece", value="x.Y"),
    "no seed of an evaluation": at("evaluation", "evaluation", "seed", value=KeyError),
    "other weights": at("evaluation", "evaluation", "weights", value="0" * 16),
    "a name of another column": at("evaluation", "evaluation", "column",
                                   value={"piece": "adaptive_at.evaluation.Other", "version": 1}),
    "an accuracy of nan": without_nan, "an accuracy of text": result(accuracy="100"),
    "a higher accuracy": result(accuracy=99.5), "no images": result(n=0, standing=""), "more images": result(n=51),
    "half an image": result(n=50.0), "verdicts of digits": result(standing="2" * 50),
    "verdicts of a list": result(standing=[1] * 50), "verdicts and scores": result(scores=[1.0] * 50),
    "more than its evaluation takes": result(n=60, standing="1" * 60, accuracy=100.0),
    "a share of more than all": result(top_class_share=3.0), "finite of text": result(finite="yes"),
    "randomised of text": result(randomised="0"),
    # the tensors
    "no bank": lambda c: [c.tensors.pop(k) for k in list(c.tensors) if k.startswith("bank")],
    "a bank without radii": lambda c: c.tensors.pop("bank/eps"),
    "no best weights": lambda c: [c.tensors.pop(k) for k in list(c.tensors) if k.startswith("best")],
    "a bank of one number": tensor("bank/eps", lambda v: v[0]),
    "a bank of whole numbers": tensor("bank/eps", lambda v: v.long()),
    "radii that are none": tensor("bank/used", lambda v: v / 0), "negative radii": tensor("bank/eps", lambda v: v - 9),
    "fewer snapshots": tensor("bank/snapshots", lambda v: v[:0]),
    "another path": tensor("bank/path", lambda v: v[:, :1]),
    "a path of others": tensor("bank/path_index", lambda v: v + 10**6),
    "a smaller bank": lambda c: c.tensors.update({f"bank/{k}": c.tensors[f"bank/{k}"][..., :-1].clone()
                                                  for k in ("eps", "used", "realised", "snapshots")}),
    "weights in bfloat16": lambda c: c.tensors.update({"last/classifier.bias": c.tensors["last/classifier.bias"].bfloat16()}),
    "weights in eight bits": lambda c: c.tensors.update({"last/classifier.bias": c.tensors["last/classifier.bias"].to(torch.float8_e4m3fn)}),
    "weights that are none": weights(lambda v: v / 0), "weights of another shape": weights(lambda v: v[:-1].clone()),
    "weights in float64": weights(lambda v: v.double()), "weights of another network": more_weights,
    "a tensor of nobody": lambda c: c.tensors.update(more=torch.zeros(1)),
    # names
    "a folder of a number": at("content", "folder", value=3),
    "a folder elsewhere": at("content", "folder", value="../../digits-0123456789ab"),
    "a folder of two lines": lambda c: c.content.update(folder=c.content["folder"] + "\n"),
}
KEPT_NAMES = ("a folder", "a name of another", "facts of a list")   # whose name is what is wrong


@pytest.mark.parametrize("name", REFUSED)
def test_a_crafted_file_is_refused_in_a_sentence(name, mine, other, tmp_path, capsys):
    crafted, before = Crafted(mine[1]), sorted(other.rglob("*"))
    REFUSED[name](crafted)
    if not name.startswith(KEPT_NAMES): crafted.renamed()
    crafted.write(tmp_path/"crafted.safetensors")
    code, out, err = cli(capsys, "import", tmp_path/"crafted.safetensors", "--outputs", other)
    assert (code, out) == (1, "") and err.count("\n") == 1 and ("is not imported, because " in err
                                                                or "is no export of a run" in err), err
    err.encode()
    assert "\x1b" not in err and sorted(other.rglob("*")) == before


def older(crafted):
    "As before there were checksums of the history, paths, and the range of the radii."
    rows = [line.split(",") for line in crafted.content["history"].splitlines()]
    places = [i for i, name in enumerate(rows[0]) if name not in ("least_eps", "most_eps", "top_class")]
    crafted.content["history"] = "".join(",".join(row[i] for i in places) + "\n" for row in rows)
    del crafted.spec["history"], crafted.spec["best"]
    for made in crafted.spec["made with"]: del made["path"]


def of_a_newer_version(crafted):
    crafted.spec["made with"][0]["more"] = [1, {"x": None}]
    crafted.evaluation["result"]["more"] = {"x": 1}
    crafted.evaluation["more"] = "x"


TAKEN = {
    "as it is": lambda c: None, "older": older, "newer": of_a_newer_version,
    "no evaluations": at("content", "evaluations", value={}),
    "another device": at("spec", "made with", value=[{"threads": 2, "device": "Ünïcode™ <b>GPU</b>"},
                                                     {"threads": 1, "path": "compiled"}]),
    "several processes": at("spec", "made with", value=[{"threads": 1, "processes": 2, "batch norm": "per process"}]),
    "made with nothing": at("spec", "made with", value=[]),
}


@pytest.mark.parametrize("name", TAKEN)
def test_a_right_file_is_taken_with_its_numbers(name, mine, other, tmp_path, capsys, monkeypatch):
    store, path = mine
    crafted, theirs = Crafted(path), tmp_path/"theirs"
    TAKEN[name](crafted)
    crafted.write(tmp_path/"crafted.safetensors")
    shutil.copytree(other, theirs)
    monkeypatch.setattr(inv, "planned", lambda *args, **kwargs: {})
    assert cli(capsys, "import", tmp_path/"crafted.safetensors", "--outputs", theirs)[0] == 0
    found, run = Store(theirs/"runs"), alone(7)
    assert found.finished(run) and cli(capsys, "verify", "--outputs", theirs)[:2] == (0, "2 runs, all intact\n")
    assert [h["test_natural"] for h in found.history(run)] == [h["test_natural"] for h in store.history(run)]
    assert training_warnings(run, found.history(run)) == training_warnings(run, store.history(run)) * (name != "older")
    assert len(found.radius(run)["eps"]) == len(digits().train.y)
    assert [fingerprint(found.model(run, digits(), w)) for w in ("last", "best")] == [store.facts(run)["weights"][w]
                                                                                      for w in ("last", "best")]
    if name != "no evaluations":
        assert found.verdicts(run, clean(store))["accuracy"] == store.verdicts(run, clean(store))["accuracy"]
    code, out, _ = cli(capsys, "list", "--outputs", theirs)
    line, = [line for line in out.splitlines() if line.startswith(run.id)]
    assert code == 0 and f"{store.history(run)[-1]['test_natural']:.1f}" in line
    assert cli(capsys, "show", run.id, "--outputs", theirs)[0] == 0


def test_a_run_with_a_rule_of_somebodys_is_taken(mine, tmp_path, capsys, monkeypatch):
    "Its piece cannot be made here, and is not: it is listed."
    crafted = Crafted(mine[1])
    crafted.run["method"]["radius"] = {"piece": "rules_of_nobody.Halved", "version": 1,
                                       "source": {"rules_of_nobody.Halved": "class Halved(RadiusRule):\n    pass"},
                                       "eps": 0.1}
    crafted.content["folder"] = f"{slug('digits narrow ResNet (width 4) Halved PGD AdversarialCE s7')}-{spec_hash(crafted.run)}"
    crafted.write(tmp_path/"crafted.safetensors")
    monkeypatch.setattr(inv, "planned", lambda *args, **kwargs: {})
    assert cli(capsys, "import", tmp_path/"crafted.safetensors", "--outputs", tmp_path/"theirs")[0] == 0
    assert "rules_of_nobody" not in sys.modules
    code, out, _ = cli(capsys, "list", "--outputs", tmp_path/"theirs")
    assert code == 0 and "Halved × PGD" in out


def test_the_corpus_is_large_enough(): assert len(REFUSED) + len(TAKEN) >= 60


def test_the_schemas_are_imported_by_the_import_command_alone():
    code = "import sys, adaptive_at.store.transfer, adaptive_at.store.audit, adaptive_at.tables.results, adaptive_at.__main__; print('msgspec' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
