"IAAT's rule on scripted attacks, its steps and random targets, and mixup's draws and loss."
import copy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from adaptive_at.attacks import PGD, CleanStart, UniformStart, per_example
from adaptive_at.base.identity import spec_hash
from adaptive_at.base.schedules import resolve_schedules
from adaptive_at.data.datasets import Batch
from adaptive_at.algorithms.iaat import CrossingPGD, EIGHT, HalfRandomTargetPGD, IAAT, IAAT_RESNET18, IAAT_WRN, MixupCE, PerRun, RandomTargetPGD, SIXTEEN, iaat, iaat_baseline, imagenet_baseline, imagenet_iaat, imagenet_training, mixing, mixup_at, other_class
from adaptive_at.algorithms.baselines import Method, Training
from adaptive_at.objectives import AdversarialCE
from adaptive_at.radius import Fixed, RuleContext
from adaptive_at.base.rng import RandomStream, key
from adaptive_at.training import Monitor, Run, State, train, train_step
from helpers import OneLayer, labels, narrow, noise, numbers, random_data, same, wavy

pytestmark = pytest.mark.trains

GAMMA = 1.9


def tensor(*values): return torch.tensor(values)


def close(a, b, atol=1e-6): return torch.allclose(a, torch.as_tensor(b), rtol=1e-5, atol=atol)


# Scripted attacks: they succeed where the script says so. Radii in units of 1/255 throughout, so that the numbers are the papers'.

class Scripted(nn.Module):
    "Right or wrong as scripted for the clean image, the attack at the remembered radius and the one at the larger: columns of `holds` [B,3]."
    def __init__(self):
        super().__init__()
        self.tried = []

    def script(self, holds, memory): self.holds, self.memory = torch.tensor(holds).bool(), memory.clone()

    def forward(self, x):
        attacked, eps = x[:, 0, 0, 0] > 0, x[:, 1, 0, 0]
        plus = attacked & close_each(eps, self.memory + GAMMA)
        assert (~attacked | plus | close_each(eps, self.memory)).all(), "an attack at another radius than the remembered and the larger one"
        self.tried.append("plus" if plus.any() else "same" if attacked.any() else "clean")
        right = self.holds.gather(1, (attacked.long() + plus.long())[:, None])[:, 0]
        return torch.stack([~right, right], 1).float()


def close_each(a, b): return (a - b).abs() < 1e-4


@dataclass(frozen=True)
class Marked:
    "An 'attack' that writes its radius into the image."
    steps: int = 10
    mode: str = "eval"
    def __call__(self, model, x, y, eps, noise=None):
        return torch.stack([torch.ones(len(x)), per_example(eps, x).flatten()], 1).view(-1, 2, 1, 1)


def visits(rule, script, start):
    "Radii and memories of one example per column, for a script [visit][example](clean, same, plus)."
    n, model = len(script[0]), Scripted()
    bank = rule.bank(RuleContext(n, 2, 1))
    bank.eps[:] = torch.tensor(start)
    batch = Batch(torch.zeros(n, 2, 1, 1), torch.ones(n, dtype=torch.long), torch.arange(n), noise(n))
    radii, memories = [], []
    for holds in script:
        model.script(holds, bank.eps)
        radii.append(rule.radius(bank, batch, model))
        memories.append(bank.eps.clone())
    return torch.stack(radii), torch.stack(memories), model.tried


def rule(**changes): return IAAT(**{"eps": 8., "attack": Marked(), "gamma": GAMMA, "beta": 0.1} | changes)


def test_alg_2_on_a_scripted_sequence():
    """Plus first, then the same, then minus, each with weight 0.1 (worked out by hand).

    both hold: 8 + .19; only the same: stays; none: 8.19 - .19; only plus: plus comes first, 8 + .19; only plus again: 8.38"""
    script = [[(1, 1, 1)], [(1, 1, 0)], [(1, 0, 0)], [(1, 0, 1)], [(1, 0, 1)]]
    for treatment in ("released", "printed"):
        radii, memories, tried = visits(rule(misclassified=treatment), script, [8.])
        assert close(memories[:, 0], tensor(8.19, 8.19, 8., 8.19, 8.38)) and torch.equal(radii, memories)
        assert sorted(set(tried)) == ["clean", "plus", "same"] and len(tried) == 15   # each once per visit; a smaller radius is never tried


