"DAAT's rules on numbers worked out by hand, its calibration head, and the bank behind them."
import copy, math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from adaptive_at.data import datasets as ds
from adaptive_at.attacks import PGD, NoAttack
from adaptive_at.base.schedules import resolve_schedules
from adaptive_at.data.datasets import Batch
from adaptive_at.algorithms.baselines import Method, Training, at
from adaptive_at.algorithms.daat import daat
from adaptive_at.networks import in_mode
from adaptive_at.objectives import AdversarialCE
from adaptive_at.radius import DAAT, Fixed, LinearDAAT, PiecewiseDAAT, RadiusRule, RuleContext, overstep
from adaptive_at.training import Monitor, Run, State, train, train_step
from fingerprints import METHODS
from helpers import OneLayer, buffers, labels, narrow, noise, numbers, random_data, same

pytestmark = pytest.mark.trains

EPS = 0.031
RULES = [DAAT, LinearDAAT, PiecewiseDAAT]


def tensor(*values): return torch.tensor(values)


def close(a, b, rel=1e-5): return torch.allclose(a, torch.as_tensor(b), rtol=rel, atol=1e-12)


# Equations 12 and 13

# exp(logits / 2) = (1, 4, 2), so that softmax(logits / 2) = (1/7, 4/7, 2/7)
LOGITS = torch.tensor([[0., 2 * math.log(4), 2 * math.log(2)]])
S = tensor(3/7, 0., 2/7)   # for y = 0, 1, 2: 4/7 - 1/7, 4/7 - 4/7, 4/7 - 2/7


def test_overstep_is_eq_13():
    assert close(overstep(LOGITS.expand(3, 3), tensor(0, 1, 2), tau=2.), S)
    # tau = 1: exp(logits) = (1, 16, 4), sum 21
    assert close(overstep(LOGITS.expand(3, 3), tensor(0, 1, 2), tau=1.), tensor(15/21, 0., 12/21))


def test_the_multiplicative_rule_is_eq_12():
    eps = torch.full((3,), EPS)
    # rho = 0.05: rho / s = 0.05 * 7/3 = 7/60; s = 0 is a reset; 0.05 * 7/2 = 0.175
    assert close(DAAT(EPS, 0.05).moved(eps, S), tensor(0.0036166667, 0.031, 0.005425))
    # rho = 0.3: 0.7 and, past the cap, 1.05
    assert close(DAAT(EPS, 0.3).moved(eps, S), tensor(0.0217, 0.031, 0.031))
    # below the cap a radius may grow: 0.7 * 0.02 = 0.014 and 1.05 * 0.02 = 0.021; the reset goes to the cap from anywhere
    assert close(DAAT(EPS, 0.3).moved(torch.full((3,), 0.02), S), tensor(0.014, 0.031, 0.021))


def test_the_radius_has_memory():
    rule, s = DAAT(EPS, 0.05), S[[0]]
    twice = rule.moved(rule.moved(tensor(EPS), s), s)
    assert close(twice, tensor(0.031 * (7/60)**2))


def test_the_enlarged_cap_is_five_quarters_and_the_reset_goes_there():
    rule = DAAT(EPS, 0.3, cap=1.25)
    # 1.25 * 0.031 = 0.03875; 1.05 * 0.031 = 0.03255; 1.05 * 0.0375 = 0.039375, past the cap
    assert close(rule.moved(torch.full((3,), EPS), S), tensor(0.0217, 0.03875, 0.03255))
    assert close(rule.moved(tensor(0.0375), S[[2]]), tensor(0.03875))
    assert rule.bank(RuleContext(4, 3, 5)).eps.tolist() == pytest.approx([EPS] * 4)   # starts from eps, not from the cap


def test_a_radius_of_zero_comes_back():
    for cap in (1., 1.25): assert close(DAAT(EPS, 0.05, cap=cap).moved(tensor(0.), tensor(0.)), tensor(cap * EPS))
    assert 0 < DAAT(EPS, 0.3).moved(tensor(0.), tensor(0.2)) < 2e-6   # the floor of 1e-6, times 1.5


