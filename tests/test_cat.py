"CAT: its radius rule on scripted outcomes, labels and losses against the equations, the order of labels and growth in a step, and its ablations."
import math
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch import nn

from adaptive_at.attacks import PGD, CleanStart, CrossEntropy
from adaptive_at.algorithms.cat import CAT, CATAttack, CAT_VGG16, CAT_WRN34, Label, MixedCE, MixedCEv0, MixedLoss, SmoothedCE, SmoothedCrossEntropy, adp_adv, adv_ls, cat, cat_v0, cat_v2, dirichlet, margin
from adaptive_at.data.datasets import Batch
from adaptive_at.algorithms.baselines import trades
from adaptive_at.objectives import AdversarialCE
from adaptive_at.radius import Fixed, RuleContext
from adaptive_at.training import train_step
from helpers import labels, narrow, noise, numbers, same, wavy

pytestmark = pytest.mark.trains

CAP, ETA = 8/255, 0.005


def tensor(*values): return torch.tensor(values)


class Steps(nn.Module):
    "Logits of two classes from the first pixel; class 1 above 0.5."
    def forward(self, x): m = x.flatten(1)[:, 0] - 0.5; return torch.stack([-m, m], 1)


def scripted(rule, outcomes, n=1):
    "Radii after each visit of one example whose attack succeeds or fails as told, always using its whole radius."
    bank, path = rule.bank(RuleContext(n, 2, 1)), []
    for success in outcomes:
        batch = Batch(torch.full((1, 1, 1, 1), 0.5), tensor(1), tensor(0))
        eps = rule.radius(bank, batch, Steps())
        tried = bank.eps[batch.index] + rule.eta if rule.grown_by == "attack" else eps
        x_adv = batch.x + (-tried if success else tried.clamp(min=1e-6)).view(-1, 1, 1, 1)
        rule.after_attack(bank, batch, x_adv, Steps(), eps)
        path.append(bank.eps[0].item())
    return path


# The radius

F_, T = False, True


@pytest.mark.parametrize("grown_by", ["rule", "attack"])
@pytest.mark.parametrize("outcome, expected", [
    ("reset", [.005, .01, .0, .005, .0]),
    ("minus_eta", [.005, .01, .01, .015, .015]),
    ("v0", [.005, .01, .0, .005, .0]),
    ("v2", [.0, .0, .005, .005, .01])])
def test_outcomes_on_a_scripted_sequence(outcome, expected, grown_by):
    assert scripted(CAT(CAP, ETA, outcome, grown_by), [F_, F_, T, F_, T]) == pytest.approx(expected, abs=1e-7)


def test_the_cap_is_reached_in_seven_visits_and_holds():
    path = scripted(CAT(CAP, ETA), [F_] * 9)
    assert path == pytest.approx([.005, .01, .015, .02, .025, .03, CAP, CAP, CAP], abs=1e-7)
    assert scripted(CAT(CAP, ETA, "minus_eta"), [F_] * 8 + [T])[-1] == pytest.approx(CAP)      # a success at the cap takes nothing off
    assert scripted(CAT(CAP, 0.0025, "v2"), [T] * 20)[-1] == pytest.approx(CAP)


def test_v0_takes_over_what_the_attack_used():
    new = CAT(CAP, ETA, "v0").moved(tensor(.01, .01), tensor(.015, .015), tensor(.012, .012), torch.tensor([False, True]))
    assert torch.equal(new, tensor(.012, 0.))


@pytest.mark.parametrize("capped, attacked", [("before", CAP), ("after", CAP + ETA)])
def test_capped_after_lets_the_attack_go_eta_further(capped, attacked):
    rule = CAT(CAP, ETA, capped=capped)
    bank, batch = rule.bank(RuleContext(1, 2, 1)), Batch(torch.full((1, 1, 1, 1), 0.9), tensor(1), tensor(0))
    bank.eps[0] = CAP
    eps = rule.radius(bank, batch, Steps())
    assert eps.item() == pytest.approx(attacked)
    assert rule.after_attack(bank, batch, batch.x, Steps(), eps).item() == pytest.approx(CAP)
    assert bank.used[0].item() == pytest.approx(attacked)


def test_success_is_read_in_eval_mode_and_moves_no_buffer():
    net, rule = narrow(), CAT(0.1, 0.02)
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    bank, x, y = rule.bank(RuleContext(20, 10, net.width)), numbers(20, 1, 8, 8), labels(20, 10)
    batch = Batch(x, y, torch.arange(20))
    new = rule.after_attack(bank, batch, x, net, rule.radius(bank, batch, net))
    assert net.training and same(before, net.state_dict())
    net.eval()
    assert torch.equal(new == 0, net(x).argmax(1) != y)


