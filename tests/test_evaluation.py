"Evaluations: verdicts, AutoAttack walked by hand, transfer, intervals, and that nothing is disturbed."
import copy, math, random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from pyautoattack import AutoAttack as Ensemble
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_base import FABAttack
from pyautoattack.square import SquareAttack
from scipy.stats import binomtest, norm
from torch import nn

from adaptive_at.data import datasets as ds
from adaptive_at.attacks import FGSM, PGD, Margin, UniformStart
from adaptive_at.evaluation import AutoAttack, Clean, Column, Images, Transfer, WhiteBox, decode_verdicts, encode_verdicts, evaluate, evaluation
from adaptive_at.intervals import mean_interval, paired, wilson
from adaptive_at.networks import fingerprint
from adaptive_at.tables.results import Results
from helpers import digits, narrow, numbers, random_data, robust_digits, same, short_autoattack, wavy


def some_digits(n, first=0):
    x, y = digits().test.x[first:first + n], digits().test.y[first:first + n]
    return Images(ds.to_unit(x), y, torch.arange(first, first + n))


def part(images, index): return Images(images.x[index], images.y[index], images.index[index])


# AutoAttack

@pytest.fixture
def short():
    "The standard ensemble with a few steps of each attack."
    with short_autoattack(): yield


@pytest.fixture
def calls(monkeypatch):
    "Every call of one of the four attacks: its name, images, labels, targets and result."
    log = []
    for kind in (APGDAttack, APGDAttack_targeted, FABAttack, SquareAttack):
        def recorded(self, x, y, *args, kind=kind, perturb=kind.perturb):
            before, result = (x.clone(), y.clone()), perturb(self, x, y, *args)
            facts = {k: getattr(self, k, None) for k in ("seed", "eps", "loss", "n_restarts", "targeted", "n_target_classes", "norm")}
            log.append((kind.__name__, facts, *before, result.clone()))
            return result
        monkeypatch.setattr(kind, "perturb", recorded)
    return log


@pytest.mark.parametrize("n, batch_size, seed", [(40, 40, 0), (41, 8, 3), (9, 1, 0)])
def test_the_walk_equals_autoattack_s_own_call(n, batch_size, seed, short, calls):
    model, images, eps = robust_digits(), some_digits(n), 0.12
    ours, mine = AutoAttack(eps, batch_size=batch_size).standing(model, images, seed), list(calls)
    calls.clear()
    ensemble = Ensemble(model, norm="Linf", eps=eps, version="standard", seed=seed, device="cpu")
    x_adv, y_adv = ensemble.run_standard_evaluation(images.x, images.y, batch_size=batch_size)
    assert ours.tolist() == (model(x_adv).argmax(1) == images.y).tolist() == (y_adv == images.y).tolist()
    assert 0 < ours.sum() < (model(images.x).argmax(1) == images.y).sum()
    assert {name for name, *_ in mine} == {"APGDAttack", "APGDAttack_targeted", "FABAttack", "SquareAttack"}
    assert len(mine) == len(calls)   # call by call: the same attack on the same images with the same numbers
    for (name, facts, *tensors), (their_name, their_facts, *theirs) in zip(mine, calls):
        told = {k: v for k, v in facts.items() if v is not None and not (name != "FABAttack" and k == "targeted")}
        assert name == their_name and told == {k: their_facts[k] for k in told}
        assert all(torch.equal(a, b) for a, b in zip(tensors, theirs))


def test_every_attack_of_the_ensemble_gets_what_the_one_before_left_standing(short, calls):
    model, images = robust_digits(), some_digits(30)
    AutoAttack(0.12, batch_size=30).standing(model, images)
    left = part(images, model(images.x).argmax(1) == images.y)
    for name, facts, x, y, x_adv in calls:
        assert torch.equal(x, left.x) and torch.equal(y, left.y)
        left = part(left, model(x_adv).argmax(1) == y)
    facts = {name: f for name, f, *_ in calls}
    assert facts["APGDAttack"]["loss"] == "ce" and facts["FABAttack"]["targeted"] and facts["SquareAttack"]["n_restarts"] == 1
    assert facts["APGDAttack"]["n_restarts"] == facts["APGDAttack_targeted"]["n_restarts"] == facts["FABAttack"]["n_restarts"] == 1
    assert facts["APGDAttack_targeted"]["n_target_classes"] == facts["FABAttack"]["n_target_classes"] == 9