def test_clipped_growth_is_at_most_a_doubling():
    rule = DAAT(EPS, 0.3, growth="clipped")
    # s = 0 counts as factor 2; 0.3 / (1/14) = 4.2 is cut to 2; 0.7 and 1.05 are not
    assert close(rule.moved(torch.full((4,), 0.002), tensor(0., 1/14, 3/7, 2/7)), tensor(0.004, 0.004, 0.0014, 0.0021))
    assert close(rule.moved(torch.full((3,), 0.02), S), tensor(0.014, 0.031, 0.021))          # 2 * 0.02 is past the cap
    assert close(rule.moved(tensor(0.), tensor(0.)), tensor(0.031 / 16))                      # 2 * eps/32
    assert close(DAAT(EPS, 0.3, cap=1.25, growth="clipped").moved(tensor(0.031, 0.002), tensor(0., 0.)), tensor(0.03875, 0.004))


def test_clipped_growth_multiplies_at_least_a_32nd_of_eps():
    "RECIPES 2.4: eps_i <- min(cap, min(rho/s_i, 2) max(eps_i, eps/32)); eps/32 = 0.00096875."
    rule = DAAT(EPS, 0.3, growth="clipped")
    # 0.7, 1.05 and 2 times eps/32
    assert close(rule.moved(tensor(0., 0., 0.0005), tensor(3/7, 2/7, 1/14)), tensor(0.000678125, 0.0010171875, 0.0019375))


def test_the_linear_rule_is_eq_16():
    # 1 - s + rho: 1 - 0.5 + 0.05 = 0.55, 1 - 0.9 + 0.05 = 0.15; 1.05 and 1.02 are past the cap; whatever the radius was
    for before in (0., 0.01, EPS):
        got = LinearDAAT(EPS, 0.05).moved(torch.full((4,), before), tensor(0.5, 0.9, 0., 0.03))
        assert close(got, tensor(0.01705, 0.00465, 0.031, 0.031))


def test_the_piecewise_rule_takes_the_nearest_level():
    # 1 - s + rho with rho = 0.05:  1.05   0.9   0.85   0.65   0.6   0.4   0.3   0.15   0.1   0.06
    s = tensor(0., 0.15, 0.2, 0.4, 0.45, 0.65, 0.75, 0.9, 0.95, 0.99)
    levels = tensor(1., 1., 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0., 0.)
    for before in (0., EPS): assert close(PiecewiseDAAT(EPS, 0.05).moved(torch.full((10,), before), s), levels * EPS)
    assert PiecewiseDAAT(EPS, 0.2).moved(tensor(0.), tensor(1.)) == EPS / 4   # rho above 1/8: nobody is left out altogether


rules = st.builds(lambda kind, rho, cap, growth: kind(EPS, rho, **({"cap": cap, "growth": growth} if kind is DAAT else {})),
                  st.sampled_from(RULES), st.floats(0.01, 0.4), st.sampled_from([1., 1.25]), st.sampled_from(["reset", "clipped"]))
oversteps = st.sampled_from([0., 1e-45, 1e-12, 1e-8, 1e-7, 1.]) | st.floats(0, 1, width=32)
radii = st.sampled_from([0., 1e-45, 1e-6, EPS]) | st.floats(0, EPS)


@given(rules, st.lists(st.tuples(radii, oversteps), min_size=1, max_size=8))
@settings(max_examples=200)
def test_every_new_radius_is_a_number_from_0_to_the_cap(rule, pairs):
    eps, s = (torch.tensor(v) for v in zip(*pairs))
    new = rule.moved(eps, s)
    assert new.shape == eps.shape and new.dtype == torch.float32
    assert new.isfinite().all() and (new >= 0).all() and (new <= getattr(rule, "cap", 1.) * EPS * (1 + 1e-6)).all()


@given(rules, radii, st.lists(oversteps, min_size=2, max_size=8))
def test_a_larger_overstep_never_gives_a_larger_radius(rule, eps, oversteps):
    s = torch.tensor(sorted(oversteps))
    new = rule.moved(torch.full_like(s, eps), s)
    assert (new.diff() <= 1e-9).all()


@given(st.lists(st.lists(st.floats(-200, 200, width=32), min_size=4, max_size=4), min_size=1, max_size=6), st.sampled_from([1., 2., 3.]))
def test_overstep_lies_in_0_1_and_is_0_where_the_head_is_right(logits, tau):
    z = torch.tensor(logits)
    for k in range(4):
        s = overstep(z, torch.full((len(z),), k), tau)
        assert ((s >= 0) & (s <= 1)).all() and (s[z.argmax(1) == k] == 0).all()


# Rho's schedule

