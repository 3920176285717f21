"Attacks against closed forms, other people's implementations, and properties that hold for any radius."
import itertools
from dataclasses import dataclass, replace
from functools import partial

import foolbox
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from hypothesis import assume, given, settings, strategies as st
from torch import nn

from adaptive_at.attacks import (FGSM, KL, PGD, CleanStart, CrossEntropy, FriendlyPGD, Margin, NoAttack, NormalStart, UniformStart, gradient, per_example,
                                 project, restarted)
from adaptive_at.algorithms.iaat import RandomTargetPGD
from helpers import buffers, labels, narrow, noise, numbers, same, seeded, wavy

LOSSES = [CrossEntropy(), KL(), Margin(), Margin(0.)]
STARTS = [UniformStart(), NormalStart(0.01), CleanStart()]


@dataclass(frozen=True, eq=False)
class GivenStart:
    "Start from these images."
    images: torch.Tensor
    def __call__(self, x, eps, noise): return self.images


class Affine(nn.Module):
    "Logits W x + b."
    def __init__(self, weight, bias=0.):
        super().__init__()
        self.weight, self.bias = weight, bias
    def forward(self, x): return x.flatten(1).double() @ self.weight.T + self.bias


# Linear models: the strongest perturbation is known

SHAPES = [(1, (1, 1, 1)), (3, (3, 5, 7)), (7, (1, 2, 3))]
RADII = torch.tensor([0.05, 0., 1e-5, 2., 0.03125, 0.2, 1.])   # usual, none, tiny, larger than the box


def one_direction(classes, shape):
    "A model that looks along one direction v: logit k is a_k v.x, with a_0 the smallest and a_{K-1} the largest."
    v = torch.linspace(-1, 1.3, int(np.prod(shape))).double()
    if len(v) > 3: v[1] = 0.   # a pixel it does not look at
    return Affine(torch.linspace(-1, 1, classes).double()[:, None] * v), v


def edgy_images(n, shape):
    "Images with pixels at and near 0 and 1, where clipping acts."
    x = numbers(n, *shape)
    x.flatten(1)[:, ::3] = torch.where(x.flatten(1)[:, ::3] < 0.5, 0., 0.99)
    return x


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("n, shape", SHAPES)
@pytest.mark.parametrize("loss", [CrossEntropy(), Margin(), Margin(1000.)])
@pytest.mark.parametrize("start", STARTS)
def test_pgd_finds_the_optimum_of_a_linear_model(classes, n, shape, loss, start):
    model, v = one_direction(classes, shape)
    x, eps = edgy_images(n, shape), RADII[:n]
    y = (classes - 1) * (torch.arange(n) % 2)   # the lowest and the highest class: down and up along v
    away = torch.where(y == 0, 1., -1.)[:, None] * v.sign().float()
    best = (x + (eps[:, None] * away).view_as(x)).clamp(0, 1)
    got = PGD(0.25, 12, loss, start)(model, x, y, eps, noise(n))
    seen = (v != 0).view(shape).expand_as(x)
    assert torch.allclose(got[seen], best[seen], rtol=0, atol=1e-6)
    if isinstance(start, CleanStart):
        assert torch.equal(got[~seen], x[~seen])   # sign(0) is 0
        for attack in (FGSM(), PGD(None, 3, loss, start)):
            assert torch.allclose(attack(model, x, y, eps), best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 5])
