"DRA: the attack against Alg. 1 written out, its share of pixels, the schedule, the replay's two steps, calibration, and fine-tuning from a clean run."
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch import nn

from adaptive_at.attacks import KL, NormalStart, PGD, UniformStart
from adaptive_at.base.errors import UserError
from adaptive_at.base.identity import spec_hash, to_spec
from adaptive_at.base.schedules import resolve_schedules
from adaptive_at.data.datasets import Batch
from adaptive_at.algorithms.dra import CLEAN, DRA, FINE_TUNE, FINE_TUNE_MNIST, HalfAndHalf, Replay, Scheduled, Source, accuracy, calibrate, decaying, dra_finetune, dra_finetune_constant, dra_finetune_mnist, madry_dra, madry_pgd, normalised, on_mnist, pgd_finetune, significant, success, trades_dra, trades_pgd
from adaptive_at.algorithms.baselines import Training, at, mart, natural, trades
from adaptive_at.networks import NarrowResNet, fingerprint
from adaptive_at.objectives import TRADES, AdversarialCE
from adaptive_at.tables.plan import Row
from adaptive_at.radius import Fixed
from adaptive_at.store.runs import Store
from adaptive_at.training import Monitor, Run, State, train, train_step
from helpers import buffers, labels, narrow, noise, numbers, random_data, same, wavy

pytestmark = pytest.mark.trains


def tensor(*values): return torch.tensor(values)


class Linear(nn.Module):
    "Two classes; class 1 where w x > b."
    def __init__(self, w, b=0.): super().__init__(); self.w, self.b = w, b
    def forward(self, x): m = x.flatten(1) @ self.w - self.b; return torch.stack([-m, m], 1) / 2


def slope(model, x, y):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)[0]


def written_out(model, x, y, eps, p, steps, rank):
    "Alg. 1, image by image, in numpy."
    results = []
    for i in range(len(x)):
        one, cls = x[i:i+1], y[i:i+1]
        x_t = one.numpy().copy()
        for t in range(steps):
            g = slope(model, torch.from_numpy(x_t), cls).numpy()
            x_t = x_t + np.float32(float(eps[i]) / steps) * g / np.abs(g).mean()
        if rank == "end": g = slope(model, torch.from_numpy(x_t), cls).numpy()
        order = np.argsort(-np.abs(g).ravel(), kind="stable")
        keep = np.zeros(g.size, bool)
        keep[order[:round(p * g.size)]] = True
        results.append(np.clip(np.where(keep.reshape(g.shape), x_t, one.numpy()), 0, 1))
    return torch.from_numpy(np.concatenate(results)).float()


# The attack

@pytest.mark.parametrize("p, steps, rank", [(1/3, 5, "last"), (1/3, 5, "end"), (0.5, 1, "last"), (1., 3, "last"), (0., 3, "end")])
def test_it_is_algorithm_1(p, steps, rank):
    model, x, y = wavy(6)
    eps = torch.linspace(0.01, 0.1, 6)
    assert torch.allclose(DRA(p, steps, rank=rank)(model, x, y, eps), written_out(model, x, y, eps, p, steps, rank), atol=1e-5)


def test_the_gradient_that_ranks_matters():
    model, x, y = wavy(6)
    assert not torch.equal(DRA(1/3, rank="last")(model, x, y, 0.1), DRA(1/3, rank="end")(model, x, y, 0.1))


@pytest.mark.parametrize("steps", [1, 5])
def test_p_1_changes_every_pixel_with_a_gradient_that_is_not_stopped_by_the_range(steps):
    w = tensor(1., -2., 0., 3., 0.5, -0.1)
    x = tensor([.5, .5, .5, .5, .5, .5], [0., .5, .5, 1., 1., 1.], [1., 0., 0., 0., .5, 0.]).view(3, 1, 2, 3)
    y = tensor(1, 1, 0)
    moved = (DRA(1., steps)(Linear(w), x, y, 0.1) != x).flatten(1)
    up = torch.stack([-w, -w, w]).sign()                        # where the attack pushes
    stopped = ((up < 0) & (x.flatten(1) == 0)) | ((up > 0) & (x.flatten(1) == 1))
    assert torch.equal(moved, (w != 0).expand(3, 6) & ~stopped)
    assert moved.sum(1).tolist() == [5, 3, 2]