@pytest.mark.parametrize("epoch, rho", [(1, 0.05), (74, 0.05), (75, 0.2), (89, 0.2), (90, 0.3), (100, 0.3)])
def test_rho_changes_at_the_papers_epochs(epoch, rho):
    "DAAT section 6.1, epochs counted from 1."
    method = daat(EPS)
    assert resolve_schedules(method, epoch - 1, 100).radius == DAAT(EPS, rho, 2.)
    assert resolve_schedules(method, epoch - 1, 100).attack == method.attack
    if epoch % 5 == 0: assert resolve_schedules(method, epoch // 5 - 1, 20).radius.rho == rho   # the same fractions of a shorter run


# The calibration head

def batch_of(n=6, seed=0, index=None, side=8):
    return Batch(numbers(n, 1, side, side, seed=seed), labels(n, 10, seed), torch.arange(n) if index is None else index)


@pytest.mark.parametrize("eps", [0, 1])
def test_a_radius_that_is_a_whole_number_makes_a_bank_of_real_ones(eps):
    assert Fixed(eps).bank(RuleContext(3, 2, 1)).eps.dtype == torch.float32


def setting(model, n=6, **changes): return RuleContext(n, model.classifier.out_features, model.width, **changes)


ALL = ["detach", "bn_train", "joint", "joint_bn_train"]


@pytest.mark.parametrize("calibration", ALL)
def test_the_head_takes_textbook_sgd_steps_on_natural_images(calibration):
    momentum, decay, model = 0.9, 5e-2, narrow().train()
    rule = DAAT(EPS, 0.05, calibration=calibration)
    bank = rule.bank(setting(model, momentum=momentum, weight_decay=decay), key=3)
    weight, bias = bank.head.weight.detach().clone(), bank.head.bias.detach().clone()
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    parameters, was = copy.deepcopy(dict(model.named_parameters())), buffers(model)
    reference = copy.deepcopy(model)
    for step, lr in enumerate((0.5, 0.5, 0.05)):   # the rate follows the run's
        batch = batch_of(seed=step)
        with torch.no_grad(), in_mode(reference, "train" if calibration == "bn_train" else "eval"): g = reference.features(batch.x)
        bank.learning_rate(lr)
        eps = rule.radius(bank, batch, model)
        # gradient of the mean cross-entropy of a linear layer, by hand
        error = (g @ weight.T + bias).softmax(1) - F.one_hot(batch.y, 10)
        gradients = [error.T @ g / 6 + decay * weight, error.mean(0) + decay * bias]
        velocity = [momentum * v + d for v, d in zip(velocity, gradients)]
        weight, bias = weight - lr * velocity[0], bias - lr * velocity[1]
        assert close(bank.head.weight, weight, 1e-4) and close(bank.head.bias, bias, 1e-4)
        assert eps.tolist() == pytest.approx([EPS] * 6)
    assert same(parameters, dict(model.named_parameters())) and all(p.grad is None for p in model.parameters())   # the net learns nothing here
    assert model.training and same(was, buffers(model)) is (calibration != "bn_train")
    if calibration == "bn_train": assert same(buffers(reference), buffers(model))   # moved by the three natural batches, and by nothing else


@pytest.mark.parametrize("calibration", ["detach", "bn_train"])
def test_only_joint_calibration_adds_a_loss(calibration):
    model = narrow().train()
    rule = DAAT(EPS, 0.05, calibration=calibration)
    assert rule.extra_loss(rule.bank(setting(model)), batch_of(), model) is None


@pytest.mark.parametrize("calibration", ["joint", "joint_bn_train"])
def test_the_joint_loss_trains_the_features_alone(calibration):
    model = narrow().train()
    rule = DAAT(EPS, 0.05, calibration=calibration)
    bank = rule.bank(setting(model))
    rule.extra_loss(bank, batch_of(), model).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.body.parameters())
    assert all(p.grad is None for p in [*model.classifier.parameters(), *bank.head.parameters()])


