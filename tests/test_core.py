"The source of a class that a notebook's cell defines: part of its runs' names."
import linecache

import pytest
import torch
import torch.utils._contextlib

from adaptive_at.core import SourceUnknown, normalised

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