def test_p_1_on_a_network_and_p_0_on_anything():
    model, x, y = wavy(8)
    x = 0.3 + 0.4 * x
    assert (slope(model, x, y) != 0).all() and (DRA(1., 1)(model, x, y, 0.01) != x).all()
    for steps in (1, 5): assert torch.equal(DRA(0., steps)(model, x, y, 0.5), x)


@pytest.mark.parametrize("p, kept", [(0, 0), (1/6, 512), (1/3, 1024), (1/2, 1536), (1, 3072)])
def test_the_share_counts_values_of_one_image_by_magnitude(p, kept):
    g = numbers(3, 3, 32, 32) - 0.5
    mask = significant(g, p)
    assert mask.flatten(1).sum(1).tolist() == [kept] * 3
    for i in range(3):
        if 0 < kept < 3072: assert g[i][mask[i]].abs().min() >= g[i][~mask[i]].abs().max() and (g[i][mask[i]] < 0).any()


def test_no_gradient_no_move():
    class Flat(nn.Module):
        def forward(self, x): return torch.zeros(len(x), 3) + 0 * x.flatten(1).sum(1, keepdim=True)
    x = numbers(4, 1, 3, 3)
    assert torch.equal(DRA(1.)(Flat(), x, labels(4, 3), 0.5), x)


def test_a_very_small_gradient_still_gives_full_steps():
    x, w = torch.full((1, 1, 1, 2), 0.5), 1e-15 * tensor(1., 3.)
    assert torch.allclose(DRA(1.)(Linear(w), x, tensor(0), 0.1) - x, tensor(0.05, 0.15).view(1, 1, 1, 2))
    assert normalised(torch.full((1, 1, 2, 2), 1e-36)).flatten().tolist() == pytest.approx([1.] * 4)


def test_it_runs_in_eval_mode_without_noise():
    net = narrow().train()
    x, y, before = numbers(6, 1, 8, 8), labels(6, 10), buffers(net)
    a = DRA()(net, x, y, 0.05, noise(6))
    assert net.training and same(before, buffers(net))
    assert torch.equal(a, DRA()(net, x, y, 0.05, noise(6, seed=1))) and torch.equal(a, DRA()(net.eval(), x, y, 0.05))


@pytest.mark.parametrize("p", [1.5, -0.1])
def test_a_share_outside_0_to_1_is_refused(p):
    with pytest.raises(UserError, match=f"p is {p}; it is a share"): DRA(p=p)


@given(st.integers(0, 5), st.lists(st.floats(0, 0.5), min_size=5, max_size=5), st.floats(0, 1), st.integers(1, 4))
def test_mean_change_and_range(seed, eps, p, steps):
    model, x, y = wavy(5, seed=seed)
    eps = tensor(*eps)
    x_adv = DRA(p, steps)(model, x, y, eps)
    assert ((x_adv - x).abs().flatten(1).mean(1) <= eps + 1e-6).all() and x_adv.min() >= 0 and x_adv.max() <= 1
    assert torch.equal(x_adv[eps == 0], x[eps == 0])


@given(st.permutations(range(6)))
def test_an_example_is_attacked_alike_wherever_it_stands(order):
    model, x, y = wavy(6)
    eps, order = torch.linspace(0, .2, 6), torch.tensor(order)
    assert torch.allclose(DRA()(model, x[order], y[order], eps[order]), DRA()(model, x, y, eps)[order], atol=1e-6)


# A frozen source

@pytest.fixture
def source(tmp_path):
    network = NarrowResNet(width_factor=4)
    model = network.build(10, 1, key=3).eval()
    torch.save({"model": model.state_dict()}, tmp_path/"last.pt")
    return model, Source(network, fingerprint(model), str(tmp_path/"last.pt"))


def test_adversaries_are_made_on_the_source(source):
    model, s = source
    other, x, y = narrow(seed=1), numbers(6, 1, 8, 8), labels(6, 10)
    on_source = DRA(source=s)(other, x, y, 0.05)
    assert torch.equal(on_source, DRA()(model, x, y, 0.05)) and not torch.equal(on_source, DRA()(other, x, y, 0.05))
    assert all(p.grad is None for p in other.parameters()) and other.training


