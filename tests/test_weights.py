"Adversarial weight perturbation against the published procedure written out, and what it must leave alone."
import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from adaptive_at.attacks import NoAttack
from adaptive_at.base.schedules import Milestones, resolve_schedules
from adaptive_at.base.identity import spec_hash, to_spec
from adaptive_at.data.datasets import Batch
from adaptive_at.algorithms.baselines import Method, at, natural
from adaptive_at.objectives import MART, TRADES, AdversarialCE
from adaptive_at.radius import Fixed, RuleContext
from adaptive_at.training import train_step
from adaptive_at.awp import AT_AWP, AWP, TRADES_AWP, add, perturbable
from helpers import buffers, labels, narrow, noise, numbers, same

pytestmark = pytest.mark.trains

EPS = torch.finfo(torch.float32).eps


def weights(model): return {name: p.detach().clone() for name, p in model.named_parameters()}


def ce(x, y): return lambda model: F.cross_entropy(model(x), y)


def scene(n=8, classes=4, seed=0):
    "A network in train mode, images and labels."
    return narrow(classes, seed=seed).train(), numbers(n, 1, 8, 8, seed=seed), labels(n, classes, seed=seed)


def one_batch(x, y): return Batch(x, y, torch.arange(len(y)))


def by_proxy(model, loss, gamma, lr):
    "The published procedure: a copy with buffers of its own climbs by one step of SGD; the difference is rescaled layer by layer."
    proxy = copy.deepcopy(model)
    optimiser = torch.optim.SGD(proxy.parameters(), lr=lr)
    (-loss(proxy)).backward()
    optimiser.step()
    there, out = dict(proxy.named_parameters()), {}
    for name, old in model.named_parameters():
        if old.dim() <= 1 or "weight" not in name: continue
        d = there[name].detach() - old.detach()
        out[name] = gamma * (old.detach().norm() / (d.norm() + 1e-20) * d)
    return out


# The perturbation

LOSSES = {"at": lambda x, x_adv, y: ce(x_adv, y), "trades": lambda x, x_adv, y: next(TRADES().losses(one_batch(x, y), x_adv, y, None)),
          "mart": lambda x, x_adv, y: next(MART().losses(one_batch(x, y), x_adv, y, None))}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("gamma, lr", [(0.01, 0.01), (0.005, 0.1), (0.3, 0.001)])
def test_the_perturbation_is_the_proxy_s_bit_for_bit(kind, gamma, lr):
    model, x, y = scene()
    loss = LOSSES[kind](x, (x + 0.1 * numbers(8, 1, 8, 8, seed=5)).clamp(0, 1), y)
    assert same(AWP(gamma, lr).perturbation(model, loss), by_proxy(model, loss, gamma, lr))


def test_by_hand():
    "Two 1x2 layers: loss = 3 a.u + b.v, with |a| = 5 and |b| = 2; the gradient's direction is all that counts."
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 1), nn.Linear(2, 1, bias=False)
            with torch.no_grad():
                self.a.weight.copy_(torch.tensor([[3., 4.]]))
                self.b.weight.copy_(torch.tensor([[0., 2.]]))
    v = AWP(0.1, 0.5).perturbation(Two(), lambda m: 3 * (m.a.weight @ torch.tensor([0., 2.])).sum() + (m.b.weight @ torch.tensor([-4., 3.])).sum() + m.a.bias.sum())
    assert v.keys() == {"a.weight", "b.weight"}
    assert torch.allclose(v["a.weight"], torch.tensor([[0., 0.5]])) and torch.allclose(v["b.weight"], torch.tensor([[-0.16, 0.12]]))


@given(st.sampled_from([1e-4, 0.005, 0.01, 0.5]), st.sampled_from([0.01, 0.1, 1.]), st.integers(0, 20))
@settings(max_examples=25)
def test_each_layer_moves_by_gamma_times_its_norm_and_uphill(gamma, lr, seed):
    model, x, y = scene(seed=seed)
    v = AWP(gamma, lr).perturbation(model, ce(x, y))
    slope = torch.autograd.grad(ce(x, y)(model), list(perturbable(model).values()))
    for (name, w), g in zip(perturbable(model).items(), slope):
        assert float(v[name].norm()) == pytest.approx(gamma * float(w.detach().norm()), rel=1e-5)
        assert F.cosine_similarity(v[name].flatten(), g.flatten(), dim=0) > 0.999


def test_only_weights_of_layers_move():
    model, x, y = scene()
    named = dict(model.named_parameters())
    assert perturbable(model).keys() == {n for n, p in named.items() if p.dim() in (2, 4)}   # linear and convolutional weights
    was = weights(model)
    with AT_AWP.perturbed(model, ce(x, y)):
        assert {n for n, p in named.items() if not torch.equal(p, was[n])} == perturbable(model).keys()
    model.body[0].weight.requires_grad_(False)   # a frozen layer stays where it is
    assert "body.0.weight" not in AT_AWP.perturbation(model, ce(x, y))


def test_a_layer_without_a_gradient_stays_where_it_is():
    model, x, y = scene()
    model.unused = nn.Linear(3, 3)
    v = AT_AWP.perturbation(model, ce(x, y))
    assert torch.equal(v["unused.weight"], torch.zeros(3, 3)) and all(torch.isfinite(d).all() for d in v.values())
    with torch.no_grad(): model.unused.weight.zero_()
    assert torch.equal(AT_AWP.perturbation(model, ce(x, y))["unused.weight"], torch.zeros(3, 3))


def test_the_rescaling_cancels_the_ascent_s_step_size():
    model, x, y = scene()
    a, b = (AWP(0.01, lr).perturbation(model, ce(x, y)) for lr in (0.01, 10.))
    assert all(float((a[n] - b[n]).norm()) < 1e-3 * float(a[n].norm()) for n in a)