@pytest.mark.parametrize("calibration, mode", [("joint", "eval"), ("joint_bn_train", "train")])
def test_joint_is_the_head_s_own_loss_not_detached(calibration, mode):
    "RECIPES 2.4: joint is (a) not detached: the loss that steps the head, of the head before its step, in eval mode."
    model, batch = narrow().train(), batch_of()
    rule = DAAT(EPS, 0.05, calibration=calibration)
    bank = rule.bank(setting(model))
    bank.learning_rate(20.)   # large, so that the head before its step differs from the head after it
    reference, head = copy.deepcopy(model), copy.deepcopy(bank.head)
    rule.radius(bank, batch, model)
    rule.extra_loss(bank, batch, model).backward()
    with in_mode(reference, mode): loss = F.cross_entropy(head(reference.features(batch.x)), batch.y)
    want = torch.autograd.grad(loss, list(reference.body.parameters()))
    assert all(torch.allclose(p.grad, g, rtol=1e-4, atol=1e-6) for p, g in zip(model.body.parameters(), want))


@dataclass(frozen=True)
class Shift(NoAttack):
    "An 'attack' that brightens, whatever eps."
    by: float = 0.3
    def __call__(self, model, x, y, eps, noise=None): return (x + self.by).clamp(0, 1)


@pytest.mark.parametrize("calibration", ALL)
def test_batch_norm_sees_what_the_variant_says(calibration):
    """A whole step: the outer loss moves the buffers once, by adversaries; those with bn_train in their name once by the natural images too; judging s moves nothing.

    RECIPES 2.4: (a) and (d) run in eval mode, in `joint` too; that the statistics mix is what `bn_train` is for."""
    model, batch = narrow().train(), batch_of()
    rule = DAAT(EPS, 0.05, calibration=calibration)
    bank, method = rule.bank(setting(model)), Method(rule, Shift(), AdversarialCE())
    reference = copy.deepcopy(model)
    train_step(method, model, bank, torch.optim.SGD(model.parameters(), 0.1), batch, noise(6))
    with torch.no_grad():
        if calibration == "bn_train": reference(batch.x)
        reference((batch.x + 0.3).clamp(0, 1))
        if calibration == "joint_bn_train": reference(batch.x)
    assert same(buffers(reference), buffers(model))


@pytest.mark.parametrize("calibration", ALL)
def test_one_step_moves_the_weights_by_the_right_gradient(calibration):
    "detach and bn_train: the adversarial loss alone."
    model, batch = narrow().train(), batch_of()
    rule = DAAT(EPS, 0.05, calibration=calibration)
    bank, reference = rule.bank(setting(model)), copy.deepcopy(model)
    train_step(Method(rule, Shift(), AdversarialCE()), model, bank, torch.optim.SGD(model.parameters(), 0.1), batch, noise(6))
    gradients = torch.autograd.grad(F.cross_entropy(reference((batch.x + 0.3).clamp(0, 1)), batch.y), list(reference.parameters()))
    expected = [p - 0.1 * g for p, g in zip(reference.parameters(), gradients)]
    equal = all(torch.allclose(p, e, rtol=1e-5, atol=1e-7) for p, e in zip(model.parameters(), expected))
    assert equal is (calibration in ("detach", "bn_train"))


# The bank

class Reader(nn.Module):
    "g(x) = the image itself: a head then says what the test wants of each example."
    def __init__(self, pixels=2, classes=2):
        super().__init__()
        self.width, self.classifier = pixels, nn.Linear(pixels, classes)
    def features(self, x): return x.flatten(1)
    def forward(self, x): return self.classifier(self.features(x))


def told_split(n):
    "Images of two pixels: logits (0, 2 ln(1 + i)) for example i under the head below."
    x = torch.zeros(n, 1, 1, 2, dtype=torch.uint8)
    x[:, 0, 0, 1] = torch.arange(n)
    return ds.Split(x, torch.zeros(n, dtype=torch.long))


def told_bank(rule, n):
    bank = rule.bank(RuleContext(n, 2, 2))
    with torch.no_grad():
        bank.head.weight.copy_(torch.tensor([[0., 0.], [0., 25.5]]))   # 25.5 * i/255 = i/10
        bank.head.bias.zero_()
    bank.learning_rate(0.)   # the head stays
    return bank


def told_s(n, tau): return torch.tensor([0.] + [(math.exp(i / 10 / tau) - 1) / (math.exp(i / 10 / tau) + 1) for i in range(1, n)])


STILL = Method(DAAT(EPS, 0.05), NoAttack(), AdversarialCE())