def test_other_weights_than_the_sources_are_refused(source):
    model, s = source
    with pytest.raises(UserError, match="holds other weights"): DRA(source=replace(s, weights="0" * 16))(model, numbers(2, 1, 8, 8), labels(2, 10), 0.05)


def test_the_sources_path_is_not_part_of_the_identity(source):
    _, s = source
    a, b = dra_finetune(8/255, source=s), dra_finetune(8/255, source=replace(s, path="elsewhere"))
    assert spec_hash(a) == spec_hash(b) != spec_hash(dra_finetune(8/255, source=replace(s, weights="f" * 16))) and spec_hash(a) != spec_hash(dra_finetune(8/255))


# The schedule

def test_the_schedule_at_60_epochs():
    eps = [resolve_schedules(dra_finetune(8/255), e, 60).radius.eps * 255 for e in range(60)]
    assert eps[:50] == pytest.approx(np.linspace(2, 0.5, 50)) and eps[50:] == [0] * 10


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5, 6, 7, 12, 20, 25, 30, 60, 61])
def test_clean_only_is_when_the_radius_is_0_at_any_length(epochs):
    for e in range(epochs):
        m = resolve_schedules(dra_finetune(8/255), e, epochs)
        late = Training(epochs=epochs, lr=FINE_TUNE.lr, schedule=FINE_TUNE.schedule).lr_at(e + 0.5) < FINE_TUNE.lr
        assert (m.radius.eps > 0) == bool(m.objective.adversarial) == (not late)


def test_the_bank_follows_the_schedule():
    data = random_data()
    run = Run("random", "", NarrowResNet(width_factor=4), dra_finetune(8/255, steps=2), Training(epochs=6, batch=8, lr=0.01), Monitor(PGD(0.1, 1), 0.1, 4, every=6))
    state = train(run, data, State(run, data), report_line=lambda line: None)
    assert [h["mean_eps"] * 255 for h in state.history] == pytest.approx([2, 1.625, 1.25, 0.875, 0.5, 0], abs=1e-5)
    assert state.history[-1]["mean_realised"] == 0 < state.history[0]["mean_realised"]


# The replay

class Counting(torch.optim.SGD):
    steps = 0
    def step(self, *args): self.steps += 1; return super().step(*args)


def stepped(method, seed=0):
    "A network after one batch, and how many optimiser steps that took."
    net = narrow(seed=seed).train()
    opt, bank = Counting(net.parameters(), lr=0.05, momentum=0.9), method.radius.bank(_setting(net))
    train_step(method, net, bank, opt, Batch(numbers(8, 1, 8, 8), labels(8, 10), torch.arange(8)), noise(8))
    return net, opt.steps


def _setting(net):
    from adaptive_at.radius import RuleContext
    return RuleContext(8, 10, net.width)


def test_replay_takes_two_steps_clean_first():
    net, steps = stepped(dra_finetune_constant(8/255))
    assert steps == 2
    by_hand = narrow().train()
    opt, x, y = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.9), numbers(8, 1, 8, 8), labels(8, 10)
    x_adv = DRA()(by_hand, x, y, 1/255)      # made before either step
    for images in (x, x_adv):
        opt.zero_grad()
        F.cross_entropy(by_hand(images), y).backward()
        opt.step()
    assert same(net.state_dict(), by_hand.state_dict())


def test_clean_only_epochs_take_one_step_of_natural_training():
    net, steps = stepped(resolve_schedules(dra_finetune(8/255), 55, 60))
    assert steps == 1 and same(net.state_dict(), stepped(natural())[0].state_dict())
    assert stepped(resolve_schedules(dra_finetune(8/255), 49, 60))[1] == 2


def test_half_and_half_is_one_step_on_the_mean():
    model, x, y = wavy(6)
    x_adv = DRA()(model, x, y, 0.1)
    loss, = HalfAndHalf().losses(Batch(x, y, torch.arange(6)), x_adv, y, None)
    assert loss(model).item() == pytest.approx((F.cross_entropy(model(x), y) + F.cross_entropy(model(x_adv), y)).item() / 2)
    assert stepped(replace(dra_finetune_constant(8/255), objective=HalfAndHalf()))[1] == 1


