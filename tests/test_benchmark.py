"The benchmark's structure at a tiny size: turns, ratios, what it compares with, what it writes. No clock decides."
import json
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from adaptive_at.benchmark import measure as benchmark, other_libraries
from adaptive_at.attacks import PGD, UniformStart, per_example, restarted
from adaptive_at.benchmark.measure import Lap, Line, PARAMETERS, PARTS, alternating, begin, draw, frame, listing, ratio, slope, timed, write
from adaptive_at.base.errors import UserError
from adaptive_at.evaluation import AutoAttack, Images
from adaptive_at.networks import NarrowResNet, frozen
from adaptive_at.benchmark.other_libraries import at_loop, careful, pgd_loop, trades_careful, trades_loop, trades_wasteful, wasteful
from helpers import labels, narrow, noise, numbers, wavy

TINY = dict(network="narrow-4", batch="6", small="narrow-4", steps=2, repeats=2, warmup=0, epochs=1, examples=10, restarts=2, seeds=0, threads=1)


@pytest.fixture
def bench(tmp_path): return begin(TINY | {"outputs": str(tmp_path)})


# --- turns and ratios ---------------------------------------------------------------------------------------------------------------

def test_ways_take_turns_and_every_other_round_goes_back():
    order = []
    laps = alternating({name: lambda name=name: order.append(name) for name in "abc"}, repeats=4, warmup=1)
    assert "".join(order) == "cba" + "abc" + "cba" + "abc" + "cba"   # the first round warms up
    assert {name: [lap.round for lap in each] for name, each in laps.items()} == {name: [0, 1, 2, 3] for name in "abc"}
    assert [lap.turn for lap in laps["a"]] == [3, 8, 9, 14] and [lap.turn for lap in laps["b"]] == [4, 7, 10, 13]


def test_a_ratio_is_of_times_in_the_same_round():
    def laps(*walls): return [Lap(r, 0, wall, 2 * wall, math.nan) for r, wall in enumerate(walls)]
    mine, other = laps(1., 20., 3.), laps(2., 10., 12.)   # the second round was disturbed, for both
    found = ratio(mine, other)
    assert (found.value, found.low, found.high, found.n) == (0.5, 0.25, 2., 3)   # of 0.5, 2, 0.25; that of the medians would be 0.3
    with pytest.raises(ValueError, match="same rounds"): ratio(mine, laps(1., 2.))
    lines = list(timed(Line("steps", "n", 1, "fp32", "mine", "", 0.), mine, ("cpu", "wall"), {"other": other}, {"other": 0.6}))
    assert [(l.metric, l.clock, l.value, l.met) for l in lines] == [("seconds", "cpu", 6., None), ("ratio", "cpu", 0.5, True), ("seconds", "wall", 3., None), ("ratio", "wall", 0.5, None)]


def test_the_exponent_of_a_power_law(): assert slope((1, 2, 4, 8), [3 * n**1.5 for n in (1, 2, 4, 8)]) == pytest.approx(1.5)


# --- the other sides ----------------------------------------------------------------------------------------------------------------

def test_loops_make_our_adversaries_and_our_losses():
    x, y, model = numbers(12, 1, 8, 8), labels(12, 10), narrow().eval()
    start = UniformStart()(x, per_example(0.1, x), noise(12))
    ours = PGD(0.02, 4)(model, x, y, 0.1, noise(12))
    for gradient in (wasteful, careful): assert ((pgd_loop(model, x, y, 0.1, 0.02, 4, gradient, start) - ours).abs() < 1e-5).float().mean() > 0.99
    for loop, gradients in ((at_loop, (wasteful, careful)), (trades_loop, (trades_wasteful, trades_careful))):
        losses = []
        for gradient in gradients:
            net = narrow()
            losses.append(float(loop(net, torch.optim.SGD(net.parameters(), lr=0.1), x, y, 0.1, 0.02, 4, gradient, start)))
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_only_the_wasteful_loop_makes_gradients_of_the_weights():
    x, y = numbers(4, 1, 8, 8), labels(4, 10)
    for gradient, given, weights in ((wasteful, y, True), (careful, y, False), (trades_wasteful, y, False), (trades_careful, torch.full((4, 10), 0.1), False)):
        model = narrow().eval()
        assert gradient(model, x, x + 0.1, given).shape == x.shape
        assert (next(model.parameters()).grad is not None) is weights


