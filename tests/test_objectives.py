"Outer losses against their formulas written out in numpy, and their gradients against the textbook's."
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from adaptive_at.data.datasets import Batch
from adaptive_at.objectives import MART, TRADES, AdversarialCE
from helpers import buffers, labels, narrow, numbers, same, wavy

pytestmark = pytest.mark.trains

OBJECTIVES = [AdversarialCE(), TRADES(), TRADES(beta=1.5), MART(), MART(beta=6.)]


def losses(objective, x, x_adv, y, eps=None):
    batch, eps = Batch(x, y, torch.arange(len(y))), torch.zeros(len(y)) if eps is None else eps
    return list(objective.losses(batch, x_adv, objective.target(batch, eps), eps))


def value(objective, model, x, x_adv, y):
    loss, = losses(objective, x, x_adv, y)
    return loss(model)


class Table(nn.Module):
    "Gives back the images as logits: [B,1,1,K] to [B,K]."
    def forward(self, x): return x.flatten(1)


def softmax(z): e = np.exp(z - z.max(1, keepdims=True)); return e / e.sum(1, keepdims=True)


def by_numpy(objective, z, z_adv, y):
    "Each objective written out, example by example: their mean."
    p, q, total = softmax(z), softmax(z_adv), 0.
    for i, k in enumerate(y):
        kl = sum(p[i, j] * (np.log(p[i, j]) - np.log(q[i, j] + (1e-12 if isinstance(objective, MART) else 0))) for j in range(p.shape[1]) if p[i, j] > 0)
        if isinstance(objective, TRADES): total += -np.log(p[i, k]) + objective.beta * kl
        elif isinstance(objective, MART):   # YisenWang/MART, mart.py: its constants
            rival = max(q[i, j] for j in range(p.shape[1]) if j != k)
            total += -np.log(q[i, k]) - np.log(1.0001 - rival + 1e-12) + objective.beta * kl * (1.0000001 - p[i, k])
        else: total += -np.log(q[i, k])
    return total / len(y)


def printed_mart(z, z_adv, y, beta):
    "MART's eqs. 9 and 11 as printed: no constants."
    p, q, total = softmax(z), softmax(z_adv), 0.
    for i, k in enumerate(y):
        rival = max(q[i, j] for j in range(p.shape[1]) if j != k)
        total += -np.log(q[i, k]) - np.log(1 - rival) + beta * (p[i] * np.log(p[i] / q[i])).sum() * (1 - p[i, k])
    return total / len(y)


logit_tables = st.integers(1, 5).flatmap(lambda b: st.integers(2, 5).flatmap(lambda k: st.tuples(
    *[st.lists(st.lists(st.floats(-8, 8, width=32), min_size=k, max_size=k), min_size=b, max_size=b)] * 2, st.lists(st.integers(0, k - 1), min_size=b, max_size=b))))


@given(st.sampled_from(OBJECTIVES), logit_tables)
@settings(max_examples=150)
def test_losses_equal_their_formulas(objective, drawn):
    z, z_adv, y = (np.array(v) for v in drawn)
    images = [torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (z, z_adv)]
    got = value(objective, Table(), *images, torch.tensor(y))
    assert float(got) == pytest.approx(by_numpy(objective, z, z_adv, y), rel=1e-7, abs=1e-9)
    single = value(objective, Table(), *[i.float() for i in images], torch.tensor(y))
    assert float(single) == pytest.approx(float(got), rel=1e-3, abs=1e-3)   # in float32, as in training
    if isinstance(objective, MART) and np.sort(softmax(z_adv), 1)[:, -1].max() < 0.9:   # away from saturation
        assert float(got) == pytest.approx(printed_mart(z, z_adv, y, objective.beta), rel=1e-3, abs=1e-3)


def test_numbers_worked_out_by_hand():
    z, z_adv = torch.log(torch.tensor([[.5, .25, .25]])).view(1, 1, 1, 3), torch.log(torch.tensor([[.25, .5, .25]])).view(1, 1, 1, 3)
    y = torch.tensor([0])
    kl = .5 * np.log(2) + .25 * np.log(.5)   # p log(p/q), p clean: 0.25 ln 2
    assert float(value(AdversarialCE(), Table(), z, z_adv, y)) == pytest.approx(np.log(4))
    assert float(value(TRADES(6.), Table(), z, z_adv, y)) == pytest.approx(np.log(2) + 6 * kl)
    assert float(value(MART(5.), Table(), z, z_adv, y)) == pytest.approx(np.log(4) + np.log(2) + 5 * kl * .5, abs=1e-3)
    assert kl == pytest.approx(0.25 * np.log(2))


def test_mart_s_constants_act_where_the_rival_is_certain():
    sure = torch.tensor([[-60., 60., 0.]], dtype=torch.float64).view(1, 1, 1, 3)
    y = torch.tensor([0])
    boosted = float(value(MART(0.), Table(), sure, sure, y)) - float(value(AdversarialCE(), Table(), sure, sure, y))
    assert boosted == pytest.approx(-np.log(1e-4), abs=1e-4)             # 9.21, where the printed formula is infinite
    right = torch.tensor([[60., -60., 0.]], dtype=torch.float64).view(1, 1, 1, 3)
    kl = float(value(MART(1.), Table(), right, sure, y)) - float(value(MART(0.), Table(), right, sure, y))
    assert kl == pytest.approx(-np.log(1e-12) * 1e-7, rel=1e-2)          # KL stops near 27.6, and its weight near 1e-7