# Fine-tuning starts from the clean run

def test_fine_tuning_starts_from_the_clean_runs_weights(tmp_path):
    data, monitor = random_data(), Monitor(PGD(0.1, 1), 0.1, 4, every=2)
    row = Row(dra_finetune(8/255, steps=1), replace(FINE_TUNE, epochs=2, lr=0.), start="Vanilla")
    clean = Run("random", "", NarrowResNet(width_factor=4), natural(), Training(epochs=2, batch=8), monitor)
    run = replace(clean, method=row.method, training=row.training, start=clean)
    store = Store(tmp_path)
    store.train(run, data, report_line=lambda line: None)
    start, end = (dict(store.model(r, data).named_parameters()) for r in (clean, run))
    assert store.finished(clean) and same(start, end) and run.id != replace(run, start=None).id   # lr 0: every weight, of all layers, is the clean run's
    assert not same(start, dict(clean.network.build(3, 1).named_parameters()))


def test_all_layers_are_fine_tuned():
    before, after = dict(narrow().named_parameters()), dict(stepped(dra_finetune_constant(8/255))[0].named_parameters())
    assert all(not torch.equal(before[k], after[k]) for k in before)


# Calibration

def linear(n=400):
    "A linear model and images whose margins spread over 0 to 0.4, away from the ends of the range."
    w = tensor(1., -2., 0.5, 3.)
    x = 0.35 + 0.3 * numbers(n, 1, 2, 2)
    model = Linear(w, b=float((x.flatten(1) @ w).median()))
    return model, w, x, model(x).argmax(1)


@pytest.mark.parametrize("eps", [8/255, 0.1])
def test_calibration_finds_the_factor_that_is_known_for_a_linear_model(eps):
    "PGD takes r |w|_1 off the margin, DRA with all pixels f e sum(w^2) / mean|w|."
    model, w, x, y = linear()
    r = 2.55/8 * eps
    found = calibrate(model, x, y, eps, DRA(1.), reference=PGD(r / 4, 20), rounds=14)
    known = 2.55 * w.abs().sum() * w.abs().mean() / (w**2).sum()
    assert found.factor == pytest.approx(float(known), rel=0.03) and abs(found.dra - found.pgd) <= 0.5 and 0 < found.pgd < 100 and found.examples == 400


def test_the_papers_pgd_goes_three_quarters_of_the_way():
    "Steps of eps/20 from a uniform start: a value moves by min(1, 1 + u) eps, u uniform in [-1, 1), 3/4 eps on average."
    x = torch.full((2000, 1, 1, 1), 0.5)
    x_adv = PGD(0.1 / 20, 20)(Linear(tensor(1.)), x, torch.ones(2000, dtype=torch.long), 0.1)
    assert (x - x_adv).mean().item() == pytest.approx(0.075, rel=0.03)
    model, w, x, y = linear()
    assert calibrate(model, x, y, 0.1, DRA(1.)).factor < 0.9 * calibrate(model, x, y, 0.1, DRA(1.), reference=PGD(0.01, 20)).factor


def test_calibration_is_used_as_the_factor():
    assert dra_finetune_constant(8/255, factor=2.) == replace(dra_finetune_constant(8/255), radius=Fixed(2/255))
    assert decaying(8/255, 3.).first == 3 * decaying(8/255).first and decaying(8/255, 3.).last == 3 * decaying(8/255).last


def test_calibration_says_when_there_is_no_such_factor():
    model, _, x, y = linear()
    with pytest.raises(UserError, match="bounds"): calibrate(model, x, y, attack=DRA(0.))


# Constants

