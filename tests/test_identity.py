"Ids: the same wherever the code lies and whatever it is called, and those that stand in `outputs/` are planned again."
import ast
import copy
import dataclasses
import functools
import importlib
import importlib.util
import json
import pkgutil

import pytest

import adaptive_at
import fingerprints
from adaptive_at.attacks import PGD
from adaptive_at.base import identity
from adaptive_at.base.identity import HOMES, PIECES, declared, from_spec, piece, qualified, spec_field, spec_hash, to_spec
from adaptive_at.base.source import pieces_of
from adaptive_at.algorithms.baselines import at
from adaptive_at.radius import DAAT
from committed import ROOT, notebooks, plan, planned, printed, recorded_data, runs

MAP = json.loads((ROOT/"tests/committed_runs.json").read_text())   # ids and specs as the code before the redesign wrote them, and the ids now


def told(spec):
    "A spec's fields and values, pieces by the last part of their names."
    if isinstance(spec, list): return [told(part) for part in spec]
    if isinstance(spec, dict): return {k: part.rpartition(".")[2] if k == "piece" else told(part) for k, part in spec.items()}
    return spec


@pytest.fixture(scope="module")
def now():
    "The runs that today's code plans for each executed notebook, and for the quick table of `table2_dra`, whose notebook shows another preset."
    found = planned()
    with recorded_data(): found["quick"] = runs(plan("table2_dra", {"preset": "quick"}))
    return found


def test_the_map_is_of_all_that_is_planned(now):
    specs = {i: to_spec(run) for each in now.values() for i, run in each.items()}
    assert specs.keys() == {entry["id"] for entry in MAP} and len(MAP) == len({entry["was"] for entry in MAP}) == 149
    for entry in MAP: assert told(specs[entry["id"]]) == told(entry["spec"]), entry["was"]


def test_every_id_that_is_printed_is_planned(now):
    every = {i for each in now.values() for i in each}
    shown = {path: printed(path) for path in notebooks()}
    assert len(shown) == 27 and sum(map(bool, shown.values())) == 26   # the benchmark trains no run of the store
    assert set().union(*shown.values()) == every
    for path, ids in shown.items():
        if path in now: assert now[path].keys() <= ids <= now[path].keys() | now["quick"].keys(), path


def test_executed_notebooks_show_imports_that_exist():
    found = 0
    for path, notebook in notebooks().items():
        for cell in notebook["cells"]:
            if cell["cell_type"] != "code": continue
            for node in ast.walk(ast.parse("".join(cell["source"]))):
                if not isinstance(node, ast.ImportFrom) or node.module.partition(".")[0] != "adaptive_at": continue
                for name in node.names:
                    module = importlib.import_module(node.module)
                    assert hasattr(module, name.name) or importlib.util.find_spec(f"{node.module}.{name.name}"), f"{path.name}: {ast.unparse(node)}"
                    found += 1
    assert found > 500


# Pieces

def dataclasses_of_the_package():
    names = [m.name for m in pkgutil.walk_packages(adaptive_at.__path__, "adaptive_at.") if not m.name.endswith("__main__")]
    assert len(names) > 60
    return [kind for name in names for kind in vars(importlib.import_module(name)).values() if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == name]


def test_names_are_declared_once_and_for_each_class_itself():
    "A subclass that declares nothing is no piece, and neither has it its base's version."
    for kind in dataclasses_of_the_package():
        if any(map(declared, kind.__mro__)): assert declared(kind) and PIECES[declared(kind)[0]] is kind, f"{qualified(kind)} stands on a piece and declares none"
    with pytest.raises(ValueError, match="'PGD', which adaptive_at.attacks.PGD has"):
        piece("PGD")(type("Other", (), {"__module__": "adaptive_at.attacks"}))
    class Heir(DAAT): pass
    assert declared(Heir) is None


@pytest.mark.parametrize("name", fingerprints.METHODS)
def test_a_process_that_was_sent_a_spec_finds_its_pieces(name):
    run = fingerprints.spec(name)
    assert from_spec(json.loads(json.dumps(to_spec(run)))) == run
    assert {declared(kind)[0] for kind in pieces_of(run)} <= set(PIECES)


