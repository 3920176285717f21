"SA-PGD against Alg. 1 and the released loop written out, its limits bit for bit, and SAAT's published settings."
import copy, itertools, math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from adaptive_at.attacks import KL, PGD, CleanStart, CrossEntropy, NormalStart, UniformStart, per_example, project
from adaptive_at.base.identity import spec_hash, to_spec
from adaptive_at.data.datasets import Augment, Batch
from adaptive_at.algorithms.baselines import Method, Training
from adaptive_at.objectives import TRADES, AdversarialCE
from adaptive_at.radius import Fixed, RuleContext
from adaptive_at.algorithms.saat import SAAT_AUGMENT, SAAT_TRAINING, StrengthAdaptivePGD, for_classes, radii, rice_at, rice_trades, saat, saat_down, saat_up, satrades_up
from adaptive_at.training import train_step
from adaptive_at.awp import AT_AWP, TRADES_AWP
from helpers import buffers, labels, narrow, noise, numbers, same, wavy

pytestmark = pytest.mark.trains

EPS = 8/255
BIG = 0.1   # a radius at which the small models below are fooled


def ce(model, x, y):
    with torch.no_grad(): return F.cross_entropy(model(x), y, reduction="none")


def slope(loss, model, x, target):
    z = x.clone().requires_grad_()
    return torch.autograd.grad(loss(model(z), target).sum(), z)[0]


def attacked(method, model, x, y, stream, **changes):
    "A method's attack, with the radii its rule gives."
    return replace(method.attack, **changes)(model, x, y, torch.full((len(x),), method.radius.eps), stream)


def bn_net(mode="eval", n=12):
    "A network with batch norm whose statistics are not the initial ones, images and labels."
    model, x, y = narrow(4), numbers(n, 1, 8, 8), labels(n, 4)
    with torch.no_grad():
        for _ in range(20): model.train()(numbers(16, 1, 8, 8, seed=3))
        model.classifier.weight.mul_(6.)   # losses on both sides of any rho
    return model.train(mode == "train"), x, y


# Stages

@pytest.mark.parametrize("eps_max, want", [(8, ()), (9, (9,)), (10, (10,)), (11, (10, 11)), (12, (10, 12)), (13, (10, 12, 13)), (14, (10, 12, 14)), (15, (10, 12, 14, 15)),
                                           (16, (10, 12, 14, 16)), (17, (10, 12, 14, 16, 17)), (18, (10, 12, 14, 16, 18)), (19, (10, 12, 14, 16, 18, 19)),
                                           (20, (10, 12, 14, 16, 18, 20))])
def test_stages_from_the_standard_radius(eps_max, want):
    assert radii(8, eps_max) == want
    got = saat_up(EPS, eps_max).attack.stages
    assert got == tuple(w / 255 for w in want)
    e, released = 8/255, []   # the released loop, whose last stage is cut at eps_max
    while e < eps_max/255:
        e = e + 2/255
        released.append(e if e < eps_max/255 else eps_max/255)
    assert got == pytest.approx(released)


def test_stages_from_nothing():
    assert radii(0, 8) == (2, 4, 6, 8) and radii(0, 0) == () and radii(0, 3) == (2, 3) and radii(0, 1) == (1,)
    assert len(saat(EPS, 128).attack.stages) == 64
    assert all(isinstance(r, float) for r in radii(8, 11))   # 9 and 9.0 would be two runs


@given(st.integers(0, 20), st.integers(0, 60), st.sampled_from([1., 2., 3., 0.1]))
def test_stages_rise_by_tau_up_to_the_cap(first, more, tau):
    got = radii(first, first + more, tau)
    steps = [b - a for a, b in itertools.pairwise((first, *got))]
    assert (got[-1] == first + more if more else got == ()) and all(0 < s <= tau + 1e-9 for s in steps) and all(abs(s - tau) < 1e-9 for s in steps[:-1])


# Alg. 1 as printed

def printed(model, x, y, rho, eps_max, tau, K, alpha):
    "SAAT Alg. 1, one example at a time. Gives the images and the steps each took."
    out, taken = [], []
    for i in range(len(x)):
        image, label, point, eps, steps = x[i:i+1], y[i:i+1], x[i:i+1], 0., 0
        done = ce(model, point, label) >= rho
        while not done and eps < eps_max - 1e-9:
            eps = eps + tau
            for _ in range(K):
                point = project(point + alpha * slope(CrossEntropy(), model, point, label).sign(), image, per_example(eps, image))
                steps += 1
                if done := bool(ce(model, point, label) >= rho): break
        out.append(point)
        taken.append(steps)
    return torch.cat(out), torch.tensor(taken)


