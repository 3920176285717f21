"DeepFool against the closed form, against foolbox image by image, and properties that hold for any radius."
from dataclasses import replace

import foolbox
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from adaptive_at.attacks import PGD, project, per_example
from adaptive_at.base.errors import UserError
from adaptive_at.deepfool import DeepFool, rivals
from adaptive_at.evaluation import Images, WhiteBox
from adaptive_at.data.datasets import to_unit
from helpers import buffers, digits, narrow, noise, numbers, robust_digits, same, wavy


class Affine(nn.Module):
    "Logits W (x - 1/2) + b, in float64; the classes' weights are of different length."
    def __init__(self, classes, d, seed=0):
        super().__init__()
        self.weight = (2 * numbers(classes, d, seed=seed).double() - 1) * (0.2 + numbers(classes, 1, seed=seed + 2).double())
        self.bias = 0.2 * d**0.5 * numbers(classes, seed=seed + 1).double()
    def forward(self, x): return (x.flatten(1).double() - 0.5) @ self.weight.T + self.bias


def foolboxed(model, x, y, attack, eps=None):
    "What foolbox's attack finds, and what it makes of it within eps."
    theirs = foolbox.attacks.LinfDeepFoolAttack(steps=attack.steps, candidates=attack.candidates, overshoot=attack.overshoot)
    raw, clipped, success = theirs(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, foolbox.criteria.Misclassification(y), epsilons=eps)
    return raw, clipped, success


# Affine models: the smallest perturbation is known

@pytest.mark.parametrize("classes, shape, n", [(2, (1, 1, 1), 1), (3, (3, 5, 7), 3), (10, (1, 2, 3), 7), (25, (1, 4, 4), 12)])
def test_one_step_is_the_smallest_perturbation_of_an_affine_model(classes, shape, n):
    model, x = Affine(classes, int(np.prod(shape)), seed=3), 0.4 + 0.2 * numbers(n, *shape)
    f, w = model(x).numpy(), model.weight.numpy()
    y = torch.from_numpy(f.argmax(1))
    want, winner, least = np.empty((n, w.shape[1])), [], []
    for i, own in enumerate(f.argmax(1)):
        reach = {k: (f[i, own] - f[i, k]) / np.abs(w[k] - w[own]).sum() for k in range(classes) if k != own}
        winner.append(min(reach, key=reach.get))
        least.append(reach[winner[-1]])
        want[i] = 1.02 * (least[-1] + 1e-4) * np.sign(w[winner[-1]] - w[own])
    inside = np.abs(want).max(1) < 0.35   # the box does not cut it
    assert inside.mean() > 0.6
    x_adv = DeepFool(candidates=classes)(model, x, y, 1.)
    assert np.abs((x_adv - x).flatten(1).numpy() - want)[inside].max() < 1e-6
    assert model(x_adv).argmax(1)[inside].tolist() == np.array(winner)[inside].tolist()
    if n > 5: assert (np.array(winner) != np.argsort(f)[:, -2]).any()   # not always the class with the next logit
    for factor, falls in ((0.999, False), (1.001, True)):   # a radius just too small, and one just large enough
        eps = factor * torch.tensor(least)
        fooled = model(DeepFool(candidates=classes)(model, x, y, eps)).argmax(1) != y
        assert (fooled.numpy() == falls)[inside].all()


def test_only_candidates_are_tried():
    "The nearest boundary is that of a class whose logit is far behind; with two candidates the other one is taken."
    model = Affine(3, 2)
    model.weight, model.bias = torch.tensor([[0., 0], [0.1, 0], [0, 9]]).double(), torch.tensor([3., 2.95, 1.5]).double()
    x, y = torch.full((1, 1, 1, 2), 0.3), torch.tensor([0])
    assert model(x).argsort().tolist() == [[2, 1, 0]]
    moved = {c: (DeepFool(candidates=c)(model, x, y, 1.) - x).flatten().tolist() for c in (2, 3, 10)}
    assert moved[3] == moved[10] == pytest.approx([0, 1.02 * (3.3 / 9 + 1e-4)], abs=1e-6)
    assert moved[2] == pytest.approx([0.7, 0], abs=1e-6)   # 0.07/0.1 = 0.7 away, cut at the box
    with pytest.raises(UserError, match="at least 2"): DeepFool(candidates=1)