def test_the_candidate_has_weight_beta():
    _, memories, _ = visits(rule(beta=0.25), [[(1, 1, 1)]], [8.])
    assert close(memories, [[0.75 * 8 + 0.25 * 9.9]])


def test_misclassified_examples_both_ways():
    "All four outcomes of the trials, for a wrong clean image remembered at 8: 0.9 * 8 whatever the trials say, or Alg. 2's memory and a clean image."
    script = [[(0, s, p) for s in (0, 1) for p in (0, 1)]]
    radii, memories, _ = visits(rule(), script, [8.] * 4)
    assert close(radii, [[7.2] * 4]) and close(memories, [[7.2] * 4])
    radii, memories, _ = visits(rule(misclassified="printed"), script, [8.] * 4)
    assert radii.tolist() == [[0.] * 4] and close(memories, [[7.81, 8.19, 8., 8.19]])


def test_candidates_are_not_negative():
    "From 1 the smaller radius would be -0.9: the candidate is 0 and the memory 0.9; from 0 it stays at 0."
    for treatment in ("released", "printed"):
        _, memories, _ = visits(rule(misclassified=treatment), [[(1, 0, 0)] * 2], [1., 0.])
        assert close(memories, [[0.9, 0.]])


outcomes = st.tuples(*[st.booleans()] * 3)


@given(st.lists(st.tuples(st.floats(0, 30, width=32), outcomes), min_size=1, max_size=6), st.sampled_from(["released", "printed"]))
def test_a_memory_moves_by_at_most_019_per_visit(examples, treatment):
    "Upwards always; downwards where the clean image is right, or under the printed rule. Else it loses a tenth."
    start, holds = zip(*examples)
    _, memories, _ = visits(rule(misclassified=treatment), [list(holds)], list(start))
    change, right = memories[0] - torch.tensor(start), torch.tensor(holds)[:, 0]
    bounded = right | (treatment == "printed")
    assert (change <= 0.19 + 1e-5).all() and (change[bounded] >= -0.19 - 1e-5).all() and (memories >= 0).all()
    assert close(change[~bounded], -0.1 * torch.tensor(start)[~bounded], 1e-5)


# Warm-up

def test_the_memory_at_the_end_of_the_warm_up():
    "Released: 8 for those right in the last warm-up epoch, 0 for the others, whatever came before. Printed: 8 for all. No trial attack is run."
    script = [[(1, 0, 0), (0, 0, 0), (1, 0, 0), (0, 0, 0)], [(1, 0, 0), (1, 0, 0), (0, 0, 0), (0, 0, 0)]]
    radii, memories, tried = visits(rule(warm=1.), script, [0.] * 4)
    assert radii.tolist() == memories.tolist() == [[8., 0., 8., 0.], [8., 8., 0., 0.]] and set(tried) == {"clean"}
    radii, memories, tried = visits(rule(warm=1., misclassified="printed"), script, [0.] * 4)
    assert radii.tolist() == [[8., 0., 8., 0.], [8., 8., 0., 0.]] and memories.tolist() == [[8.] * 4] * 2 and set(tried) == {"clean"}


@pytest.mark.parametrize("warmup, epochs, length, warm", [(5, 200, 200, 5), (10, 110, 110, 10), (0, 200, 200, 0), (5, 200, 30, 1), (10, 110, 30, 3), (5, 200, 20, 1), (5, 200, 3, 1), (0, 200, 20, 0)])
def test_the_warm_up_lasts_the_papers_epochs(warmup, epochs, length, warm):
    method = iaat(EIGHT, warmup, epochs)
    assert [bool(resolve_schedules(method, e, length).radius.warm) for e in range(length)] == [True] * warm + [False] * (length - warm)


def test_without_warm_up_memories_start_from_0_and_grow():
    method = resolve_schedules(iaat(EIGHT, warmup=0), 0, 200)
    assert not method.radius.warm and method.radius.bank(RuleContext(3, 2, 1)).eps.tolist() == [0.] * 3
    radii, _, _ = visits(rule(), [[(1, 1, 1)], [(1, 1, 1)]], [0.])
    assert close(radii[:, 0], tensor(0.19, 0.38))