@pytest.mark.parametrize("rho", [0.3, 1.0, 1.5, 2.5])
def test_sa_pgd_equals_alg_1_example_by_example(rho):
    model, x, y = wavy(40, seed=3)
    alpha = tau = 0.02
    want, taken = printed(model, x, y, rho, 0.1, tau, 3, alpha)
    got = StrengthAdaptivePGD(alpha, 0, start=CleanStart(), rho=rho, stages=radii(0, 0.1, tau))(model, x, y, 0.1, noise(40))
    assert torch.allclose(got, want, rtol=0, atol=1e-7)
    reached, start = ce(model, got, y) >= rho, ce(model, x, y) >= rho
    assert torch.equal(got[start], x[start]) and (taken[start] == 0).all()
    assert reached[taken < 15].all() and len(taken.unique()) > 3 and start.any() and (~start).any()   # every fate occurs
    if rho == 2.5: assert (taken == 15).any() and not reached.all()                                    # the cap is reached without rho


def test_by_hand():
    "One pixel, logits +-m, m = 4 (x - 1/2): the loss is log(1 + e^-2m), so log 2 at the boundary; steps and stages of 0.02."
    class Pixel(nn.Module):
        def forward(self, x): m = 4 * (x.flatten(1)[:, 0].double() - 0.5); return torch.stack([-m, m], 1)
    x, y = torch.tensor([0.45, 0.5, 0.53, 0.555, 0.7]).view(-1, 1, 1, 1).double(), torch.ones(5, dtype=torch.long)
    run = lambda rho, **changes: (x - replace(StrengthAdaptivePGD(0.02, 0, start=CleanStart(), rho=rho, stages=(0.02, 0.04, 0.06)), **changes)(Pixel(), x, y, 1.)).flatten().tolist()
    assert run(math.log(2)) == pytest.approx([0, 0, 0.04, 0.06, 0.06], abs=1e-7)           # the first stage that crosses, or the cap
    assert run(math.log(1 + math.exp(0.2))) == pytest.approx([0, 0.04, 0.06, 0.06, 0.06], abs=1e-7)   # rho where m = -0.1, that is x = 0.475: 0.46 is the first beyond
    assert run(5.) == pytest.approx([0.06] * 5, abs=1e-7) and run(0.) == [0.] * 5
    assert run(math.log(2), stages=(0.05,), K=2) == pytest.approx([0, 0, 0.04, 0.04, 0.04], abs=1e-7)  # K steps are all a stage has
    assert run(math.log(2), stages=(0.03,)) == pytest.approx([0, 0, 0.03, 0.03, 0.03], abs=1e-7)       # projected onto the stage


def test_an_example_with_exactly_rho_is_left_alone():
    model, x, y = wavy(10, seed=1)
    loss = ce(model, x, y)
    for i in range(10):
        x_adv = StrengthAdaptivePGD(0.02, 0, start=CleanStart(), rho=float(loss[i]), stages=(0.02, 0.04))(model, x, y, 0.1)
        has = loss >= loss[i]
        assert torch.equal(x_adv[has], x[has]) and has[i] and not any(torch.equal(x_adv[j], x[j]) for j in range(10) if not has[j])


# Limits, bit for bit, with batch norm in eval mode

@pytest.mark.parametrize("make", [saat, saat_down])
@pytest.mark.parametrize("rho", [0., -1.])
def test_without_a_least_loss_saat_and_saat_down_are_natural_training(make, rho):
    model, x, y = bn_net()
    before = buffers(model)
    assert torch.equal(attacked(make(BIG, rho=rho, **({"eps_max": 10} if make is saat else {})), model, x, y, noise(12), mode="eval"), x) and same(before, buffers(model))


@pytest.mark.parametrize("make, baseline", [(saat_up, rice_at), (satrades_up, rice_trades)])
@pytest.mark.parametrize("rho", [0., -1.])
def test_without_a_least_loss_the_extended_methods_are_their_baselines(make, baseline, rho):
    model, x, y = bn_net()
    for eps_max in (9, 14):
        ours, theirs = (attacked(m, model, x, y, noise(12), mode="eval") for m in (make(BIG, eps_max, rho), baseline(BIG)))
        assert torch.equal(ours, theirs) and not torch.equal(ours, x)


