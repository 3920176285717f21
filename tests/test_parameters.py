"Parameters as people give them: NumPy's numbers, 3.0, '1e-2', paths, ~, names that are nearly right, and a command that can be pasted."
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from adaptive_at.data import datasets
from adaptive_at import networks
from adaptive_at.base import rng
from adaptive_at.__main__ import main
from adaptive_at.attacks import PGD
from adaptive_at.benchmark.measure import begin
from adaptive_at.algorithms.cat import cat
from adaptive_at.base.schedules import Milestones
from adaptive_at.base.errors import UserError
from adaptive_at.base.identity import spec_hash, to_spec
from adaptive_at.base.files import user_path
from adaptive_at.corruptions import Corruption
from adaptive_at.evaluation import Clean, evaluation
from adaptive_at.algorithms.baselines import Training
from adaptive_at.algorithms.daat import daat
from adaptive_at.tables.parameters import COMMON, check_parameters
from adaptive_at.training import Monitor, Run, State

from helpers import OneLayer, random_data


def told(**given): return check_parameters("table1_daat", given)


def sentence(call, *parts):
    with pytest.raises(UserError) as caught: call()
    said = str(caught.value)
    assert said.endswith(".") and "\n" not in said and all(str(p) in said for p in parts), said
    return said


# Numbers

@pytest.mark.parametrize("name, given, value", [
    ("epochs", np.int64(3), 3), ("epochs", 3.0, 3), ("epochs", np.float64(3), 3), ("epochs", np.uint8(3), 3), ("epochs", "3", 3), ("epochs", "1e1", 10), ("seeds", np.int32(2), 2),
    ("eps", np.float64(0.03), 0.03), ("eps", np.float32(0.25), 0.25), ("eps", np.int64(0), 0.), ("eps", 0, 0.), ("eps", "1e-2", 0.01), ("eps", yaml.safe_load("eps: 1e-2")["eps"], 0.01), ("tau", " 2 ", 2.),
    ("dry_run", np.bool_(True), True),
    ("outputs", Path("a")/"b", str(Path("a")/"b")), ("data_root", Path("d"), "d"), ("outputs", 2024, "2024"), ("outputs", np.int64(2024), "2024"), ("datasets", np.str_("digits"), "digits")])