@pytest.mark.parametrize("objective", [AdversarialCE(), TRADES(), MART()])
def test_gradients_stay_finite_where_a_probability_underflows(objective):
    "Logits 120 apart: in float32 the smallest probability is 0, and its logarithm infinite."
    z = torch.tensor([60., -60., 0.]).view(1, 1, 1, 3)
    for clean, adversarial in ((z, z), (z, -z), (-z, z), (-z, -z)):
        x = [v.clone().requires_grad_() for v in (clean, adversarial)]
        loss = value(objective, Table(), *x, torch.tensor([0]))
        loss.backward()
        assert loss.isfinite() and all(v.grad is None or v.grad.isfinite().all() for v in x)


# Gradients, against the textbook code

def textbook_trades(model, x, x_adv, y, beta):
    "trades.py: the mean CE of the clean images and the summed KL over the batch size, with a clean forward pass for each."
    divergence = nn.KLDivLoss(reduction="sum")(model(x_adv).log_softmax(1), model(x).softmax(1)) / len(x)
    return nn.CrossEntropyLoss()(model(x), y) + beta * divergence


def textbook_mart(model, x, x_adv, y, beta):
    "mart.py: the most probable wrong class found by sorting, and a KL weighted by 1 - p_y."
    probabilities, natural, rows = model(x_adv).softmax(1), model(x).softmax(1), torch.arange(len(y))
    best, second = probabilities.sort(1, descending=True).indices[:, :2].T
    rival = torch.where(best == y, second, best)
    boosted = F.cross_entropy(model(x_adv), y) + F.nll_loss((1.0001 - probabilities + 1e-12).log(), rival)
    weight = 1.0000001 - natural[rows, y]
    kl = nn.KLDivLoss(reduction="none")((probabilities + 1e-12).log(), natural).sum(1)
    return boosted + beta / len(x) * (kl * weight).sum()


@pytest.mark.parametrize("ours, textbook", [(TRADES(6.), textbook_trades), (TRADES(1.), textbook_trades), (MART(5.), textbook_mart), (MART(6.), textbook_mart)])
def test_gradients_equal_the_textbook_s(ours, textbook):
    model, x, y = wavy(9, classes=4)
    x_adv = (x + 0.1 * (2 * numbers(*x.shape, seed=9) - 1)).clamp(0, 1)
    clean, adversarial = (v.double().requires_grad_() for v in (x, x_adv))
    through = [*model.parameters(), clean, adversarial]
    mine = value(ours, model, clean, adversarial, y)
    theirs = textbook(model, clean, adversarial, y, ours.beta)
    assert torch.allclose(mine, theirs, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(mine, through), torch.autograd.grad(theirs, through)):
        assert b.abs().max() > 1e-6 and torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", [TRADES(), MART()])
def test_gradients_flow_through_the_clean_branch(objective):
    "Detaching the clean prediction gives other gradients: of TRADES' KL target, of MART's KL target and weight."
    model, x, y = wavy(9, classes=4)
    x_adv = (x + 0.1).clamp(0, 1)
    clean, adversarial = model(x).detach().requires_grad_(), model(x_adv).detach().requires_grad_()
    table = Table()
    kl = lambda beta: value(type(objective)(beta), table, clean, adversarial, y)
    gradient, = torch.autograd.grad(kl(1.) - kl(0.), clean)   # of the KL term alone
    p, q, k = clean.detach().softmax(1), adversarial.detach().softmax(1), F.one_hot(y, 4)
    divergence = (p * (p / q).log()).sum(1, keepdim=True)
    want = p * ((p / q).log() - divergence)                                            # d KL(p||q) / d logits of p
    if isinstance(objective, MART):
        own = (p * k).sum(1, keepdim=True)
        want = want * (1 - own) - divergence * own * (k - p)                           # and of the weight 1 - p_y
    assert torch.allclose(gradient, want / 9, rtol=1e-4, atol=1e-7) and want.abs().max() > 1e-2


# Reductions and forwards

@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_are_batch_means(objective):
    model, x, y = wavy(6, classes=4)
    x_adv = (x + 0.1).clamp(0, 1)
    whole = value(objective, model, x, x_adv, y)
    assert whole.shape == ()
    alone = torch.stack([value(objective, model, x[i:i+1], x_adv[i:i+1], y[i:i+1]) for i in range(6)])
    assert torch.allclose(whole, alone.mean(), rtol=1e-9) and alone.std() > 0.01


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_attack_s_and_the_loss_s_labels_are_the_classes(objective):
    batch = Batch(numbers(3, 1, 2, 2), labels(3, 5), torch.arange(3))
    assert objective.target(batch, torch.rand(3)) is batch.y


@pytest.mark.parametrize("objective, passes", [(AdversarialCE(), ["adversarial"]), (TRADES(), ["clean", "adversarial"]), (MART(), ["clean", "adversarial"])])
def test_batch_norm_sees_clean_and_adversarial_images_once_each(objective, passes):
    "RECIPES 7: one clean forward pass gives TRADES' loss with buffers moved 1:1 (its code runs two)."
    x, x_adv, y = numbers(6, 1, 8, 8), numbers(6, 1, 8, 8, seed=1), labels(6, 10)
    model = narrow().train()
    reference = copy.deepcopy(model)
    value(objective, model, x, x_adv, y)
    for checkpoint in passes: reference({"clean": x, "adversarial": x_adv}[checkpoint])
    assert same(buffers(reference), buffers(model))


def test_plain_adversarial_training_has_no_clean_term():
    model, x, y = wavy(5)
    x_adv = (x + 0.1).clamp(0, 1)
    a, b = (value(AdversarialCE(), model, v, x_adv, y) for v in (x, x.flip(0)))
    assert torch.equal(a, b) and torch.equal(a, F.cross_entropy(model(x_adv), y))