@pytest.mark.parametrize("make, baseline", [(saat_up, rice_at), (satrades_up, rice_trades)])
def test_with_no_room_to_extend_they_are_their_baselines_in_any_mode(make, baseline):
    for mode in ("eval", "train"):
        model, x, y = bn_net(mode)
        twin = copy.deepcopy(model)
        assert torch.equal(attacked(make(BIG, 8.), model, x, y, noise(12)), attacked(baseline(BIG), twin, x, y, noise(12)))
        assert same(buffers(model), buffers(twin))


@pytest.mark.parametrize("eps_max", [8, 10, 11])
def test_with_an_infinite_least_loss_saat_is_the_staged_attack(eps_max):
    model, x, y = bn_net()
    x_adv, eps, alpha = x, 0, BIG / 4
    while eps < eps_max:
        eps = min(eps + 2, eps_max)
        ball = per_example(eps * BIG / 8, x)
        for _ in range(3): x_adv = project(x_adv + alpha * slope(CrossEntropy(), model, x_adv, y).sign(), x, ball)
    got = attacked(saat(BIG, eps_max, math.inf), model, x, y, noise(12), mode="eval")
    assert torch.equal(got, x_adv) and torch.equal(got, attacked(saat(BIG, eps_max, 1e9), model, x, y, noise(12), mode="eval"))
    assert not torch.equal(got, attacked(rice_at(BIG), model, x, y, noise(12), mode="eval"))   # the paper's "standard AT" is not PGD-10


def test_with_no_cap_saat_has_no_attack():
    model, x, y = bn_net()
    assert torch.equal(attacked(saat(BIG, 0.), model, x, y, noise(12)), x)


# SAAT_up as released

def released(model, x, y, rho, eps, tau, eps_max, K, alpha, start, early=True):
    "The released procedure in perturbations: PGD-10, then stages for those under rho, looked at before each stage and after each step by a pass of their own. Gives how often one that had rho fell under it again, too."
    d, falls = start - x, 0
    def step(d, radius): return torch.min(torch.max((d + alpha * slope(CrossEntropy(), model, x + d, y).sign()).clamp(-radius, radius), -x), 1 - x)
    for _ in range(10): d = step(d, eps)
    e = eps
    while e < eps_max - 1e-9:
        under = ce(model, x + d, y) < rho
        if early and not under.any(): break
        e = e + tau
        for _ in range(K):
            moved = step(d, min(e, eps_max))
            d[under] = moved[under]
            now = ce(model, x + d, y) < rho
            falls, under = falls + int((now & ~under).sum()), now
            if early and not under.any(): break
    return x + d, falls


class Crowd(nn.Module):
    "A curved model with batch norm, in float64: in train mode an example's logits depend on the others."
    def __init__(self, model):
        super().__init__()
        self.inner, self.bn = model, nn.BatchNorm1d(3).double()
    def forward(self, x): return 3 * self.bn(self.inner(x))


@pytest.mark.parametrize("rho", [0.5, 1.7, 3., 6.])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_saat_up_equals_the_released_loop(mode, rho):
    inner, x, y = wavy(24, seed=2)
    model = Crowd(inner)
    x = x.double()
    for _ in range(20): model.train()(x)
    ours, theirs, early = (copy.deepcopy(model).train(mode == "train") for _ in range(3))
    method = saat_up(BIG, 14, rho)
    assert method.attack.mode == "train"
    got = attacked(method, ours, x, y, noise(24), mode=mode)
    start = UniformStart()(x, per_example(BIG, x), noise(24))
    unit = BIG / 8
    want, falls = released(theirs, x, y, rho, BIG, 2 * unit, 14 * unit, 3, 2 * unit, start, early=False)
    assert torch.allclose(got, want, rtol=0, atol=1e-6)
    assert torch.allclose(released(early, x, y, rho, BIG, 2 * unit, 14 * unit, 3, 2 * unit, start)[0], want)   # stopping early changes no image
    if mode == "train":   # every gradient moves the buffers, and nothing else does
        assert same(buffers(ours), buffers(seen_by(model, x, y, rho, start, unit)))
        if rho == 3.: assert falls > 0   # one that had rho is taken up again
    else: assert falls == 0 and same(buffers(ours), buffers(model))


