"A spec from a file names pieces of this package, and of the modules that the caller allows; all else is one sentence, and nothing is imported."
import copy
import json
import sys

import pytest

from adaptive_at.jobs import distributed
from adaptive_at.__main__ import main
from adaptive_at.base.schedules import Milestones, Ramp
from adaptive_at.base.errors import UserError
from adaptive_at.base.identity import foreign_modules, from_spec, to_spec
from adaptive_at.base.files import write_json
from adaptive_at.algorithms.baselines import at
from adaptive_at.algorithms.daat import daat
from adaptive_at.jobs.distributed import why_not_distributed
from adaptive_at.radius import Fixed
from adaptive_at.store.runs import Store

from test_parallel import EPS, RUNS, spec

RULE = """
from dataclasses import dataclass
from pathlib import Path
from adaptive_at.radius import RadiusRule
Path({mark!r}).touch()

def halve(eps): return eps / 2

@dataclass(frozen=True)
class Halved(RadiusRule):
    how: object = halve
    def radius(self, bank, batch, model): return self.how(super().radius(bank, batch, model))

class NoPiece: pass
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    "A module of somebody's; whether it was imported; and the spec of a run with its rule."
    mark = tmp_path/"imported"
    (tmp_path/"their_rules.py").write_text(RULE.format(mark=str(mark)))
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("their_rules", None)
    import their_rules
    told = to_spec(spec(at(EPS, their_rules.Halved(EPS), steps=1), epochs=1))
    del sys.modules["their_rules"]
    mark.unlink()
    return mark, told


def sentence(told, allow=()):
    with pytest.raises(UserError) as caught: from_spec(told, allow)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_module_is_imported_only_where_it_is_allowed(theirs):
    mark, told = theirs
    assert foreign_modules(told) == ["their_rules"]
    for allow in ((), ("their",), ("their_rules.Halved",), ("os",)):
        assert "their_rules.Halved, which is not of this package" in sentence(told, allow)
        assert "--allow their_rules" in sentence(told, allow)
    assert not mark.exists() and "their_rules" not in sys.modules
    run = from_spec(told, ["their_rules"])
    assert mark.exists() and to_spec(run) == told and not why_not_distributed(run)
    told["method"]["radius"]["piece"] = "their_rules.NoPiece"
    assert "their_rules.NoPiece as a piece, which is none" in sentence(told, ["their_rules"])


def test_the_train_command_trains_what_is_allowed(theirs, tmp_path, capsys):
    mark, told = theirs
    write_json(tmp_path/"spec.json", {"run": told})
    def train(*more):
        return main(["train", str(tmp_path/"spec.json"), "--outputs", str(tmp_path), "--data-root", str(tmp_path),
                     *more]), *capsys.readouterr()
    code, out, err = train()
    assert code == 1 and not out and err.count("\n") == 1 and "add `--allow their_rules`" in err and not mark.exists()
    code, out, err = train("--allow", "json", "--allow", "their_rules")
    assert code == 0 and not err and Store(tmp_path/"runs").finished(from_spec(told, ["their_rules"]))
    assert main(["train", "x" * 5000, "--outputs", str(tmp_path)]) == 1 and "no spec.json" in capsys.readouterr().err


def put(path, value):
    "The spec of a run with another value in it."
    told = place = copy.deepcopy(to_spec(RUNS["daat"]))
    *way, last = path.split(".")
    for name in way: place = place[name]
    if value is KeyError: del place[last]
    else: place[last] = value
    return told


NO_PIECES = ["os.system", "adaptive_at.base.files.os.system", "adaptive_at.store.runs.np", "adaptive_at.base.files.write_text", "PGD.x", "Bank", "pgd",
             "adaptive_at.store.audit.remove", "adaptive_at.networks.Classifier", "adaptive_at.store.runs.Store",
             "adaptive_at.store.runs.Run", "adaptive_at.nothing.X", "adaptive_at.base", "adaptive_at", "os", "", ".", "..base.X", "__main__.X", 3, None, ["adaptive_at.attacks.PGD"], {}]


@pytest.mark.parametrize("name", NO_PIECES, ids=str)
@pytest.mark.parametrize("as_what", ["piece", "function"])
def test_a_name_of_no_piece_is_a_sentence(name, as_what, monkeypatch):
    assert sentence(put("method.attack", {"piece": name, "version": 1}
                        if as_what == "piece" else {"function": name, "source": None}))


@pytest.mark.parametrize("path, value, said", [
    ("method.attack.alpha", KeyError, "no alpha"), ("method.attack.shell", "x", "shell, which it does not know"),
    ("seed", KeyError, "no seed"), ("network", to_spec(Fixed(0.1)), "it must be Network"),
    ("method", to_spec(Fixed(0.1)), "it must be Method"), ("method.attack", to_spec(Fixed(0.1)), "it must be PGD"),
    ("method.attack", "PGD", "it must be"), ("method.attack", [1], "it must be"), ("seed", "0", "it must be int"),
    ("seed", 1.5, "it must be int"), ("seed", True, "it must be int"), ("start", {"a": 1}, "it must be"),
    ("dataset", 3, "it must be str"), ("training.epochs", "7", "it must be int"),
    ("training.epochs", -1, "epochs is -1"),
    ("training.lr", None, "it must be float"), ("training.precision", "fp8", "precision is 'fp8'"),
    ("training.version", 99, "another version"), ("method.attack.source", {}, "another version"),
    ("network.mean", ["a"], "it must be"), ("network.mean", {"x": 1}, "it must be"), ("monitor.select", "train",
        "select is 'train'"), ("method.radius.eps", float("nan"), "")], ids=lambda v: str(v)[:40])
def test_values_that_no_piece_takes_are_a_sentence(path, value, said): assert said in sentence(put(path, value))


def test_a_spec_that_is_nested_without_end_is_a_sentence():
    told = 0
    for _ in range(100_000): told = [told]
    assert "nested too deeply" in sentence(told)


def test_schedules_may_stand_for_numbers():
    for value in (Milestones((0.5,), (0.1, 0.2)), Ramp(0.1, 0.2)):
        run = spec(daat(EPS, rho=value))
        assert from_spec(json.loads(json.dumps(to_spec(run)))) == run


def test_the_launcher_allows_the_modules_of_the_callers_own_pieces(theirs, tmp_path, monkeypatch):
    run, commands = from_spec(theirs[1], ["their_rules"]), []
    def begun(command, **how):
        commands.append(command)
        raise InterruptedError
    monkeypatch.setattr(distributed.subprocess, "Popen", begun)
    for each in (run, RUNS["at"]):
        with pytest.raises(InterruptedError): distributed.launched(each, 2, "digits", tmp_path, tmp_path, "cpu", print)
    assert commands[0][-2:] == ["--allow", "their_rules"] and "--allow" not in commands[1]