# ImageNet's lower bound

def test_imagenets_radii_are_at_least_4():
    "The memory is not bounded, and a radius above 4 is left alone."
    script = [[(1, 1, 1), (1, 0, 0), (0, 1, 1), (1, 1, 1)]]
    radii, memories, _ = visits(rule(least=4.), script, [0., 2., 1., 8.])
    assert close(radii, [[4., 4., 4., 8.19]]) and close(memories, [[0.19, 1.81, 0.9, 8.19]])
    radii, _, _ = visits(rule(least=4., misclassified="printed"), script, [0., 2., 1., 8.])
    assert close(radii, [[4., 4., 0., 8.19]])   # trained on the clean image all the same
    radii, _, _ = visits(rule(least=4., warm=1.), script, [0.] * 4)
    assert radii.tolist() == [[8., 8., 0., 8.]]
    assert imagenet_iaat().radius.least == 4/255


# The rule with real attacks

def alg_2(model, x, y, memory, attack, gamma, beta, stream, misclassified):
    "Example by example, with ifs: radii and memories."
    radii, memories = [], []
    for i in range(len(x)):
        one, label, m = x[i:i+1], y[i:i+1], float(memory[i])
        def holds(eps, name): return bool(model(attack(model, one, label, torch.tensor([eps], dtype=torch.float32), stream[torch.tensor([i])].of("selection").of(name))).argmax() == label)
        right = bool(model(one).argmax() == label)
        if holds(m + gamma, "plus"): found = m + gamma
        elif holds(m, "same"): found = m
        else: found = max(0., m - gamma)
        if misclassified == "released" and not right: found = 0.
        m = (1 - beta) * m + beta * found
        memories.append(m)
        radii.append(0. if misclassified == "printed" and not right else m)
    return tensor(*radii), tensor(*memories)


@pytest.mark.parametrize("misclassified", ["released", "printed"])
def test_the_rule_equals_alg_2_example_by_example(misclassified):
    n, gamma = 40, 0.02
    model, x, y = wavy(n, seed=2)
    attack = CrossingPGD(0.01, 5)
    memory, stream, index = numbers(n, seed=5) * 0.08, noise(n), torch.arange(n)
    ours = IAAT(0.05, attack, gamma, 0.1, misclassified=misclassified)
    bank = ours.bank(RuleContext(n + 3, 3, 6))
    bank.eps[:n] = memory
    eps = ours.radius(bank, Batch(x, y, index, stream), model)
    radii, memories = alg_2(model, x, y, memory, attack, gamma, 0.1, stream, misclassified)
    change = (memories - memory).sign()
    assert {-1., 0., 1.} == set(change.tolist())   # all three outcomes
    assert close(eps, radii, 1e-7) and close(bank.eps[:n], memories, 1e-7) and torch.equal(bank.eps[n:], torch.zeros(3))


def test_a_radius_belongs_to_its_example_whatever_the_batch():
    n = 24
    model, x, y = wavy(n, seed=3)
    ours = IAAT(0.05, CrossingPGD(0.01, 4), 0.02, 0.1)
    order = torch.arange(n).flip(0)[:17]
    banks = [ours.bank(RuleContext(n, 3, 6)) for _ in range(2)]
    for b in banks: b.eps[:] = numbers(n, seed=6) * 0.08
    whole = ours.radius(banks[0], Batch(x, y, torch.arange(n), noise(n)), model)
    part = ours.radius(banks[1], Batch(x[order], y[order], order, noise(n)[order]), model)
    assert torch.equal(part, whole[order]) and torch.equal(banks[1].eps[order], banks[0].eps[order])


def test_the_trials_and_the_attack_have_starts_of_their_own():
    seen = []
    @dataclass(frozen=True)
    class Listening(Marked):
        def __call__(self, model, x, y, eps, noise=None):
            seen.append(noise.key)
            return super().__call__(model, x, y, eps, noise)
    model = Scripted()
    model.script([(1, 1, 1)], tensor(0.))
    ours = rule(attack=Listening())
    batch = Batch(torch.zeros(1, 2, 1, 1), tensor(1), tensor(0), noise(1))
    ours.radius(ours.bank(RuleContext(1, 2, 1)), batch, model)
    assert len({*seen, batch.noise.of("attack").key}) == 3