class Killed(Exception): "Instead of SIGKILL."


def interrupted(column, model, images, at, keep):
    "Run until the `at`-th save, which dies before or after it has kept the progress; the progress kept."
    kept = []
    def save(progress):
        if len(kept) == at and not keep: raise Killed
        kept.append(copy.deepcopy(progress))
        if len(kept) == at: raise Killed
    with pytest.raises(Killed): column.standing(model, images, save=save)
    return kept[-1] if kept else None


def test_a_walk_interrupted_after_any_batch_ends_with_the_same_verdicts(short, calls):
    model, images, column = robust_digits(), some_digits(20), AutoAttack(0.12, batch_size=8)
    saves = []
    whole = column.standing(model, images, save=lambda p: saves.append(copy.deepcopy(p)))
    batches = len(calls)
    assert len(saves) == batches > 7 and {p["attack"] for p in saves} == {0, 1, 2, 3} and saves[-1]["standing"] == encode_verdicts(whole)
    assert 0 < whole.sum() < 20
    for at, keep in [*((k, True) for k in range(1, batches + 1)), (0, False), (3, False), (batches - 1, False)]:
        saved = interrupted(column, model, images, at, keep)
        calls.clear()
        assert torch.equal(column.standing(model, images, saved=saved), whole), (at, keep)
        assert len(calls) == batches - at   # nothing is attacked twice, and what was not kept is attacked again


def test_an_interrupted_evaluation_of_a_table_goes_on(short):
    data, model = digits(), robust_digits()
    e = evaluation(AutoAttack(0.12, limit=20, batch_size=10), data.info.identity, fingerprint(model), examples=30)
    saves = []
    whole = evaluate(e, model, data, save=saves.append)
    assert whole["n"] == 20 and len(saves) >= 4
    for saved in (saves[0], saves[3], saves[-1]): assert evaluate(e, model, data, saved=saved) == whole


def test_autoattack_s_survivors_survive_pgd():
    "The whole standard ensemble on an adversarially trained network: at most 2 of 80 examples (2.5%) stand under AutoAttack and fall to PGD-40."
    model, images, eps = robust_digits(), some_digits(80), 0.1
    verdict = {name: column.standing(model, images) for name, column in {
        "clean": Clean(), "PGD-40": WhiteBox(PGD(eps / 10, 40), eps), "AA": AutoAttack(eps)}.items()}
    assert (verdict["AA"] & ~verdict["PGD-40"]).sum() <= 2
    assert not (verdict["AA"] & ~verdict["clean"]).any()
    assert 0.5 < verdict["AA"].float().mean() <= verdict["PGD-40"].float().mean() + 0.025 and verdict["PGD-40"].sum() < verdict["clean"].sum() - 5


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 9])
def test_autoattack_runs_with_few_classes(classes, short, calls):
    data = random_data(24, classes, side=9)
    model = narrow(classes).eval()
    images = Images(ds.to_unit(data.test.x), model(ds.to_unit(data.test.x)).argmax(1), torch.arange(24))   # the model's own predictions: all stand
    stands = AutoAttack(0.001, batch_size=10).standing(model, images)
    assert stands.shape == (24,) and stands.any()
    names = [name for name, *_ in calls]
    assert ("APGDAttack_targeted" in names) is (classes >= 4)   # targeted DLR looks at four logits
    assert {"APGDAttack", "FABAttack", "SquareAttack"} <= set(names)
    assert {f["n_target_classes"] for name, f, *_ in calls if name in ("FABAttack", "APGDAttack_targeted")} == {classes - 1}


def test_three_digits_in_full(short):
    "A three-class model, from dataset to result."
    keep = {name: split.y < 3 for name, split in (("train", digits().train), ("test", digits().test))}
    few = lambda name, split: ds.Split(split.x[keep[name]], split.y[keep[name]])
    data = ds.Dataset(replace(digits().info, classes=("0", "1", "2")), few("train", digits().train), None, few("test", digits().test))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    middle = torch.stack([ds.to_unit(data.train.x[data.train.y == k]).flatten(1).mean(0) for k in range(3)])   # nearest class mean
    with torch.no_grad(): model[1].weight.copy_(2 * middle); model[1].bias.copy_(-middle.square().sum(1))
    accuracy = {}
    for column in (Clean(), WhiteBox(PGD(0.02, 20), 0.2), AutoAttack(0.2)):
        accuracy[type(column)] = evaluate(evaluation(column, "", fingerprint(model)), model, data)["accuracy"]
    assert accuracy[Clean] > 90 and accuracy[AutoAttack] <= accuracy[WhiteBox] < accuracy[Clean] and accuracy[AutoAttack] > 0