def epoch_of(method, bank, split, key, subset=None, size=7):
    "One epoch of shuffled batches without any learning; the sizes of the batches, and the radii each example was attacked with."
    model, used, sizes = Reader(), torch.full((len(split),), -1.), []
    optimiser = torch.optim.SGD(model.parameters(), 0.)
    for batch in ds.batches(split, size, key, subset=subset):
        used[batch.index] = bank.eps[batch.index]
        train_step(method, model, bank, optimiser, batch, noise(len(batch.index)))
        sizes.append(len(batch.index))
    return sizes, used


def by_hand(rule, eps, s): return torch.where(s == 0, rule.cap * EPS, (rule.rho / s.clamp(min=1e-9) * eps).clamp(max=rule.cap * EPS))


@pytest.mark.parametrize("cap", [1., 1.25])
def test_each_radius_follows_its_own_example_through_shuffled_batches(cap):
    n, rule = 25, DAAT(EPS, 0.3, cap=cap)
    bank, split = told_bank(rule, n), told_split(n)
    eps, s = torch.full((n,), EPS), told_s(n, 2.)
    for epoch in range(3):
        sizes, used = epoch_of(replace(STILL, radius=rule), bank, split, key=epoch)
        assert sizes == [7, 7, 7, 4]                      # a last short batch
        assert close(used, eps, 1e-4)                     # an update is used at the next visit, not before
        eps = by_hand(rule, eps, s)
        assert close(bank.eps, eps, 1e-4) and len(eps.unique()) > 10


def test_only_visited_examples_move():
    n, rule = 25, DAAT(EPS, 0.05)
    bank, split = told_bank(rule, n), told_split(n)
    subset = torch.tensor([3, 24, 8, 9, 10])
    epoch_of(replace(STILL, radius=rule), bank, split, key=0, subset=subset, size=2)
    want = torch.full((n,), EPS)
    want[subset] = by_hand(rule, want, told_s(n, 2.))[subset]
    assert close(bank.eps, want, 1e-4)


@pytest.mark.parametrize("kind", [*RULES, Fixed])
def test_a_bank_goes_on_from_its_saved_state(kind, tmp_path):
    "Radii, head and the head's momentum: after loading, the next steps are the same to the bit."
    rule = Fixed(EPS) if kind is Fixed else kind(EPS, 0.05)
    def run(bank, steps):
        model = narrow().train()
        for t in steps:
            bank.learning_rate(20.)   # so that the head gets sure of itself
            batch = batch_of(4, seed=t, index=(torch.arange(4) * 3 + t) % 11)
            rule.radius(bank, batch, model)
            rule.after_step(bank, batch, batch.x, model)
        return bank
    whole = run(rule.bank(setting(narrow(), n=11), key=1), range(6))
    half = run(rule.bank(setting(narrow(), n=11), key=1), range(3))
    torch.save(half.state_dict(), tmp_path / "bank.pt")
    resumed = rule.bank(setting(narrow(), n=11), key=2)   # another head, to be overwritten
    resumed.load_state_dict(torch.load(tmp_path / "bank.pt", weights_only=True))
    resumed = run(resumed, range(3, 6))
    assert torch.equal(resumed.eps, whole.eps) and torch.equal(resumed.realised, whole.realised)
    if kind is not Fixed:
        assert torch.equal(resumed.head.weight, whole.head.weight) and torch.equal(resumed.head.bias, whole.head.bias)
        assert not torch.equal(half.head.weight, whole.head.weight) and not torch.equal(half.eps, whole.eps)