class Counting(nn.Module):
    "Counts forwards, and backwards through its output; batch norm's own counter is one more witness."
    def __init__(self):
        super().__init__()
        self.net, self.width, self.forwards, self.backwards = OneLayer().build(10, 1), 128, 0, 0

    def forward(self, x):
        self.forwards += 1
        out = self.net(x)
        def count(grad): self.backwards += 1
        if out.requires_grad: out.register_hook(count)
        return out

    @property
    def moved(self): return int(next(m for m in self.net.modules() if isinstance(m, nn.BatchNorm2d)).num_batches_tracked)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("epoch, forwards, backwards", [(0, 1 + 10 + 1, 10 + 1), (5, 1 + 20 + 2 + 10 + 1, 20 + 10 + 1)])
def test_what_a_step_costs_and_which_forwards_move_batch_norm(epoch, forwards, backwards, mode):
    method, model, n = resolve_schedules(iaat(0.1, mode=mode), epoch, 200), Counting().train(), 6
    bank = method.radius.bank(RuleContext(n, 10, 128))
    batch = Batch(numbers(n, 1, 8, 8), labels(n, 10), torch.arange(n))
    train_step(method, model, bank, torch.optim.SGD(model.parameters(), 0.1), batch, noise(n))
    assert (model.forwards, model.backwards) == (forwards, backwards) and model.training
    assert model.moved == (forwards if mode == "train" else 1)
    assert resolve_schedules(iaat(0.1), 5, 200).radius.passes == 20 + 1


def test_the_rule_trains_nothing():
    model, method, n = narrow().train(), resolve_schedules(iaat(0.1), 5, 200), 6
    before = copy.deepcopy(dict(model.named_parameters()))
    eps = method.radius.radius(method.radius.bank(RuleContext(n, 10, 16)), Batch(numbers(n, 1, 8, 8), labels(n, 10), torch.arange(n), noise(n)), model)
    assert same(before, dict(model.named_parameters())) and all(p.grad is None for p in model.parameters()) and not eps.requires_grad


@pytest.mark.parametrize("method", [iaat(0.1), iaat(0.1, warmup=0, misclassified="printed"), imagenet_iaat(0.1), mixup_at(0.1)], ids=["iaat", "printed", "imagenet", "mixup"])
def test_runs_resume_bit_for_bit(method):
    data = random_data()
    run = Run("random", "", OneLayerAt5(), method, Training(epochs=4, batch=6), Monitor(PGD(0.1, 1), 0.1, examples=3, every=4))
    saved = {}
    whole = train(run, data, State(run, data), save=lambda s: saved.update({s.epoch: copy.deepcopy(s.state_dict())}), report_line=lambda line: None)
    again = State(run, data)
    again.load_state_dict(saved[2])
    train(run, data, again, report_line=lambda line: None)
    assert same(whole.model.state_dict(), again.model.state_dict()) and torch.equal(whole.bank.eps, again.bank.eps)


@dataclass(frozen=True)
class OneLayerAt5(OneLayer):
    "For images of 5 by 5 pixels."
    def parts(self, channels): return super().parts(channels)[0], 8 * 9


# Steps that grow with the radius

def test_step_sizes():
    eps = tensor(0., 4., 8., 10., 12., 16., 20.)
    assert close(CrossingPGD(2., 10).length(eps), tensor(2., 2., 2., 2., 2.4, 3.2, 4.))      # max(2, eps/5)
    assert close(CrossingPGD(1., 30).length(eps), tensor(1., 1., 1., 1., 1., 16/15, 4/3))    # max(1, eps/15)


def test_without_a_step_size_the_step_is_the_radius_or_longer():
    "As of PGD, whose default it is."
    eps = tensor(0., 4., 8.)
    assert close(CrossingPGD().length(eps), eps) and close(CrossingPGD(steps=1).length(eps), 2 * eps)
    model, x, y = wavy(15)
    assert torch.equal(CrossingPGD()(model, x, y, 0.1, noise(15)), PGD()(model, x, y, 0.1, noise(15)))