def seen_by(model, x, y, rho, start, unit):
    "A copy of the model that has seen, in train mode, what SAAT_up takes gradients at: a stage is begun while one example is under rho, and there its first gradient tells."
    model, x_adv = copy.deepcopy(model).train(), start
    def moved(radius): return project(x_adv + 2 * unit * slope(CrossEntropy(), model, x_adv, y).sign(), x, per_example(radius * unit, x))
    for _ in range(10): x_adv = moved(8)
    for radius in (10, 12, 14):
        for k in range(3):
            weak = ce(copy.deepcopy(model), x_adv, y) < rho
            stepped = moved(radius)
            if k == 0 and not weak.any(): return model
            x_adv = torch.where(weak.view(-1, 1, 1, 1), stepped, x_adv)
    return model


@pytest.mark.parametrize("make, first", [(saat_up, 10), (saat_down, 0), (satrades_up, 10)])
def test_no_stage_is_begun_when_all_have_rho(make, first):
    model, x, y = wavy(6, seed=2)
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    most = {saat_up: 9, saat_down: 12, satrades_up: 3}[make]
    for rho, looks in ((1e9, most), (-1., 1)):   # the one: the first stage's first gradient, which tells
        seen.clear()
        attacked(make(BIG, rho=rho), model, x, y, noise(6), mode="eval")
        assert len(seen) == first + looks + (make is satrades_up)   # KL's clean prediction


@pytest.mark.parametrize("make, baseline", [(saat_up, rice_at), (satrades_up, rice_trades)])
def test_only_examples_under_rho_leave_the_baseline_s_adversary(make, baseline):
    model, x, y = wavy(60, seed=4)
    rho = 1.2
    before, after = (attacked(m, model, x, y, noise(60), mode="eval") for m in (baseline(BIG), make(BIG, 14, rho)))
    has = ce(model, before, y) >= rho
    assert torch.equal(after[has], before[has]) and has.any() and (~has).any()
    moved = ((after - x).abs().flatten(1).amax(1) - BIG)[~has]
    assert (moved > 1e-4).all() and (moved <= 6 * BIG / 8 + 1e-6).all()
    climbed = baseline(BIG).attack.loss
    target = climbed.target(model, x, y)
    assert (climbed(model(after), target)[~has] > climbed(model(before), target)[~has]).all()


def test_satrades_climbs_kl_and_looks_at_cross_entropy():
    model, x, y = wavy(30, seed=5)
    method, rho, unit = satrades_up(BIG, 11, 1.), 1., BIG / 8
    target = model(x).softmax(1).detach()
    x_adv = attacked(rice_trades(BIG), model, x, y, noise(30))
    extended = torch.zeros(30, dtype=torch.bool)
    for stage in (10, 11):
        for _ in range(3):
            weak = ce(model, x_adv, y) < rho
            extended |= weak
            stepped = project(x_adv + 2 * unit * slope(KL(), model, x_adv, target).sign(), x, per_example(stage * unit, x))
            x_adv = torch.where(weak.view(-1, 1, 1, 1), stepped, x_adv)
    assert 0 < extended.sum() < 30
    assert torch.allclose(attacked(method, model, x, y, noise(30)), x_adv, rtol=0, atol=1e-7)


# Properties

attacks = st.builds(lambda alpha, steps, loss, start, mode, rho, full, stages, K: StrengthAdaptivePGD(alpha, steps, loss, start, mode, rho=rho, full=full, stages=tuple(sorted(stages)), K=K),
                    st.floats(1e-3, 1.), st.integers(0, 3), st.sampled_from([CrossEntropy(), KL()]), st.sampled_from([UniformStart(), NormalStart(0.01), CleanStart()]),
                    st.sampled_from(["eval", "train"]), st.floats(-1, 4), st.sampled_from([0., 0.05]), st.lists(st.floats(0.05, 0.5), max_size=3), st.integers(0, 3))
caps = st.lists(st.sampled_from([0., 1e-5, 0.03, 1.]) | st.floats(0, 2, width=32), min_size=1, max_size=6)