def test_operations_are_those_of_the_passes():
    task = benchmark.random_task(NarrowResNet(), 8, 10, torch.device("cpu"))
    forward = benchmark.flops(task.network, 10, (3, 32, 32)) * 8
    worth = {g: benchmark.work(task, loop, g) / forward for loop, g in ((at_loop, careful), (at_loop, wasteful), (trades_loop, trades_careful), (trades_loop, trades_wasteful))}
    # forwards: an attack step 2, with the weights' gradients 3; an update 3; TRADES sends two batches through the update, and the clean images once, or in each step and twice in the update
    for gradient, count in ((careful, 23), (wasteful, 33), (trades_careful, 27), (trades_wasteful, 39)): assert worth[gradient] == pytest.approx(count, rel=0.02)


def test_every_library_judges_alike():
    model, x, y = wavy(30, wrong=31)   # all of a class the model sees, near its boundaries
    stand = {multi: other_libraries.torchattacks_pgd(model, x, y, 0.02, 0.005, 10, 3, multi) for multi in (False, True)} | {"foolbox": other_libraries.foolbox_pgd(model, x, y, 0.02, 0.005, 10, 3)}
    stand["ours"] = restarted(PGD(0.005, 10), model, x, y, 0.02, noise(30), 3)[1]
    assert 0 < int(stand["ours"].sum()) < 29
    for flags in stand.values(): assert flags.dtype == torch.bool and (flags != stand["ours"]).sum() <= 3


# --- the benchmark ------------------------------------------------------------------------------------------------------------------

def test_all_parts_at_a_tiny_size(bench, monkeypatch):
    monkeypatch.setattr(benchmark, "SWEEPS", {"images": (50, 100), "passes": (3, 5), "batch": (8, 16)})
    monkeypatch.setattr(benchmark, "ceilings", lambda batch, device, precision: {name: (lambda: torch.ones(64).sum(), 1e6) for name in ("matrix product", "convolution")})
    monkeypatch.setattr(benchmark, "memory", lambda bench: [])           # a process of its own: below
    monkeypatch.setattr(benchmark, "autoattack", lambda bench, model: [])  # seconds: test_evaluation.py has the equality
    found = write(benchmark.measure(bench, report_line=lambda line: None), bench)
    assert set(found.part) == set(PARTS) - {"autoattack", "bf16"}
    steps = found[(found.part == "steps") & (found.clock == "cpu") & (found.metric == "ratio")]
    assert {(line.way, line.precision, line.reference) for line in steps.itertuples()} >= {
        *((f"{m}, ours", p, f"{loop}, {kind}") for m, loop in (("AT", "AT"), ("TRADES", "TRADES"), ("DAAT", "AT")) for p in ("fp32", "bf16") for kind in ("textbook", "careful")), ("DAAT, ours", "fp32", "AT, ours")}
    assert (steps.n == 2).all() and {*steps.target.dropna()} == {0.60, 0.32, 0.62, 0.33, 1.15}
    assert set(found[found.part == "rules"].way) == {"AT", "DAAT", "FAT", "IAAT", "SAAT", "CAT", "TRADES", "DAAT-TRADES", "MART"}
    accuracies = found[found.metric == "robust accuracy"]
    assert {*accuracies.way} == {"PGD-20, ours", "PGD-20, torchattacks", "PGD-20, foolbox", *(f"PGD-100x2, {who}" for who in ("ours", "ours, any iterate", "torchattacks", "torchattacks, MultiAttack", "foolbox"))}
    kept = accuracies.set_index("way").value
    assert kept["PGD-100x2, ours, any iterate"] <= kept["PGD-100x2, ours"]
    aimed = found[(found.part == "evaluation") & (found.target == 0.40)]
    assert [*zip(aimed.way, aimed.reference)] == [("PGD-100x2, ours, any iterate", "torchattacks")]
    fidelity = found[(found.part == "fidelity") & (found.precision == "fp32")].set_index("metric").value
    assert all((fidelity[f"{what} loss, same images"] <= 1e-5).all() for what in ("attack's", "update's")) and (fidelity["same sign of the gradient"] > 99).all() and fidelity["verdicts that differ"] == 0
    assert len(found[found.metric == "exponent"]) == 3
    share = found[found.metric == "share of the step in kernels"].value
    assert len(share) == 2 and share.between(1, 100).all()
    draw(found, bench)
    for part in PARTS: listing(found, part, bench)


