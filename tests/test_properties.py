"More than 20,000 attacked and remembered examples: none outside its ball or the range, none in another's place, no radius at another index."
import pytest
import torch

from adaptive_at.attacks import FGSM, KL, PGD, CleanStart, FriendlyPGD, Margin, NormalStart, UniformStart
from adaptive_at.algorithms.cat import CAT, CATAttack, Label, MixedLoss
from adaptive_at.data.datasets import Batch
from adaptive_at.deepfool import DeepFool
from adaptive_at.algorithms.iaat import CrossingPGD, IAAT, RandomTargetPGD
from adaptive_at.radius import DAAT, Fixed, LinearDAAT, PiecewiseDAAT, RuleContext
from adaptive_at.algorithms.saat import StrengthAdaptivePGD
from helpers import noise, numbers, wavy

EACH, CAP = 700, 0.25
ATTACKS = {
    "FGSM": FGSM(), "FGSM, random start": FGSM(UniformStart()), "PGD": PGD(0.03, 5), "PGD, any": PGD(0.1, 4, success="any"), "PGD on KL": PGD(0.02, 4, KL(), NormalStart(0.01)),
    "PGD on the margin": PGD(0.05, 4, Margin(), CleanStart()), "PGD, huge step": PGD(1.5, 3), "FAT": FriendlyPGD(0.03, 5, tau=1, omega=0.01), "SAAT": StrengthAdaptivePGD(0.03, 1, rho=1.2, stages=(0.1, 0.2, 0.3)),
    "SAAT on KL": StrengthAdaptivePGD(0.03, 2, KL(), NormalStart(0.01), rho=2., stages=(0.2, 0.4)), "IAAT": CrossingPGD(0.02, 4), "IAAT, random target": RandomTargetPGD(0.02, 4, crossings=1.),
    "CAT": CATAttack(0.05, 4, MixedLoss(2.), CleanStart(), eta=0.02, cap=0.3), "DeepFool": DeepFool(5)}
RULES = {
    "fixed": Fixed(CAP), "DAAT": DAAT(CAP, 0.05), "DAAT, enlarged": DAAT(CAP, 0.1, cap=1.25), "DAAT, clipped": DAAT(CAP, 0.05, growth="clipped"), "linear": LinearDAAT(CAP, 0.1), "piecewise": PiecewiseDAAT(CAP, 0.1),
    "IAAT": IAAT(CAP, CrossingPGD(0.05, 3), 0.03, 0.3), "CAT": CAT(CAP, 0.05), "CAT, minus eta": CAT(CAP, 0.05, "minus_eta"), "CAT v0": CAT(CAP, 0.05, "v0", capped="after"), "CAT v2": CAT(CAP, 0.05, "v2")}


def drawn(n, seed):
    "Images with pixels at 0 and 1, and radii from none to larger than the range."
    model, x, y = wavy(n, seed=seed)
    x[x < 0.15], x[x > 0.85] = 0., 1.
    eps = numbers(n, seed=seed + 7)**2
    eps[::9], eps[1::9], eps[2::9] = 0., 1e-7, 1.5
    return model, x, y, eps


@pytest.mark.parametrize("name", ATTACKS)
def test_ball_range_and_order(name):
    attack, n = ATTACKS[name], EACH
    model, x, y, eps = drawn(n, seed=len(name))
    stream, before = noise(n), (x.clone(), y.clone(), eps.clone())
    def attacked(i):
        target = Label(y[i], 0.3 * eps[i].clamp(max=1), eps[i], stream[i]) if name == "CAT" else y[i]
        return attack(model, x[i], target, eps[i], stream[i])
    whole = attacked(torch.arange(n))
    ball = (eps + attack.eta).clamp(max=attack.cap) if name == "CAT" else eps
    assert whole.shape == x.shape and whole.dtype == x.dtype and ((whole - x).abs().flatten(1).amax(1) <= ball + 1e-6).all()
    assert whole.min() >= 0 and whole.max() <= 1 and torch.equal(whole[ball == 0], x[ball == 0])
    assert all(torch.equal(a, b) for a, b in zip(before, (x, y, eps))) and all(p.grad is None for p in model.parameters())
    order = (numbers(n, seed=3)).argsort()
    for part in order.split(97):   # the same adversary in other company and in another place
        assert torch.allclose(attacked(part), whole[part], atol=1e-6)
    assert ((whole - x).abs().flatten(1).amax(1) > 0).float().mean() > 0.3   # there was something to see


def visited(rule, model, x, y, sizes, seeds):
    "A bank after visits to all examples, in batches of these sizes, shuffled with these seeds; and the radii in use."
    n, attack = len(x), PGD(0.05, 3)
    bank, used = rule.bank(RuleContext(n, 3, model.width)), []
    if hasattr(bank, "head"):
        with torch.no_grad(): bank.head.weight.copy_(3 * numbers(3, model.width, seed=5) - 1.5)
        bank.head.double().register_forward_hook(lambda module, args, out: out.float())
        bank.learning_rate(0.)   # the head learns from whole batches; here each example stands for itself
    for size, seed in zip(sizes, seeds):
        used.append(torch.full((n,), torch.nan))
        for i in numbers(n, seed=seed).argsort().split(size):
            batch = Batch(x[i], y[i], i, noise(n)[i])
            eps = rule.radius(bank, batch, model)
            used[-1][i] = eps
            x_adv = attack(model, batch.x, batch.y, eps, batch.noise)
            rule.after_attack(bank, batch, x_adv, model, eps)
            rule.after_step(bank, batch, x_adv, model)
    return bank.eps, used


@pytest.mark.parametrize("name", RULES)
def test_every_radius_is_its_own_example_s_and_within_its_cap(name):
    rule, n = RULES[name], 350
    model, x, y, _ = drawn(n, seed=len(name))
    eps, used = visited(rule, model, x, y, (64, 50, 33), (1, 2, 3))
    cap = CAP * getattr(rule, "cap", 1.) if name != "IAAT" else CAP + 0.1
    assert ((eps >= 0) & (eps <= cap + 1e-6)).all() and all(((u >= 0) & (u <= cap + (0.05 + 1e-6 if "v0" in name else 1e-6))).all() for u in used)   # v0 caps after the attack, as printed
    other, others = visited(rule, model, x, y, (17, 350, 64), (4, 5, 6))       # other batches, another order
    assert torch.allclose(other, eps, atol=1e-5) and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(used, others))
    if name == "fixed": assert len(eps.unique()) == 1
    else: assert len(eps.unique()) > 1, "the radii differ, so that a wrong index would show"