def test_kl_leaves_the_clean_prediction_on_the_side_it_started_on(classes):
    shape = (2, 3, 3)
    model, v = one_direction(classes, shape)
    x, y, eps = edgy_images(6, shape), labels(6, classes), RADII[:6]
    shift = 0.004 * torch.tensor([1., -1, 1, -1, -1, 1])[:, None] * v.sign().float()
    begin = project(x + shift.view_as(x), x, per_example(eps, x))
    side = ((begin - x).flatten(1).double() @ v).sign()
    assert side.tolist() == [1, 0, 1, -1, -1, 1]   # radius 0 cannot leave
    got = PGD(0.25, 12, KL(), GivenStart(begin))(model, x, y, eps)
    best = (x + (eps[:, None] * side[:, None].float() * v.sign().float()).view_as(x)).clamp(0, 1)
    seen = (v != 0).view(shape).expand_as(x)
    assert torch.allclose(got[seen], best[seen], rtol=0, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("n, shape", SHAPES)
@pytest.mark.parametrize("loss", LOSSES[:3])
def test_one_step_on_a_full_linear_model_is_what_numpy_says(classes, n, shape, loss):
    d = int(np.prod(shape))
    W = 3 * numbers(classes, d, seed=5).double() - 1
    x, y, eps, alpha = edgy_images(n, shape), labels(n, classes), RADII[:n], 0.04
    begin = project(x + 0.01 * (2 * numbers(n, *shape, seed=6) - 1), x, per_example(eps, x))
    got = PGD(alpha, 1, loss, GivenStart(begin))(Affine(W), x, y, eps)

    w, a, a0 = W.numpy(), begin.flatten(1).double().numpy(), x.flatten(1).double().numpy()
    def softmax(z): e = np.exp(z - z.max(1, keepdims=True)); return e / e.sum(1, keepdims=True)
    onehot = np.eye(classes)[y.numpy()]
    z = a @ w.T
    if isinstance(loss, CrossEntropy): g = (softmax(z) - onehot) @ w
    elif isinstance(loss, KL): g = (softmax(z) - softmax(a0 @ w.T)) @ w
    else: g = w[np.where(onehot == 1, -np.inf, z).argmax(1)] - w[y.numpy()]
    clear = np.abs(g) > 1e-12
    step = a + alpha * np.sign(g)
    e = eps.double().numpy()[:, None]
    best = np.minimum(np.maximum(step, a0 - e), a0 + e).clip(0, 1)
    assert clear.sum() >= (n - 1) * d   # in the example of radius 0 KL has no gradient
    assert np.abs(got.flatten(1).double().numpy() - best)[clear].max() < 1e-6


def test_losses_by_hand():
    z, y = torch.tensor([[2., 0., -1.], [0., 3., 1.], [1., 1., 0.]]), torch.tensor([0, 2, 1])
    p = np.exp(z.numpy()) / np.exp(z.numpy()).sum(1, keepdims=True)
    assert np.allclose(CrossEntropy()(z, y), -np.log(p[range(3), y]), atol=1e-6)
    assert np.allclose(CrossEntropy()(z, F.one_hot(y, 3).float()), -np.log(p[range(3), y]), atol=1e-6)
    assert Margin(0.)(z, y).tolist() == [-2, 0, 0] and Margin(50.)(z, y).tolist() == [-52, -48, -50]
    q = np.array([[.7, .2, .1]] * 3)
    assert np.allclose(KL()(z, torch.tensor(q).float()), (q * np.log(q / p)).sum(1), atol=1e-6)   # KL(clean || prediction)


def test_the_target_of_kl_is_the_clean_prediction_without_gradient():
    model, x, y = wavy(4)
    target = KL().target(model, x, y)
    assert torch.equal(target, model(x).softmax(1).detach()) and not target.requires_grad


def test_one_hot_label_distributions_are_class_labels():
    model, x, y = wavy(3, wrong=2)
    attack = PGD(0.02, 3)
    assert torch.equal(attack(model, x, F.one_hot(y, 3).double(), 0.1), attack(model, x, y, 0.1))


# Other people's implementations

def convnet(channels=3, classes=5):
    return seeded(1, lambda: nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten(),
                                           nn.Linear(8 * 9, classes))).eval()


def dyadic_images(n, shape=(3, 8, 8)): return (numbers(n, *shape) * 256).floor() / 256


@pytest.mark.parametrize("n, eps, alpha, steps", [(8, 1/16, 1/64, 10), (4, 1/32, 1/16, 5), (1, 1/8, 1/128, 12)])
def test_pgd_equals_torchattacks_bit_for_bit(n, eps, alpha, steps):
    "Radius, step and pixels are binary fractions, so that every sum is exact whatever its order."
    model, x, y = convnet(), dyadic_images(n), labels(n, 5)
    theirs = torchattacks.PGD(model, eps, alpha, steps, random_start=False)(x, y)
    ours = PGD(alpha, steps, start=CleanStart())(model, x, y, eps)
    assert torch.equal(ours, theirs) and not torch.equal(ours, x)