def test_only_the_visited_move():
    rule = CAT(CAP, ETA)
    bank = rule.bank(RuleContext(5, 2, 1))
    batch = Batch(torch.full((2, 1, 1, 1), 0.9), tensor(1, 0), tensor(3, 1))
    rule.after_attack(bank, batch, batch.x, Steps(), rule.radius(bank, batch, Steps()))
    assert torch.equal(bank.eps, tensor(0., 0., 0., ETA, 0.))


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.sampled_from(["reset", "minus_eta", "v0", "v2"]), st.floats(1e-4, 0.05))
def test_a_radius_stays_between_0_and_the_cap(outcomes, outcome, eta):
    path = tensor(*scripted(CAT(CAP, eta, outcome), outcomes))
    assert path.min() >= -1e-9 and path.max() <= tensor(CAP)


# Labels

def label(n=6, K=4, seed=0, c=10., eps=None, **changes):
    eps = torch.linspace(0, CAP, n) if eps is None else eps
    return Label(labels(n, K, seed), c * eps, eps, noise(n, seed), **changes)


def test_the_label_is_eq_4():
    l = label()
    d, soft = dirichlet(l.noise, 4), l.soft(torch.zeros(6, 4))
    for i in range(6):
        for k in range(4):
            w = 10 * CAP * i / 5
            assert soft[i, k].item() == pytest.approx((1 - w) * (l.y[i].item() == k) + w * d[i, k].item(), abs=1e-6)
    assert torch.allclose(soft.sum(1), torch.ones(6)) and torch.equal(soft[0], F.one_hot(l.y[0], 4).float())


def test_v0_divides_the_dirichlet_part():
    soft = label(divided=True).soft(torch.zeros(6, 4))
    w = 10 * torch.linspace(0, CAP, 6)
    assert torch.allclose(soft.sum(1), 1 - w + w / 4)


def test_dirichlet_has_the_marginals_of_the_flat_one():
    from scipy import stats
    d = dirichlet(noise(4000), 5).double()
    assert torch.allclose(d.sum(1), torch.ones(4000).double(), atol=1e-6) and d.min() > 0
    for k in range(5): assert stats.kstest(d[:, k].numpy(), stats.beta(1, 4).cdf).pvalue > 1e-3
    assert torch.corrcoef(d.T)[0, 1].item() == pytest.approx(-1/4, abs=0.06)


def test_a_draw_belongs_to_the_example_and_the_moment():
    objective, y, eps = SmoothedCE(), labels(6, 4), torch.full((6,), 0.03)
    def soft(index, moment, seed=0):
        i = torch.tensor(index)
        batch = Batch(torch.zeros(len(i), 1, 1, 1), y[i], i, noise(6, seed)[i])
        return objective.label(batch, eps[i], moment).soft(torch.zeros(len(i), 4))
    everyone = soft(range(6), "attack")
    assert torch.equal(soft([4, 1], "attack"), everyone[[4, 1]])
    assert not torch.allclose(soft(range(6), "update"), everyone) and not torch.allclose(soft(range(6), "attack", seed=1), everyone)


# Losses

Z = tensor([1., -2., 0.5], [0., 14., 3.], [20., 1., 0.])
Y = tensor(0, 0, 0)   # margins: 0.5 - 1 = -0.5; 14 - 0 = 14; 1 - 20 = -19
PLAIN = Label(Y, torch.zeros(3), tensor(0.01, 0.02, 0.03), noise(3))


def test_the_margin():
    assert torch.allclose(margin(Z, Y), tensor(-.5, 14., -19.))
    assert torch.allclose(margin(Z, tensor(1, 1, 1)), tensor(3., -11., 19.))


def test_the_hinge_is_clipped_above_in_the_attack_and_below_in_the_update():
    ce = F.cross_entropy(Z, Y, reduction="none")
    assert torch.allclose(MixedLoss(10.)(Z, PLAIN) - ce, tensor(-.5, 10., -19.), atol=1e-5)    # min(m, kappa)
    assert torch.allclose(MixedCE(kappa=10.).each(Z, PLAIN) - ce, tensor(-.5, 14., -10.), atol=1e-5)  # max(m, -kappa): eq. 6


def test_the_attack_pushes_the_confidently_right_and_the_update_the_confidently_wrong():
    def hinge_gradient(loss):
        z = Z.clone().requires_grad_()
        (loss(z, PLAIN) - SmoothedCrossEntropy()(z, PLAIN)).sum().backward()
        return z.grad.abs().sum(1) > 1e-4
    assert hinge_gradient(MixedLoss(10.)).tolist() == [True, False, True]
    assert hinge_gradient(MixedCE(kappa=10.).each).tolist() == [True, True, False]


