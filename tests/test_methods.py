"Methods and their published constants, and fingerprints that notice a changed recipe."
import copy, json, math
from dataclasses import fields, is_dataclass, replace

import pytest

import fingerprints
from adaptive_at.attacks import KL, PGD, CleanStart, CrossEntropy, FriendlyPGD, NoAttack, NormalStart, UniformStart
from adaptive_at.algorithms.cat import CAT, CATAttack, adp_adv, adv_ls, cat, cat_v0, cat_v2
from adaptive_at.base.schedules import Milestones, Ramp, resolve_schedules
from adaptive_at.base.errors import UserError
from adaptive_at.base.identity import to_spec
from adaptive_at.data.datasets import Augment
from adaptive_at.deepfool import DeepFool
from adaptive_at.algorithms.dra import DRA, Scheduled, dra_finetune, dra_finetune_constant, dra_finetune_mnist, madry_pgd, trades_dra
from adaptive_at.evaluation import AutoAttack, Transfer, WhiteBox
from adaptive_at.algorithms.iaat import IAAT, iaat, iaat_baseline, imagenet_baseline, imagenet_iaat, mixup_at
from adaptive_at.algorithms.baselines import FAT_TRAINING, MART_RESNET18, Method, OneCycle, Training, at, fat, mart, natural, trades, scale_to_eps
from adaptive_at.algorithms.daat import daat
from adaptive_at.radius import DYNAMIC_RHO
from adaptive_at.networks import MNISTCNN, NarrowResNet, WideResNet
from adaptive_at.objectives import MART, TRADES, AdversarialCE
from adaptive_at.radius import DAAT, Fixed, LinearDAAT, PiecewiseDAAT
from adaptive_at.algorithms.saat import StrengthAdaptivePGD, rice_at, rice_trades, saat, saat_down, saat_up, satrades_up
from adaptive_at.training import Monitor

pytestmark = pytest.mark.trains

EPS = 0.031
BASELINES = {"at": at, "fat": fat, "trades": trades, "mart": mart}


# Published constants (RECIPES 2.2 and 7)

def test_natural_training_is_ce_on_the_images_themselves():
    assert natural() == Method(Fixed(0.), NoAttack(), AdversarialCE())


def test_standard_adversarial_training():
    method = at(EPS)
    assert method.radius == Fixed(EPS) and type(method.objective) is AdversarialCE
    assert method.attack == PGD(alpha=0.007, steps=10, loss=CrossEntropy(), start=UniformStart(), mode="eval", success="last")


def test_trades():
    method = trades(EPS)
    assert method.radius == Fixed(EPS) and method.objective == TRADES(beta=6.)
    assert method.attack == PGD(alpha=0.007, steps=10, loss=KL(), start=NormalStart(0.001), mode="eval", success="last")


def test_mart():
    method = mart(EPS)
    assert method.radius == Fixed(EPS) and method.objective == MART(beta=5.) and mart(EPS, beta=6.).objective == MART(6.)
    assert method.attack == PGD(alpha=0.007, steps=10, loss=CrossEntropy(), start=NormalStart(0.001), mode="eval", success="last")


@pytest.mark.parametrize("epoch, tau", [(1, 0), (50, 0), (51, 1), (90, 1), (91, 2), (120, 2)])
def test_fat(epoch, tau):
    method = resolve_schedules(fat(EPS), epoch - 1, 120)
    assert method.radius == Fixed(EPS) and type(method.objective) is AdversarialCE
    assert method.attack == FriendlyPGD(alpha=0.007, steps=10, loss=CrossEntropy(), start=UniformStart(), mode="eval", success="last", tau=tau, omega=0.001)


def test_daat_s_radius():
    assert daat(EPS) == at(EPS, DAAT(eps=EPS, rho=DYNAMIC_RHO, tau=2., calibration="detach", cap=1., growth="reset")) == at(EPS, DAAT(EPS))
    assert daat(EPS, steps=3, alpha=0.01, rule=LinearDAAT, tau=3.) == at(EPS, LinearDAAT(EPS, tau=3.), 3, 0.01)
    assert DYNAMIC_RHO == Milestones(at=(0.75, 0.9), values=(0.05, 0.2, 0.3))
    assert PiecewiseDAAT(EPS) == PiecewiseDAAT(EPS, DYNAMIC_RHO, 2.)
    assert DAAT(EPS, cap=1.25, growth="clipped", calibration="joint") == DAAT(EPS, DYNAMIC_RHO, 2., "joint", 1.25, "clipped")


