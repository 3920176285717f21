"The source of a class that a notebook's cell defines: part of its runs' names."
import importlib
import linecache
import sys

import pytest
import torch
import torch.utils._contextlib

from adaptive_at.base.identity import SourceUnknown, normalised, sources

CELL = """
class Rule:
    'What it does.'
    {decorator}
    def after_step(self, bank): return bank + {step}
"""


def defined(name, **choices):
    "The class that a cell defines, as IPython does: compiled under a file name that only the line cache knows."
    text = CELL.format(**choices)
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    scope = {"torch": torch, "__name__": "__main__"}
    exec(compile(text, name, "exec"), scope)
    return scope["Rule"]


@pytest.fixture
def cells():
    yield
    for name in [n for n in linecache.cache if "ipython-input-test" in n]: del linecache.cache[name]


@pytest.mark.parametrize("decorator", ["", "@torch.no_grad()"])
def test_a_cells_class_is_read_from_its_own_cell(cells, decorator):
    linecache.getlines(torch.utils._contextlib.__file__)  # as after a warning out of the decorator's file
    first = defined("<ipython-input-test-1>", decorator=decorator, step=1)
    second = defined("<ipython-input-test-2>", decorator=decorator, step=2)
    assert "bank + 1" in normalised(first) and "bank + 2" in normalised(second)
    assert "What it does" not in normalised(first)


def test_a_class_of_no_cell_is_refused():
    with pytest.raises(SourceUnknown, match="cannot be read"): normalised(type("Lost", (), {}))


RULE = """
import functools, torch, collections
from dataclasses import dataclass
import {helper} as helper

LIST, TABLE, WEIGHTS, scale = [1, 2], {{"a": (0.5, max)}}, torch.tensor([1., 2.]), 3.

def half(x, by=2): return x / by
LESS = functools.partial(half, by=4)

@functools.lru_cache
def kept(x): return x + 1

def made(step):
    def move(x): return x + step
    return move
MOVE, MORE = made(1), made(5)

@dataclass(frozen=True)
class Constant:
    by: float = 1.
ONE = Constant()

class Counter: pass
COUNTER = Counter()

class Rule:
    def radius(self, x):
        scale = x   # its own, not the one above
        return {uses}
"""


def recorded(tmp_path, monkeypatch, name, uses, edit=("", ""), theirs="def f(x): return x"):
    "What a rule of a file records of itself, after an edit."
    monkeypatch.syspath_prepend(tmp_path)
    helper, module = f"helper_{name}", f"rule_{name}"
    (tmp_path/f"{helper}.py").write_text(theirs)
    text = RULE.format(helper=helper, uses=uses)
    assert edit[0] in text
    (tmp_path/f"{module}.py").write_text(text.replace(*edit))
    for imported in (helper, module): sys.modules.pop(imported, None)   # another test's
    return {k.replace(name, ""): v.replace(name, "") for k, v in sources(importlib.import_module(module).Rule).items()}


@pytest.mark.parametrize("uses, edit", [
    ("x * LIST[1]", ("LIST, TABLE, WEIGHTS, scale = [1, 2]", "LIST, TABLE, WEIGHTS, scale = [1, 3]")), ("x * TABLE['a'][0]", ("0.5", "0.6")), ("x * WEIGHTS", ("[1., 2.]", "[1., 3.]")), ("LESS(x)", ("by=4", "by=8")),
    ("LESS(x)", ("x / by", "x / by + 1")), ("kept(x)", ("x + 1", "x + 2")), ("MOVE(x)", ("made(1)", "made(2)")), ("MORE(MOVE(x))", ("made(1)", "made(2)")), ("ONE.by * x", ("Constant()", "Constant(2.)"))])
def test_what_a_rule_uses_is_part_of_its_identity(tmp_path, monkeypatch, uses, edit):
    before = recorded(tmp_path, monkeypatch, "before", uses)
    assert before != recorded(tmp_path, monkeypatch, "after", uses, edit)
    assert before == recorded(tmp_path, monkeypatch, "again", uses, ("]), 3.", "]), 4."))


def test_a_users_own_module_is_part_of_it(tmp_path, monkeypatch):
    before = recorded(tmp_path, monkeypatch, "first", "helper.f(x)")
    assert before != recorded(tmp_path, monkeypatch, "second", "helper.f(x)", theirs="def f(x): return -x")
    assert before == recorded(tmp_path, monkeypatch, "third", "helper.f(x)", theirs="def f(x): return x\ndef g(x): return 2 * x")


def test_what_cannot_be_read_is_refused(tmp_path, monkeypatch):
    with pytest.raises(SourceUnknown, match=r"rule_odd\.COUNTER is a Counter"): recorded(tmp_path, monkeypatch, "odd", "COUNTER")