def test_the_steps_can_be_compiled_too(bench, monkeypatch):
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: whole(f, **options, backend="aot_eager"))
    monkeypatch.setattr(benchmark, "ceilings", lambda batch, device, precision: {})
    monkeypatch.setattr(benchmark, "loop_step", lambda *args, **options: lambda: None)
    found = benchmark.steps(replace(bench, compile=True, precisions=("fp32",)), 6, report_line=lambda line: None)
    assert {"AT, ours, compiled", "TRADES, ours, compiled"} <= {line.way for line in found}


def test_a_part_that_is_not_measured_stays(bench):
    line = Line("rules", "n", 128, "fp32", "AT", "seconds", 1.)
    write(frame([line, Line("steps", "n", 64, "fp32", "AT", "seconds", 2., note="x")], bench), bench)
    found = write(frame([Line("steps", "n", 64, "fp32", "AT", "seconds", 3.), Line("steps", "n", 128, "fp32", "AT", "seconds", 4.)], bench), bench)
    assert found[["part", "batch", "value"]].values.tolist() == [["steps", 64, 3.], ["steps", 128, 4.], ["rules", 128, 1.]]
    assert pd.read_csv(bench.folder/"table.csv").shape == found.shape


def test_a_library_that_is_missing_is_named(bench, monkeypatch):
    monkeypatch.setattr(other_libraries, "find_spec", lambda name: None)
    lines = benchmark.attacks(bench, narrow().eval(), report_line=lambda line: None)
    needs = {line.way: line.note for line in lines if line.note}
    assert needs["PGD-20, torchattacks"] == "needs torchattacks: pip install 'adaptive_at[bench]'" and "foolbox" in needs["PGD-100x2, foolbox"]
    assert {line.way for line in lines if line.n} == {"PGD-20, ours", "PGD-100x2, ours", "PGD-100x2, ours, any iterate"}
    assert "needs torchattacks" in listing(frame(lines, bench), "evaluation", bench).to_html()


def test_memory_does_not_grow_with_steps_or_epochs(bench):
    for line in benchmark.memory(bench): assert line.value < 20, line   # MB, of about 500


def test_a_profile_never_counts_an_operator_twice(bench):
    lines = benchmark.kernels(bench, narrow(), batch=16, calls=2)
    assert 0 < sum(line.value for line in lines[1:]) <= lines[0].value * 1.0001 <= 100


@pytest.mark.parametrize("wrong, text", [
    (dict(batch="64,x"), "batch is '64,x'; it must be batch sizes with commas"), (dict(parts="speed"), "parts is 'speed'; it must be some of steps, rules"), (dict(repeats=0), "repeats is 0"), (dict(seeds=1), "one seed has no spread"),
    (dict(network="resnet"), "network is 'resnet'"), (dict(batchsize=3), "batchsize is not a parameter"), (dict(precision="fp16"), "precision is 'fp16'")])
def test_bad_parameters(wrong, text):
    with pytest.raises(UserError, match=text): begin(TINY | wrong)


def test_the_notebook_is_thin_and_says_the_same_defaults():
    nb = json.loads((Path(__file__).parent.parent/"nbs/benchmark.ipynb").read_text())
    cell, = (c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", []))
    namespace = {}
    exec("".join(cell["source"]), namespace)
    assert {k: v for k, v in namespace.items() if not k.startswith("__")} == {k: p.default for k, p in PARAMETERS.items()}
    assert begin(TINY | {"batch": 64}).batches == (64,)   # as papermill gives it


def test_autoattack_called_directly_judges_as_ours():
    torch.manual_seed(0)
    model, x = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval(), numbers(20, 1, 8, 8)
    images = Images(x, model(x).argmax(1), torch.arange(20))
    with frozen(model):
        direct, ours = other_libraries.autoattack_direct(model, images.x, images.y, 0.02), AutoAttack(0.02).standing(model, images)
    assert direct.tolist() == ours.tolist() and 0 < int(ours.sum()) < 20
