"""Losses of the first steps of a tiny run of every method, beside the versions of the pieces it is made of.

    python tests/fingerprints.py                     # compare with fingerprints.json
    python tests/fingerprints.py --update            # take what is new, and losses that moved where a version was raised
    python tests/fingerprints.py --update --force    # take everything: only when the numbers moved for no reason of ours (a new torch)

A run's identity holds its pieces' names, fields and versions, not their code. So a formula that changes inside the package has to raise
the `version` of its piece, or stored runs would pass for runs of the new formula. `test_methods.py` fails where losses moved and no version did.

The run: 16 random images, one batch an epoch, three epochs, so that steps 2 and 3 use the radii that the steps before gave, and every
schedule moves; radii start anywhere from 0 to eps, so that growth and shrinking show. The network computes in float64: losses agree across processors far better than the tolerance.
"""
import argparse, json, sys
from pathlib import Path

import torch

from adaptive_at.attacks import PGD
from adaptive_at.algorithms.cat import adp_adv, adv_ls, cat, cat_v0, cat_v2
from adaptive_at.base.identity import to_spec
from adaptive_at.algorithms.dra import dra_finetune, dra_finetune_constant, madry_dra, trades_dra
from adaptive_at.algorithms.iaat import iaat, imagenet_iaat, mixup_at
from adaptive_at.algorithms.baselines import Training, at, fat, mart, natural, trades
from adaptive_at.algorithms.daat import daat
from adaptive_at.radius import DAAT
from adaptive_at.networks import NarrowResNet
from adaptive_at.radius import LinearDAAT, PiecewiseDAAT
from adaptive_at.algorithms.saat import rice_at, rice_trades, saat, saat_down, saat_up, satrades_up
from adaptive_at.training import Monitor, Run, State, threads, train
from adaptive_at.awp import AT_AWP, TRADES_AWP
from helpers import random_data

PATH = Path(__file__).with_suffix(".json")
TOLERANCE = 1e-4
EPS = 0.1
SURE = 100   # factor on the head's first weights: a new head is too unsure of everything to shrink a radius
METHODS = {
    "natural": natural(), "at": at(EPS), "fat": fat(EPS), "trades": trades(EPS), "mart": mart(EPS),
    "daat": daat(EPS), "daat-linear": daat(EPS, rule=LinearDAAT), "daat-piecewise": daat(EPS, rule=PiecewiseDAAT),
    "daat-enlarged": daat(EPS, cap=1.25), "daat-clipped": daat(EPS, growth="clipped"),
    "daat-joint": daat(EPS, calibration="joint"), "daat-bn-train": daat(EPS, calibration="bn_train"),
    "daat-joint-bn-train": daat(EPS, calibration="joint_bn_train"),
    "daat-fat": fat(EPS, DAAT(EPS)), "daat-trades": trades(EPS, DAAT(EPS)), "daat-mart": mart(EPS, DAAT(EPS)),
    "saat": saat(EPS, 16.), "saat-down": saat_down(EPS), "saat-up": saat_up(EPS), "satrades-up": satrades_up(EPS),
    "at-awp": rice_at(EPS, weights=AT_AWP), "trades-awp": rice_trades(EPS, weights=TRADES_AWP), "saat-up-awp": saat_up(EPS, weights=AT_AWP),
    "iaat": iaat(EPS, warmup=67), "iaat-no-warm": iaat(EPS, warmup=0), "iaat-printed": iaat(EPS, warmup=67, misclassified="printed"), "iaat-imagenet": imagenet_iaat(EPS, steps=3), "mixup-at": mixup_at(EPS),
    "cat": cat(EPS), "cat-ce": cat(EPS, mixed=False), "cat-minus-eta": cat(EPS, outcome="minus_eta"), "cat-v0": cat_v0(EPS), "cat-v2": cat_v2(EPS), "adv-ls": adv_ls(EPS), "adp-adv": adp_adv(EPS),
    "dra": dra_finetune(EPS), "dra-constant": dra_finetune_constant(EPS), "dra-madry": madry_dra(EPS), "dra-trades": trades_dra(EPS, beta=6., factor=4.)}


def spec(name):
    return Run("random", "", NarrowResNet(width_factor=4), METHODS[name], Training(epochs=3, batch=16), Monitor(PGD(EPS, 1), EPS, examples=1, every=3))


def versions(told):
    "Qualified name of every piece in a description, and its version."
    if isinstance(told, list): return {k: v for item in told for k, v in versions(item).items()}
    if not isinstance(told, dict): return {}
    own = {told["piece"]: told["version"]} if "piece" in told else {}
    return own | {k: v for item in told.values() for k, v in versions(item).items()}


def measured(name):
    "This code's entry for a method."
    run, data = spec(name), random_data(classes=3)
    with threads(1):
        state = State(run, data)
        state.bank.eps *= torch.linspace(0, 1, len(state.bank.eps))   # radii from 0 to eps
        state.model.double().body.register_forward_pre_hook(lambda module, args: args[0].double())
        if hasattr(state.bank, "head"):
            state.bank.head.double().register_forward_hook(lambda module, args, out: out.float())
            with torch.no_grad(): state.bank.head.weight.mul_(SURE)
        train(run, data, state, report_line=lambda line: None)
    return {"versions": dict(sorted(versions(to_spec(run)).items())), "losses": [entry["loss"] for entry in state.history]}


def stored(): return json.loads(PATH.read_text()) if PATH.exists() else {}


def moved(old, new): return any(abs(a - b) > TOLERANCE * abs(a) for a, b in zip(old["losses"], new["losses"]))


def problem(name, old, new):
    "What is wrong with a method's stored entry, and what to do about it."
    refresh = "`python tests/fingerprints.py --update`"
    if old is None: return f"{name} has no fingerprint yet: run {refresh}"
    if old["versions"] != new["versions"]:
        changed = sorted(k for k in old["versions"].keys() | new["versions"].keys() if old["versions"].get(k) != new["versions"].get(k))
        return f"{name} is made of other pieces or versions than its fingerprint ({', '.join(changed)}): run {refresh}"
    if moved(old, new):
        return (f"the first losses of {name} were {old['losses']} and are {new['losses']}, but no version changed: stored runs would pass for runs of the new code. "
                f"Undo the change, or raise the `version` of the piece that changed (one of {', '.join(old['versions'])}; `@piece(..., version=...)`, 1 where none is written) "
                f"and run {refresh}")


def main(args):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="take new entries, and losses that moved under a raised version")
    parser.add_argument("--force", action="store_true", help="with --update: also losses that moved under the same versions")
    args = parser.parse_args(args)
    before, entries, refused = stored(), {}, 0
    for name in METHODS:
        new, old = measured(name), before.get(name)
        text = problem(name, old, new)
        same_versions = old is not None and old["versions"] == new["versions"]
        take = args.update and text and (args.force or not same_versions)
        entries[name] = new if take else old
        if text and not take:
            refused += 1
            print(text)
    if args.update: PATH.write_text(json.dumps({k: v for k, v in entries.items() if v}, indent=1) + "\n")
    return int(refused > 0)


if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
