"The digest of what a run executes: the same for other words and names, another for other numbers."
import ast
import re
import subprocess
import sys
from dataclasses import replace

import pytest

import fingerprints
from adaptive_at.base import source
from adaptive_at.base.errors import UserError
from adaptive_at.base.source import Reader, pieces_of, read_module, source_digest
from adaptive_at.papers.table1_daat import TABLE
from adaptive_at.store.runs import Store
from adaptive_at.jobs.interrupts import Stopped
from adaptive_at.tables.results import run
from adaptive_at.training import State, train
from helpers import digits

ROOTS = [("adaptive_at.training", "train"), ("adaptive_at.training", "State"), ("adaptive_at.radius", "DAAT"), ("adaptive_at.attacks", "PGD"),
         ("adaptive_at.objectives", "TRADES"), ("adaptive_at.networks", "NarrowResNet"), ("adaptive_at.algorithms.baselines", "Training"), ("adaptive_at.data.datasets", "Augment"), ("adaptive_at.awp", "AWP")]


def digest(edit=lambda module, text: text):
    "Of a run whose package was edited."
    return Reader(lambda module: edit(module, read_module(module))).digest(ROOTS)


def replaced(where, old, new):
    def edit(module, text):
        if module != where: return text
        assert old in text, (where, old)
        return text.replace(old, new)
    return digest(edit)


@pytest.mark.parametrize("module, old, new", [
    ("adaptive_at.radius", "FLOOR = ", "FLOOR = 2 * "),
    ("adaptive_at.attacks", "grad.sign()", "-grad.sign()"),
    ("adaptive_at.base.rng", "_MIX1", "_MIX2"),
    ("adaptive_at.training", "optimiser.zero_grad()", "pass"),
    ("adaptive_at.training", "(i + 0.5) / steps", "i / steps"),
    ("adaptive_at.data.datasets", "self.crop", "(self.crop + 1)"),
    ("adaptive_at.networks", "nn.ReLU()", "nn.ELU()"),
    ("adaptive_at.objectives", "self.beta *", "2 * self.beta *"),
    ("adaptive_at.base.schedules", "at * epochs - 1e-9", "at * epochs"),
])
def test_an_edited_formula_is_another_digest(module, old, new): assert replaced(module, old, new) != digest()


def without_words(module, text):
    "Comments, docstrings and annotations gone, messages of another wording, and white space of another kind."
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node): node.body[0].value.value = "Other words."
        if isinstance(node, ast.arg): node.annotation = None
        if isinstance(node, ast.FunctionDef): node.returns = None
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call): node.exc.args = [ast.Constant("Another sentence.")]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "report_line": node.args = [ast.Constant("Another line.")]
    return ast.unparse(ast.fix_missing_locations(tree))


def test_other_words_are_the_same_digest(): assert digest(without_words) == digest()


@pytest.mark.parametrize("old, new", [
    ("train_step", "one_step"), ("per_example", "radius_of_each"), ("scaled", "rescale"), ("RandomStream", "Noise"), ("Bank", "Memory"), ("_scrambled", "_mixed"), ("check_eps", "on_scale"),
    ("subset", "chosen_examples"), ("gradient", "image_gradient"), ("overstep", "excess"), ("Calibrated", "WithHead"), ("perturbed", "with_perturbation"), ("watched", "followed_examples"),
])
def test_another_name_is_the_same_digest(old, new):
    "Of a function, a class, a method, an attribute and a variable, wherever they stand."
    assert any(re.search(rf"\b{old}\b", read_module(m)) for m, _ in ROOTS) or old.startswith("_")
    assert digest(lambda module, text: re.sub(rf"\b{old}\b", new, text)) == digest()


def test_two_arguments_that_change_places_are_another_digest():
    "Names are replaced by numbers, and yet it counts which is which."
    assert replaced("adaptive_at.attacks", "project(x_adv +", "project(x + 0 * x_adv +") != digest()


