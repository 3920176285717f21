"Accuracies that flatter are marked, from what is measured and whoever's model it is; sound ones are not. And models that cannot be judged are refused with a sentence."
import copy

import pytest
import torch
from torch import nn

from adaptive_at.attacks import FGSM, PGD, Margin
from adaptive_at.base.errors import UserError
from adaptive_at.deepfool import DeepFool
from adaptive_at.algorithms.dra import DRA
from adaptive_at.tables.warnings import cell_warnings, fact_warnings
from adaptive_at.evaluation import AutoAttack, Clean, Transfer, WhiteBox, evaluate, evaluation
from adaptive_at.store.audit import _accuracy
from adaptive_at.masking import attacked_gradients
from adaptive_at.pretrained import scored
from helpers import digits, numbers, short_autoattack
from zoo import EPS, LATER_MASKED, LATER_SOUND, MASKED, SOUND, Backward, before, natural, robust

COLUMNS = {"natural": Clean(), "FGSM": WhiteBox(FGSM(), EPS), "PGD-20": WhiteBox(PGD(EPS / 10, 20), EPS), "C&W-20": WhiteBox(PGD(EPS / 10, 20, Margin()), EPS), "DeepFool": WhiteBox(DeepFool(20), EPS)}


def said(model, columns=COLUMNS, examples=150):
    "What is told of a model, by column; a refusal counts."
    torch.manual_seed(0)
    try: return dict(scored(model, columns, digits(), examples, report_line=lambda line: None).warning)
    except UserError as e: return {"": str(e)}


@pytest.mark.parametrize("name", MASKED)
def test_what_flatters_is_marked(name): assert any(said(MASKED[name](), dict(list(COLUMNS.items())[:3])).values())


@pytest.mark.parametrize("name", SOUND)
def test_what_is_sound_is_not(name): assert not any((told := said(SOUND[name]())).values()), told


@pytest.mark.parametrize("name", LATER_MASKED)
def test_what_was_not_looked_at_and_flatters_is_marked(name): assert any(said(LATER_MASKED[name]()).values())


@pytest.mark.parametrize("name", LATER_SOUND)
def test_what_was_not_looked_at_and_is_sound_is_not(name): assert not any((told := said(LATER_SOUND[name]())).values()), told


# What a mark says

@pytest.mark.parametrize("name, column, text", [
    ("gradient is no number", "FGSM", "gradients that are no numbers at 100% of the images"), ("gradient is no number", "PGD-20", "of the images stand where the attack has no gradient, zero or not a number"),
    ("rounded images", "PGD-20", "random noise of the same size"), ("gradient reversed", "PGD-20", "agrees with what the model does to -"), ("louder half detached", "PGD-20", "the gradient is not that of the model"),
    ("probabilities, saturated", "PGD-20", "of the images stand where the attack has no gradient"), ("logits x 30", "PGD-20", "an attack on the margin breaks another"),
    ("logits x 0.01", "PGD-20", "the softmax is saturated or flat"), ("logits are no numbers", "natural", "logits are not finite"), ("noisy images", "natural", "randomised: "), ("dropout in eval mode", "FGSM", "randomised: "),
    ("batch norm of the batch", "natural", "depend on what else is in its batch"), ("normalised twice", "natural", "collapsed"), ("forward without gradient", "", "No gradient comes back")])
def test_each_fact_has_its_sentence(name, column, text):
    told = said(MASKED[name](), {c: a for c, a in COLUMNS.items() if c in ("natural", column or "FGSM")})
    assert text in told[column], told


def test_the_share_that_stands_without_a_gradient_is_said():
    "A third of the images have no gradient; the others are attacked as ever."
    def third(grad, x): return torch.where((x.mean((1, 2, 3)) > 0.33).view(-1, 1, 1, 1), torch.nan, grad)
    result = evaluate(evaluation(COLUMNS["PGD-20"], "", "", examples=150), before(lambda x: Backward.apply(x, third)), digits())
    assert 0.02 < result["stuck"] < 0.5 and 0 < result["nonfinite_gradients"] < 0.7 and result["zero_gradients"] == 0.
    assert f"{100 * result['stuck']:.0f}% of the images stand where" in "".join(fact_warnings(result))