@pytest.mark.parametrize("n", [1, 5, 8])
def test_pgd_equals_torchattacks_from_the_same_random_start(n):
    eps, alpha, model, x, y = 0.031, 0.007, convnet().double(), numbers(n, 3, 8, 8).double(), labels(n, 5)
    x[:, :, 0], x[:, :, 1] = 0., 1.   # clipping acts
    theirs = seeded(7, lambda: torchattacks.PGD(model, eps, alpha, 10)(x, y))
    begin = seeded(7, lambda: (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1))
    ours = PGD(alpha, 10, start=GivenStart(begin))(model, x, y, eps)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-7)
    assert (ours - begin).abs().max() > alpha   # it went somewhere


@pytest.mark.parametrize("steps, alpha", [(1, 1/16), (10, 1/64)])
def test_pgd_and_fgsm_equal_foolbox(steps, alpha):
    eps, model, x, y = 1/16, convnet(), dyadic_images(8), labels(8, 5)
    theirs = foolbox.attacks.LinfPGD(abs_stepsize=alpha, steps=steps, random_start=False).run(
        foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, foolbox.criteria.Misclassification(y), epsilon=eps)
    assert torch.equal(PGD(alpha, steps, start=CleanStart())(model, x, y, eps), theirs)
    if steps == 1:
        theirs = foolbox.attacks.FGSM(random_start=False).run(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, foolbox.criteria.Misclassification(y), epsilon=eps)
        assert torch.equal(FGSM()(model, x, y, eps), theirs)


@pytest.mark.parametrize("loss", LOSSES)
def test_each_example_is_attacked_as_if_it_were_alone_with_its_radius(loss):
    model, x, y = wavy(6)
    attack, stream = PGD(0.02, 5, loss), noise(6)
    together = attack(model, x, y, RADII[:6], stream)
    for i in range(6):
        one = torch.tensor([i])
        assert torch.equal(together[one], attack(model, x[one], y[one], float(RADII[i]), stream[one]))


# Properties

attacks = st.builds(lambda kind, alpha, steps, loss, start, mode, success, tau, omega:
                    FriendlyPGD(alpha, steps, loss, start, mode, tau=tau, omega=omega) if kind is FriendlyPGD else PGD(alpha, steps, loss, start, mode, success),
                    st.sampled_from([PGD, FriendlyPGD]), st.none() | st.floats(1e-4, 1.5), st.integers(1, 4), st.sampled_from(LOSSES), st.sampled_from(STARTS),
                    st.sampled_from(["eval", "train"]), st.sampled_from(["last", "any"]), st.integers(0, 2), st.sampled_from([0., 0.01, 1.]))
radii = st.lists(st.sampled_from([0., 1e-8, 1e-5, 0.031, 1.]) | st.floats(0, 2, width=32), min_size=1, max_size=6)
shapes = st.sampled_from([(1, 1, 1), (1, 4, 3), (3, 5, 5)])


@given(attacks, radii, shapes, st.integers(0, 50), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=120)
def test_the_result_stays_within_its_own_radius_and_the_box(attack, eps, shape, seed, dtype):
    model, x, y = wavy(len(eps), shape, seed=seed)
    x = x.to(dtype)
    x[x < 0.2], x[x > 0.9] = 0., 1.
    before, eps = (x.clone(), y.clone()), torch.tensor(eps)
    x_adv = attack(model, x, y, eps, noise(len(eps), seed))
    assert x_adv.shape == x.shape and x_adv.dtype == dtype and not x_adv.requires_grad
    assert ((x_adv - x).abs().flatten(1).amax(1) <= eps + 1e-6).all()
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert torch.equal(x_adv[eps == 0], x[eps == 0])
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])
    assert all(p.grad is None for p in model.parameters())