def test_the_losses_against_the_equations():
    l = label(n=3, K=3)
    soft, p = l.soft(Z), Z.softmax(1)
    ce = -(soft * p.log()).sum(1)
    batch = Batch(Z.view(3, 1, 1, 3), l.y, torch.arange(3), l.noise)
    class Flat(nn.Module):
        def forward(self, x): return x.flatten(1)
    for objective in (SmoothedCE(), MixedCE(kappa=2.), MixedCE(kappa=2., per_eps=1.)):
        loss, = objective.losses(batch, batch.x, None, l.radius)
        soft = objective.label(batch, l.radius, "update").soft(Z)
        ce = torch.stack([-sum(soft[i, k] * math.log(p[i, k]) for k in range(3)) for i in range(3)])
        m = [max(Z[i, k].item() for k in range(3) if k != l.y[i]) - Z[i, l.y[i]].item() for i in range(3)]
        hinge = tensor(*(max(v, -2.) for v in m))
        extra = 0 if type(objective) is SmoothedCE else hinge.mean() if objective.per_eps is None else (l.radius * hinge).sum()
        assert loss(Flat()).item() == pytest.approx((ce.mean() + extra).item(), rel=1e-5)


def test_the_weighted_attack_has_the_gradient_of_the_codes_loss():
    "CE averaged over the batch plus the sum of eps_i times the hinge (attacker/pgd.py), up to the factor B."
    z = Z.clone().requires_grad_()
    l = replace(label(n=3, K=3, eps=tensor(.01, .02, .03)), y=Y, per_eps=1.)
    ours, = torch.autograd.grad(MixedLoss(10.)(z, l).sum(), z)
    theirs = -(l.soft(z) * z.log_softmax(1)).sum() / 3 + (tensor(.01, .02, .03) * margin(z, Y).clamp(max=10)).sum()
    assert torch.allclose(ours / 3, torch.autograd.grad(theirs, z)[0], atol=1e-6)


def test_one_hot_labels_give_the_gradients_of_ordinary_cross_entropy_bit_for_bit():
    z = [(8 * numbers(37, 10) - 4).requires_grad_() for _ in "12"]
    F.cross_entropy(z[0], labels(37, 10)).backward()
    SmoothedCE(0.).each(z[1], label(37, 10, c=0.)).mean().backward()
    assert torch.equal(z[0].grad, z[1].grad)


# The step: which eps labels what

class Noted:
    "Keeps what the attack is told and what it gives."
    def __call__(self, model, x, label, eps, noise=None):
        x_adv = super().__call__(model, x, label, eps, noise)
        self.seen.append((label.weight.clone(), x_adv))
        return x_adv


@dataclass(frozen=True)
class SpyAttack(Noted, CATAttack): seen: list = field(default_factory=list, compare=False)


@dataclass(frozen=True)
class SpyPGD(Noted, PGD): seen: list = field(default_factory=list, compare=False)


@dataclass(frozen=True)
class SpyCE(SmoothedCE):
    seen: list = field(default_factory=list, compare=False)
    def each(self, logits, label):
        self.seen.append(label)
        return super().each(logits, label)


def spied(method):
    spy = SpyAttack if isinstance(method.attack, CATAttack) else SpyPGD
    return replace(method, attack=spy(**vars(method.attack)), objective=SpyCE(method.objective.c))


class Frozen(nn.Module):
    "Class 1 above 0.5, with a parameter that trains nothing."
    def __init__(self): super().__init__(); self.width, self.bias = 1, nn.Parameter(torch.zeros(()))
    def forward(self, x): m = 20 * (x.flatten(1)[:, 0] - 0.5); return torch.stack([-m, m], 1) + 0 * self.bias


@pytest.mark.parametrize("when", ["before", "after"])
def test_which_radius_labels_the_attack_and_the_update(when):
    "Four examples at 0, on the way, just below the cap and at it; the second one is fooled."
    method, model = spied(cat(CAP, mixed=False, label=when)), Frozen()
    bank = method.radius.bank(RuleContext(4, 2, 1))
    bank.eps[:] = old = tensor(0., .01, .03, CAP)
    x = tensor(.9, .51, .9, .9).view(4, 1, 1, 1)
    tried, new = tensor(.005, .015, CAP, CAP), tensor(.005, 0., CAP, CAP)
    train_step(method, model, bank, torch.optim.SGD(model.parameters(), lr=0.1), Batch(x, torch.ones(4, dtype=torch.long), torch.arange(4)), noise(4))
    (attack_weight, x_adv), = method.attack.seen
    update, = method.objective.seen
    assert torch.allclose(attack_weight, 10 * (old if when == "before" else tried))
    assert torch.allclose((x - x_adv).flatten().abs(), tried) and torch.allclose(bank.used, tried)
    assert torch.allclose(update.weight, 10 * new) and torch.allclose(bank.eps, new)
    assert update.soft(torch.zeros(4, 2))[1].tolist() == [0., 1.]     # the reset example: one-hot, on the adversary that succeeded