def test_a_model_that_is_always_wrong_needs_no_attack(short, calls):
    model, images = robust_digits(), some_digits(10)
    wrong = replace(images, y=(model(images.x).argmax(1) + 1) % 10)
    assert not AutoAttack(0.1).standing(model, wrong).any() and not calls


# White-box columns

def test_verdicts_do_not_hang_on_batches_or_on_who_else_is_tested():
    model, x, y = wavy(50)
    images = Images(x, y, torch.arange(100, 150))
    for column in (Clean(), WhiteBox(PGD(0.01, 3), 0.03), WhiteBox(PGD(0.02, 2, Margin()), 0.03, restarts=3), WhiteBox(FGSM(UniformStart()), 0.03)):
        whole = column.standing(model, images)
        assert 0 < whole.sum() < 50
        for batch in (1, 7, 50): assert torch.equal(column.standing(model, images, batch=batch), whole)
        some = torch.arange(50).flip(0)[::3]
        assert torch.equal(column.standing(model, part(images, some)), whole[some])   # random numbers belong to the test example
    verdicts = [WhiteBox(FGSM(UniformStart()), 0.03).standing(model, images, seed) for seed in range(5)]
    assert any(not torch.equal(verdicts[0], v) for v in verdicts)


def test_columns_count_their_gradient_steps():
    assert (Clean().steps, WhiteBox(PGD(0.1, 20), 0.1, 5).steps, Transfer(PGD(0.1, 20), 0.1).steps, Column.steps) == (0, 100, 20, 0)
    assert Transfer(PGD(0.1, 20), 0.1, "Standard AT").surrogate == "Standard AT" and Clean().surrogate == ""


class Along(nn.Module):
    "Two classes, divided at the sum of the pixels: class 1 above; `sign` -1 has it the other way round."
    def __init__(self, sign=1., middle=8.):
        super().__init__()
        self.sign, self.middle = nn.Parameter(torch.tensor(sign)), middle
    def forward(self, x): m = self.sign * (x.flatten(1).sum(1) - self.middle); return torch.stack([-m, m], 1)


def test_transfer_follows_the_surrogate_s_gradient():
    model, surrogate = Along(), Along(-1.)
    x = numbers(40, 1, 4, 4)
    images, attack = Images(x, model(x).argmax(1), torch.arange(40)), PGD(0.05, 10)
    assert not WhiteBox(attack, 0.3).standing(model, images).any()
    assert not Transfer(attack, 0.3).standing(model, images).any()                             # no source: the model itself
    assert not Transfer(attack, 0.3).standing(model, images, source=copy.deepcopy(model)).any()
    assert Transfer(attack, 0.3).standing(model, images, source=surrogate).all()               # what fools the reversed model helps this one
    assert not WhiteBox(attack, 0.3).standing(model, images, source=surrogate).any()           # white-box: the model's own gradient, whatever the source


def test_transfer_counts_the_last_iterate_on_every_example():
    "An image the model gets wrong is attacked like the others, and may be right afterwards."
    model, surrogate = Along(), Along(-1.)
    x = torch.full((1, 1, 4, 4), 0.5) + 0.01   # just above: class 1
    images = Images(x, torch.tensor([0]), torch.tensor([0]))
    assert not Clean().standing(model, images)[0] and Transfer(PGD(0.05, 10), 0.3).standing(model, images, source=surrogate)[0]


# Whole evaluations

COLUMNS = [Clean(), WhiteBox(PGD(0.05, 3), 0.1, restarts=2), Transfer(PGD(0.05, 3), 0.1, "other"), AutoAttack(0.1, limit=8)]