CHOICES = {
    "DAAT: calibration": (lambda x: DAAT(EPS, calibration=x), "'detach', 'bn_train', 'joint' or 'joint_bn_train'"),
    "LinearDAAT: calibration": (lambda x: LinearDAAT(EPS, calibration=x), "'detach', 'bn_train', 'joint' or 'joint_bn_train'"),
    "DAAT: growth": (lambda x: DAAT(EPS, growth=x), "'reset' or 'clipped'"),
    "PGD: mode": (lambda x: PGD(mode=x), "'eval' or 'train'"), "PGD: success": (lambda x: PGD(success=x), "'last' or 'any'"),
    "FriendlyPGD: mode": (lambda x: replace(fat(EPS).attack, mode=x), "'eval' or 'train'"),
    "DeepFool: mode": (lambda x: DeepFool(mode=x), "'eval' or 'train'"),
    "DRA: mode": (lambda x: DRA(mode=x), "'eval' or 'train'"), "DRA: rank": (lambda x: DRA(rank=x), "'last' or 'end'"),
    "IAAT: misclassified": (lambda x: iaat(EPS, misclassified=x), "'released' or 'printed'"),
    "CAT: outcome": (lambda x: cat(EPS, outcome=x), "'reset', 'minus_eta', 'v0' or 'v2'"), "CAT: grown_by": (lambda x: CAT(EPS, grown_by=x), "'rule' or 'attack'"),
    "CAT: capped": (lambda x: cat(EPS, capped=x), "'before' or 'after'"),
    "cat: label": (lambda x: cat(EPS, label=x), "'before' or 'after'"), "cat: hinge": (lambda x: cat(EPS, hinge=x), "'mean' or 'eps'"),
    "FriendlyPGD: success": (lambda x: FriendlyPGD(success=x), "'last'"), "StrengthAdaptivePGD: success": (lambda x: StrengthAdaptivePGD(success=x), "'last'"),
    "CATAttack: success": (lambda x: CATAttack(success=x), "'last'"),
    "Training: precision": (lambda x: Training(precision=x), "'fp32' or 'bf16'"), "WhiteBox: part": (lambda x: WhiteBox(PGD(), EPS, part=x), "'test' or 'train'"),
    "Augment: pad": (lambda x: Augment(pad=x), "'zeros' or 'reflect'"),
    "Monitor: select": (lambda x: Monitor(PGD(), EPS, select=x), "'test' or 'val'"),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_a_misspelt_choice_is_refused(choice):
    "It would else be taken for the default, and train for days what was not asked for."
    make, options = CHOICES[choice]
    with pytest.raises(UserError) as e: make("paper")
    assert str(e.value) == f"{choice} is 'paper'; it must be {options}."
    for option in options.replace(" or ", ", ").split(", "): make(option.strip("'"))   # and those it names are not


@pytest.mark.parametrize("attack", [FriendlyPGD, StrengthAdaptivePGD, CATAttack])
def test_an_attack_that_has_but_one_success_refuses_the_other(attack):
    with pytest.raises(UserError, match=f"{attack.__name__}: success is 'any'; it must be 'last'."): attack(success="any")


RADII = {
    "at": at, "at, step given": lambda e: at(e, alpha=0.01), "fat": fat, "trades": trades, "mart": mart, "at, DAAT": lambda e: at(EPS, DAAT(e)), "at, fixed": lambda e: at(EPS, Fixed(e)),
    "rice_at": rice_at, "rice_trades": rice_trades, "saat": saat, "saat_down": saat_down, "saat_up": saat_up, "satrades_up": satrades_up,
    "iaat": iaat, "iaat_baseline": iaat_baseline, "iaat_baseline, step given": lambda e: iaat_baseline(e, 0.01), "mixup_at": mixup_at, "imagenet_iaat": imagenet_iaat, "imagenet_baseline": imagenet_baseline,
    "cat": cat, "cat_v0": cat_v0, "cat_v2": cat_v2, "adv_ls": adv_ls, "adp_adv": adp_adv,
    "dra_finetune": dra_finetune, "dra_finetune_constant": dra_finetune_constant, "dra_finetune_mnist": dra_finetune_mnist, "madry_pgd": madry_pgd, "trades_dra": trades_dra,
    "scheduled": lambda e: Method(Scheduled(Ramp(EPS, e)), PGD(), AdversarialCE()), "in stages": lambda e: Method(Scheduled(Milestones((0.5,), (EPS, e))), PGD(), AdversarialCE()),
    "WhiteBox": lambda e: WhiteBox(PGD(), e), "Transfer": lambda e: Transfer(PGD(), e), "AutoAttack": AutoAttack, "Monitor": lambda e: Monitor(PGD(), e),
}
RATIOS = "cat", "adv_ls"


@pytest.mark.parametrize("name", RADII)
@pytest.mark.parametrize("eps", [8, 8., -0.1, math.nan, "8/255", None])
def test_a_radius_off_the_scale_is_refused_at_once(name, eps):
    "8 in place of 8/255 would train and evaluate for days in a ball that holds every image."
    with pytest.raises(UserError) as e: RADII[name](eps)
    assert str(e.value) == f"eps is {eps!r}, but radii are on the [0, 1] scale: 8/255 is 0.0314."


@pytest.mark.parametrize("name", RADII)
def test_radii_on_the_scale_are_not(name):
    for eps in (8/255, 0.3, 1, 1.): RADII[name](eps)
    if not name.startswith(RATIOS): RADII[name](0.)


@pytest.mark.parametrize("name", [name for name in RADII if name.startswith(RATIOS)])
def test_a_method_whose_constant_is_a_ratio_to_its_radius_refuses_none(name):
    with pytest.raises(UserError, match="eps is 0, but a published constant"): RADII[name](0.)


def test_a_radius_that_is_not_the_l_inf_balls_may_be_larger():
    "DRA's is a mean before pixels are left out, times a measured factor; that of SA-PGD is the cap of its stages."
    assert dra_finetune(0.25, factor=40.).radius.eps.first == 2.5 and WhiteBox(DRA(), 3.).eps == 3 and saat(0.25).radius.eps == 4
    with pytest.raises(UserError, match="eps is -0.1"): WhiteBox(DRA(), -0.1)


@pytest.mark.parametrize("make", [at, fat, trades, mart])
@pytest.mark.parametrize("radius", [0.5, 0, PGD()])
def test_what_is_no_radius_rule_is_refused(make, radius):
    "The second place of a baseline is the rule's, and not the step's or beta's."
    with pytest.raises(UserError) as e: make(EPS, radius)
    assert str(e.value) == f"Method: radius is {radius!r}; it must be a radius rule, such as DAAT(eps) or Fixed(eps)."


STEPPED = Milestones(at=(0.5,), values=(0.1, -1.))


@pytest.mark.parametrize("make, sentence", [
    (lambda: PGD(0.1, 0), "PGD: steps is 0; it must be a whole number from 1 on."), (lambda: PGD(0.1, 2.5), "PGD: steps is 2.5; it must be a whole number from 1 on."),
    (lambda: PGD(-0.1, 10), "PGD: alpha is -0.1; it must be a number from 0 on."), (lambda: at(EPS, alpha="tiny"), "PGD: alpha is 'tiny'; it must be a number from 0 on."),
    (lambda: PGD(steps=None), "PGD: steps is None; it must be a whole number from 1 on."), (lambda: replace(iaat(EPS).attack, steps=0), "CrossingPGD: steps is 0; it must be a whole number from 1 on."),
    (lambda: FriendlyPGD(tau=-1), "FriendlyPGD: tau is -1; it must be a whole number from 0 on."), (lambda: FriendlyPGD(omega=-1.), "FriendlyPGD: omega is -1.0; it must be a number from 0 on."),
    (lambda: FriendlyPGD(tau=Milestones((0.5,), (0, 0.5))), "FriendlyPGD: tau is 0.5; it must be a whole number from 0 on."),
    (lambda: StrengthAdaptivePGD(K=-1), "StrengthAdaptivePGD: K is -1; it must be a whole number from 0 on."), (lambda: StrengthAdaptivePGD(stages=(0.1, -0.1)), "StrengthAdaptivePGD: stages is -0.1; it must be a number from 0 on."),
    (lambda: CATAttack(eta=-0.1), "CATAttack: eta is -0.1; it must be a number from 0 on."), (lambda: CATAttack(cap=-0.1), "CATAttack: cap is -0.1; it must be a number from 0 on."),
    (lambda: DRA(steps=0), "DRA: steps is 0; it must be a whole number from 1 on."), (lambda: DRA("x"), "DRA: p is 'x'; it is a share of the pixels, from 0 to 1."),
    (lambda: Monitor(PGD(), EPS, -1), "Monitor: examples is -1; it must be a whole number from 0 on."), (lambda: Monitor(PGD(), EPS, every=0), "Monitor: every is 0; it must be a whole number from 1 on."),
    (lambda: DAAT(EPS, rho=-1., tau=0), "DAAT: rho is -1.0; it must be a number from 0 on."), (lambda: DAAT(EPS, rho=STEPPED), "DAAT: rho is -1.0; it must be a number from 0 on."),
    (lambda: LinearDAAT(EPS, tau=0), "LinearDAAT: tau is 0; it must be a number from 1e-06 on."), (lambda: DAAT(EPS, cap=-1.), "DAAT: cap is -1.0; it must be a number from 0 on."),
    (lambda: IAAT(EPS, PGD(), -1.), "IAAT: gamma is -1.0; it must be a number from 0 on."), (lambda: iaat(EPS, beta=-0.1), "IAAT: beta is -20.0; it must be a number from 0 on."),
    (lambda: CAT(EPS, eta=-1.), "CAT: eta is -1.0; it must be a number from 0 on."),
    (lambda: Training(epochs=0), "Training: epochs is 0; it must be a whole number from 1 on."), (lambda: Training(epochs=1.5), "Training: epochs is 1.5; it must be a whole number from 1 on."),
    (lambda: Training(batch=0), "Training: batch is 0; it must be a whole number from 1 on."), (lambda: Training(lr="x"), "Training: lr is 'x'; it must be a number from 0 on."),
    (lambda: Training(lr=math.nan), "Training: lr is nan; it must be a number from 0 on."), (lambda: Training(weight_decay=-1.), "Training: weight_decay is -1.0; it must be a number from 0 on."),
    (lambda: NarrowResNet(width_factor=0), "NarrowResNet: width_factor is 0; it must be a whole number from 1 on."), (lambda: NarrowResNet(strides=(1, 0)), "NarrowResNet: strides is 0; it must be a whole number from 1 on."),
    (lambda: WideResNet(width_factor=2.5), "WideResNet: width_factor is 2.5; it must be a whole number from 1 on."), (lambda: WideResNet(depth=2), "WideResNet: depth is 2; it must be a whole number from 8 on."),
    (lambda: MNISTCNN(filters=(16, 0)), "MNISTCNN: filters is 0; it must be a whole number from 1 on."),
    (lambda: WhiteBox(PGD(), EPS, 0), "WhiteBox: restarts is 0; it must be a whole number from 1 on."), (lambda: Transfer(PGD(), EPS, restarts=0), "Transfer: restarts is 0; it must be a whole number from 1 on."),
    (lambda: AutoAttack(EPS, limit=-1), "AutoAttack: limit is -1; it must be a whole number from 0 on."), (lambda: AutoAttack(EPS, batch_size=0), "AutoAttack: batch_size is 0; it must be a whole number from 1 on."),
], ids=lambda v: v.partition(";")[0] if isinstance(v, str) else "")
def test_a_number_that_cannot_be_is_refused_at_once(make, sentence):
    with pytest.raises(UserError) as e: make()
    assert str(e.value) == sentence


def test_numbers_that_can_be_are_not():
    assert StrengthAdaptivePGD(0.1, 0, K=0, stages=()).steps == 0 and PGD(None).alpha is None and PGD(0., 1).alpha == 0 and CATAttack(cap=None).cap is None
    assert at(EPS, alpha=0.).attack.alpha == 0. and Training(lr=0.).lr == 0 and DAAT(EPS, rho=0., tau=1).tau == 1


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("eps", [EPS, 0.25])
def test_daat_s_version_of_a_baseline_differs_in_the_radius_rule_only(name, eps):
    ours, baseline = BASELINES[name](eps, radius=DAAT(eps)), BASELINES[name](eps)
    assert ours.radius == DAAT(eps) and baseline.radius == Fixed(eps)
    assert replace(ours, radius=baseline.radius) == baseline
    assert to_spec(replace(ours, radius=baseline.radius)) == to_spec(baseline)


# Other radius units

def in_units(piece, scale):
    "A piece with what carries the unit of eps divided by `scale`; pieces of pieces too."
    carries = {"eps", "alpha", "sigma", "omega"}
    changed = {f.name: getattr(piece, f.name) / scale if f.name in carries and getattr(piece, f.name) is not None else in_units(getattr(piece, f.name), scale)
               for f in fields(piece)} if is_dataclass(piece) else {}
    return replace(piece, **changed) if changed else piece


def flat(value, at=""):
    if isinstance(value, dict): return {k: v for n, item in value.items() for k, v in flat(item, f"{at}.{n}").items()}
    if isinstance(value, list): return {k: v for n, item in enumerate(value) for k, v in flat(item, f"{at}.{n}").items()}
    return {at: value}


@pytest.mark.parametrize("name", [*BASELINES, "daat"])
@pytest.mark.parametrize("eps", [8/255, 0.25, 0.3])
def test_what_carries_the_unit_of_eps_keeps_its_ratio(name, eps):
    make = (lambda e: daat(e, cap=1.25)) if name == "daat" else BASELINES[name]
    there, here = (flat(to_spec(in_units(make(e), e))) for e in (EPS, eps))
    number = lambda v: isinstance(v, float)
    assert {k: v for k, v in there.items() if not number(v)} == {k: v for k, v in here.items() if not number(v)}
    assert {k: v for k, v in there.items() if number(v)} == pytest.approx({k: v for k, v in here.items() if number(v)}, rel=1e-12)
    assert make(eps).attack.alpha == pytest.approx(eps * 0.007 / 0.031) and make(eps).radius.eps == eps
    assert scale_to_eps(0.007, EPS) == 0.007 and scale_to_eps(0.001, EPS) == 0.001   # to the last digit, where they were published


def test_a_given_step_size_and_number_of_steps_win():
    assert at(EPS, alpha=2/255, steps=7).attack == PGD(2/255, 7)
    assert [make(EPS, steps=3).attack.steps for make in (fat, trades, mart)] == [3] * 3


# Training settings

@pytest.mark.parametrize("epoch, lr", [(1, 0.1), (74, 0.1), (75, 0.01), (89, 0.01), (90, 0.001), (100, 0.001)])
def test_the_family_s_schedule(epoch, lr):
    t = Training()
    assert (t.epochs, t.batch, t.momentum, t.weight_decay) == (100, 128, 0.9, 2e-4)
    for inside in (0, 0.5, 0.999): assert t.lr_at(epoch - 1 + inside) == pytest.approx(lr)   # the same all through an epoch


@pytest.mark.parametrize("epoch, lr", [(1, 0.1), (59, 0.1), (60, 0.01), (89, 0.01), (90, 0.001), (109, 0.001), (110, 0.0005), (120, 0.0005)])
def test_fat_s_own_schedule(epoch, lr):
    assert (FAT_TRAINING.epochs, FAT_TRAINING.batch, FAT_TRAINING.momentum, FAT_TRAINING.weight_decay) == (120, 128, 0.9, 2e-4)
    assert FAT_TRAINING.lr_at(epoch - 1) == pytest.approx(lr)


def test_mart_s_own_step_and_decay():
    assert MART_RESNET18 == Training(lr=0.01, weight_decay=3.5e-3)
    assert [MART_RESNET18.lr_at(e - 1) for e in (74, 75, 89, 90)] == pytest.approx([0.01, 0.001, 0.001, 0.0001])


def test_one_cycle():
    t = Training(epochs=30, schedule=OneCycle(0.2))
    assert [t.lr_at(e) for e in (0, 3, 6, 18, 30)] == pytest.approx([0, 0.05, 0.1, 0.05, 0])


@pytest.mark.parametrize("epochs", [1, 2, 3, 7, 20, 30, 100, 120, 200])
def test_milestones_keep_their_place_in_runs_of_any_length(epochs):
    m = Milestones(at=(0.75, 0.9), values=(0, 1, 2))
    got = [m.value(e, epochs) for e in range(epochs)]
    assert got == [(e >= 0.75 * epochs) + (e >= 0.9 * epochs - 1e-9) for e in range(1, epochs + 1)]


# Fingerprints

REFRESH = "python tests/fingerprints.py --update"


@pytest.mark.parametrize("name", fingerprints.METHODS)
def test_a_recipe_that_moves_has_a_new_version(name):
    assert (problem := fingerprints.problem(name, fingerprints.stored().get(name), fingerprints.measured(name))) is None, problem


def test_every_stored_fingerprint_has_its_method(): assert set(fingerprints.stored()) == set(fingerprints.METHODS)


def test_methods_have_different_fingerprints():
    losses = {name: tuple(e["losses"]) for name, e in fingerprints.stored().items()}
    for a in losses:
        for b in losses: assert a == b or max(abs(p / q - 1) for p, q in zip(losses[a], losses[b])) > 10 * fingerprints.TOLERANCE, (a, b)


def test_what_a_fingerprint_notices():
    entry = fingerprints.stored()["trades"]
    moved = entry | {"losses": [entry["losses"][0], entry["losses"][1] * 1.0002, entry["losses"][2]]}
    raised = moved | {"versions": entry["versions"] | {"TRADES": 2}}
    assert fingerprints.problem("trades", entry, entry) is None
    assert fingerprints.problem("trades", entry, entry | {"losses": [l * 1.00005 for l in entry["losses"]]}) is None
    assert "raise" in fingerprints.problem("trades", entry, moved) and REFRESH in fingerprints.problem("trades", entry, moved)
    assert REFRESH in fingerprints.problem("trades", entry, raised) and "raise" not in fingerprints.problem("trades", entry, raised)
    assert REFRESH in fingerprints.problem("trades", None, entry)


@pytest.mark.parametrize("break_it, names", [
    (lambda patch: patch.setattr(TRADES, "losses", MART.losses), {"trades", "daat-trades"}),
    (lambda patch: patch.setattr(DAAT, "moved", lambda self, eps, s: LinearDAAT.moved(self, eps, s)), {"daat", "daat-joint", "daat-bn-train", "daat-joint-bn-train", "daat-trades", "daat-mart"}),
    (lambda patch: patch.setattr(NormalStart, "__call__", CleanStart.__call__), {"trades", "mart"}),
])
def test_a_changed_formula_is_noticed(break_it, names, monkeypatch):
    break_it(monkeypatch)
    for name in names:
        problem = fingerprints.problem(name, fingerprints.stored()[name], fingerprints.measured(name))
        assert problem and "raise" in problem, name


def test_updating_refuses_losses_that_moved_under_the_same_versions(tmp_path, monkeypatch, capsys):
    path = tmp_path / "fingerprints.json"
    entries = copy.deepcopy(fingerprints.stored())
    entries["natural"]["losses"][0] += 1
    del entries["at"]
    path.write_text(json.dumps(entries))
    monkeypatch.setattr(fingerprints, "PATH", path)
    monkeypatch.setattr(fingerprints, "METHODS", {k: fingerprints.METHODS[k] for k in ("natural", "at")})
    assert fingerprints.main(["--update"]) == 1 and "natural" in capsys.readouterr().out
    assert fingerprints.stored()["natural"] == entries["natural"] and "at" in fingerprints.stored()   # the new one is taken, the moved one is not
    assert fingerprints.main(["--update", "--force"]) == 0 and fingerprints.main([]) == 0
    assert fingerprints.stored()["natural"]["losses"][0] == pytest.approx(entries["natural"]["losses"][0] - 1)