def test_growing_steps_are_pgd_with_that_step():
    n = 15
    model, x, y = wavy(n)
    attack = CrossingPGD(0.02, 10)
    small = numbers(n, seed=8) * 0.1   # eps / 5 is at most alpha
    assert torch.equal(attack(model, x, y, small, noise(n)), PGD(0.02, 10)(model, x, y, small, noise(n)))
    assert torch.equal(replace(attack, crossings=0.)(model, x, y, 3 * small, noise(n)), PGD(0.02, 10)(model, x, y, 3 * small, noise(n)))
    for i in range(n):   # each as plain PGD with its own step
        eps = 0.1 + 0.02 * i
        one = torch.tensor([i])
        want = PGD(max(0.02, eps / 5), 10)(model, x[one], y[one], eps, noise(n)[one])
        assert close(attack(model, x, y, torch.full((n,), eps), noise(n))[one], want)


radii = st.lists(st.sampled_from([0., 1e-6, 0.3]) | st.floats(0, 0.5, width=32), min_size=1, max_size=6)


@given(radii, st.sampled_from([CrossingPGD(0.02, 4), RandomTargetPGD(0.02, 4), RandomTargetPGD(0.02, 4, crossings=1.)]), st.integers(0, 20))
@settings(max_examples=40)
def test_every_adversary_stays_in_its_own_ball_and_in_0_1(eps, attack, seed):
    n, eps = len(eps), torch.tensor(eps)
    model, x, y = wavy(n, seed=seed)
    x_adv = attack(model, x, y, eps, noise(n, seed))
    assert x_adv.shape == x.shape and (x_adv >= 0).all() and (x_adv <= 1).all()
    assert ((x_adv - x).abs().flatten(1).amax(1) <= eps + 1e-6).all() and torch.equal(x_adv[eps == 0], x[eps == 0])
    order = torch.arange(n).flip(0)
    assert torch.equal(attack(model, x[order], y[order], eps[order], noise(n, seed)[order]), x_adv[order])


# Random targets