def test_scored_prints_what_it_says_and_neighbours_are_compared(capsys):
    table = scored(MASKED["rounded images"](), {"natural": Clean(), "PGD-10": WhiteBox(PGD(EPS / 4, 10), EPS)}, digits(), 60)
    said = capsys.readouterr().out
    assert "⚠ PGD-10: zero gradients at 100% of the images" in said and not table.warning["natural"]
    columns = {"PGD-10": WhiteBox(PGD(EPS / 4, 10), EPS), "PGD-20, tiny steps": WhiteBox(PGD(1e-4, 20), EPS)}
    assert "more steps help less than the fewer of PGD-10" in scored(natural(), columns, digits(), 150, report_line=lambda line: None).warning["PGD-20, tiny steps"]


def test_old_evaluations_say_nothing_new():
    old = {"accuracy": 50., "n": 4, "standing": "1100", "randomised": 0., "zero_gradients": 0.}
    assert cell_warnings("PGD-20", COLUMNS, {"PGD-20": old}) == [] and cell_warnings("natural", COLUMNS, {"natural": {"accuracy": 50., "n": 4, "standing": "1100"}}) == []


@pytest.mark.parametrize("column", [WhiteBox(DRA(), 0.03), WhiteBox(PGD(EPS / 4, 4, success="any"), EPS, 3), WhiteBox(PGD(EPS / 4, 4), EPS, part="train"), WhiteBox(PGD(EPS / 4, 4), 0.), Transfer(PGD(EPS / 4, 4), EPS, "x"),
                                    AutoAttack(EPS, limit=30)], ids=lambda c: type(c).__name__)
def test_other_columns_of_a_sound_network_are_silent(column):
    with short_autoattack(): result = evaluate(evaluation(column, "", "", examples=60), robust(), digits(), natural() if isinstance(column, Transfer) else None)
    assert fact_warnings(result) == []


def test_a_surrogate_without_gradient_is_marked():
    result = evaluate(evaluation(Transfer(PGD(EPS / 4, 4), EPS, "x"), "", "", examples=60), robust(), digits(), MASKED["rounded images"]())
    assert any("zero gradients at 100%" in text for text in fact_warnings(result))


# At the door

class Answers(nn.Module):
    "A sound network whose answer is changed."
    def __init__(self, change, net=natural): super().__init__(); self.net, self.change = copy.deepcopy(net()), change
    def forward(self, x): return self.change(self.net(x))


class Without(Answers):
    def forward(self, x):
        with torch.no_grad(): return self.net(x)


def no_change(z): return z


@pytest.mark.parametrize("model, text", [
    (lambda: Answers(lambda z: (z.mean(1), z)), "returns `self.model(x)[1]`"), (lambda: Answers(lambda z: {"features": z.mean(1), "logits": z}), "returns `self.model(x)['logits']`"), (lambda: Answers(lambda z: [z]), "a list of 1"),
    (lambda: Answers(lambda z: z[:, :, None, None]), "returns `self.model(x).flatten(1)`"), (lambda: Answers(lambda z: z[:, 0]), "one score per image, [8]"), (lambda: Answers(lambda z: z[:, :1]), "one score per image, [8, 1]"),
    (lambda: Answers(lambda z: z[:, :5]), "5 outputs, and the dataset 10 classes"), (lambda: Answers(lambda z: z.argmax(1)), "torch.int64"), (lambda: Answers(lambda z: z.mean()), "[] for 8 images"), (lambda: Answers(lambda z: "no"), "a str"),
    (lambda: Answers(lambda z: z[:1]), "[1, 10] for 8 images"), (lambda: copy.deepcopy(natural()).bfloat16(), "bfloat16, and evaluations are in float32: evaluate `model.float()`"),
    (lambda: copy.deepcopy(natural()).half(), "float16"), (lambda: copy.deepcopy(natural()).double(), "float64"), (lambda: nn.Sequential(nn.Conv2d(3, 4, 1)), "cannot take images [8, 1, 8, 8]"), (lambda: no_change, "a function"),
    (lambda: Answers(lambda z: 1 / 0), "ZeroDivisionError")])