def test_a_moved_function_is_the_same_digest():
    "From one module to another, with the import that this takes."
    text = read_module("adaptive_at.radius")
    tree = ast.parse(text)
    moved = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "overstep")
    rest = ast.unparse(ast.Module([n for n in tree.body if n is not moved], []))
    imports = "\n".join(ast.unparse(n) for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom)))
    def edit(module, text):
        if module == "adaptive_at.radius": return f"from .deepfool import overstep\n{rest}"
        return f"{text}\n{imports}\n{ast.unparse(moved)}" if module == "adaptive_at.deepfool" else text
    assert digest(edit) == digest()


def test_methods_have_digests_of_their_own():
    found = {name: source_digest(train, State, *pieces_of(fingerprints.spec(name))) for name in ("at", "daat", "trades", "saat-up", "iaat", "cat", "dra")}
    assert len(set(found.values())) == len(found)


# Beside a run

@pytest.fixture
def edit(monkeypatch):
    "Edit the package's files, as this process reads them: the code that runs is the same."
    def edit(where, old, new):
        read = source.read_module
        monkeypatch.setattr(source, "read_module", lambda module: read(module).replace(old, new) if module == where else read(module))
        for cached in (source._module, source._digest): cached.cache_clear()
    yield edit
    for cached in (source._module, source._digest): cached.cache_clear()


TINY = dict(preset="quick", device="cpu", epochs=2, train_examples=96, test_examples=20, figures="none", rows="Natural", columns="clean,FGSM")
SAME, OTHER = ("adaptive_at.training", '"One batch: ', '"A batch: '), ("adaptive_at.training", "optimiser.zero_grad()", "optimiser.zero_grad(); pass")


def test_a_finished_run_of_other_code_is_marked(tmp_path, edit):
    def warnings(): return {text for told in run(TABLE, **TINY, outputs=str(tmp_path)).frame.warning for text in told.split("; ") if "code" in text}
    assert not warnings()
    edit(*SAME)
    assert not warnings()
    edit(*OTHER)
    assert warnings() == {"trained by other code than this: what it executes was edited since"}
    edit("adaptive_at.training", "optimiser.zero_grad(); pass", "optimiser.zero_grad()")
    edit("adaptive_at.evaluation", "argmax(1)", "argmin(1)")
    assert warnings() == {"evaluated by other code than this: what it executes was edited since"}


def test_a_half_trained_run_of_other_code_is_refused_and_nothing_is_lost(tmp_path, edit):
    spec, store = fingerprints.spec("daat"), Store(tmp_path/"runs")
    spec = replace(spec, dataset="digits", content=digits().info.identity, train_examples=32)
    def stop(line): raise KeyboardInterrupt
    with pytest.raises(Stopped): store.train(spec, digits(), report_line=stop)
    before = {p: p.read_bytes() for p in store.folder(spec).iterdir()}
    edit("adaptive_at.radius", "FLOOR = ", "FLOOR = 2 * ")
    with pytest.raises(UserError, match="was begun by other code.*Delete .* to start it anew, or go on with the code that began it"): store.train(spec, digits())
    assert all(p.read_bytes() == b for p, b in before.items() if p.name != "lock")
    edit("adaptive_at.radius", "FLOOR = 2 * ", "FLOOR = ")
    assert store.train(spec, digits(), report_line=lambda line: None)


def test_another_pytorch_is_the_same_digest():
    "A release that brings names which this package has too; were theirs kept as they are, each upgrade could mark every run as of other code."
    code = ("import torch\n{}\nfrom adaptive_at.base.source import Reader\n"
            f"print(Reader().digest({ROOTS!r}))")
    names = ("perturbed", "overstep", "realised", "watched", "after_attack")
    brought = "; ".join(f"torch.{name} = torch.Tensor.{name} = None" for name in names)
    now, later = (subprocess.run([sys.executable, "-c", code.format(text)], capture_output=True, text=True, check=True).stdout for text in ("", brought))
    assert now == later != ""