def test_gradients_of_the_differences():
    model, x, y = wavy(5, classes=4, wrong=1000)
    others = torch.stack([torch.tensor([k for k in range(4) if k != int(c)]) for c in y])
    behind, grads = rivals(model, x, y, others)
    assert behind.shape == (3, 5) and grads.shape == (3, *x.shape) and not grads.requires_grad
    with torch.no_grad(): logits = model(x)
    for i in range(5):
        for j, k in enumerate(others[i]):
            z = x[i:i + 1].clone().requires_grad_()
            f = model(z)[0]
            g, = torch.autograd.grad(f[k] - f[y[i]], z)
            assert torch.allclose(grads[j, i], g[0], rtol=0, atol=1e-6) and float(behind[j, i]) == pytest.approx(float(logits[i, k] - logits[i, y[i]]))


# foolbox

@pytest.mark.parametrize("n, shape, classes, attack", [
    (40, (1, 5, 4), 3, DeepFool()), (9, (3, 4, 4), 12, DeepFool()), (9, (3, 4, 4), 12, DeepFool(candidates=3)), (12, (1, 5, 4), 5, DeepFool(steps=2)),
    (12, (1, 5, 4), 5, DeepFool(overshoot=0.5)), (1, (1, 5, 4), 2, DeepFool())])
def test_deepfool_equals_foolbox_on_a_curved_model(n, shape, classes, attack):
    model, x, y = wavy(n, shape, classes)
    raw, clipped, _ = foolboxed(model, x, y, attack, 0.05)
    raw, clipped = raw.float(), clipped.float()   # the model computes in float64
    assert torch.allclose(attack(model, x, y, 2.), raw, rtol=0, atol=1e-6)
    assert torch.allclose(attack(model, x, y, 0.05), clipped, rtol=0, atol=1e-6)
    if n > 1: assert torch.equal(raw[::4], x[::4]) and (raw != x).flatten(1).any(1).sum() >= n // 2   # every fourth label is wrong from the start
    if attack == DeepFool() and n > 1:
        more = [DeepFool(steps=t)(model, x, y, 2.) for t in (1, 50)]
        assert not torch.equal(*more)   # some need more than one step


@pytest.mark.parametrize("eps", [0.05, 0.15])
def test_deepfool_equals_foolbox_on_digits(eps):
    model, data = robust_digits(), digits().test
    x, y = to_unit(data.x[:60]), data.y[:60]
    raw, clipped, success = foolboxed(model, x, y, DeepFool(), eps)
    ours = DeepFool()(model, x, y, eps)
    assert torch.allclose(ours, clipped, rtol=0, atol=1e-5)
    standing = WhiteBox(DeepFool(), eps).standing(model, Images(x, y, torch.arange(60)), batch=17)
    assert torch.equal(standing, ~success) and 0 < standing.sum() < 60
    assert not ours.isnan().any()


def test_within_a_radius_pgd_breaks_more():
    "DeepFool looks for the nearest boundary, PGD for the worst point: so PGD-40 leaves no more standing, but for a few."
    model, data, eps = robust_digits(), digits().test, 0.12
    images = Images(to_unit(data.x[:200]), data.y[:200], torch.arange(200))
    pgd, deepfool, natural = (int(c.standing(model, images).sum()) for c in (WhiteBox(PGD(eps / 8, 40), eps), WhiteBox(DeepFool(), eps), WhiteBox(DeepFool(), 0.)))
    assert pgd - 4 <= deepfool < 0.9 * natural


# Properties