def test_a_model_that_cannot_be_judged_is_refused_before_anything_is_computed(model, text):
    for column in (Clean(), COLUMNS["FGSM"], AutoAttack(EPS)):
        with pytest.raises(UserError) as caught: scored(model(), {"x": column}, digits(), 20)
        assert text in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("model", [lambda: Without(no_change), lambda: Answers(lambda z: z.detach()), lambda: Answers(lambda z: torch.from_numpy(z.detach().numpy()))])
def test_a_forward_pass_without_gradients_has_a_natural_accuracy_alone(model):
    assert scored(model(), {"natural": Clean()}, digits(), 20).accuracy["natural"] > 80
    for column in (COLUMNS["FGSM"], AutoAttack(EPS)):
        with pytest.raises(UserError, match="No gradient comes back"): scored(model(), {"x": column}, digits(), 20)


def test_a_surrogate_is_asked_as_well():
    with pytest.raises(UserError, match="tuple"): evaluate(evaluation(Transfer(FGSM(), EPS, "x"), "", "", examples=20), natural(), digits(), Answers(lambda z: (z, z)))
    with pytest.raises(UserError, match="tuple"): evaluate(evaluation(Transfer(FGSM(), EPS, "x"), "", "", examples=20), Answers(lambda z: (z, z)), digits(), natural())
    assert evaluate(evaluation(Transfer(FGSM(), EPS, "x"), "", "", examples=20), Without(no_change), digits(), natural())["n"] == 20   # no attack climbs it


def test_more_outputs_than_classes_are_judged_and_said():
    table = scored(Answers(lambda z: nn.functional.pad(z, (0, 3), value=-9.)), {"natural": Clean()}, digits(), 40, report_line=lambda line: None)
    assert table.accuracy["natural"] > 80 and "13 outputs for 10 classes" in table.warning["natural"]


@pytest.mark.parametrize("column", [Clean(), COLUMNS["PGD-20"], WhiteBox(DRA(), 0.03), AutoAttack(EPS, limit=10)], ids=lambda c: type(c).__name__)
def test_the_default_dtype_moves_no_verdict(column):
    def judged():
        with short_autoattack(): return evaluate(evaluation(column, "", "", examples=20), natural(), digits())
    single = judged()
    torch.set_default_dtype(torch.float64)
    try: assert judged() == single and torch.get_default_dtype() == torch.float64
    finally: torch.set_default_dtype(torch.float32)


# Wherever an accuracy is shown

def test_the_store_s_listing_says_it_too():
    masked = {"accuracy": 99., "n": 100, "standing": "1" * 99 + "0", "zero_gradients": 1.}
    assert _accuracy(masked) == "99.0% of 100; zero gradients at 100% of the images: the attack cannot climb" and _accuracy(masked | {"zero_gradients": 0.}) == "99.0% of 100"


class Wave(nn.Module):
    "A margin that rises and falls within the radius: one step of full length goes past the top, as it does on adversarially trained networks."
    def forward(self, x):
        m = 1 - 0.5 * torch.sin(2 * torch.pi * x.mean((1, 2, 3)) / EPS)
        return torch.stack([m, torch.zeros_like(m)], 1)


@pytest.mark.parametrize("attack", [FGSM(), PGD(EPS / 4, 4)], ids=["FGSM", "PGD-4"])
def test_a_step_that_goes_past_the_top_is_no_masking(attack):
    "Random noise gets nearer to the boundary than a few long steps do; of an attack with many steps it would say something."
    x, y = 0.2 + 0.6 * numbers(64, 1, 8, 8), torch.zeros(64, dtype=torch.long)
    facts = attacked_gradients(Wave(), x, y, attack(Wave(), x, y, EPS), torch.ones(64, dtype=torch.bool), attack, EPS)
    assert not fact_warnings(facts | {"accuracy": 100., "n": 64}), facts
