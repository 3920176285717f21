"An attack climbs the network that is judged: batch norms are folded into convolutions only where that is the same function."
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from adaptive_at import networks as nets
from adaptive_at.attacks import FGSM, PGD, CleanStart, FriendlyPGD
from adaptive_at.evaluation import AutoAttack, Column, Transfer, WhiteBox, evaluate, evaluation
from adaptive_at.algorithms.baselines import Training, at
from adaptive_at.networks import BasicBlock, Classifier, NarrowResNet, folded, normed_convolutions, approve_folding
from adaptive_at.algorithms.saat import StrengthAdaptivePGD
from adaptive_at.training import Monitor, Run, State, train
from helpers import labels, narrow, numbers, random_data, seeded, short_autoattack

pytestmark = pytest.mark.trains

EPS = 0.1


class Standardised(nn.Conv2d):
    "Weight standardisation: the forward pass does not read `weight` as it is."
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-5), self.bias)


class Same(nn.Conv2d):
    "TensorFlow's padding 'same' at stride 2: one more row and column at the end."
    def forward(self, x): return super().forward(F.pad(x, (0, 1, 0, 1)))


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w): return (w * 8).round() / 8
    @staticmethod
    def backward(ctx, grad): return grad


class Quantised(nn.Conv2d):
    "Weights on a grid of eighths."
    def forward(self, x): return self._conv_forward(x, Rounded.apply(self.weight), self.bias)


class Tempered(nn.BatchNorm2d):
    "A batch norm whose answer is squashed."
    def forward(self, x): return super().forward(x).tanh()


class ReadElsewhere(nn.Module):
    "The batch norm's input is read by a second branch."
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
    def forward(self, x):
        h = self.stem[0](x)
        return self.stem[1:](h) + h.sin()


class Twice(nn.Module):
    "One convolution, with and without its batch norm."
    def __init__(self):
        super().__init__()
        conv = nn.Conv2d(1, 6, 3, padding=1)
        self.one, self.two = nn.Sequential(conv, nn.BatchNorm2d(6)), nn.Sequential(conv, nn.Tanh())
    def forward(self, x): return (self.one(x) * self.two(x)).relu()


def shifted(): return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())


def hooked():
    body = shifted()
    body[0].register_forward_hook(lambda m, args, out: 2 * out.sin())
    return body


def shared():
    conv, norms = nn.Conv2d(1, 1, 3, padding=1), [nn.BatchNorm2d(1), nn.BatchNorm2d(1)]
    return nn.Sequential(conv, norms[0], conv, norms[1], nn.Conv2d(1, 6, 3), nn.ReLU())


def patched():
    body = shifted()
    body[0].forward = lambda x: F.conv2d(x.square(), body[0].weight, body[0].bias, padding=1)
    return body