def test_the_head_s_first_weights_come_from_the_key_and_no_generator_moves():
    rule, before = DAAT(EPS), torch.get_rng_state()
    a, b, c = (rule.bank(RuleContext(3, 4, 5), key).head.weight for key in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(torch.get_rng_state(), before)


def test_a_fixed_radius_never_moves():
    rule = Fixed(EPS)
    bank, model, batch = rule.bank(RuleContext(9, 10, 16)), narrow(), batch_of()
    assert torch.equal(rule.radius(bank, batch, model), torch.full((6,), EPS))
    assert torch.equal(rule.after_attack(bank, batch, batch.x, model, torch.full((6,), 0.5)), torch.full((6,), 0.5))
    assert rule.extra_loss(bank, batch, model) is None
    rule.after_step(bank, batch, batch.x, model)
    assert torch.equal(bank.eps, torch.full((9,), EPS))


def test_daat_judges_the_adversary_with_the_new_weights_and_the_new_head():
    "RECIPES 2.4: s_i after the step of f and g, on x', in eval mode, with c after its own step."
    model, batch, rule = narrow().train(), batch_of(), DAAT(EPS, 1e-3)   # so small a margin that all the radii shrink
    bank = rule.bank(setting(model))
    bank.learning_rate(0.5)
    old, old_head, adversaries = copy.deepcopy(model), copy.deepcopy(bank.head), (batch.x + 0.3).clamp(0, 1)
    train_step(Method(rule, Shift(), AdversarialCE()), model, bank, torch.optim.SGD(model.parameters(), 0.5), batch, noise(6))

    def radius(net, head, x, mode="eval"):
        with torch.no_grad(), in_mode(copy.deepcopy(net), mode) as net: q = (head(net.features(x)) / 2).softmax(1)
        s = q.amax(1) - q[range(6), batch.y]
        return torch.where(s == 0, EPS, 1e-3 / s * EPS).clamp(max=EPS)
    got = bank.eps
    assert close(got, radius(model, bank.head, adversaries), 1e-4)
    wrong = {"old weights": radius(old, bank.head, adversaries), "old head": radius(model, old_head, adversaries),
             "clean images": radius(model, bank.head, batch.x), "train mode": radius(model, bank.head, adversaries, "train")}
    for name, other in wrong.items(): assert not close(got, other, 1e-3), name
    assert model.training
    assert close(bank.realised, (adversaries - batch.x).abs().flatten(1).amax(1))


def test_a_step_asks_its_rule_in_the_order_of_the_algorithm():
    calls = []
    class Told(RadiusRule):
        def radius(self, bank, batch, model): calls.append("radius"); return super().radius(bank, batch, model)
        def after_attack(self, bank, batch, x_adv, model, eps): calls.append("after attack"); return eps
        def extra_loss(self, bank, batch, model): calls.append("extra loss")
        def after_step(self, bank, batch, x_adv, model): calls.append("after step")
    class Attack(NoAttack):
        def __call__(self, model, x, y, eps, noise=None): calls.append("attack"); return x
    model = narrow().train()
    rule = Told(EPS)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    optimiser.register_step_post_hook(lambda *_: calls.append("step"))
    train_step(Method(rule, Attack(), AdversarialCE()), model, rule.bank(setting(model)), optimiser, batch_of(), noise(6))
    assert calls == ["radius", "attack", "after attack", "extra loss", "step", "after step"]


# Lower and higher precision

class OneLayer5(OneLayer):
    "For images of 5 pixels."
    def parts(self, channels): return super().parts(channels)[0], 8 * 9


def trained(method, precision="bf16"):
    run = Run("random", "", OneLayer5(), method, Training(epochs=2, batch=16, precision=precision), Monitor(PGD(EPS, 1), EPS, examples=1, every=3))
    data = random_data()
    return train(run, data, State(run, data), report_line=lambda line: None)


def floating(state): return [v for v in [*(getattr(state.bank, name) for name in state.bank.each), *state.model.state_dict().values()] if v.is_floating_point()]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_in_bf16_and_remembers_in_fp32(name):
    state = trained(METHODS[name])
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in floating(state)) and state.history[-1]["loss"] > 0


@dataclass(frozen=True)
class Rounded(RadiusRule):
    "A rule of somebody's own that computes in another precision."
    kind: str = "bfloat16"
    def radius(self, bank, batch, model): return bank.eps[batch.index].to(getattr(torch, self.kind))
    def after_step(self, bank, batch, x_adv, model): bank.write(batch.index, eps=self.radius(bank, batch, model) / 2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float64"])
def test_a_rule_may_compute_in_any_precision(kind, precision):
    state = trained(at(EPS, Rounded(EPS, kind)), precision)
    assert all(v.dtype == torch.float32 for v in floating(state))
    assert torch.allclose(state.bank.eps, torch.full((16,), EPS / 4), rtol=1e-2) and torch.allclose(state.bank.used, torch.full((16,), EPS / 2), rtol=1e-2)


def test_a_bank_takes_a_number_for_all_and_a_tensor_for_each():
    bank = Fixed(EPS).bank(RuleContext(3, 2, 1))
    bank.write(torch.tensor([2, 0]), eps=torch.tensor([0.25, 0.5], dtype=torch.bfloat16), used=1)
    assert close(bank.eps, [0.5, EPS, 0.25]) and bank.used.tolist() == [1, 0, 1] and bank.realised.tolist() == [0, 0, 0]