def test_the_hinge_in_the_attack_is_weighted_with_the_attacks_own_radius():
    seen = []
    @dataclass(frozen=True)
    class Spy(MixedLoss):
        def __call__(self, logits, label): seen.append(label.radius); return super().__call__(logits, label)
    objective = MixedCE(per_eps=1.)
    batch = Batch(torch.full((3, 1, 1, 1), 0.9), tensor(1, 1, 1), torch.arange(3), noise(3))
    eps = tensor(0., .02, .03)
    CATAttack(0.007, 2, Spy(), CleanStart(), eta=ETA, cap=CAP)(Steps(), batch.x, objective.target(batch, eps), eps)
    assert torch.allclose(seen[0], tensor(.005, .025, CAP))


def test_v0_trains_on_the_clean_image_where_it_was_reset():
    x, x_adv, y = numbers(4, 1, 2, 2), numbers(4, 1, 2, 2, seed=1), labels(4, 3)
    seen = []
    class Record(nn.Module):
        def forward(self, x): seen.append(x); return torch.zeros(len(x), 3)
    batch, eps = Batch(x, y, torch.arange(4), noise(4)), tensor(0., .01, 0., .03)
    for objective, first in ((MixedCEv0(), x), (MixedCE(), x_adv)):
        next(objective.losses(batch, x_adv, None, eps))(Record())
        assert torch.equal(seen[-1], torch.stack([first[0], x_adv[1], first[2], x_adv[3]]))


# The ablation

def trained(method, steps=12, n=24):
    "Weights and bank after some steps on images that are easy, middling and hard."
    net = narrow(classes=3, seed=1)
    opt, bank = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), method.radius.bank(RuleContext(n, 3, net.width))
    x, y = numbers(n, 1, 8, 8) * 0.5, labels(n, 3)
    x[torch.arange(n), 0, 2 * y] += 0.4
    paths = []
    net.train()
    for t in range(steps):
        index = torch.arange(n).roll(5 * t)[:16]
        train_step(method, net, bank, opt, Batch(x[index], y[index], index), noise(n, seed=t)[index])
        paths.append(bank.eps.clone())
    return net.state_dict(), bank.state_dict(), torch.stack(paths)