@given(attacks, caps, st.integers(0, 50))
@settings(max_examples=100)
def test_the_result_stays_within_its_own_cap_the_last_stage_and_the_box(attack, eps, seed):
    model, x, y = wavy(len(eps), seed=seed)
    x[x < 0.2], x[x > 0.9] = 0., 1.
    before, eps = (x.clone(), y.clone()), torch.tensor(eps)
    x_adv = attack(model, x, y, eps, noise(len(eps), seed))
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and not x_adv.requires_grad
    assert ((x_adv - x).abs().flatten(1).amax(1) <= eps.clamp(max=max((attack.full, *attack.stages))) + 1e-6).all()
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and torch.equal(x_adv[eps == 0], x[eps == 0])
    assert torch.equal(x, before[0]) and torch.equal(y, before[1]) and all(p.grad is None for p in model.parameters())


@given(attacks, caps, st.integers(0, 50), st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_permuting_the_batch_permutes_the_result(attack, eps, seed, random):
    attack, n = replace(attack, mode="eval"), len(eps)
    model, x, y = wavy(n, seed=seed)
    order, stream, eps = torch.tensor(random.sample(range(n), n)), noise(n, seed), torch.tensor(eps)
    assert torch.equal(attack(model, x[order], y[order], eps[order], stream[order]), attack(model, x, y, eps, stream)[order])


@given(st.integers(0, 30), st.floats(0.2, 3.))
@settings(max_examples=25)
def test_more_rho_never_goes_less_far(seed, more):
    model, x, y = wavy(10, seed=seed)
    far = [(StrengthAdaptivePGD(0.02, 0, start=CleanStart(), rho=rho, stages=radii(0, 0.1, 0.02))(model, x, y, 1.) - x).abs().flatten(1).amax(1) for rho in (0.2, 0.2 + more)]
    assert (far[0] <= far[1] + 1e-7).all()


def test_the_mode_comes_back_and_weights_get_no_gradient():
    for before, mode in itertools.product((True, False), ("eval", "train")):
        model, x, y = bn_net()
        model.train(before)
        was = buffers(model)
        attacked(saat_down(BIG), model, x, y, noise(12), mode=mode)
        assert model.training is before and all(m.training is before for m in model.modules()) and all(p.grad is None for p in model.parameters())
        # in train mode two stages, and the gradient that says that the third is not needed
        tracked = {int(v) - 20 for k, v in model.named_buffers() if k.endswith("num_batches_tracked")}
        assert tracked == ({0} if mode == "eval" else {2 * 3 + 1}) and same(was, buffers(model)) is (mode == "eval")


# Published settings

def test_the_baselines_at_saat_s_settings():
    assert rice_at(EPS) == Method(Fixed(EPS), PGD(2/255, 10, CrossEntropy(), UniformStart(), "train", "last"), AdversarialCE())
    assert rice_trades(EPS) == Method(Fixed(EPS), PGD(2/255, 10, KL(), NormalStart(0.001), "eval", "last"), TRADES(6.))


def test_saat_s_methods():
    attack = StrengthAdaptivePGD(2/255, 10, CrossEntropy(), UniformStart(), "train", rho=1.7, full=8/255, stages=(10/255, 12/255, 14/255), K=3)
    assert saat_up(EPS) == Method(Fixed(14/255), attack, AdversarialCE())
    assert saat_up(EPS, 9, 1.7, AT_AWP) == Method(Fixed(9/255), replace(attack, stages=(9/255,)), AdversarialCE(), AT_AWP)
    printed = StrengthAdaptivePGD(2/255, 0, CrossEntropy(), CleanStart(), "train", rho=1.5, full=0., stages=(2/255, 4/255, 6/255, 8/255), K=3)
    assert saat_down(EPS) == Method(Fixed(8/255), printed, AdversarialCE()) == saat(EPS, 8, 1.5)
    assert saat(EPS).radius == Fixed(128/255) and saat(EPS).attack.stages[::63] == (2/255, 128/255)
    assert satrades_up(EPS, 10, 1.7) == Method(Fixed(10/255), replace(attack, loss=KL(), start=NormalStart(0.001), mode="eval", stages=(10/255,)), TRADES(6.))


@pytest.mark.parametrize("make, awp", [(rice_at, AT_AWP), (saat, AT_AWP), (saat_down, AT_AWP), (saat_up, AT_AWP), (rice_trades, TRADES_AWP), (satrades_up, TRADES_AWP)])
def test_awp_s_version_differs_in_the_weights_only(make, awp):
    assert replace(make(EPS, weights=awp), weights=None) == make(EPS) and make(EPS, weights=awp).weights == awp
    assert spec_hash(make(EPS, weights=awp)) != spec_hash(make(EPS))


@pytest.mark.parametrize("make", [rice_at, rice_trades, saat, saat_down, saat_up, satrades_up])
@pytest.mark.parametrize("eps", [0.25, 0.031])
def test_what_carries_the_unit_of_eps_keeps_its_ratio(make, eps):
    def scaled(value, by):
        if isinstance(value, dict): return {k: [v * by for v in item] if k == "stages" else item * by if k in ("eps", "alpha", "sigma", "full") else scaled(item, by) for k, item in value.items()}
        return value
    there, here = scaled(to_spec(make(EPS)), 1 / EPS), scaled(to_spec(make(eps)), 1 / eps)
    for part in ("radius", "objective", "weights"): assert here[part] == pytest.approx(there[part])
    assert here["attack"].pop("start") == pytest.approx(there["attack"].pop("start"))
    assert here["attack"].pop("loss") == there["attack"].pop("loss")
    if "stages" in here["attack"]: assert here["attack"].pop("stages") == pytest.approx(there["attack"].pop("stages"))
    assert here["attack"] == pytest.approx(there["attack"])


def test_rows_of_table_1_are_different_runs():
    rows = [rice_at(EPS), saat_down(EPS), *(saat_up(EPS, e, 1.5) for e in range(9, 21)), *(saat_up(EPS, 14, r) for r in (1.3, 1.4, 1.6, 1.7, 1.8, 1.9, 2.0))]
    rows += [replace(r, weights=AT_AWP) for r in rows]
    assert len({spec_hash(r) for r in rows}) == len(rows) and spec_hash(saat_up(EPS, 14, 1.5)) == spec_hash(saat_up(EPS, 14., 1.5))


def test_cost():
    assert saat_up(EPS).attack.passes == 10 + 9 and saat_down(EPS).attack.passes == 12 and saat(EPS).attack.passes == 192


def test_rho_in_units_of_a_guess():
    assert for_classes(1.7, 10) == 1.7 and for_classes(1.7, 100) == pytest.approx(3.4) and for_classes(math.log(10), 7) == pytest.approx(math.log(7))


@pytest.mark.parametrize("epoch, lr", [(1, 0.1), (100, 0.1), (101, 0.01), (150, 0.01), (151, 0.001), (200, 0.001)])
def test_the_schedule(epoch, lr):
    assert replace(SAAT_TRAINING, schedule=None) == Training(epochs=200, batch=128, lr=0.1, momentum=0.9, weight_decay=5e-4, schedule=None)
    assert SAAT_AUGMENT == Augment(crop=4, pad="reflect", flip=True)
    for inside in (0, 0.999): assert SAAT_TRAINING.lr_at(epoch - 1 + inside) == pytest.approx(lr)
    for epochs in (2, 8, 20, 30, 40, 100): assert sum(replace(SAAT_TRAINING, epochs=epochs).lr_at(e) > 0.09 for e in range(epochs)) == epochs // 2


@pytest.mark.parametrize("make, values", [(rice_at, {}), (rice_trades, {}), (saat, {"eps_max": 10., "rho": 6.}), (saat_down, {"rho": 6.}), (saat_up, {"rho": 6.}), (satrades_up, {"rho": 6.})])
def test_a_step_of_each_trains_and_logs_how_far_its_adversaries_went(make, values):
    model, x, y = bn_net("train")
    method = make(BIG, weights=AT_AWP, **values)
    bank = method.radius.bank(RuleContext(12, 4, model.width))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    was = model.classifier.weight.detach().clone()
    loss = train_step(method, model, bank, optimiser, Batch(x, y, torch.arange(12)), noise(12))
    assert torch.isfinite(loss) and not torch.equal(model.classifier.weight, was)
    assert torch.equal(bank.used, torch.full((12,), method.radius.eps)) and (bank.realised <= method.radius.eps + 1e-6).all()
    if make in (saat, saat_down): assert len(bank.realised.round(decimals=4).unique()) >= 4 and (bank.realised == 0).any()
    if make is saat_up: assert (bank.realised > BIG * 1.01).any() and ((bank.realised - BIG).abs() < 1e-6).any()
