"The compiled path: the numbers of the plain one, full batches alone, and never worse than the plain one where it fails. Graphs are run operator by operator here; one test takes the real compiler."
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from adaptive_at import compiled as module
from adaptive_at.attacks import PGD, CrossEntropy, gradient
from adaptive_at.compiled import PASSES, compiled, pays, twin
from adaptive_at.algorithms.baselines import Training, at, natural, trades
from adaptive_at.algorithms.daat import daat
from adaptive_at.networks import NETWORKS, NarrowResNet, ResNet18, fingerprint
from adaptive_at.store.runs import Store
from adaptive_at.algorithms.saat import rice_at, saat_up
from adaptive_at.tables.results import Results
from adaptive_at.training import Monitor, Run, State, threads, train
from adaptive_at.awp import AT_AWP
from helpers import labels, narrow, numbers, random_data, same

EPS = 0.1


@pytest.fixture
def plain_graphs(monkeypatch):
    "No code is generated: a graph's operators run one by one. What was compiled is kept."
    made, whole = [], torch.compile
    def watched(f, **options):
        graph, calls = whole(f, **options, backend="aot_eager"), []
        made.append(calls)
        def call(x):
            calls.append(len(x))
            return graph(x)
        return call
    monkeypatch.setattr(torch, "compile", watched)
    return made


def run(method, epochs=2, batch=8, precision="fp32"):
    return Run("random", "", NarrowResNet(width_factor=4, strides=(1,)), method, Training(epochs=epochs, batch=batch, precision=precision), Monitor(PGD(EPS, 1), EPS, examples=1, every=epochs))


def losses(r, data, how, **options):
    with threads(1):
        state = State(r, data)
        with how(r, state) as taken: train(r, data, state, report_line=lambda line: None, **options)
    return [entry["loss"] for entry in state.history], state, taken


def as_compiled(r, state): return compiled(state.model, (r.training.batch, 1, 5, 5), getattr(r.method.attack, "mode", None), r.training.precision == "bf16")


def as_it_is(r, state): return module._eager()


METHODS = {"AT": at(EPS), "AT, train mode": rice_at(EPS), "TRADES": trades(EPS), "natural": natural(), "DAAT, joint": daat(EPS, calibration="joint"), "SAAT": saat_up(EPS), "AWP": rice_at(EPS, weights=AT_AWP)}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_has_the_plain_paths_numbers(name, plain_graphs):
    r, data = run(METHODS[name]), random_data(n=20)
    plain, _, taken = losses(r, data, as_it_is)
    assert taken == "eager" and not plain_graphs
    fast, state, taken = losses(r, data, as_compiled)
    assert taken == "compiled" and fast == pytest.approx(plain, rel=1e-5)
    assert {n for calls in plain_graphs for n in calls} == {8}   # 20 images: two full batches, and four that go the plain way
    images, learnt = (plain_graphs if len(plain_graphs) == 2 else [[], *plain_graphs])
    updates, images = len(learnt) - 2, len(images) - 2   # the first two calls of each compare, at clean and at attacked images
    assert updates == 2 * 2 * {"TRADES": 2, "AWP": 2}.get(name, 1)
    assert (name == "natural") == (images < 0) and (name == "natural" or images >= 2 * 2 * r.method.attack.steps or name == "SAAT")
    assert not {"forward", "imaged"} & vars(state.model).keys()


def test_bf16_holds_in_the_graphs(plain_graphs):
    r, data = run(at(EPS), precision="bf16"), random_data(n=20)
    plain, fast = losses(r, data, as_it_is)[0], losses(r, data, as_compiled)[0]
    assert fast == pytest.approx(plain, rel=2e-2) and fast != losses(run(at(EPS)), data, as_it_is)[0]
    model, x, y = narrow(width=8).eval(), numbers(4, 1, 8, 8), labels(4, 10)
    with compiled(model, (4, 1, 8, 8), "eval", lowered=True):
        with torch.autocast("cpu", torch.bfloat16): assert gradient(model, x, CrossEntropy(), y)[1].dtype == torch.bfloat16
        calls = len(plain_graphs[-2])
        assert gradient(model, x, CrossEntropy(), y)[1].dtype == torch.float32 and len(plain_graphs[-2]) == calls   # what is judged in fp32 does not pass them