@pytest.mark.parametrize("outcome", ["reset", "minus_eta", "v0", "v2"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_without_labels_and_hinge_it_is_adp_adv_bit_for_bit(outcome, when):
    eps = 0.03
    (a, bank_a, path), (b, bank_b, _) = trained(cat(eps, mixed=False, c=0., outcome=outcome, label=when), 20), trained(adp_adv(eps, outcome), 20)
    assert same(a, b) and same(bank_a, bank_b)
    if outcome == "reset":    # something happened: growth to the cap, resets
        assert path.max() == tensor(eps) and ((path[1:] == 0) & (path[:-1] > 0)).any()


def test_each_of_the_two_ideas_changes_the_weights():
    base, eps = trained(adp_adv(0.06))[0], 0.06
    for other in (cat(eps, mixed=False), cat(eps, c=0.)): assert not same(base, trained(other)[0])


def test_the_mean_over_the_batch_and_the_weighted_sum_differ():
    assert not same(trained(cat(0.06))[0], trained(cat(0.06, hinge="eps"))[0])


def test_the_ablations_take_one_idea_each():
    ls, adp, full = adv_ls(CAP), adp_adv(CAP), cat(CAP)
    assert ls.radius == Fixed(CAP) and ls.objective == SmoothedCE(10.) and type(ls.attack) is PGD
    assert adp.objective == AdversarialCE() and adp.radius == CAT(CAP, ETA) and adp.attack == PGD(0.007, 10, CrossEntropy(), CleanStart())
    assert {m.attack.alpha for m in (ls, adp, full)} == {0.007} and {m.attack.start for m in (ls, adp, full)} == {CleanStart()}
    trained(ls, steps=2)


# Constants

def test_published_constants_at_8_255():
    m = cat(8/255)
    assert m.radius == CAT(8/255, 0.005, "reset", "attack") and m.objective == MixedCE(10., 10., None)
    assert m.attack == CATAttack(0.007, 10, MixedLoss(10.), CleanStart(), "eval", eta=0.005, cap=8/255)
    v0, v2 = cat_v0(8/255), cat_v2(8/255)
    assert v0.radius == CAT(0.03, 0.0025, "v0", "attack") and v0.objective == MixedCEv0(10., 50., 1.)
    assert (v0.attack.alpha, v0.attack.eta, v0.attack.cap, v0.attack.loss) == (0.002, 0.0025, 0.03, MixedLoss(50.))
    assert v2.radius == CAT(0.035, 0.0025, "v2", "rule") and v2.objective == MixedCE(10., 10., 1.) and v2.attack == PGD(0.007, 10, MixedLoss(10.), CleanStart())


@pytest.mark.parametrize("eps", [0.031, 0.25, 0.3])
def test_constants_keep_their_ratios(eps):
    a, b = cat(8/255, hinge="eps"), cat(eps, hinge="eps")
    ratio = lambda m: (m.radius.eta / m.radius.eps, m.attack.alpha / m.radius.eps, m.objective.c * m.radius.eps, m.objective.per_eps * m.radius.eps, m.attack.cap / m.radius.eps, m.objective.kappa)
    assert ratio(a) == pytest.approx(ratio(b)) and ratio(b)[2] == pytest.approx(0.314, abs=1e-3)
    assert b.radius.eps == eps


def test_training():
    assert (CAT_WRN34.epochs, CAT_WRN34.batch, CAT_WRN34.lr, CAT_WRN34.momentum, CAT_WRN34.weight_decay) == (200, 128, 0.1, 0.9, 5e-4)
    assert replace(CAT_VGG16, lr=0.1) == CAT_WRN34 and CAT_VGG16.lr == 0.01
    phases = [CAT_VGG16.lr_at(e) for e in range(200)]
    assert [phases.count(v) for v in sorted(set(phases), reverse=True)] == [80, 60, 40, 20]


# Properties

@given(st.integers(0, 5), st.lists(st.floats(0, 0.3), min_size=5, max_size=5), st.floats(0, 0.2), st.floats(0.01, 0.3))
def test_the_attack_stays_in_its_ball_and_in_range(seed, eps, eta, cap):
    model, x, y = wavy(5, seed=seed)
    eps = tensor(*eps)
    l = Label(y, 0.3 * eps, eps, noise(5, seed), 1.)
    x_adv = CATAttack(0.05, 4, MixedLoss(2.), CleanStart(), eta=eta, cap=cap)(model, x, l, eps)
    assert ((x_adv - x).abs().flatten(1).amax(1) <= (eps + eta).clamp(max=cap) + 1e-6).all() and x_adv.min() >= 0 and x_adv.max() <= 1


def test_every_variant_can_be_hashed_and_each_is_another():
    from adaptive_at.base.identity import spec_hash
    variants = [cat(CAP), cat(CAP, capped="after"), cat(CAP, label="after"), cat(CAP, hinge="eps"), cat(CAP, mixed=False), cat(CAP, outcome="minus_eta"), cat_v0(CAP), cat_v2(CAP), adv_ls(CAP), adp_adv(CAP)]
    assert len({spec_hash(m) for m in variants}) == len(variants)
    for m in variants: trained(m, steps=1)


def test_no_radius_no_change():
    model, x, y = wavy(5)
    assert torch.equal(CATAttack(0.05, 4, MixedLoss(), CleanStart(), eta=0.)(model, x, Label(y, torch.zeros(5), torch.zeros(5), noise(5)), 0.), x)


@given(st.permutations(range(6)))
def test_an_example_is_attacked_alike_wherever_it_stands(order):
    model, x, y = wavy(6)
    eps, order = torch.linspace(0, .2, 6), torch.tensor(order)
    attack = CATAttack(0.05, 4, MixedLoss(2.), CleanStart(), eta=0.02)
    whole = attack(model, x, Label(y, 0.3 * eps, eps, noise(6)), eps)
    moved = attack(model, x[order], Label(y[order], 0.3 * eps[order], eps[order], noise(6)[order]), eps[order])
    assert torch.allclose(moved, whole[order], atol=1e-6)


def test_as_a_plain_rule_it_keeps_other_attacks_within_eps():
    *_, bank, path = trained(trades(0.06, CAT(0.06, 0.01)))
    assert path.max() <= tensor(0.06) and bank["realised"].max() <= 0.06 + 1e-6 and (bank["realised"] <= bank["used"] + 1e-6).all()
    assert (path > 0).any()
