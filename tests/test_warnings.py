"Truthful evaluation: adversaries are verified, the model is the same afterwards, and each warning of a table is provoked by a model that deserves it and by no sound one."
import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from adaptive_at.data import datasets as ds
from adaptive_at import networks
from adaptive_at.attacks import FGSM, PGD, CrossEntropy, restarted
from adaptive_at.base.errors import UserError
from adaptive_at.algorithms.dra import DRA
from adaptive_at.evaluation import AutoAttack, Clean, Transfer, WhiteBox, evaluate, evaluation, decode_verdicts
from adaptive_at.algorithms.baselines import at, natural
from adaptive_at.algorithms.daat import daat
from adaptive_at.papers.table1_daat import TABLE
from adaptive_at.tables.plan import Row
from adaptive_at.store.runs import Store
from adaptive_at.base.rng import RandomStream, key
from adaptive_at.tables.results import run
from faults.bench import tiny
from helpers import OneLayer, digits, narrow, robust_digits


# Networks with something wrong once they are trained

class Wrong(nn.Module):
    "Sound while it trains."
    def forward(self, x): return x if self.training else self.wrong(x)


class Round(Wrong):
    def wrong(self, x): return (x * 6).round() / 6
class Louder(Wrong):
    def wrong(self, x): return 3000 * x
class Shaking(Wrong):
    def wrong(self, x): return x + 0.5 * torch.randn_like(x)
class Nothing(Wrong):
    def wrong(self, x): return 0 * x
class Zeroth(Wrong):
    def wrong(self, x): return x / (0 * x)


@dataclass(frozen=True)
class Flawed(OneLayer):
    "One layer between two that may be wrong."
    name: str = "sound"
    @property
    def label(self): return self.name
    def parts(self, channels):
        body, width = super().parts(channels)
        before, after = PLACES[self.name]
        return nn.Sequential(before(), body, after()), width


PLACES = {"sound": (nn.Identity, nn.Identity), "rounded": (Round, nn.Identity), "loud": (nn.Identity, Louder), "shaking": (nn.Identity, Shaking), "collapsed": (nn.Identity, Nothing), "no number": (nn.Identity, Zeroth)}
FLAWED = {name: Flawed(name=name) for name in PLACES}


@dataclass(frozen=True)
class Helpful(CrossEntropy):
    "Climbing it makes the image easier."
    def __call__(self, logits, target): return -super().__call__(logits, target)


@pytest.fixture(scope="module")
def warned(tmp_path_factory):
    "A table with a row for each network: (row, column) -> warning."
    columns = lambda p: {"natural": Clean(), "PGD-10": WhiteBox(PGD(p.eps / 4, 10), p.eps), "PGD-20, tiny steps": WhiteBox(PGD(1e-4, 20), p.eps), "AA": AutoAttack(p.eps), "help": Transfer(PGD(p.eps / 4, 10, Helpful()), p.eps, "sound"), "transfer": Transfer(PGD(p.eps / 4, 10), p.eps, "sound")}
    rows = lambda p: {name: Row(natural(), network=name) for name in FLAWED} | {"robust": at(p.eps, steps=4), "stuck": daat(p.eps, rho=1., steps=1)}
    table = replace(TABLE, rows=rows, columns=columns, more_columns=lambda p: {}, extra_rows=lambda p: {}, extra_columns=lambda p: {}, figures={}, stand_ins={n: n for n in FLAWED})
    with tiny(), pytest.MonkeyPatch.context() as m:
        for name, n in FLAWED.items(): m.setitem(networks.NETWORKS, name, n)
        m.setattr(Store, "every", 300.)
        results = run(table, preset="quick", device="cpu", eps=0.12, epochs=4, train_examples=600, test_examples=250, figures="none", outputs=str(tmp_path_factory.mktemp("warned")))
        return results.table().to_html(), results.frame.set_index(["row", "column"]).warning


def test_a_sound_network_has_no_warning(warned):
    assert not any(warned[1]["robust"].drop(["PGD-20, tiny steps", "help"], errors="ignore")), dict(warned[1]["robust"])
    assert not any(warned[1]["sound"].drop(["PGD-20, tiny steps", "help"], errors="ignore")), dict(warned[1]["sound"])


