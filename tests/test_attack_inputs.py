"An attack that is called directly refuses what it cannot attack, with a sentence; inside training nothing is asked."
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from adaptive_at.attacks import FGSM, PGD, CrossEntropy, FriendlyPGD, KL, Margin, NoAttack, restarted, trusted
from adaptive_at.base.errors import UserError
from adaptive_at.deepfool import DeepFool
from adaptive_at.algorithms.dra import DRA
from adaptive_at.evaluation import WhiteBox, evaluate, evaluation
from adaptive_at.algorithms.iaat import CrossingPGD, HalfRandomTargetPGD, RandomTargetPGD
from adaptive_at.algorithms.baselines import Training, at
from adaptive_at.networks import NarrowResNet
from adaptive_at.algorithms.saat import StrengthAdaptivePGD
from adaptive_at.training import Monitor, Run, State, train
from helpers import digits, noise, wavy


@dataclass(frozen=True)
class Restarted:
    "Two restarts, called like an attack."
    def __call__(self, model, x, y, eps): return restarted(PGD(0.02, 2), model, x, y, eps, noise(len(x)), 2)[0]


@dataclass(frozen=True)
class OfTheUser(PGD):
    "A subclass with a call of its own."
    def __call__(self, model, x, y, eps, noise=None): return super().__call__(model, x, y, eps, noise)


ATTACKS = [FGSM(), PGD(0.02, 2), PGD(0.02, 2, success="any"), PGD(0.02, 2, Margin()), FriendlyPGD(0.02, 2), StrengthAdaptivePGD(0.02, 2, stages=(0.1,), full=0.05), DRA(), DeepFool(2), CrossingPGD(0.02, 2),
           RandomTargetPGD(0.02, 2), HalfRandomTargetPGD(0.02, 2), OfTheUser(0.02, 2), Restarted()]
MODEL, X, Y = wavy(6)
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("wrong, said", [
    (dict(x=X * 255), "images are in the range"), (dict(x=X - 0.5), "images are in the range"), (dict(x=X.clone().fill_(NAN)), "images are in the range nan"), (dict(x=(X * 255).byte()), "torch.uint8"),
    (dict(x=X.numpy()), "ndarray"), (dict(eps=-0.1), "eps is -0.1"), (dict(eps=NAN), "eps is nan"), (dict(eps="8/255"), "eps is '8/255'"), (dict(eps=torch.full((6,), -0.1)), "eps"),
    (dict(eps=torch.full((6,), NAN)), "eps"), (dict(eps=torch.full((5,), 0.1)), "eps"), (dict(y=Y.int()), "torch.int32"), (dict(y=Y.float()), "torch.float32"), (dict(y=Y[:5]), "[5]"), (dict(y=Y[:, None]), "[6, 1]"),
    (dict(y=Y.tolist()), "list"), (dict(y=Y - 100), "-100")])
def test_what_cannot_be_attacked_is_refused(attack, wrong, said):
    with pytest.raises(UserError) as caught: attack(MODEL, **dict(x=X, y=Y, eps=0.1) | wrong)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("attack", [a for a in ATTACKS if not isinstance(a, (DRA, StrengthAdaptivePGD))], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("eps", [8, 8., INF, torch.full((6,), 8.), torch.tensor(8)])
def test_a_radius_in_255ths_is_refused(attack, eps):
    with pytest.raises(UserError, match="scale"): attack(MODEL, X, Y, eps)


def test_labels_are_distributions_only_where_the_attack_takes_them():
    soft = torch.nn.functional.one_hot(Y, 3).float()
    for attack in (PGD(0.02, 2), PGD(0.02, 2, KL()), FGSM(), DRA()): assert attack(MODEL, X, soft, 0.1).shape == X.shape
    for attack in (PGD(0.02, 2, success="any"), PGD(0.02, 2, Margin()), FriendlyPGD(0.02, 2), DeepFool(2), Restarted()):
        with pytest.raises(UserError, match="classes"): attack(MODEL, X, soft, 0.1)
    with pytest.raises(UserError, match="finite"): PGD(0.02, 2)(MODEL, X, soft * NAN, 0.1)


@pytest.mark.parametrize("eps", [0, 0., 1, 0.1, torch.tensor(0.1), torch.tensor([0.1]), torch.linspace(0, 1, 6), torch.linspace(0, 1, 6, dtype=torch.float64)], ids=str)
def test_radii_that_are_some_are_taken(eps):
    for attack in ATTACKS[:-1]: assert attack(MODEL, X, Y, eps).isfinite().all()


def test_restarts_share_one_radius():
    assert Restarted()(MODEL, X, Y, torch.tensor(0.1)).equal(Restarted()(MODEL, X, Y, 0.1))
    with pytest.raises(UserError, match="one radius"): Restarted()(MODEL, X, Y, torch.full((6,), 0.1))


def test_empty_batches_and_a_user_s_own_targets_are_taken():
    @dataclass(frozen=True)
    class Own:
        def target(self, model, x, y): return y["classes"]
        def __call__(self, logits, target): return CrossEntropy()(logits, target)
    assert len(PGD(0.02, 2)(nn.Flatten(), X[:0], Y[:0], 0.1)) == 0
    assert torch.equal(PGD(0.02, 2, Own())(MODEL, X, {"classes": Y}, 0.1), PGD(0.02, 2)(MODEL, X, Y, 0.1))
    assert NoAttack()(MODEL, X, Y, 0.1) is X


class Asked(torch.overrides.TorchFunctionMode):
    "Counts what makes the host wait for the device."
    def __init__(self): super().__init__(); self.n = 0
    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.n += getattr(function, "__name__", "") in ("tolist", "item", "__bool__", "__float__", "__int__")
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("attack", [PGD(0.02, 2), FriendlyPGD(0.02, 2), DRA(), RandomTargetPGD(0.02, 2)], ids=lambda a: type(a).__name__)
def test_trusted_arguments_cost_nothing(attack):
    with Asked() as direct: attack(MODEL, X, Y, 0.1, noise(6))
    with Asked() as inside, trusted(): attack(MODEL, X, Y, 0.1, noise(6))
    assert inside.n == 0 < direct.n


def test_training_and_evaluation_ask_nothing_of_an_attack_s_arguments(monkeypatch):
    from adaptive_at import attacks
    asked = []
    monkeypatch.setattr(attacks, "check_batch", lambda *args: asked.append(args))
    data = digits()
    run = Run("digits", data.info.identity, NarrowResNet(width_factor=4), at(0.1, steps=1), Training(epochs=1, batch=50), Monitor(PGD(0.1, 1), 0.1, examples=10), train_examples=100)
    model = train(run, data, State(run, data), report_line=lambda line: None).model
    evaluate(evaluation(WhiteBox(PGD(0.05, 2), 0.1), "", "", examples=20), model, data)
    assert not asked
    PGD(0.02, 1)(MODEL, X, Y, 0.1)
    assert asked


def test_trust_ends_with_its_block():
    with pytest.raises(ZeroDivisionError), trusted(): 1 / 0
    with pytest.raises(UserError): PGD(0.02, 1)(MODEL, X, Y, 8)