@given(attacks, radii, st.integers(0, 50), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_permuting_the_batch_permutes_the_result(attack, eps, seed, random):
    attack, n = replace(attack, mode="eval"), len(eps)
    assume(not isinstance(attack.loss, KL) or not isinstance(attack.start, CleanStart) and all(e == 0 or e > 1e-4 for e in eps))   # at the clean image KL's gradient is 0, and its sign that of a rounding error
    model, x, y = wavy(n, seed=seed)
    order, stream, eps = torch.tensor(random.sample(range(n), n)), noise(n, seed), torch.tensor(eps)
    whole = attack(model, x, y, eps, stream)
    assert torch.equal(attack(model, x[order], y[order], eps[order], stream[order]), whole[order])
    part = order[:(n + 1) // 2]
    assert torch.equal(attack(model, x[part], y[part], eps[part], stream[part]), whole[part])   # noise belongs to the example, not to the batch


@given(st.integers(0, 50), st.sampled_from(STARTS[:2]))
@settings(max_examples=20)
def test_starts_depend_on_key_and_example_alone(seed, start):
    x, eps = numbers(5, 1, 4, 4) / 2 + 0.25, torch.full((5, 1, 1, 1), 0.1)
    whole = start(x, eps, noise(5, seed))
    some = torch.tensor([4, 1])
    assert torch.equal(start(x[some], eps[some], noise(5, seed)[some]), whole[some])
    assert not torch.equal(whole, start(x, eps, noise(5, seed + 1)))
    moved = (whole - x).flatten(1)
    assert not torch.equal(moved[0], moved[1])   # examples do not share their noise


def test_starts_have_the_published_size():
    x, eps = torch.full((400, 1, 8, 8), 0.5), 0.031
    uniform = (UniformStart()(x, per_example(eps, x), noise(400)) - x) / eps
    assert uniform.abs().max() <= 1 + 1e-5 and abs(uniform.mean()) < 0.02 and abs(uniform.std() - 3**-0.5) < 0.01
    normal = (NormalStart(0.001)(x, per_example(eps, x), noise(400)) - x) / 0.001
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.02 and abs((normal.abs() < 1).float().mean() - 0.6827) < 0.01
    assert (NormalStart(0.1)(x, per_example(0.004, x), noise(400)) - x).abs().max() <= 0.004 + 1e-6   # projected, where a radius is small


def test_a_kl_attack_needs_its_start():
    "At the clean image its gradient is zero, up to rounding (whose sign would be taken: so TRADES starts beside it)."
    model, x, y = wavy(6)
    target = KL().target(model, x, y)
    start = NormalStart(0.001)(x, per_example(0.1, x), noise(6))
    here, beside = (gradient(model, v, KL(), target)[0].abs().flatten(1).amax(1) for v in (x, start))
    assert here.max() < 1e-12 and beside.min() > 1e-5
    x_adv = PGD(0.02, 5, KL(), NormalStart(0.001))(model, x, y, 0.1, noise(6))
    kl = KL()(model(x_adv), target)
    assert (kl > 20 * KL()(model(start), target)).all()


def test_no_attack_gives_the_images_back():
    x = numbers(3, 1, 4, 4)
    assert NoAttack()(None, x, labels(3, 2), 0.1) is x


# Batch norm and modes

@pytest.mark.parametrize("attack", [PGD(0.02, 3), PGD(0.02, 3, KL()), FriendlyPGD(0.02, 3), FGSM()])
def test_only_train_mode_moves_batch_norm(attack):
    x, y = numbers(6, 1, 8, 8), labels(6, 10)
    for before, mode in itertools.product((True, False), ("eval", "train")):
        model = narrow().train(before)
        weights, was = {k: p.clone() for k, p in model.named_parameters()}, buffers(model)
        replace(attack, mode=mode)(model, x, y, 0.1, noise(6))
        assert model.training is before and all(m.training is before for m in model.modules())
        assert same(weights, dict(model.named_parameters())) and all(p.grad is None for p in model.parameters())
        forwards = 0 if mode == "eval" else attack.steps + isinstance(attack.loss, KL)
        tracked = {int(v) for k, v in model.named_buffers() if k.endswith("num_batches_tracked")}
        assert tracked == {forwards} and same(was, buffers(model)) is (mode == "eval")


class Fails(nn.Module):
    "Raises in its second forward pass."
    def __init__(self):
        super().__init__()
        self.passes, self.bn = 0, nn.BatchNorm2d(1)
    def forward(self, x):
        self.passes += 1
        if self.passes == 2: raise RuntimeError("second pass")
        return self.bn(x).flatten(1)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("kind", [PGD, FriendlyPGD])
def test_the_mode_comes_back_even_when_the_model_raises(kind, before, mode):
    model = Fails().train(before)
    with pytest.raises(RuntimeError, match="second pass"): kind(0.1, 3, mode=mode)(model, numbers(2, 1, 2, 2), labels(2, 4), 0.1)
    assert model.training is before and model.bn.training is before


def test_layers_frozen_by_hand_stay_frozen():
    "`in_mode` gives the model back as it was, also where some layers are in another mode."
    model = narrow().train()
    model.body[1].eval()
    PGD(0.02, 1)(model, numbers(2, 1, 8, 8), labels(2, 10), 0.1)
    assert model.training and not model.body[1].training


# FAT's early stop

def earlystopped(model, x, y, eps, alpha, steps, tau, omega, start, stream):
    """RECIPES 7, one example at a time: before each step, an example that is misclassified leaves if its counter is 0, and counts down otherwise.

    Gives the images and how many steps each was taken."""
    out, taken = [], []
    for i in range(len(x)):
        image, point, counter = x[i:i+1], start[i:i+1], tau
        for t in range(steps):
            active = [point]                       # shrinks to nothing when the example leaves
            with torch.enable_grad():
                z = active[0].clone().requires_grad_()
                logits = model(z)
                g, = torch.autograd.grad(F.cross_entropy(logits, y[i:i+1]), z)
            if int(logits.argmax()) != int(y[i]):
                if counter == 0: active.pop()
                else: counter -= 1
            if not active: break
            point = point + alpha * g.sign() + omega * stream.of("step", t).normal(x)[i:i+1]
            point = torch.clamp(torch.min(torch.max(point, image - eps[i]), image + eps[i]), 0, 1)
        else: t = steps
        out.append(point)
        taken.append(t)
    return torch.cat(out), taken


@pytest.mark.parametrize("tau", [0, 1, 2])
@pytest.mark.parametrize("omega", [0., 0.02])
def test_friendly_pgd_equals_the_textbook_example_by_example(tau, omega):
    n, steps = 40, 6
    model, x, y = wavy(n, classes=3, seed=3)
    eps, stream = RADII[:5].repeat(8), noise(n)
    attack = FriendlyPGD(0.02, steps, tau=tau, omega=omega)
    start = attack.start(x, per_example(eps, x), stream)
    want, taken = earlystopped(model, x, y, eps, 0.02, steps, tau, omega, start, stream)
    assert {tau, tau + 1, steps} <= set(taken) and min(taken) == tau   # some leave as soon as they may, some later, some never
    got = attack(model, x, y, eps, stream)
    assert torch.allclose(got, want, rtol=0, atol=1e-7)
    first = torch.tensor(taken) == 0
    assert torch.equal(got[first], start[first])   # a start that already fools the network is used as it is (tau 0)


def test_a_counter_goes_on_after_an_example_was_right_again():
    "Decrements need not be consecutive: wrong at the start, right after one step, wrong after the second, where tau=1 is used up."
    class Zigzag(nn.Module):   # wrong on [0.4,0.5], right on (0.5,0.6), wrong from 0.6 on; the loss always rises to the right
        def forward(self, x):
            v = x.flatten(1)[:, 0]
            right = (v > 0.501) & (v < 0.599)
            return torch.stack([torch.where(right, 1., -1.) - v, torch.zeros_like(v)], 1)
    x, y = torch.full((1, 1, 1, 1), 0.45), torch.zeros(1, dtype=torch.long)
    ends = [float(FriendlyPGD(0.1, 5, tau=tau, start=CleanStart())(Zigzag(), x, y, 0.5)) for tau in (0, 1, 2, 3)]
    assert ends == pytest.approx([0.45, 0.65, 0.75, 0.85])


def test_friendly_pgd_without_an_early_stop_is_pgd():
    model, x, y = wavy(12)
    assert torch.equal(FriendlyPGD(0.02, 5, tau=99)(model, x, y, 0.1, noise(12)), PGD(0.02, 5)(model, x, y, 0.1, noise(12)))


# Success and restarts

def test_any_freezes_an_example_where_it_first_fools_the_model():
    "KL does not look at labels, so it also leads from a wrong class to the right one."
    model, x, y = wavy(60, wrong=2)
    begin = UniformStart()(x, per_example(0.1, x), noise(60))
    path = [begin] + [PGD(0.05, t, KL(), GivenStart(begin))(model, x, y, 0.1) for t in range(1, 7)]
    fooled = torch.stack([model(p).argmax(1) != y for p in path])
    first = torch.where(fooled.any(0), fooled.float().argmax(0), 6)
    assert torch.equal(PGD(0.05, 6, KL(), GivenStart(begin), success="any")(model, x, y, 0.1), torch.stack(path)[first, torch.arange(60)])
    assert (fooled.any(0) & ~fooled[-1]).any() and 0 < fooled.any(0).sum() < 60 and len(first.unique()) > 3


@given(st.integers(0, 30), st.integers(1, 4), st.sampled_from(LOSSES[:3]), st.sampled_from(["last", "any"]))
@settings(max_examples=25)
def test_dropping_the_broken_changes_no_verdict(seed, restarts, loss, success):
    n, eps = 14, 0.06
    model, x, y = wavy(n, seed=seed)
    attack, stream = PGD(0.03, 3, loss, success=success), noise(n, seed)
    x_adv, standing = restarted(attack, model, x, y, eps, stream, restarts)
    every = [attack(model, x, y, eps, stream.of("restart", r)) for r in range(restarts)]   # nobody is dropped
    fooled = torch.stack([model(x).argmax(1) != y] + [model(e).argmax(1) != y for e in every])
    assert torch.equal(standing, ~fooled.any(0)) and torch.equal(standing, model(x_adv).argmax(1) == y)
    part = torch.arange(n)[::2]
    assert torch.equal(restarted(attack, model, x[part], y[part], eps, stream[part], restarts)[1], standing[part])
    first = torch.where(fooled.any(0), fooled.float().argmax(0), restarts)
    assert torch.equal(x_adv, torch.stack([x, *every])[first, torch.arange(n)])


@given(st.integers(0, 30), st.integers(1, 3), st.sampled_from(LOSSES[:3]))
@settings(max_examples=25)
def test_counting_any_iterate_leaves_at_most_as_many_standing(seed, restarts, loss):
    model, x, y = wavy(14, seed=seed)
    verdict = {s: restarted(PGD(0.03, 4, loss, success=s), model, x, y, 0.06, noise(14), restarts)[1] for s in ("last", "any")}
    assert not (verdict["any"] & ~verdict["last"]).any()


@pytest.mark.parametrize("loss", LOSSES[:2])
@pytest.mark.parametrize("restarts", [1, 3])
def test_closing_ranks_saves_passes_and_changes_no_adversary(restarts, loss, monkeypatch):
    model, x, y = wavy(40)
    eps, stream, images = torch.linspace(0., 0.12, 40), noise(40), []
    model.conv.register_forward_pre_hook(lambda module, args: images.append(len(args[0])))
    whole = PGD(0.03, 12, loss, success="any")(model, x, y, eps, stream)
    found = {}
    for look in (1, 2, 5, 12, 1000):
        monkeypatch.setattr(PGD, "check_every", look)
        assert torch.equal(PGD(0.03, 12, loss, success="any")(model, x, y, eps, stream), whole)   # each example with its own radius
        images.clear()
        found[look] = *restarted(PGD(0.03, 12, loss, success="any"), model, x, y, 0.05, stream, restarts), sum(images)
    x_adv, standing, passes = found[1000]   # nobody is left out
    assert 5 < standing.sum() < 25
    for look, (other, verdict, count) in found.items(): assert torch.equal(other, x_adv) and torch.equal(verdict, standing), look
    counts = [found[look][2] for look in (1, 2, 5, 12)]
    assert counts[0] < counts[1] < counts[2] < counts[3] == passes
    assert counts[0] < 0.8 * passes


@pytest.mark.parametrize("attack", [*(make(success=s) for s in ("last", "any") for make in (partial(PGD, 0.03, 4), partial(PGD, 0.03, 4, KL(), NormalStart(0.01)), partial(RandomTargetPGD, 0.03, 4))),
                                    FriendlyPGD(0.03, 4, omega=0.01)])
def test_restarts_side_by_side_are_those_one_by_one(attack, monkeypatch):
    monkeypatch.setattr(PGD, "check_every", 2)
    model, x, y = wavy(40, classes=4)
    stream, sizes = noise(40), []
    model.conv.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    x_adv, standing = restarted(attack, model, x, y, 0.06, stream, 7)
    side, sizes[:] = len(sizes), []
    wanted, stands = x.clone(), model(x).argmax(1) == y
    for r in range(7):
        i = stands.nonzero()[:, 0]
        wanted[i] = attack(model, x[i], y[i], 0.06, stream[i].of("restart", r))
        stands[i] = model(wanted[i]).argmax(1) == y[i]
    assert torch.equal(standing, stands) and torch.equal(x_adv, wanted) and 0 < int(stands.sum()) <= 20
    assert side < len(sizes) - 5


def test_everybody_may_be_broken_at_once():
    model, x, y = wavy(12)
    y = (model(x).argmax(1) + 1) % 3
    attack = PGD(0.03, 30, start=CleanStart(), success="any")
    calls = []
    model.conv.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    assert torch.equal(attack(model, x, y, 0.1, noise(12)), x) and calls == [12] * PGD.check_every


def test_ranks_stay_open_where_the_batch_is_normalised_as_a_whole(monkeypatch):
    model, x, y = narrow(classes=3), numbers(12, 1, 8, 8), labels(12, 3)
    ends = []
    for look in (1, 1000):
        monkeypatch.setattr(PGD, "check_every", look)
        ends.append(PGD(0.03, 5, mode="train", success="any")(model, x, y, 0.1, noise(12)))
    assert torch.equal(*ends)


def test_restarts_take_turns_where_the_batch_is_normalised_as_a_whole():
    x, attack, models = numbers(12, 1, 8, 8), PGD(0.03, 3, mode="train"), [narrow(classes=3).eval() for _ in range(2)]
    y = models[0](x).argmax(1)
    assert all(map(torch.equal, *(m.state_dict().values() for m in models)))
    x_adv, standing = restarted(attack, models[0], x, y, 0.15, noise(12), 6)
    wanted, stands, left = x.clone(), models[1](x).argmax(1) == y, []
    for r in range(6):
        i = stands.nonzero()[:, 0]
        wanted[i] = attack(models[1], x[i], y[i], 0.15, noise(12)[i].of("restart", r))
        stands[i] = models[1](wanted[i]).argmax(1) == y[i]
        left.append(int(stands.sum()))
    assert left[2] <= 6 and 0 < left[5] < left[2] and torch.equal(standing, stands) and torch.equal(x_adv, wanted)
    assert all(map(torch.equal, *(m.state_dict().values() for m in models)))   # the running statistics moved alike


def test_an_attack_that_has_no_mode_is_restarted_as_well():
    model, x, y = wavy(12)
    class Own:
        def __call__(self, model, x, y, eps, noise): return x
    x_adv, standing = restarted(Own(), model, x, y, 0.1, noise(12), 3)
    assert torch.equal(x_adv, x) and torch.equal(standing, model(x).argmax(1) == y)


def test_more_restarts_break_more():
    model, x, y = wavy(60, wrong=1000)
    stands = [int(restarted(PGD(0.03, 1), model, x, y, 0.04, noise(60), r)[1].sum()) for r in (0, 1, 2, 8)]
    assert stands[0] == int((model(x).argmax(1) == y).sum()) and stands[0] > stands[1] >= stands[2] > stands[3]