# Coming back

def test_the_weights_come_back_to_one_rounding_and_nothing_else_has_changed():
    model, x, y = scene()
    was, before = weights(model), buffers(model)
    gradients = [torch.ones_like(p) for p in model.parameters()]
    for p, g in zip(model.parameters(), gradients): p.grad = g.clone()
    with AT_AWP.perturbed(model, ce(x, y)):
        largest = {n: torch.maximum(p.detach().abs(), was[n].abs()) for n, p in model.named_parameters()}
        assert same(before, buffers(model)) and all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients))
    for name, p in model.named_parameters(): assert ((p - was[name]).abs() <= EPS * largest[name]).all()
    assert same(before, buffers(model)) and model.training


def test_one_perturbation_added_and_removed_a_thousand_times_changes_nothing_after_the_first():
    model, x, y = scene()
    v = AWP(0.3, 0.01).perturbation(model, ce(x, y))
    was, once = weights(model), None
    for _ in range(1000):
        add(model, v, 1)
        add(model, v, -1)
        once = once or weights(model)
        assert same(once, weights(model))
    assert not same(was, once)   # rounding did happen


def test_nothing_drifts_over_a_thousand_steps():
    "New directions in every step, no update in between: what is left is rounding without a direction, at most a random walk of it."
    model, x, y = scene(n=64)
    awp, was = AWP(0.01, 0.01), weights(model)
    size = {n: w.abs() + 0.01 * w.norm() for n, w in was.items()}   # no weight is ever larger
    left = {}
    for step in range(1, 1001):
        some = torch.arange(8) + step * 8
        with awp.perturbed(model, ce(x[some % 64], y[(some + step // 8) % 64])): pass
        if step in (10, 1000): left[step] = torch.cat([((p.detach() - was[n]) / (EPS * size[n])).flatten() for n, p in perturbable(model).items()])
    ulps = left[1000]
    assert ulps.abs().max() < 50 and ulps.std() < 4 * (1000 / 10)**0.5 * left[10].std()   # a thousand roundings one way would be 500
    assert abs(ulps.mean()) < 5 * ulps.std() / len(ulps)**0.5                              # no direction
    assert all(torch.equal(p, was[n]) for n, p in model.named_parameters() if p.dim() == 1)


def test_the_weights_come_back_when_the_update_fails():
    model, x, y = scene()
    was = weights(model)
    with pytest.raises(RuntimeError, match="no"):
        with AT_AWP.perturbed(model, ce(x, y)): raise RuntimeError("no")
    assert all(torch.allclose(p, was[n], rtol=0, atol=1e-7) for n, p in model.named_parameters())


def test_gamma_zero_costs_nothing():
    def never(model): raise AssertionError("no pass is spent")
    model, _, _ = scene()
    was = weights(model)
    with AWP(0., 0.01).perturbed(model, never): assert same(was, weights(model))
    assert same(was, weights(model))


# In the training step

@pytest.mark.parametrize("objective", [AdversarialCE(), TRADES()])
def test_one_update_equals_the_published_procedure(objective):
    "Gradient, momentum and decay at the perturbed weights; buffers that have seen those only; the same perturbation taken off again."
    model, x, y = scene()
    theirs = copy.deepcopy(model)
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4) for m in (model, theirs)]
    method = Method(Fixed(0.1), NoAttack(), objective, AT_AWP)
    bank = method.radius.bank(RuleContext(8, 4, model.width))
    for step in range(3):
        got = train_step(method, model, bank, optimisers[0], one_batch(x, y), noise(8, step))
        loss, = objective.losses(one_batch(x, y), x, y, None)
        v = by_proxy(theirs, loss, 0.01, 0.01)
        with torch.no_grad():
            for name, d in v.items(): theirs.get_parameter(name).add_(d)
        optimisers[1].zero_grad()
        value = loss(theirs)
        value.backward()
        optimisers[1].step()
        with torch.no_grad():
            for name, d in v.items(): theirs.get_parameter(name).sub_(d)
        assert torch.equal(got, value.detach())
        assert same(weights(model), weights(theirs)) and same(buffers(model), buffers(theirs))


def test_the_update_under_autocast_sees_the_perturbed_weights():
    "Autocast keeps the weights it has cast once; those of the attack would stand in for the perturbed ones."
    model, x, y = scene()
    with torch.autocast("cpu", torch.bfloat16):
        outside = model(x)
        with AWP(0.5, 0.1).perturbed(model, ce(x, y)): inside = model(x)
        after = model(x)
    assert float((inside - outside).detach().abs().max()) > 0.1 and torch.equal(outside, after)


def test_awp_fits_any_method_and_tells_runs_apart():
    assert Method(*(getattr(at(0.1), f) for f in ("radius", "attack", "objective"))) == at(0.1)
    ours = replace(at(0.1), weights=AT_AWP)
    assert len({spec_hash(m) for m in (at(0.1), ours, replace(ours, weights=AWP(0.005, 0.01)), replace(natural(), weights=AT_AWP))}) == 4


# Published settings

def test_published_settings():
    assert AT_AWP == AWP(gamma=0.01, lr=0.01)
    assert TRADES_AWP == AWP(gamma=Milestones((10/200,), (0., 0.005)), lr=0.1)
    assert [resolve_schedules(replace(at(0.1), weights=TRADES_AWP), e - 1, 200).weights for e in (9, 10)] == [AWP(0., 0.1), AWP(0.005, 0.1)]
    assert to_spec(TRADES_AWP)["gamma"]["values"] == [0., 0.005]