def test_nothing_is_built_again(plain_graphs):
    "Neither short batches nor epochs, modes, folded batch norms or layouts make a new graph."
    from torch._dynamo.utils import counters
    built = []
    r, data = run(daat(EPS), epochs=4), random_data(n=20)
    counters.clear()
    with threads(1):
        state = State(r, data)
        with as_compiled(r, state):
            before = dict(counters["stats"])
            train(r, data, state, save=lambda s: built.append(dict(counters["stats"])), report_line=lambda line: None)
            with torch.enable_grad(): state.model.eval(), gradient(state.model, numbers(8, 1, 5, 5).to(memory_format=torch.channels_last), CrossEntropy(), labels(8, 3))
            assert before["unique_graphs"] == 2 and {b["unique_graphs"] for b in [*built, counters["stats"]]} == {2}


def test_a_twin_shares_its_memory_and_asks_for_no_gradient():
    model = narrow(width=8)
    for mode, weights in (("eval", False), ("train", True)):
        other = twin(model, mode, weights)
        assert all(a.data_ptr() == b.data_ptr() for a, b in zip([*model.parameters(), *model.buffers()], [*other.parameters(), *other.buffers()]))
        assert {p.requires_grad for p in other.parameters()} == {weights} and other.training == (mode == "train") and model.training
    other(numbers(4, 1, 8, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_comparison_leaves_no_trace(plain_graphs):
    model = narrow(width=8)
    before = fingerprint(model)
    with compiled(model, (4, 1, 8, 8), "train") as taken: assert taken == "compiled" and fingerprint(model) == before and all(p.grad is None for p in model.parameters()) and model.training


# --- where it fails -----------------------------------------------------------------------------------------------------------------

def broken(kind):
    def compile_(f, **options):
        if kind == "missing": raise RuntimeError("no C++ compiler\nand so on")
        return {"late": lambda x: 1 / 0, "wrong": lambda x: f(x) + torch.arange(10.), "no number": lambda x: f(x) * torch.nan, "gradient": lambda x: f(x).detach() + 0 * f(x) - (f(x) - f(x).detach())}[kind]
    return compile_


@pytest.mark.parametrize("kind, says", [("missing", "RuntimeError: no C++ compiler"), ("late", "ZeroDivisionError"), ("wrong", "ArithmeticError: its loss is"), ("no number", "its loss is nan"), ("gradient", "its gradients are not the network's")])
def test_a_graph_that_fails_or_errs_is_not_used(kind, says, monkeypatch):
    monkeypatch.setattr(torch, "compile", broken(kind))
    model, lines = narrow(width=8), []
    before = fingerprint(model)
    with compiled(model, (4, 1, 8, 8), "eval", report_line=lines.append) as taken:
        assert taken == "eager" and not {"forward", "imaged"} & vars(model).keys() and fingerprint(model) == before
        gradient(model, numbers(4, 1, 8, 8), CrossEntropy(), labels(4, 10))
    assert len(lines) == 1 and says in lines[0] and "the plain path is taken" in lines[0] and "\n" not in lines[0]


def test_an_error_while_it_trains_is_not_swallowed(plain_graphs):
    model = narrow(width=8)
    with pytest.raises(KeyError), compiled(model, (4, 1, 8, 8), "eval"): raise KeyError
    assert not {"forward", "imaged"} & vars(model).keys()


# --- the rule, and the record -------------------------------------------------------------------------------------------------------

def test_the_rule_is_a_gpu_a_large_network_and_a_long_run(monkeypatch):
    monkeypatch.delenv("TORCH_COMPILE_DISABLE", raising=False)
    long = replace(run(at(EPS), epochs=100, batch=128), network=ResNet18())
    cuda, n = torch.device("cuda"), 128 * PASSES // (11 * 100) + 128
    assert pays(long, n, cuda) and pays(long, 50_000, cuda)
    assert not pays(long, n - 256, cuda) and not pays(replace(long, network=NarrowResNet()), 50_000, cuda) and not any(pays(long, 50_000, torch.device(kind)) for kind in ("cpu", "mps"))
    assert pays(replace(long, method=natural()), 50_000, cuda) and not pays(replace(long, method=natural()), n, cuda)   # an eleventh of the passes
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert not pays(long, 50_000, cuda)


def test_a_network_that_is_not_safe_in_channels_last_is_not_compiled_on_a_cpu(plain_graphs):
    told = []
    with compiled(narrow(width=4), (4, 1, 8, 8), "eval", report_line=told.append) as taken: assert taken == "eager"
    assert not plain_graphs and "not safe in channels_last" in told[0]


def test_a_graph_that_is_right_at_clean_images_alone_is_not_used(monkeypatch):
    "Equal on the images of the comparison, another function one step away."
    def compile_(f, **options):
        seen = []
        def graph(x):
            seen.append(x.detach().clone()) if not seen else None
            return f(x) if torch.equal(x, seen[0]) else f(x.flip(3))
        return graph
    monkeypatch.setattr(torch, "compile", compile_)
    told = []
    with compiled(narrow(width=8), (4, 1, 8, 8), "eval", report_line=told.append) as taken: assert taken == "eager"
    assert "ArithmeticError" in told[0]


def test_dropout_that_counts_its_calls_is_not_compiled(plain_graphs):
    model, told = NETWORKS["smallcnn"].build(10, 1).train(), []
    with compiled(model, (2, 1, 28, 28), "eval", report_line=told.append) as how: assert how == "eager"
    assert not plain_graphs and "dropout" in told[0]
    with compiled(NETWORKS["mnistcnn"].build(10, 1), (2, 1, 28, 28), "eval") as how: assert how == "compiled"   # its dropout drops nothing


class Killed(Exception): pass


def test_a_killed_run_goes_on_the_same_way_to_the_same_weights(tmp_path, monkeypatch, plain_graphs):
    monkeypatch.setattr(module, "pays", lambda run, images, device: True)
    r, data = run(daat(EPS), epochs=3), random_data(n=20)
    whole, part = Store(tmp_path/"whole"), Store(tmp_path/"part")
    def report_line(line):
        if "epoch   1" in line: raise Killed
    whole.train(r, data, report_line=lambda line: None)
    with pytest.raises(Killed): part.train(r, data, report_line=report_line)
    part.train(r, data, report_line=lambda line: None)
    assert [m["path"] for m in part.facts(r)["made with"]] == ["compiled"] and part.facts(r)["weights"] == whole.facts(r)["weights"]
    assert same(part.model(r, data).state_dict(), whole.model(r, data).state_dict())


@pytest.mark.parametrize("older", [False, True])
def test_a_changed_path_is_recorded_and_told(tmp_path, monkeypatch, plain_graphs, older):
    r, data, store = run(at(EPS), epochs=2), random_data(n=20), Store(tmp_path)
    def report_line(line):
        if "epoch   1" in line: raise Killed
    with pytest.raises(Killed): store.train(r, data, report_line=report_line)
    if older:   # as a run that was begun before paths were recorded
        from adaptive_at.store.checksums import write_checked_json
        facts = store.facts(r)
        write_checked_json(store.folder(r)/"spec.json", facts | {"made with": [{k: v for k, v in facts["made with"][0].items() if k != "path"}]})
    else: monkeypatch.setattr(module, "pays", lambda run, images, device: True)
    store.train(r, data, report_line=lambda line: None)
    made = store.facts(r)["made with"]
    assert [m.get("path") for m in made] == ([None] if older else ["eager", "compiled"])
    results = object.__new__(Results)
    results.concerned, results.plan = {}, type("Plan", (), {"store": store})
    assert ("continued on another execution path (eager, then compiled)" in results.training_warnings(r)) == (not older)


# --- the compiler itself ------------------------------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")

AGREE = """
import copy, torch
from adaptive_at.attacks import CrossEntropy, gradient
from adaptive_at.compiled import compiled
from adaptive_at.networks import NarrowResNet
torch.set_num_threads(1)
model = NarrowResNet(width_factor=4, strides=(1,)).build(3, 1)
x, y = torch.rand(4, 1, 5, 5, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 3
def step():
    net = copy.deepcopy(model)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    def work():
        grad, _ = gradient(net.eval(), x, CrossEntropy(), y)
        loss = CrossEntropy()(net.train()(x), y).mean()
        loss.backward(); optimiser.step()
        return [grad, loss.detach(), *(p.detach() for p in net.parameters()), *(b.double() for b in net.buffers())]
    return net, work
plain = step()[1]()
found = []
for _ in range(2):
    net, work = step()
    with compiled(net, x.shape, 'eval') as taken: found.append(work())
    assert taken == 'compiled'
assert all(torch.equal(a, b) for a, b in zip(*found))
for a, b in zip(found[0], plain): assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1e-3), (a, b)
"""


@needs_compiler
def test_compiled_code_gives_the_plain_numbers_twice():
    subprocess.run([sys.executable, "-c", AGREE], check=True)


@needs_compiler
def test_a_cache_that_another_processor_filled_is_not_used(tmp_path):
    "As on machines that share a folder. Where the processor has no AVX-512 both runs are the same."
    own = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"} | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for environment in (own | {"ATEN_CPU_CAPABILITY": "avx2"}, own): subprocess.run([sys.executable, "-c", AGREE], check=True, env=environment)
