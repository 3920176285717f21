"""One picture per paper, computed with the library's own rules and attacks on a network of one pixel.

The pixel's logits are plus and minus a multiple of its distance to the boundary, so an image is its margin: how far it stands on the right
side, in units of eps. Left: how far its adversary goes, by margin. Right: how that comes about.
"""
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from adaptive_at.attacks import CleanStart, PGD
from adaptive_at.algorithms.cat import adp_adv
from adaptive_at.data.datasets import Batch
from adaptive_at.algorithms.dra import decaying, normalised, significant
from adaptive_at.figures import PALETTE, figure_style
from adaptive_at.algorithms.iaat import IAAT
from adaptive_at.networks import Classifier
from adaptive_at.radius import DAAT, RuleContext
from adaptive_at.algorithms.saat import StrengthAdaptivePGD, radii
from adaptive_at.base.rng import RandomStream, key

EPS, STEEP = 0.1, 3.                                       # radius on the [0,1] scale; logit per eps of margin
MARGINS, EXAMPLES = torch.linspace(-1, 2.4, 137), torch.tensor([-0.5, 0.6, 2.])
NAMES = ("misclassified", "near the boundary", "far from it")
THEMES = {"light": ("#333", "#e6e6e6"), "dark": ("#cfd0d0", "#33373d")}  # text, grid


class Distance(nn.Module):
    "The pixel's distance to the boundary in units of eps, as a feature."
    def forward(self, x): return (x.flatten(1)[:, :1] - 0.5) / EPS


def network() -> Classifier:
    head = nn.Linear(1, 2, bias=False)
    with torch.no_grad(): head.weight.copy_(torch.tensor([[-STEEP / 2], [STEEP / 2]]))
    return Classifier(Distance(), head, 1).eval()


def batch(margins: torch.Tensor, visit: int = 0) -> Batch:
    "Images of class 1 at these margins."
    index = torch.arange(len(margins))
    return Batch(0.5 + EPS * margins.view(-1, 1, 1, 1), torch.ones(len(margins), dtype=torch.long), index, RandomStream(key("picture", visit), index))


def visits(rule, margins: torch.Tensor, n: int, attack=PGD(EPS / 4, 10, start=CleanStart())) -> np.ndarray:
    "The radius of every image's attack at each of `n` visits, in units of eps [n, images]; the network stays as it is."
    model, path = network(), []
    bank = rule.bank(RuleContext(len(margins), 2, 1))
    if hasattr(bank, "head"): bank.head.load_state_dict({"weight": model.classifier.weight.detach(), "bias": torch.zeros(2)})
    for visit in range(n):
        b = batch(margins, visit)
        eps = rule.radius(bank, b, model)
        x_adv = attack(model, b.x, b.y, eps)
        path.append((eps / EPS).detach().numpy().copy())
        rule.after_attack(bank, b, x_adv, model, eps)
        rule.after_step(bank, b, x_adv, model)
    return np.array(path)


def frames() -> list[plt.Axes]:
    "Two panels, each a figure of its own: on a phone they stand one below the other."
    with figure_style(): return [plt.subplots(figsize=(4.4, 3.2), layout="constrained")[1] for _ in range(2)]


def by_margin(ax, limit: float) -> None:
    ax.axvline(0, color="0.5", lw=1, ls=":")
    ax.plot(MARGINS, np.ones(len(MARGINS)), color="0.5", lw=1.2, ls="--", label="standard AT")
    ax.set(xlabel=r"margin of the image / $\epsilon$", ylabel=r"radius / $\epsilon$", ylim=(-0.08, limit), title="how far the adversary goes")


def of_rule(rule, n: int, last: int, limit: float) -> list[plt.Axes]:
    "Left: mean and range of the last visits; right: the paths of three images."
    left, right = frames()
    by_margin(left, limit)
    path = visits(rule, MARGINS, n)[-last:]
    left.fill_between(MARGINS, path.min(0), path.max(0), color=PALETTE[0], alpha=0.2, lw=0, label=f"range over {last} visits")
    left.plot(MARGINS, path.mean(0), color=PALETTE[0], label="mean")
    for k, (name, line) in enumerate(zip(NAMES, visits(rule, EXAMPLES, n).T)): right.plot(range(1, n + 1), line, color=PALETTE[(3, 1, 2)[k]], marker=".", ms=4, lw=1.2, label=name)
    right.set(xlabel="visit (epoch)", ylim=(-0.08, limit), title="three images")
    right.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    return [left, right]


def daat(): return of_rule(DAAT(EPS, rho=0.2), 20, 10, 1.2)