def test_the_modules_that_are_looked_in_define_all_pieces():
    import subprocess, sys
    code = "from importlib import import_module\nfrom adaptive_at.base.identity import HOMES, PIECES\nfor home in HOMES: import_module('adaptive_at.' + home)\nprint(len(PIECES))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    dataclasses_of_the_package()
    assert int(found) == len(PIECES) and len(HOMES) == len(set(HOMES))


# Moves, names, fields

@pytest.fixture
def another_piece(monkeypatch):
    "Make a class of the package that stands in for a piece: elsewhere, and called otherwise."
    def made(name, module, fields, version=1):
        monkeypatch.delitem(PIECES, name, raising=False)
        kind = dataclasses.make_dataclass("Renamed", fields, frozen=True, namespace={"__module__": module})
        return piece(name, version)(kind)
    return made


def test_a_moved_renamed_and_extended_piece_keeps_its_id(another_piece):
    before = another_piece("Toy", "adaptive_at.attacks", [("eps", float), ("steps", int, dataclasses.field(default=3))])
    moved = another_piece("Toy", "adaptive_at.radius", [("eps", float), ("steps", int, dataclasses.field(default=3))])
    extended = another_piece("Toy", "adaptive_at.elsewhere.radius", [("radius", float, spec_field(0.2, recorded="eps")), ("steps", int, dataclasses.field(default=3)), ("decay", float, spec_field(0.5, neutral=0.))])
    assert spec_hash(before(0.1)) == spec_hash(moved(0.1)) == spec_hash(extended(0.1, decay=0.)) != spec_hash(extended(0.1))
    assert from_spec(to_spec(before(0.1))) == extended(0.1, decay=0.)   # of an old spec
    raised = another_piece("Toy", "adaptive_at.attacks", [("eps", float), ("steps", int, dataclasses.field(default=3))], version=2)
    assert spec_hash(raised(0.1)) != spec_hash(moved(0.1))


def test_a_renamed_class_keeps_the_folders_and_files_of_its_runs(another_piece):
    renamed = another_piece("PGD", "adaptive_at.attacks", [("eps", float)])
    assert renamed.__name__ == "Renamed" and identity.piece_name(renamed) == "PGD"
    run = fingerprints.spec("daat")
    assert run.slug == "random-narrow-resnet-width-4-daat-pgd-adversarialce-s0"
    method = copy.copy(run.method)   # one that did not check its attack's kind
    object.__setattr__(method, "attack", renamed(0.1))
    run = dataclasses.replace(run, method=method)
    assert run.slug == "random-narrow-resnet-width-4-daat-pgd-adversarialce-s0"


def test_a_method_that_somebody_attaches_is_a_part_of_the_spec(monkeypatch):
    "Of a class, a base of it, and a part of the run."
    before = spec_hash(at(0.1))
    def project(self, x): return x
    monkeypatch.setattr(PGD, "project", project, raising=False)
    added = spec_hash(at(0.1))
    assert added != before and "PGD.project" in to_spec(at(0.1).attack)["attached"]
    def other(self, x): return x / 2
    monkeypatch.setattr(PGD, "project", other)
    assert spec_hash(at(0.1)) not in (added, before)
    def other(self, x):
        "The same, with another docstring."
        return x / 2
    renamed = to_spec(at(0.1).attack)["attached"]["PGD.project"]
    monkeypatch.setattr(PGD, "project", other)
    assert to_spec(at(0.1).attack)["attached"]["PGD.project"] == renamed
    @functools.wraps(PGD.__call__)
    def wrapped(self, *args): return other(self, *args)
    monkeypatch.undo()
    monkeypatch.setattr(PGD, "__call__", wrapped)
    assert "other(self, *args)" in to_spec(at(0.1).attack)["attached"]["PGD.__call__"]
    monkeypatch.undo()
    assert spec_hash(at(0.1)) == before


def test_what_declares_nothing_is_no_part_of_a_spec():
    bare = dataclasses.make_dataclass("Bare", [("eps", float)], frozen=True, namespace={"__module__": "adaptive_at.attacks"})
    with pytest.raises(TypeError, match=r"declares no name; put @piece\(\.\.\.\) on it"): to_spec(bare(0.1))
    assert identity.PACKAGE == "adaptive_at"