@pytest.mark.parametrize("column", COLUMNS, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_disturbs_nothing(column, training, short):
    "Random generators, weights, batch norm, modes and gradients; and it is done in eval mode, whatever the mode before."
    data, models = digits(), (narrow(seed=1).train(training), narrow(seed=2).train(not training))
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in models]
    generators = torch.get_rng_state(), np.random.get_state(), random.getstate()
    e = evaluation(column, data.info.identity, fingerprint(models[0]), examples=20)
    result = evaluate(e, *models[:1], data, models[1] if isinstance(column, Transfer) else None)
    assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[2]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), generators[1]))
    for model, state, mode in zip(models, states, (training, not training)):
        assert same(model.state_dict(), state) and {m.training for m in model.modules()} == {mode}
        assert all(p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()
    again = evaluate(e, models[0].eval(), data, models[1].eval() if isinstance(column, Transfer) else None)
    assert again == result


@pytest.mark.parametrize("column", COLUMNS, ids=lambda c: type(c).__name__)
def test_an_evaluation_leaves_no_gradients_behind(column, short):
    model = narrow()
    evaluate(evaluation(column, "", "", examples=20), model, digits(), narrow(seed=2) if isinstance(column, Transfer) else None)
    assert all(p.grad is None for p in model.parameters())


def test_results_add_up():
    data, model = digits(), robust_digits()
    results = {c: evaluate(evaluation(c, data.info.identity, fingerprint(model), examples=50), model, data) for c in (Clean(), WhiteBox(PGD(0.03, 5), 0.15))}
    subset = ds.balanced(data.test.y, 50)
    right = model(ds.to_unit(data.test.x[subset])).argmax(1) == data.test.y[subset]
    clean, robust = results.values()
    assert decode_verdicts(clean["standing"]).tolist() == right.tolist() and clean["n"] == 50
    assert clean["accuracy"] == pytest.approx(100 * right.double().mean()) and robust["accuracy"] < clean["accuracy"]
    shares = model(ds.to_unit(data.test.x[subset])).argmax(1).bincount() / 50
    assert clean["top_class_share"] == pytest.approx(float(shares.max())) and clean["finite"] is True and robust["zero_gradients"] == 0.


class Steep(nn.Module):
    "So sure of class 0 that the cross-entropy has no gradient there."
    def __init__(self, scale): super().__init__(); self.scale = scale
    def forward(self, x): m = self.scale * (1 + x.flatten(1).mean(1)); return torch.stack([m, -m], 1)


def test_facts_for_warnings():
    data = random_data(20, 2)
    def result(model, column): return evaluate(evaluation(column, "", ""), model, data)
    attack = WhiteBox(PGD(0.05, 2), 0.1)
    assert result(Steep(1e4), attack)["zero_gradients"] == 1. and result(Steep(1.), attack)["zero_gradients"] == 0.
    clean = result(Steep(1.), Clean())
    assert clean["top_class_share"] == 1. and clean["finite"] and clean["accuracy"] == 50.   # collapsed to one class
    assert not result(Steep(float("nan")), Clean())["finite"]


def test_an_evaluation_s_identity_holds_all_that_moves_a_verdict():
    base = evaluation(WhiteBox(PGD(0.03, 20), 0.1), "data", "weights")
    others = [evaluation(WhiteBox(PGD(0.03, 20), 0.2), "data", "weights"), evaluation(WhiteBox(PGD(0.03, 40), 0.1), "data", "weights"),
              evaluation(WhiteBox(PGD(0.03, 20), 0.1, 2), "data", "weights"), evaluation(WhiteBox(PGD(0.03, 20, success="any"), 0.1), "data", "weights"),
              evaluation(base.column, "other", "weights"), evaluation(base.column, "data", "other"), evaluation(base.column, "data", "weights", "source"),
              evaluation(base.column, "data", "weights", examples=5), evaluation(base.column, "data", "weights", seed=1), replace(base, batch=100)]
    assert len({base.id, *(o.id for o in others)}) == 11 and base.id == evaluation(WhiteBox(PGD(0.03, 20), 0.1), "data", "weights").id
    a = evaluation(AutoAttack(0.1), "data", "weights")
    assert a.library.startswith("pyautoattack ") and len({a.id, replace(a, library="pyautoattack 9").id, replace(a, column=AutoAttack(0.1, batch_size=100)).id}) == 3


@given(st.lists(st.booleans(), max_size=40))
def test_flags_survive_being_written(flags):
    assert decode_verdicts(encode_verdicts(torch.tensor(flags, dtype=torch.bool))).tolist() == flags


# Intervals

@pytest.mark.parametrize("right, n, low, high", [(5, 10, 23.66, 76.34), (0, 10, 0, 27.75), (10, 10, 72.25, 100), (81, 263, 25.53, 36.62)])   # the last: Newcombe, 1998
def test_wilson_s_interval_at_known_values(right, n, low, high):
    assert wilson(100 * right / n, n) == pytest.approx((low, high), abs=0.006)


@given(st.integers(1, 20_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.9, 0.95, 0.99]))
@settings(max_examples=60)
def test_wilson_s_interval_equals_scipy_s(pair, level):
    right, n = pair
    theirs = binomtest(right, n).proportion_ci(level, method="wilson")
    low, high = wilson(100 * right / n, n, norm.ppf(0.5 + level / 2))
    assert (low, high) == pytest.approx((100 * theirs.low, 100 * theirs.high), abs=1e-6)
    assert 0 <= low <= 100 * right / n + 1e-9 and 100 * right / n - 1e-9 <= high <= 100