def test_a_value_is_taken_as_people_have_it(name, given, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parameters = told(**{name: given})
    found = parameters.values[name]
    assert found == value and type(found) is type(value) is type((COMMON | {"eps": None, "tau": None})[name].default if name in COMMON else 0.)
    assert json.loads(json.dumps(found)) == value and (name not in ("outputs", "data_root") or getattr(parameters, name) == Path.cwd()/value)


@pytest.mark.parametrize("name, given", [
    ("epochs", 1.5), ("epochs", np.float64(1.5)), ("epochs", "ten"), ("epochs", "1.5"), ("epochs", True), ("epochs", np.bool_(True)), ("epochs", None), ("epochs", float("inf")), ("epochs", float("nan")), ("epochs", "inf"),
    ("eps", "8/255"), ("eps", "nan"), ("eps", True), ("eps", "1e5"), ("eps", [0.1]), ("eps", np.array([0.1, 0.2])), ("eps", 1j), ("dry_run", 1), ("dry_run", "yes"), ("outputs", 1.5), ("outputs", True), ("outputs", None), ("outputs", "")])
def test_a_wrong_value_is_still_refused(name, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sentence(lambda: told(**{name: given}), f"{name} is {given!r}; it must be")
    assert not list(tmp_path.iterdir())


def test_the_benchmark_takes_them_too(tmp_path):
    bench = begin({"batch": np.int64(64), "steps": 2.0, "outputs": tmp_path, "parts": "steps", "seeds": 0, "device": "cpu"})
    assert bench.batches == (64,) and bench.steps == 2 and bench.outputs == tmp_path


# The same in Python

def spec(seed=0, epochs=2, eps=0.1, steps=1, number=float, whole=int):
    data = random_data()
    method = daat(number(eps), rho=Milestones((number(0.5),), (number(0.1), number(0.2))), steps=whole(steps))
    return Run("random", data.info.identity, OneLayer(), method, Training(epochs=whole(epochs), batch=whole(8), lr=number(0.5)), Monitor(PGD(number(0.1), whole(1)), number(eps), whole(4)), seed=whole(seed))


@pytest.mark.parametrize("number, whole", [(np.float64, np.int64), (float, np.int32), (float, float), (np.float64, np.float64)])
def test_a_run_of_numpy_s_numbers_is_the_same_run(number, whole):
    seed = np.int64(3) if whole is not int else 3
    mine, plain = spec(seed=seed, number=number, whole=whole), spec(seed=3)
    assert mine.id == plain.id and to_spec(mine) == to_spec(plain) and mine.slug == plain.slug
    assert type(mine.training.epochs) is int and type(mine.method.attack.steps) is int
    weights = [State(r, random_data()).model.state_dict() for r in (mine, plain)]
    assert all((weights[0][k] == weights[1][k]).all() for k in weights[1])


def test_numpy_s_numbers_give_the_same_random_numbers():
    assert rng.key(np.int64(3), "weights", np.float64(0.5), np.str_("a")) == rng.key(3, "weights", 0.5, "a")
    assert rng.key(3, True) != rng.key(3, 1)   # as ever


def test_a_spec_holds_plain_numbers():
    told = to_spec({"a": np.int64(3), "b": (np.float32(0.5), np.float64(0.1)), "c": np.bool_(True)})
    assert told == {"a": 3, "b": [0.5, 0.1], "c": True} and [type(told["a"]), type(told["b"][0]), type(told["b"][1]), type(told["c"])] == [int, float, float, bool]
    assert spec_hash(np.float64(0.1)) == spec_hash(0.1)


@pytest.mark.parametrize("make, parts", [(lambda: PGD(0.1, 1.5), ["steps is 1.5"]), (lambda: Training(epochs=float("nan")), ["epochs is nan"]), (lambda: Training(epochs=np.float64(0)), ["epochs", "from 1 on"]),
                                         (lambda: PGD(0.1, "3"), ["steps is '3'"])])
def test_a_number_that_cannot_be_is_still_refused(make, parts): sentence(make, *parts)


# Home

def test_the_home_folder_is_meant_everywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path/"my runs"/"runs").mkdir(parents=True)
    parameters = told(outputs="~/my runs", data_root=Path("~/data"))
    assert parameters.outputs == tmp_path/"my runs" and parameters.data_root == tmp_path/"data"
    assert "~" not in parameters.command() and str(tmp_path) in parameters.command()
    for arguments in (["runs", "list", "--outputs=~/my runs"], ["runs", "--outputs=~/my runs"]): assert main(arguments) == 0, capsys.readouterr()
    for arguments in (["train", "~/nothing", "--outputs=~/my runs"], ["runs", "import", "~/nothing.safetensors", "--outputs=~/my runs"]):
        assert main(arguments) == 1
        assert str(tmp_path/"nothing") in capsys.readouterr().err
    assert datasets.folder_path("imagefolder:~/photos") == tmp_path/"photos" == user_path("~/photos")
    bench = begin({"outputs": "~/b", "parts": "steps", "device": "cpu", "seeds": 0})
    assert bench.outputs == tmp_path/"b"
    assert not (tmp_path/"~").exists()


def test_nobody_s_home_is_one_sentence():
    for given in ("~nobody-has-this-name/x",): sentence(lambda: told(outputs=given), given.partition("/")[0], "home")


# Names that are nearly right

@pytest.mark.parametrize("call, meant", [
    (lambda: told(epoch=3), "epochs"), (lambda: told(train_example=3), "train_examples"), (lambda: told(preset="quik"), "quick"), (lambda: told(precision="bf_16"), "bf16"), (lambda: told(launcher="Ray"), "ray"),
    (lambda: told(figures="fig4b"), "fig4"), (lambda: networks.network("resnet-18"), "resnet18"), (lambda: networks.network("ResNet18"), "resnet18"), (lambda: datasets.info("cifar-10", "data"), "cifar10"),
    (lambda: Training(precision="fp23"), "fp32"), (lambda: begin({"step": 3}), "steps")])
def test_a_near_miss_is_asked_about(call, meant): assert f" (did you mean {meant!r}?)" in sentence(call)


@pytest.mark.parametrize("call", [lambda: told(zzz=3), lambda: told(preset="large"), lambda: networks.network("q"), lambda: datasets.info("q", "data")])
def test_what_is_far_off_is_not(call): assert "did you mean" not in sentence(call)


@pytest.mark.parametrize("arguments, meant", [(["run"], "runs"), (["runs", "lst"], "list"), (["runs", "verfy"], "verify"), (["runs", "list", "--output", "x", "--outpts", "y"], "--outputs"), (["trian", "x"], "train")])
def test_a_near_miss_in_the_shell_is_asked_about(arguments, meant, capsys):
    with pytest.raises(SystemExit) as end: main(arguments)
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.count("\n") == 1 and f" (did you mean {meant!r}?)" in said, said


# A variable that no cell of this notebook made

def test_a_variable_of_a_startup_file_is_no_parameter(tmp_path):
    startup = tmp_path/"ipython"/"profile_default"/"startup"
    startup.mkdir(parents=True)
    (startup/"mine.py").write_text("epoch = 3\nmine = [1, 2]\nPI = 3.14\n")
    cells = ["from adaptive_at.tables.parameters import check_parameters", "epochs = 2", "print('epochs:', check_parameters('table1_daat', globals()).epochs)"]
    def said(cells):
        done = subprocess.run([sys.executable, "-m", "IPython", "--simple-prompt", "--no-banner", "--colors=NoColor", f"--ipython-dir={tmp_path/'ipython'}"], input="\n".join(cells) + "\n", capture_output=True, text=True, cwd=tmp_path)
        return done.stdout + done.stderr
    assert "epochs: 2" in said(cells)
    assert "epoch is not a parameter of this notebook (did you mean 'epochs'?)" in said([cells[0], "epoch = 2", cells[2]])


# A command that can be pasted

FOLDERS = ["outputs", "2024", "a b", "it's", 'say "so"', "$HOME", "a;b&c", "a*?[b]", "(c) é", "!x", "back\\slash", "`date`", "#1", "-x", "tab\tbed"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_command_can_be_pasted_whatever_the_folder_is_called(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = "Standard AT,DAAT"
    command = told(outputs=folder, rows=rows, eps=0.01, epochs=3).command()
    shell = 'papermill() { printf "%s\\0" "$@" > given; };' + command
    done = subprocess.run(["sh", "-c", shell], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    given = (tmp_path/"given").read_text().split("\0")[:-1]
    assert given[0] == "nbs/table1_daat.ipynb" and Path(given[1]) == Path(folder)/"table1_daat.ipynb" and not given[1].startswith("-")
    pairs = dict(zip(given[3::3], given[4::3]))
    assert pairs.pop("rows") == rows and pairs.pop("eps") == "0.01" and pairs.pop("epochs") == "3" and Path(pairs.pop("outputs", "outputs")) == Path(folder) and not pairs
    assert {p.name for p in tmp_path.iterdir()} <= {"given", folder}


def test_an_evaluation_of_numpy_s_numbers_is_the_same_evaluation():
    mine, plain = (evaluation(Clean(), "data", "weights", examples=n, seed=s) for n, s in ((np.int64(50), 1.0), (50, 1)))
    assert mine.id == plain.id and type(mine.examples) is type(mine.seed) is int


@pytest.mark.parametrize("call, meant", [(lambda: Corruption(("gausian_noise",)), "gaussian_noise"), (lambda: cat(0.1, label="befor"), "before"), (lambda: cat(0.1, hinge="Mean"), "mean")])
def test_other_choices_are_asked_about_too(call, meant): assert f" (did you mean {meant!r}?)" in sentence(call)