def cat(): return of_rule(adp_adv(EPS).radius, 24, 14, 1.2)


def iaat():
    attack = PGD(EPS / 4, 10, start=CleanStart(), mode="eval")
    return of_rule(IAAT(EPS, attack, gamma=1.9 / 8 * EPS, beta=0.3), 40, 10, 2.7)


def saat():
    left, right = frames()
    by_margin(left, 2.7)
    stages = lambda first, last: tuple(r / 8 * EPS for r in radii(first, last))
    b, model, rho = batch(MARGINS), network(), 1.5
    variants = {"SAAT": StrengthAdaptivePGD(EPS / 4, 0, start=CleanStart(), rho=rho, stages=stages(0, 20)),
                r"SAAT$_{down}$": StrengthAdaptivePGD(EPS / 4, 0, start=CleanStart(), rho=rho, stages=stages(0, 8)),
                r"SAAT$_{up}$": StrengthAdaptivePGD(EPS / 4, 10, start=CleanStart(), rho=rho, full=EPS, stages=stages(8, 14))}
    for k, (name, attack) in enumerate(variants.items()):
        far = (attack(model, b.x, b.y, 3 * EPS) - b.x).abs().flatten().numpy() / EPS
        left.plot(MARGINS, far, color=PALETTE[k], ls=("-", "--", ":")[k], lw=1.8, label=name)
    reach = np.linspace(0, 2.5, 60)
    for k, (name, m) in enumerate(zip(NAMES, EXAMPLES)):
        right.plot(reach, np.logaddexp(0, -STEEP * (float(m) - reach)), color=PALETTE[(3, 1, 2)[k]], label=name)
    right.axhline(rho, color="0.5", lw=1.2, ls="--", label=r"$\rho$")
    right.set(xlabel=r"radius / $\epsilon$", ylabel="loss of the adversary", ylim=(0, 5), title=r"the radius is where the loss is $\rho$")
    return [left, right]


def dra():
    left, right = frames()
    grad = torch.tensor(np.random.default_rng(0).standard_normal((1, 1, 6, 8)).astype("float32"))
    order = grad.flatten().abs().argsort(descending=True)
    kept = torch.where(significant(grad, 1 / 3), normalised(grad), 0.).flatten()[order].abs()
    left.bar(range(48), kept, color=PALETTE[0], width=0.8, label=r"DRA, $p=\frac{1}{3}$")
    left.plot([-0.5, 47.5], [2.55, 2.55], color="0.5", lw=1.2, ls="--", label="PGD of equal strength")
    left.set(xlabel="pixel values, by their gradient", ylabel=r"change / $\epsilon$", ylim=(0, 3.4), title="which pixels move")
    epochs = np.arange(60)
    strength = np.array([decaying(8 / 255).value(e, 60) * 255 for e in epochs])
    right.step(epochs + 1, strength, where="mid", color=PALETTE[0], label="strength of the adversaries (1/255)")
    right.fill_between([0.5, 50.5], 0, 2.4, color=PALETTE[2], alpha=0.12, lw=0, label="clean and adversarial steps by turns")
    right.fill_between([50.5, 60.5], 0, 2.4, color=PALETTE[1], alpha=0.2, lw=0, label="clean steps only")
    right.set(xlabel="epoch of fine-tuning", ylim=(0, 2.4), xlim=(0.5, 60.5), title="from the clean network on")
    return [left, right]


def draw(folder: Path) -> None:
    "Each panel as SVG, once per theme: daat-1-light.svg and so on."
    folder.mkdir(parents=True, exist_ok=True)
    for make in (daat, saat, iaat, cat, dra):
        for number, ax in enumerate(make(), 1):
            handles, labels = ax.get_legend_handles_labels()
            columns = 1 if max(map(len, labels)) > 24 else 2 if len(labels) == 4 else 3
            for theme, (ink, grid) in THEMES.items():
                ax.grid(color=grid); ax.set_axisbelow(True); ax.patch.set_alpha(0)
                for text in (ax.title, ax.xaxis.label, ax.yaxis.label): text.set_color(ink)
                ax.tick_params(colors=ink)
                ax.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.46, -0.2), ncols=columns, columnspacing=1.2, handlelength=1.6, labelcolor=ink, frameon=False, fontsize="small")
                with plt.rc_context({"svg.hashsalt": "adaptive_at"}): ax.figure.savefig(folder / f"{make.__name__}-{number}-{theme}.svg", transparent=True, metadata={"Date": None})
            plt.close(ax.figure)


if __name__ == "__main__":
    import sys
    draw(Path(sys.argv[1]))