@pytest.mark.parametrize("classes", [2, 3, 10, 513, 1000])
def test_the_drawn_class_is_a_wrong_one(classes):
    draw = torch.linspace(0, 1 - 2**-24, 4001)
    assert draw[-1] < 1
    for y in {0, 1, classes // 2, classes - 1}:
        drawn = other_class(torch.full((len(draw),), y), draw, classes)
        assert (drawn != y).all() and drawn.min() >= 0 and drawn.max() < classes
        assert {int(drawn[0]), int(drawn[-1])} == {1 if y == 0 else 0, classes - 2 if y == classes - 1 else classes - 1}
    if classes <= 10: assert sorted(set(other_class(torch.ones(4001).long(), draw, classes).tolist())) == [k for k in range(classes) if k != 1]


def test_random_targets_are_descended_from_a_uniform_start():
    "The attack written out, with the target read off the example's own stream."
    n, eps = 20, 0.1
    model, x, y = wavy(n, classes=4)
    stream = noise(n)
    target = other_class(y, (stream.of("target class").uniform(torch.zeros(n)) + 1) / 2, 4)
    point = UniformStart()(x, per_example(eps, x), stream)
    for _ in range(6):
        z = point.clone().requires_grad_()
        g, = torch.autograd.grad(F.cross_entropy(model(z), target, reduction="sum"), z)
        point = (x + (point - 0.03 * g.sign() - x).clamp(-eps, eps)).clamp(0, 1)
    got = RandomTargetPGD(0.03, 6)(model, x, y, eps, stream)
    assert close(got, point)
    assert (F.cross_entropy(model(got), target) < F.cross_entropy(model(x), target)) and len(target.unique()) == 4
    assert not torch.equal(RandomTargetPGD(0.03, 6, start=CleanStart())(model, x, y, eps, stream.of("restart", 1)),
                           RandomTargetPGD(0.03, 6, start=CleanStart())(model, x, y, eps, stream.of("restart", 0)))   # another class each time


# Mixup

def indices(*values): return RandomStream(key("mixup"), torch.tensor(values))


@given(st.lists(st.integers(0, 50_000), unique=True, min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_mixup_s_draws_depend_on_the_examples_and_not_on_their_order(index, random):
    shuffled = random.sample(index, len(index))
    lam, partner = mixing(indices(*index))
    again, moved = mixing(indices(*shuffled))
    assert lam == again and 0 <= lam < 1 and lam.shape == ()
    assert sorted(partner.tolist()) == list(range(len(index)))
    def pairs(order, partner): return dict(zip(order, (order[p] for p in partner)))
    assert pairs(index, partner.tolist()) == pairs(shuffled, moved.tolist())


def test_lambda_is_uniform_over_batches_and_so_are_partners():
    "Beta(1,1) is uniform. Batches as in training: a random order of a dataset, cut up, in several epochs."
    lams, first, n = [], [], 4
    for epoch in range(12):
        order = torch.from_numpy(np.random.default_rng(epoch).permutation(400))
        for index in order.split(n):
            lam, partner = mixing(RandomStream(key("epoch", epoch), index))
            lams.append(float(lam))
            first.append(int(partner[0]))
    lams = np.sort(lams)
    assert len(np.unique(lams)) > 1190   # one for each batch
    assert np.abs(lams - (np.arange(1200) + 0.5) / 1200).max() < 1.63 / 1200**0.5   # Kolmogorov and Smirnov, 1%
    counts = np.bincount(first, minlength=n)
    assert (np.abs(counts - 300) < 4 * (1200 * 1/4 * 3/4)**0.5).all()


class Pixels(nn.Module):
    def forward(self, x): return x.flatten(1)


def test_mixup_s_loss_by_hand():
    n, k = 5, 3
    x, x_adv, y, stream = numbers(n, k, 1, 1), numbers(n, k, 1, 1, seed=1), labels(n, k, 2), noise(n)
    draws = [mixing(stream.of("mixup", name)) for name in ("clean", "adversarial")]
    assert draws[0][0] != draws[1][0] and not torch.equal(draws[0][1], draws[1][1])   # separate
    total = 0.
    for images, (lam, partner) in zip((x, x_adv), draws):
        images, lam = images.flatten(1).double().numpy(), float(lam)
        for i, j in enumerate(partner.tolist()):
            z = lam * images[i] + (1 - lam) * images[j]
            log_p = z - np.log(np.exp(z).sum())
            total += -(lam * log_p[y[i]] + (1 - lam) * log_p[y[j]]) / n / 2
    objective, batch = MixupCE(), Batch(x, y, torch.arange(n), stream)
    loss, = objective.losses(batch, x_adv, objective.target(batch, torch.zeros(n)), torch.zeros(n))
    assert float(loss(Pixels())) == pytest.approx(total, rel=1e-5)
    assert loss(Pixels()) == loss(Pixels())   # the same mixture each time it is asked
    assert torch.equal(objective.target(batch, torch.zeros(n)), y)   # the attack sees plain labels


def test_mixup_alone_is_cross_entropy():
    "A batch of one has no partner but itself."
    x, y = numbers(1, 3, 1, 1), labels(1, 3)
    loss, = MixupCE().losses(Batch(x, y, tensor(7), indices(7)), x, y, torch.zeros(1))
    assert float(loss(Pixels())) == pytest.approx(float(F.cross_entropy(x.flatten(1), y)), rel=1e-6)


# Published constants

def test_iaat_on_cifar():
    "Table 7, and the released trainer's train-mode forwards."
    method = iaat(EIGHT)
    now = resolve_schedules(method, 5, 200)
    attack = CrossingPGD(alpha=2/255, steps=10, start=UniformStart(), mode="train", crossings=1.)
    assert method.attack == attack and type(method.objective) is AdversarialCE
    assert now.radius == IAAT(8/255, attack, gamma=1.9/255, beta=0.1, warm=0., least=0., misclassified="released")
    assert resolve_schedules(iaat(EIGHT, 10, 110), 10, 110).radius == now.radius
    assert iaat(EIGHT, mode="eval").radius.attack.mode == iaat(EIGHT, mode="eval").attack.mode == "eval"
    assert len({spec_hash(m) for m in (method, iaat(EIGHT, 0), iaat(EIGHT, 10, 110), iaat(EIGHT, mode="eval"), iaat(EIGHT, misclassified="printed"))}) == 5


def test_a_shorter_run_moves_as_far():
    "beta E is 20 for ResNet-18 and 11 for WRN-32-10."
    for epochs, total in ((200, 20), (110, 11)):
        for length in (30, 60, epochs): assert resolve_schedules(iaat(EIGHT, 5, epochs), 0, length).radius.beta * length == pytest.approx(total)
    assert PerRun(values=(20.,)).value(0, 200) == PerRun(values=(11.,)).value(0, 110) == 0.1 and PerRun(values=(20.,)).value(0, 10) == 1.


def test_other_units_of_eps():
    method = resolve_schedules(iaat(0.25), 9, 200)
    assert method.attack.alpha == pytest.approx(0.25 * 0.25) and method.radius.gamma == pytest.approx(0.2375 * 0.25) and method.radius.eps == 0.25
    assert iaat_baseline(0.25).attack.alpha == pytest.approx(0.0625) and iaat_baseline(1/255, alpha=2/255).attack.alpha == 2/255


def test_baselines():
    pgd = PGD(alpha=2/255, steps=10, start=UniformStart(), mode="train")
    assert iaat_baseline(EIGHT) == Method(Fixed(8/255), pgd, AdversarialCE())
    assert mixup_at(EIGHT) == Method(Fixed(8/255), pgd, MixupCE()) and mixup_at(EIGHT, steps=7).attack.steps == 7


def test_imagenet():
    "Table 8 and appendix D.2."
    method = imagenet_iaat()
    attack = RandomTargetPGD(1/255, 30, mode="train", crossings=1.)
    assert method.attack == attack and SIXTEEN == 16/255
    assert resolve_schedules(method, 30, 110).radius == IAAT(16/255, replace(attack, steps=10), gamma=4/255, beta=0.1, warm=0., least=4/255)
    assert resolve_schedules(method, 29, 110).radius.warm and imagenet_baseline() == Method(Fixed(16/255), RandomTargetPGD(1/255, 30, mode="train"), AdversarialCE())


def test_attacks_in_half_precision_move_by_whole_steps_and_see_rounded_logits():
    "Appendix D.2."
    half, full = imagenet_iaat(half=True), imagenet_iaat()
    assert type(half.attack) is type(half.radius.attack) is HalfRandomTargetPGD and (half.attack.steps, half.radius.attack.steps) == (30, 10) and half.attack.alpha == full.attack.alpha
    seen = []
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    net.register_forward_hook(lambda module, args, out: seen.append((args[0].dtype, out.dtype)))
    x, y = numbers(6, 3, 4, 4), labels(6, 3)
    x_adv = replace(half.attack, steps=3, start=CleanStart())(net, x, y, 1.5/255, noise(6))
    assert set(seen) == {(torch.float32, torch.bfloat16)} and x_adv.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    assert float((x_adv - x).abs().max()) * 255 == pytest.approx(1.5, abs=1e-3)


@pytest.mark.parametrize("training, epochs, decay, rates", [
    (IAAT_RESNET18, 200, 2e-4, {1: 0.1, 80: 0.1, 81: 0.01, 140: 0.01, 141: 1e-3, 170: 1e-3, 171: 1e-4, 200: 1e-4}),
    (IAAT_WRN, 110, 5e-4, {1: 0.1, 70: 0.1, 71: 0.02, 90: 0.02, 91: 4e-3, 100: 4e-3, 101: 8e-4, 110: 8e-4}),
    (imagenet_training(), 110, 1e-4, {6: 0.8, 35: 0.8, 36: 0.08, 70: 0.08, 71: 8e-3, 95: 8e-3, 96: 8e-4}),
    (imagenet_training(4096), 110, 1e-4, {6: 1.6, 36: 0.16}), (imagenet_training(128), 110, 1e-4, {1: 0.05, 6: 0.05, 36: 5e-3})])
def test_training(training, epochs, decay, rates):
    assert (training.epochs, training.weight_decay, training.momentum) == (epochs, decay, 0.9)
    assert {e: training.lr_at(e - 1) for e in rates} == pytest.approx(rates)


def test_imagenets_rate_rises_from_01_over_5_epochs():
    assert [imagenet_training().lr_at(e) for e in (0, 2.5, 5, 34.9)] == pytest.approx([0.1, 0.45, 0.8, 0.8])
    assert IAAT_RESNET18.batch == IAAT_WRN.batch == 128