@pytest.mark.parametrize("row, column, text", [
    ("rounded", "PGD-10", "zero gradients at 100% of the images"), ("rounded", "transfer", "black-box beats white-box"),
    ("loud", "PGD-10", "zero gradients at "), ("loud", "AA", "AA far below PGD-10"),
    ("shaking", "natural", "randomised: "), ("shaking", "PGD-10", "randomised: "),
    ("collapsed", "natural", "collapsed: 100% of the predictions are one class"), ("no number", "natural", "logits are not finite"),
    ("sound", "PGD-20, tiny steps", "more steps help less than the fewer of PGD-10"), ("loud", "help", "higher than the natural accuracy"), ("stuck", "natural", "the radii did not adapt: all stood at 0.12 in the last 3 epochs")])
def test_each_warning_meets_who_deserves_it(row, column, text, warned):
    assert text in warned[1][row, column], warned[1][row, column]
    assert text in warned[0]


def test_a_warning_of_training_is_no_warning_of_others(warned):
    assert not warned[1][warned[1].index.get_level_values("row") != "stuck"].str.contains("adapt").any() and warned[1]["stuck"].str.contains("adapt").all()


# What an attack returns

@dataclass(frozen=True)
class Cheating(PGD):
    "Goes too far, out of the range, or to nothing."
    how: str = "far"
    def __call__(self, model, x, y, eps, noise=None):
        x_adv = super().__call__(model, x, y, eps, noise)
        if self.how == "far": return (x_adv + 0.001).clamp(max=1)
        if self.how == "range": return x + torch.as_tensor(eps).view(-1, 1, 1, 1)
        if self.how == "nan": return torch.where(x_adv > 0.5, torch.nan, x_adv)
        if self.how == "half": return x_adv.double()
        if self.how == "weights": [p.data.mul_(1.0001) for p in model.parameters()]
        if self.how == "statistics": [b.add_(0.001) for b in model.buffers() if b.is_floating_point()]
        if self.how == "mode": model.train()
        if self.how == "labels": y.fill_(0)
        if self.how == "images": x.fill_(0.5)
        return x_adv


def measured(how, kind=WhiteBox):
    model, other = copy.deepcopy(robust_digits()), copy.deepcopy(robust_digits())
    attack = PGD(0.04, 3) if how == "honest" else Cheating(0.04, 3, how=how)
    return evaluate(evaluation(kind(attack, 0.12), "", "", examples=40), model, digits(), other if kind is Transfer else None)


@pytest.mark.parametrize("kind", [WhiteBox, Transfer])
@pytest.mark.parametrize("how, said", [("far", "up to 0.121 from their own"), ("range", "in the range"), ("nan", "nan"), ("weights", "changed the model"), ("statistics", "changed the model"),
                                       ("mode", "train mode")])
def test_what_is_not_true_is_not_counted(how, said, kind):
    with pytest.raises(UserError) as caught: measured(how, kind)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_adversaries_of_another_type_are_not_counted():
    with pytest.raises(UserError, match="torch.float64"): measured("half", Transfer)


@pytest.mark.parametrize("kind", [WhiteBox, Transfer])
@pytest.mark.parametrize("how", ["labels", "images"])
def test_an_attack_cannot_touch_what_it_is_judged_by(how, kind): assert measured(how, kind)["n"] == measured("honest", kind)["n"] and measured(how, kind)["standing"] == measured("honest", kind)["standing"]


def test_the_verdict_is_a_pass_of_its_own_on_what_was_returned():
    model, data = robust_digits(), digits()
    result = evaluate(evaluation(WhiteBox(PGD(0.04, 3), 0.12), "", "", examples=40), model, data)
    index = ds.balanced(data.test.y, 40)
    x, y = ds.to_unit(data.test.x[index]), data.test.y[index]
    x_adv, _ = restarted(PGD(0.04, 3), model, x, y, 0.12, RandomStream(key(0, "evaluation"), index))
    assert decode_verdicts(result["standing"]).tolist() == (model(x_adv).argmax(1) == y).tolist() and 0 < decode_verdicts(result["standing"]).sum() < 40


def test_dra_has_a_ball_of_its_own():
    model = robust_digits()
    e = evaluation(WhiteBox(DRA(1/3), 0.03), "", "", examples=40)
    assert evaluate(e, model, digits())["n"] == 40


def test_a_sound_model_answers_alike_when_asked_again():
    for column in (Clean(), WhiteBox(FGSM(), 0.1)): assert evaluate(evaluation(column, "", "", examples=40), narrow(), digits())["randomised"] == 0.