attacks = st.builds(DeepFool, st.integers(0, 4), st.integers(2, 5), st.sampled_from([0., 0.02, 3.]), st.sampled_from(["eval", "train"]))
radii = st.lists(st.sampled_from([0., 1e-8, 1e-5, 0.031, 1.]) | st.floats(0, 2, width=32), min_size=1, max_size=7)


@given(attacks, radii, st.sampled_from([(1, 1, 1), (1, 4, 3), (3, 5, 5)]), st.integers(0, 50), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=80)
def test_the_result_stays_within_its_own_radius_and_the_box(attack, eps, shape, seed, dtype):
    model, x, y = wavy(len(eps), shape, seed=seed, wrong=3)
    x = x.to(dtype)
    x[x < 0.2], x[x > 0.9] = 0., 1.
    before, eps = (x.clone(), y.clone()), torch.tensor(eps)
    x_adv = attack(model, x, y, eps, noise(len(eps), seed))
    assert x_adv.shape == x.shape and x_adv.dtype == dtype and not x_adv.requires_grad
    assert ((x_adv - x).abs().flatten(1).amax(1) <= eps + 1e-6).all() and x_adv.min() >= 0 and x_adv.max() <= 1
    assert torch.equal(x_adv[eps == 0], x[eps == 0])
    with torch.no_grad(): wrong = model(x).argmax(1) != y
    assert torch.equal(x_adv[wrong], x[wrong])
    assert torch.equal(x, before[0]) and torch.equal(y, before[1]) and all(p.grad is None for p in model.parameters())


@given(attacks, radii, st.integers(0, 50), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_permuting_the_batch_permutes_the_result(attack, eps, seed, random):
    attack, n = replace(attack, mode="eval"), len(eps)
    model, x, y = wavy(n, seed=seed)
    order, eps = torch.tensor(random.sample(range(n), n)), torch.tensor(eps)
    whole = attack(model, x, y, eps)
    assert torch.equal(attack(model, x[order], y[order], eps[order]), whole[order])
    part = order[:(n + 1) // 2]
    assert torch.equal(attack(model, x[part], y[part], eps[part]), whole[part])


def test_what_was_found_is_only_projected():
    model, x, y = wavy(30)
    found = DeepFool()(model, x, y, 2.)
    eps = torch.linspace(0, 0.2, 30)
    assert torch.equal(DeepFool()(model, x, y, eps), project(found, x, per_example(eps, x)))


def test_a_flat_model_gives_the_images_back():
    "Without a gradient there is no direction: no step, and no NaN."
    class Flat(nn.Module):
        def forward(self, x): return 0 * x.flatten(1)[:, :1] + torch.tensor([1., 0, 0.5])
    x = numbers(4, 1, 2, 2)
    assert torch.equal(DeepFool()(Flat(), x, torch.zeros(4, dtype=torch.long), 0.3), x)


def test_only_train_mode_moves_batch_norm():
    x = numbers(6, 1, 8, 8)
    for mode in ("eval", "train"):
        model = narrow().train()
        with torch.no_grad(): y = narrow().eval()(x).argmax(1)
        was = buffers(model)
        DeepFool(3, mode=mode)(model, x, y, 0.1)
        assert model.training and all(m.training for m in model.modules()) and same(was, buffers(model)) is (mode == "eval")


def test_the_cost_told_is_the_most_it_runs():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.affine, self.forwards, self.backwards = Affine(8, 4), 0, 0
        def forward(self, x):
            self.forwards += 1
            f = self.affine(x) + torch.tensor([1e6, *[0.] * 7])   # nothing fools it
            if f.requires_grad: f.register_hook(lambda g: setattr(self, "backwards", self.backwards + 1))
            return f
    model, attack = Counting(), DeepFool(steps=6, candidates=5)
    attack(model, numbers(3, 1, 2, 2), torch.zeros(3, dtype=torch.long), 0.1)
    assert (model.forwards - 1) / 3 + model.backwards * 2 / 3 == pytest.approx(attack.passes) == 20   # but for the clean image's