BODIES = {
    "weight standardisation": lambda: nn.Sequential(Standardised(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), Standardised(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
    "padding as in TensorFlow": lambda: nn.Sequential(Same(1, 6, 3, 2), nn.BatchNorm2d(6), nn.ReLU()),
    "quantised weights": lambda: nn.Sequential(Quantised(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU()),
    "a batch norm of another kind": lambda: nn.Sequential(nn.Conv2d(1, 6, 3), Tempered(6), nn.ReLU()),
    "a forward hook": hooked,
    "an output read elsewhere": ReadElsewhere,
    "a layer used twice": Twice,
    "a layer used twice in a row": shared,
    "a forward of its own": patched,
}


def foreign(kind, classes=5):
    "Somebody else's network on images of 8 pixels, in eval mode, with running statistics and weights that tell a wrong fold at once."
    def make():
        model = nn.Sequential(BODIES[kind](), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(classes))
        model(numbers(2, 1, 8, 8))
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.uniform_(-.5, .5), m.running_var.uniform_(.2, 3)
                nn.init.uniform_(m.weight, .3, 3), nn.init.uniform_(m.bias, -1, 1)
        return model
    return seeded(3, make).eval()


def climbed(model, x, y, eps, steps, alpha):
    "PGD on the cross-entropy from the clean image, as in a textbook."
    x_adv = x.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        grad, = torch.autograd.grad(F.cross_entropy(model(x_adv), y, reduction="none").sum(), x_adv)
        x_adv = torch.minimum(torch.maximum(x_adv.detach() + alpha * grad.sign(), x - eps), x + eps).clamp(0, 1)
    return x_adv


@pytest.mark.parametrize("kind", BODIES)
def test_attacks_climb_a_foreign_network_itself(kind):
    model, x, y = foreign(kind), numbers(20, 1, 8, 8), labels(20, 5)
    want = climbed(model, x, y, EPS, 5, EPS / 4)
    assert torch.equal(PGD(EPS / 4, 5, start=CleanStart())(model, x, y, EPS), want)
    assert torch.equal(FGSM()(model, x, y, EPS), climbed(model, x, y, EPS, 1, EPS))
    assert torch.equal(FriendlyPGD(EPS / 4, 5, start=CleanStart(), tau=5)(model, x, y, EPS), want)
    assert torch.equal(StrengthAdaptivePGD(EPS / 4, 5, start=CleanStart(), full=EPS)(model, x, y, EPS), want)
    assert not normed_convolutions(model)


@pytest.mark.parametrize("kind", BODIES)
def test_the_check_before_an_evaluation_finds_what_the_rules_for_folding_would_miss(kind, monkeypatch):
    "As if the rules knew nothing: neighbours in any `Sequential` are folded, and what a foreign module holds as well."
    model, x = foreign(kind), numbers(6, 1, 8, 8)
    everything = [(a, b) for m in model.modules() if isinstance(m, nn.Sequential) for a, b in zip(m, list(m)[1:])
                  if isinstance(a, nn.Conv2d) and isinstance(b, nn.BatchNorm2d)] or [(model[0].stem[0], model[0].stem[1])]
    places = [[name for m in pair for name, n in model.named_modules() if n is m] for pair in everything]
    monkeypatch.setattr(nets, "normed_convolutions", lambda m: [tuple(m.get_submodule(n) for n in pair) for pair in places])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert not approve_folding(model, x)
    with folded(model): assert not any("forward" in vars(m) for m in model.modules() if kind != "a forward of its own")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Declared(nn.Module):
    "A block that lists its pair; what else it does with the convolution's output is the subclass's affair."
    normed = ("conv", "bn"),
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.gate = nn.Parameter(torch.zeros(()))


class Detached(Declared):
    "Equal logits, other gradients: the output is read once more, and what is read has no value but a gradient."
    normed = Declared.normed
    def forward(self, x):
        h = self.conv(x)
        return self.bn(h) + 30 * (h - h.detach()).flip(1, 3)


class OneClass(Declared):
    "The same for one of ten classes alone."
    normed = Declared.normed
    def __init__(self, k):
        super().__init__()
        self.k, self.out = k, nn.Linear(6, 10)
    def forward(self, x):
        h = self.conv(x)
        extra = F.one_hot(torch.tensor(self.k), 10) * (h - h.detach()).sum((1, 2, 3))[:, None]
        return self.out(self.bn(h).relu().mean((2, 3))) + extra


class Gated(Declared):
    "A branch that starts at nothing, as in ReZero."
    normed = Declared.normed
    def forward(self, x):
        h = self.conv(x)
        return self.bn(h) + self.gate * (3 * h).sin()


def ending(block, classes=5): return seeded(0, lambda: nn.Sequential(block(), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, classes))).eval()


def test_equal_logits_do_not_prove_equal_gradients():
    model, x = ending(Detached), numbers(6, 1, 8, 8)
    with torch.no_grad(): model[0].bn.weight.copy_(torch.tensor([1., -2, .5, -1, 3, -.2]))
    with nets._merged(normed_convolutions(model)): inside, wrong = model(x), climbed(model, x, labels(6, 5), EPS, 5, EPS / 4)
    own = climbed(model, x, labels(6, 5), EPS, 5, EPS / 4)
    assert torch.allclose(inside, model(x), atol=1e-5) and not torch.equal(wrong, own)
    assert not approve_folding(model, x)
    assert torch.equal(PGD(EPS / 4, 5, start=CleanStart())(model, x, labels(6, 5), EPS), own)


@pytest.mark.parametrize("k", range(10))
def test_a_fault_in_one_class_is_found(k): assert not approve_folding(seeded(0, lambda: OneClass(k)).eval(), numbers(4, 1, 8, 8))


def test_a_branch_that_starts_at_nothing_is_found_before_training():
    model = ending(Gated)
    assert float(model[0].gate.detach()) == 0 and not approve_folding(model, numbers(4, 1, 8, 8))


@pytest.mark.parametrize("frame", [0., 0.5, 1.])
@pytest.mark.parametrize("trained", [False, True])
def test_flat_images_and_training_do_not_change_the_answer(frame, trained):
    "Equal pixels are ties for a maximum, which break in another way when folded; the answer is about the structure."
    model, x = nets.VGG16().build(10, 3, key=3), F.pad(numbers(4, 3, 4, 4), (6,) * 4, value=frame)
    if trained: model.train()(x)
    assert approve_folding(model, x)


def test_an_approval_is_of_one_network_and_of_no_copy():
    model, x = narrow(width=8).eval(), numbers(4, 1, 8, 8)
    def is_folded(m):
        with folded(m): return any("forward" in vars(n) for n in m.modules())
    assert not is_folded(model) and approve_folding(model, x) and is_folded(model)
    assert not is_folded(copy.deepcopy(model)) and not is_folded(nn.Sequential(model))
    model.body[0].register_forward_hook(lambda m, args, out: 2 * out)
    assert len(normed_convolutions(model)) == 8
    assert not approve_folding(model, x[:0]) and not is_folded(model)   # no image, no answer


@pytest.mark.parametrize("normed", [True, "conv", 3, (("conv",),), (("conv", "other"),), (("conv", 1),), property(lambda self: 1), lambda self, x: x])
def test_a_foreign_class_may_call_anything_normed(normed):
    Own = type("Own", (Declared,), {"normed": normed, "forward": lambda self, x: self.bn(self.conv(x))})
    model, x = ending(Own), numbers(4, 1, 8, 8)
    assert not normed_convolutions(model) and not approve_folding(model, x)
    assert torch.equal(PGD(EPS / 4, 2, start=CleanStart())(model, x, labels(4, 5), EPS), climbed(model, x, labels(4, 5), EPS, 2, EPS / 4))


def test_the_check_changes_nothing_of_networks_that_share_refuse_or_draw():
    import random, numpy
    class Shared(Declared):
        normed = Declared.normed
        def __deepcopy__(self, memo): return self
        def forward(self, x): return self.bn(self.conv(x))
    class Drawing(Declared):
        normed = Declared.normed
        def forward(self, x): return self.bn(self.conv(x)) * (1 + random.random() + numpy.random.random() + torch.rand(()))
    for block in (Shared, Drawing):
        model = ending(block)
        before, states = {k: v.clone() for k, v in model.state_dict().items()}, (random.getstate(), str(numpy.random.get_state()), torch.get_rng_state())
        assert not approve_folding(model, numbers(4, 1, 8, 8))
        assert all(v.dtype == before[k].dtype and torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert random.getstate() == states[0] and str(numpy.random.get_state()) == states[1] and torch.equal(torch.get_rng_state(), states[2])


def test_a_fold_that_is_interrupted_leaves_nothing(monkeypatch):
    model, calls, product = narrow(width=8).eval(), [], nets._product
    def interrupted(conv, bn):
        calls.append(conv)
        if len(calls) == 3: raise KeyboardInterrupt
        return product(conv, bn)
    assert approve_folding(model, numbers(4, 1, 8, 8))
    monkeypatch.setattr(nets, "_product", interrupted)
    with pytest.raises(KeyboardInterrupt):
        with folded(model): pass
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_convolution_in_another_precision_than_its_batch_norm_is_left_alone():
    model = seeded(0, lambda: nn.Sequential(nn.Conv2d(1, 6, 3).bfloat16(), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(216, 5))).eval()
    nets._APPROVED.add(model)
    with folded(model): assert not any("forward" in vars(m) for m in model.modules())


def test_a_column_of_ones_own_climbs_the_network_that_is_judged():
    "Its `steps` say nothing; the network is checked all the same, and what is not checked is not folded."
    class Mine(Column):
        def batch(self, model, x, y, noise, source): return model(PGD(EPS / 4, 5, start=CleanStart())(model, x, y, EPS)).argmax(1) == y
    data, model = random_data(n=20), ending(type("Waving", (Gated,), {"normed": Declared.normed}), 3)
    with torch.no_grad(): model[0].gate += 5
    got = evaluate(evaluation(Mine(), "", ""), model, data)
    x, y = data.test.x / 255, data.test.y
    assert got["accuracy"] == pytest.approx(100 * float((model(climbed(model, x, y, EPS, 5, EPS / 4)).argmax(1) == y).float().mean()))


@pytest.mark.parametrize("spec, channels, side", [(NarrowResNet(width_factor=4), 1, 8), (nets.ResNet18(), 3, 8), (nets.PreActResNet18(), 3, 8), (nets.VGG16(), 3, 8),
                                                  (nets.WideResNet(depth=10, width_factor=1), 3, 8), (nets.IAATWideResNet(depth=8, width_factor=1), 3, 32),
                                                  (NarrowResNet(**nets.CIFAR10_RICE), 3, 8), (nets.NETWORKS["resnet50"], 3, 8), (nets.NETWORKS["resnet101"], 3, 8)])
def test_the_packages_networks_are_the_approve_folding_whatever_their_statistics(spec, channels, side):
    model = spec.build(10, channels)
    with torch.no_grad():
        for i, p in enumerate(model.state_dict().values()):
            if p.dim() == 1: p.copy_(.5 + numbers(len(p), seed=i))
    random, training = torch.get_rng_state(), {m: m.training for m in model.modules()}
    assert normed_convolutions(model) and approve_folding(model, numbers(4, channels, side, side))
    assert torch.equal(random, torch.get_rng_state()) and training == {m: m.training for m in model.modules()} and all(p.grad is None for p in model.parameters())


def test_a_subclass_of_a_block_does_not_inherit_what_it_may_have_changed():
    class Scaled(BasicBlock):
        def forward(self, x): return F.relu(self.bn2(self.conv2(F.relu(self.bn1(2 * self.conv1(x))))) + self.shortcut(x))
    class Wrapped(Classifier):
        def features(self, x): return self.body(x.square())
    net = narrow(width=8)
    own = len(normed_convolutions(net))
    for m in net.modules():
        if type(m) is BasicBlock: m.__class__ = Scaled
    assert own == 9 and len(normed_convolutions(net)) == 1   # the stem's alone
    net.__class__ = Wrapped
    assert not normed_convolutions(net)


def test_an_evaluation_and_a_run_check_once(monkeypatch):
    asked = []
    monkeypatch.setattr("adaptive_at.evaluation.approve_folding", lambda model, x: asked.append((model, len(x))))
    monkeypatch.setattr("adaptive_at.training.approve_folding", lambda model, x: asked.append((model, len(x))))
    data, model, other = random_data(n=20), narrow(3, width=8), narrow(3, seed=1, width=8)
    evaluate(evaluation(WhiteBox(PGD(0.01, 2), 0.1, restarts=3), "", ""), model, data)
    assert [m for m, n in asked] == [model]
    evaluate(evaluation(Transfer(PGD(0.01, 2), 0.1), "", ""), model, data, source=other)
    assert other in [m for m, n in asked[1:]]
    asked.clear()
    with short_autoattack(): evaluate(evaluation(AutoAttack(0.1), "", ""), model, data)
    assert [m for m, n in asked] == [model]
    asked.clear()
    run = Run("random", data.info.identity, NarrowResNet(width_factor=4), at(0.1), Training(epochs=2, batch=8), Monitor(PGD(0.1, 1), 0.1))
    state = State(run, data)
    train(run, data, state, report_line=lambda line: None)
    assert [m for m, n in asked] == [state.model]


def test_a_network_that_is_not_the_same_is_judged_unfolded():
    "A block that declares a pair and reads the convolution elsewhere: the evaluation finds it and does without."
    class Liar(ReadElsewhere):
        normed = ("conv", "bn"),
        def __init__(self):
            super().__init__()
            self.conv, self.bn = self.stem[0], nn.BatchNorm2d(6)
            self.bn.running_mean.fill_(.5)
            del self.stem
        def forward(self, x):
            h = self.conv(x)
            return F.relu(self.bn(h)) + (3 * h).sin()
    data = random_data(n=20)
    model = seeded(0, lambda: nn.Sequential(Liar(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3))).eval()
    twin = copy.deepcopy(model)
    column = WhiteBox(PGD(EPS / 4, 5, start=CleanStart()), EPS)
    got = evaluate(evaluation(column, "", ""), model, data)
    x, y = data.test.x / 255, data.test.y
    want = twin(climbed(twin, x, y, EPS, 5, EPS / 4)).argmax(1) == y
    assert got["accuracy"] == pytest.approx(100 * float(want.float().mean()))