def test_published_constants_at_8_255():
    ours, constant, mnist = dra_finetune(8/255), dra_finetune_constant(8/255), dra_finetune_mnist(0.3)
    assert (ours.radius.eps.first, ours.radius.eps.last, ours.radius.eps.until, ours.radius.eps.after) == (2/255, 0.5/255, 50/60, 0)
    assert ours.attack == constant.attack == DRA(1/3, 5) and ours.attack.source is None and ours.attack.mode == "eval"
    assert constant.radius == Fixed(1/255) and constant.objective == Replay() and isinstance(ours.radius, Scheduled)
    assert mnist.radius == Fixed(0.1) and mnist.attack == DRA(2/3, 20)
    assert madry_pgd(8/255) == at(2.55/255) and pgd_finetune(8/255) == replace(at(2.55/255), objective=Replay())
    assert madry_dra(8/255) == replace(constant, objective=AdversarialCE()) and trades_dra(8/255) == replace(constant, objective=TRADES(1.))
    assert trades_pgd(8/255).radius == Fixed(2.55/255) and trades_pgd(8/255).objective == TRADES(1.) and trades_pgd(8/255).attack.loss == KL()


def test_strengths_keep_their_ratio_to_the_radius():
    a, b = dra_finetune(8/255), dra_finetune(0.25)
    assert b.radius.eps.first / 0.25 == pytest.approx(a.radius.eps.first / (8/255)) == pytest.approx(2/8)
    assert madry_pgd(0.25).radius.eps / 0.25 == pytest.approx(2.55/8) and madry_dra(0.25).radius.eps / 0.25 == pytest.approx(1/8)


def test_training():
    assert (FINE_TUNE.epochs, FINE_TUNE.batch, FINE_TUNE.momentum, FINE_TUNE.weight_decay, FINE_TUNE_MNIST.epochs) == (60, 128, 0.9, 2e-4, 50)
    assert [FINE_TUNE.lr_at(e) for e in (0, 49.9, 50, 59)] == pytest.approx([0.01, 0.01, 0.001, 0.001])
    assert (CLEAN.epochs, CLEAN.lr, CLEAN.weight_decay) == (200, 0.1, 2e-4) and math.isclose(FINE_TUNE_MNIST.lr_at(49), 0.01)
    to_spec(FINE_TUNE)


def test_trades_on_dra_samples_runs():
    net, steps = stepped(trades_dra(8/255))
    assert steps == 1 and all(p.isfinite().all() for p in net.parameters())


# What the tables use

def test_success_is_of_the_images_that_were_right():
    right, standing = torch.tensor([1, 1, 1, 0, 1]).bool(), torch.tensor([1, 0, 0, 0, 1]).bool()
    assert success(right, standing) == (50., 4)
    assert success(~right, torch.tensor([0, 0, 0, 1, 0]).bool()) == (0., 1) and success(torch.zeros(3).bool(), torch.zeros(3).bool()) == (0., 0)


def test_accuracy_under_an_attack_of_known_strength():
    "On a linear model DRA with all pixels takes e sum(w^2) / mean|w| off the margin."
    model, w, x, y = linear()
    margin = model(x).abs().amax(1) * 2
    for e in (0.01, 0.03): assert accuracy(model, DRA(1.), x, y, e) == pytest.approx(100 * float((margin > e * (w**2).sum() / w.abs().mean()).float().mean()), abs=0.3)
    assert accuracy(model, DRA(1.), x, y, 0.02, batch=7) == accuracy(model, DRA(1.), x, y, 0.02)


def test_calibration_refuses_a_network_that_no_attack_moves():
    class Constant(nn.Module):
        def forward(self, x): return (x * 0).flatten(1)[:, :2] + torch.tensor([1., 0.])
    _, _, x, y = linear()
    with pytest.raises(UserError, match="trained on clean images"): calibrate(Constant(), x, y)


def test_baselines_on_mnist():
    for method, starts in ((at(0.3), UniformStart()), (trades(0.3), NormalStart(0.001)), (mart(0.3), NormalStart(0.001))):
        theirs = on_mnist(method, 0.3)
        assert (theirs.attack.alpha, theirs.attack.steps, theirs.attack.start) == (0.01, 40, starts) and replace(theirs, attack=method.attack) == method and theirs.attack.loss == method.attack.loss
    assert on_mnist(at(0.15), 0.15).attack.alpha == pytest.approx(0.005)


def test_two_updates_are_counted():
    assert dra_finetune_constant(8/255).passes == 5 + 2 and madry_dra(8/255).passes == 5 + 1 and pgd_finetune(8/255).passes == 10 + 2
