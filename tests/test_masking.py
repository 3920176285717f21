"Accuracies that flatter are marked, from what is measured and whoever's model it is; sound ones are not. And models that cannot be judged are refused with a sentence."
import copy

import pytest
import torch
from torch import nn

from adaptive_at import datasets as ds
from adaptive_at.attacks import FGSM, PGD, Margin
from adaptive_at.core import UserError
from adaptive_at.deepfool import DeepFool
from adaptive_at.dra import DRA
from adaptive_at.doubts import doubts, of_facts
from adaptive_at.evaluation import AutoAttack, Clean, Transfer, WhiteBox, evaluate, evaluation
from adaptive_at.plain import scored
from helpers import digits, short_autoattack
from zoo import EPS, LATER_MASKED, LATER_SOUND, MASKED, SOUND, after, before, natural, robust

COLUMNS = {"natural": Clean(), "FGSM": WhiteBox(FGSM(), EPS), "PGD-20": WhiteBox(PGD(EPS / 10, 20), EPS), "C&W-20": WhiteBox(PGD(EPS / 10, 20, Margin()), EPS), "DeepFool": WhiteBox(DeepFool(20), EPS)}


def said(model, columns=COLUMNS, examples=150):
    "What is told of a model, by column; a refusal counts."
    torch.manual_seed(0)
    try: return dict(scored(model, columns, digits(), examples, tell=lambda line: None).warning)
    except UserError as e: return {"": str(e)}


@pytest.mark.parametrize("name", MASKED)
def test_what_flatters_is_marked(name): assert any(said(MASKED[name](), dict(list(COLUMNS.items())[:3])).values())


@pytest.mark.parametrize("name", SOUND)
def test_what_is_sound_is_not(name): assert not any((told := said(SOUND[name]())).values()), told