def test_no_examples_say_nothing(): assert wilson(0., 0) == (0., 100.)


def test_a_paired_difference_by_hand():
    a, b = (torch.tensor([c == "1" for c in text]) for text in ("11101111", "11110000"))
    # differences 0 0 0 -1 1 1 1 1: mean 3/8, sum of squares 5, variance (5 - 8 * 9/64) / 7 = 31/56
    half = 1.96 * (31 / 56 / 8)**0.5
    assert paired(a, b) == pytest.approx((37.5, 100 * (0.375 - half), 100 * (0.375 + half)))
    assert paired(b, a) == pytest.approx((-37.5, 100 * (-0.375 - half), 100 * (-0.375 + half)))
    assert paired(a, a) == (0, 0, 0)


def test_an_interval_over_images_and_seeds_by_hand():
    "Two seeds, three images; means per image 1, 2, 6 (variance 7), per seed 2 and 4 (variance 2); Student's quantile of one degree of freedom at 1.96 standard deviations is 12.7073."
    values = torch.tensor([[0., 1., 5.], [2., 3., 7.]])
    half = math.hypot(1.96 * math.sqrt(7 / 3), 12.7073 * math.sqrt(2 / 2))
    assert mean_interval(values) == pytest.approx((3., 3 - half, 3 + half), rel=1e-4)
    assert mean_interval(values[:1]) == mean_interval(values[0]) == pytest.approx((2., 2 - 1.96 * math.sqrt(7 / 3), 2 + 1.96 * math.sqrt(7 / 3)))


def test_an_interval_over_seeds_covers_what_is_drawn():
    "Images and seeds drawn anew 1,000 times, 3 seeds of 50 images: at least 95% of the intervals hold the truth, and pooling the seeds would miss it far more often."
    rng = np.random.default_rng(0)
    values = rng.normal(size=(1000, 1, 50)) + rng.normal(size=(1000, 3, 1)) * 0.3 + rng.normal(size=(1000, 3, 50)) * 0.5
    def held(of): return np.mean([low <= 0 <= high for _, low, high in map(of, torch.tensor(values))])
    assert held(mean_interval) > 0.95 and held(lambda v: mean_interval(v.flatten())) < 0.8


def test_a_difference_over_seeds_takes_images_with_images_and_seeds_with_seeds():
    "What `claims.csv` and `variants.csv` say of two rows with two seeds each; a row that was not run has no difference."
    told = {"a": ["1101", "1100"], "b": ["0101", "0000"], "c": []}
    of = SimpleNamespace(by_seed=lambda block, row, column, checkpoint: [{"standing": text} for text in told[row]])
    a, b = (torch.stack([decode_verdicts(text) for text in told[row]]) for row in "ab")
    d = Results._difference(of, None, "a", "b", "AA", "")
    assert tuple(d.values()) == (*mean_interval(100 * (a.double() - b.double())), 4, 2) and d["difference"] == 37.5
    assert (Results._difference(of, None, "a", "c", "AA", "")["n"], Results._difference(of, None, "c", "c", "AA", "")["seeds"]) == (0, 0)


def test_pairing_is_sharper_than_comparing_two_intervals():
    a = numbers(400) < 0.6
    b = a & (numbers(400, seed=1) < 0.95)   # the same examples, a few fewer
    difference, low, high = paired(a, b)
    apart = (wilson(100 * float(a.float().mean()), 400)[0], wilson(100 * float(b.float().mean()), 400)[1])
    assert difference == pytest.approx(100 * float(a.float().mean() - b.float().mean()), abs=1e-4)
    assert 0 < low < difference < high and apart[0] < apart[1]   # paired: surely better; the two intervals overlap
