"IAAT's tables: Table 7's and 8's settings, runs shared between tables, and figures that draw what the store holds."
import importlib
import re

import numpy as np
import pytest
import torch
from matplotlib import colors, pyplot as plt

from adaptive_at.attacks import PGD
from adaptive_at.base.schedules import resolve_schedules
from adaptive_at.data.datasets import Augment
from adaptive_at.evaluation import WhiteBox
from adaptive_at.figures import PALETTE
from adaptive_at.algorithms.iaat import EIGHT, IAAT_RESNET18, IAAT_WRN, RandomTargetPGD, SIXTEEN, iaat, iaat_baseline, imagenet_baseline, imagenet_iaat, mixup_at
from adaptive_at.algorithms.baselines import natural
from adaptive_at.papers import table1_iaat, table3_iaat
from adaptive_at.tables.parameters import check_parameters
from adaptive_at.tables.plan import Plan, open_session
from adaptive_at.tables.results import run

CIFAR = (1, 2, 4, 5, 6)
ATTACKED = "natural,PGD-10x5,PGD-100x5,PGD-1000x2,transfer PGD-1000"
FEW = "natural,PGD-10x5"
TINY = dict(preset="quick", device="cpu", epochs=2, train_examples=128, test_examples=16)


def planned(number, **parameters):
    name = f"table{number}_iaat"
    return Plan(importlib.import_module(f"adaptive_at.papers.{name}").TABLE, open_session(check_parameters(name, dict(dry_run=True, device="cpu") | parameters)))


def ids(block): return {row: [r.id for r in runs] for row, runs in block.runs.items()}


# Rows, columns and training

@pytest.mark.parametrize("number, dataset", [(1, "cifar10"), (2, "cifar100"), (4, "cifar10"), (5, "cifar100"), (6, "cifar10")])
def test_rows_are_trained_at_table_7s_settings(number, dataset):
    narrow, wide = planned(number, preset="paper").blocks
    for block, training, warmup, epochs in ((narrow, IAAT_RESNET18, 5, 200), (wide, IAAT_WRN, 10, 110)):
        with_warmup, without = iaat(EIGHT, warmup, epochs), iaat(EIGHT, 0, epochs)
        methods = {"Clean": natural(), "Adversarial": iaat_baseline(EIGHT), "IAAT": with_warmup, "IAAT (no warm)": without, "IAAT (warm)": with_warmup,
                   "Adaptive (no warm)": without, "Adaptive (warm)": with_warmup, "Mixup": mixup_at(EIGHT)}
        assert block.info.name == dataset and set(block.runs) == {*block.rows, *(f"{row}, copy" for row in block.rows)}
        for row, (r,) in block.runs.items():
            assert r.method == methods[row.removesuffix(", copy")] and r.training == training and r.seed == 1000 * row.endswith(", copy")
            assert r.augment == Augment(crop=4, pad="reflect", flip=True)
            assert np.allclose(r.network.mean, np.array([125.3, 123.0, 113.9]) / 255) and np.allclose(r.network.std, np.array([63.0, 62.1, 66.7]) / 255)
        rule = block.runs[block.rows[-1]][0].method.radius
        assert [bool(resolve_schedules(rule, e, epochs).warm) for e in (warmup - 1, warmup)] == [True, False] and resolve_schedules(rule, warmup, epochs).beta == pytest.approx(0.1)
    assert [b.runs[b.rows[0]][0].network.label for b in (narrow, wide)] == ["ResNet-18", "WideResNet-32-10"]


@pytest.mark.parametrize("preset, steps", [("paper", 1000), ("quick", 250)])
def test_columns_are_section_4_1s(preset, steps):
    for number in CIFAR:
        for block in planned(number, preset=preset).blocks:
            eps, c = block.protocol.eps, block.columns
            white = {label: (c[label].attack.steps, c[label].restarts) for label in ("PGD-10x5", "PGD-100x5", "PGD-1000x2")}
            assert white == {"PGD-10x5": (10, 5), "PGD-100x5": (100, 5), "PGD-1000x2": (steps, 2)}
            moved = c["transfer PGD-1000"]
            assert (moved.attack.steps, moved.restarts) == (steps, 2)
            for label in (*white, "transfer PGD-1000"): assert c[label].eps == eps and c[label].attack == PGD(c[label].attack.alpha, c[label].attack.steps) and c[label].attack.alpha == pytest.approx(eps / 4)
            assert ("corruption" in block.shown) == (number in (1, 4)) and block.shown[:5] == ATTACKED.split(",")
            assert eps == (EIGHT if preset == "paper" else 0.25)


def test_tables_share_runs_and_columns():
    for preset in ("quick", "paper"):
        one, two, four, five, six = (planned(number, preset=preset).blocks for number in CIFAR)
        for a, b, c in zip(one, four, six):
            for copy in ("", ", copy"):
                assert ids(a)[f"IAAT{copy}"] == ids(b)[f"IAAT (warm){copy}"] == ids(c)[f"IAAT{copy}"]
            assert all(a.columns[label] == column for other in (b, c) for label, column in other.columns.items())
        for a, b in zip(two, five):
            for copy in ("", ", copy"): assert ids(a)[f"IAAT{copy}"] == ids(b)[f"Adaptive (warm){copy}"]
            assert a.columns == b.columns
        if preset == "quick":  # the same digits stand for both datasets: only the first of the tables costs
            assert len(one) == 1 and ids(one[0]) == ids(two[0]) and list(ids(four[0]).values()) == list(ids(five[0]).values())
        distinct = {i for blocks in (one, two, four, five, six) for b in blocks for runs in ids(b).values() for i in runs}
        assert len(distinct) == {"quick": 10, "paper": 36}[preset]   # of 22 and 52


def test_gamma_and_beta_reach_the_rule_and_nothing_else():
    before, after = (planned(1, preset="paper", network="resnet18", figures="all", **told).blocks[0] for told in ({}, dict(gamma=3., beta=0.2)))
    rule = after.runs["IAAT"][0].method.radius
    assert rule.gamma == pytest.approx(3/255) and resolve_schedules(rule, 100, 200).beta == pytest.approx(0.2)
    changed = {row for row in before.runs if ids(before)[row] != ids(after)[row]}
    assert changed == {row for row in before.runs if row.startswith("IAAT")} and len(changed) == 5
    digits = planned(1, preset="quick", gamma=3.).blocks[0].runs["IAAT"][0].method.radius
    assert digits.gamma == pytest.approx(0.25 * 3 / 8)


def test_variants_differ_in_what_their_labels_say():
    block = planned(1, preset="paper", network="wrn32-10-iaat", figures="all").blocks[0]
    method = {row: runs[0].method for row, runs in block.runs.items()}
    assert method["IAAT, printed Alg. 1"] == iaat(EIGHT, 10, 110, misclassified="printed") and method["IAAT, batch norm in eval mode"] == iaat(EIGHT, 10, 110, mode="eval")
    assert {k: method[f"AT, {k}/8 eps"] for k in range(1, 8)} == {k: iaat_baseline(k / 255) for k in range(1, 8)} and method["Adversarial"] == iaat_baseline(8/255)
    assert [block.columns[table1_iaat.swept(k)].eps * 255 for k in table1_iaat.SWEEP] == pytest.approx(table1_iaat.SWEEP)
    assert block.columns[table1_iaat.swept(8)] == WhiteBox(PGD(2/255, 100), EIGHT) == WhiteBox(block.columns["PGD-100x5"].attack, EIGHT)


def test_table_3_is_trained_and_attacked_as_table_8_says():
    for block in planned(3, preset="paper").blocks:
        assert block.protocol.eps == SIXTEEN
        assert {row: run.method for row, (run,) in block.runs.items()} == {"Clean training": natural(), "Adversarial training": imagenet_baseline(half=True), "IAAT": imagenet_iaat(half=True)}
        training = block.runs["IAAT"][0].training
        assert (training.epochs, training.weight_decay, training.lr / training.batch) == (110, 1e-4, pytest.approx(0.1 / 256)) and training.lr_at(36) == pytest.approx(training.lr / 10)
        radii = {k: block.columns[f"PGD-1000 eps={k}/255"] for k in (4, 8, 12, 16)}
        for k, column in radii.items(): assert column == WhiteBox(RandomTargetPGD(column.attack.alpha, 1000), column.eps) and (column.eps * 255, column.attack.alpha * 255) == (pytest.approx(k), pytest.approx(1))
        assert radii[16].eps == SIXTEEN and block.columns["mCE"].relative
    quick = planned(3, preset="quick").blocks
    assert [b.network.size(10, 1) for b in quick] == sorted({b.network.size(10, 1) for b in quick}) and len(quick) == 3
    for block in quick:
        eps, run = block.protocol.eps, block.runs["IAAT"][0]
        assert eps == 0.25 and not block.columns["mCE"].relative and run.training.epochs == 20
        reach = {row: block.runs[row][0].method.attack.alpha * block.runs[row][0].method.attack.steps for row in ("Adversarial training",)}
        assert reach["Adversarial training"] == pytest.approx(30/16 * eps) and run.method.attack.steps == 10
        assert [block.columns[f"PGD-1000 eps={k}/255"].eps for k in (4, 8, 12, 16)] == pytest.approx([eps / 4, eps / 2, 3 * eps / 4, eps])
    gamma = planned(3, preset="paper", gamma=2., beta=0.2).blocks[0].runs["IAAT"][0].method
    assert gamma == imagenet_iaat(gamma=2/255, beta=0.2, half=True) != imagenet_iaat(half=True)


# A tiny run, and its figures

@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("iaat")
    return folder, run(table1_iaat.TABLE, **TINY, columns=FEW, outputs=str(folder))


@pytest.fixture
def trained(tiny): return table1_iaat.Trained(tiny[1], tiny[1].plan.blocks[0])


def drawn(figure):
    "Close a figure and give it back."
    plt.close(figure)
    return figure


def test_a_tiny_run_fills_the_table_and_its_figures(tiny, capsys):
    folder, results = tiny
    frame = results.frame
    assert list(zip(frame.row, frame.column)) == [(r, c) for r in ("Clean", "Adversarial", "IAAT") for c in FEW.split(",")]
    assert frame.value.between(0, 100).all() and (frame.n == 16).all() and not frame.warning.str.contains("quoted").any()
    for name in results.plan.figures: results.figure(name, getattr(table1_iaat, name))
    assert sorted(p.stem for p in folder.glob("table1_iaat/quick/*.png")) == ["fig2", "fig5", "fig6", "fig7", "fig8"]
    capsys.readouterr()
    six = run(importlib.import_module("adaptive_at.papers.table6_iaat").TABLE, **TINY, columns=FEW, outputs=str(folder))
    counts = re.search(r"(\d+) runs from the store, (\d+) trained; (\d+) evaluations from the store, (\d+) made", capsys.readouterr().out).groups()
    assert tuple(map(int, counts)) == (1, 1, 2, 2)   # IAAT was there, with what was measured of it
    assert six.frame[six.frame.row == "IAAT"].value.tolist() == frame[frame.row == "IAAT"].value.tolist()


def test_images_are_chosen_by_radius_those_that_are_wrong_or_too_small_last(trained):
    n = len(trained.index)
    trained.radii = torch.linspace(200, 0, n)     # place n-1 has the smallest
    wrong = {n - 1, n - 3, 2}
    trained.step = float(trained.radii[n - 4]) + 1e-3   # the four smallest are below a step of the search
    trained.taken = lambda of, radius: (None, torch.tensor([int(y) + (int(i) in wrong) for i, y in zip(of, trained.images(of)[1])]))
    low, high = trained.extreme(4)
    assert low.tolist() == [n - 5, n - 6, n - 7, n - 8] and high.tolist() == [0, 1, 3, 4]
    low, high = trained.extreme(4, most=6)        # too few that are right: the others after them
    assert low.tolist() == [n - 5, n - 6, n - 1, n - 2] and high.tolist() == [0, 1, 3, 4]


def test_images_are_attacked_within_their_own_radius(trained):
    of, radii = torch.tensor([5, 0, 9]), torch.tensor([0.02, 0.3, 0.1])
    x, y = trained.images(of)
    assert torch.equal(trained.data.train.y[trained.index[of]], y)
    still, classes = trained.taken(of, 0.)
    assert torch.equal(still, x) and torch.equal(classes, trained.model(x).argmax(1))
    moved, classes = trained.taken(of, radii)
    reached = (moved - x).abs().flatten(1).amax(1)
    assert (reached <= radii + 1e-6).all() and (reached > 0.9 * radii).all() and torch.equal(classes, trained.model(moved).argmax(1))


def test_frames_say_whether_the_class_is_kept(tiny, trained):
    figure = drawn(table1_iaat.fig6(tiny[1], tiny[1].plan.blocks[0]))
    order = trained.radii.argsort(stable=True)
    shown = [*order[:20].tolist(), *order.flip(0)[:20].tolist()]
    y = trained.images(torch.tensor(shown))[1]
    taken = trained.taken(torch.tensor(shown), 0.)[1]
    assert {bool(t == k) for t, k in zip(taken, y)} == {True, False}   # both happen here
    for ax, place, t, k in zip(figure.axes, shown, taken.tolist(), y.tolist()):
        assert ax.get_title() == f"{trained.radii[place]:.1f}" and ax.get_xlabel() == trained.info.classes[t]
        assert colors.same_color(ax.spines["left"].get_edgecolor(), PALETTE[2 if t == k else 3])
        assert torch.equal(torch.as_tensor(np.asarray(ax.images[0].get_array())).squeeze(), trained.images(torch.tensor([place]))[0].squeeze())


def test_figure_2_has_a_row_per_image_and_a_column_per_radius(tiny, trained):
    figure = drawn(table1_iaat.fig2(tiny[1], tiny[1].plan.blocks[0]))
    for half, of in zip(figure.subfigs, trained.extreme(5)):
        axes = np.array(half.axes).reshape(5, 4)
        assert [a.get_title() for a in axes[0]] == ["image", "32", "64", "128"] and [a.get_ylabel() for a in axes[:, 0]] == [f"{trained.radii[i]:.1f}" for i in of]
        for column, radius in zip(axes.T, (0, 0.125, 0.25, 0.5)):
            assert [a.get_xlabel() for a in column] == [trained.info.classes[k] for k in trained.taken(of, float(radius))[1]]


def test_figure_7_ends_with_each_images_own_radius(tiny, trained):
    figure = drawn(table1_iaat.fig7(tiny[1], tiny[1].plan.blocks[0]))
    axes, of = np.array(figure.axes).reshape(4, 8), trained.extreme(8)[0]
    assert [a.get_ylabel() for a in axes[:, 0]] == ["image", "at 64", "at 128", "at its own"] and [a.get_title() for a in axes[3]] == [f"{trained.radii[i]:.1f}" for i in of]
    x, own = trained.images(of)[0], trained.radii[of] / 255
    gone = [float(np.abs(np.asarray(a.images[0].get_array()).squeeze() - picture.squeeze().numpy()).max()) for a, picture in zip(axes[3], x)]
    assert np.allclose(gone, own, rtol=0.1, atol=1e-3) and own.max() > 0.05


def test_figures_5_and_8_draw_the_bank(tiny, trained):
    block = tiny[1].plan.blocks[0]
    mean, three = drawn(table1_iaat.fig5(tiny[1], block)).axes
    assert np.allclose(mean.lines[0].get_ydata(), [255 * h["mean_eps"] for h in trained.history]) and mean.lines[0].get_ydata()[-1] == pytest.approx(float(trained.radii.mean()), rel=1e-4)
    followed = trained.bank["path_index"][:3]
    assert [line.get_ydata()[-1] for line in three.lines[:3]] == pytest.approx([255 * trained.bank["eps"][i] for i in followed]) and three.lines[3].get_ydata()[0] == 0.25 * 255
    panels = drawn(table1_iaat.fig8(tiny[1], block)).axes
    assert len(panels) == 2
    for ax, epoch in zip(panels, (1, 2)):
        assert sum(p.get_height() for p in ax.patches) == 128 and ax.get_title().startswith(f"epoch {epoch}: ")   # only the images that were trained on
    assert panels[1].get_title() == f"epoch 2: {trained.radii.mean():.1f} ± {trained.radii.std(correction=0):.1f}"


class Scripted:
    "Results whose every number is known."
    def __init__(self, plan, value): self.plan, self.value = plan, value
    def interval(self, block, row, column): return (v := self.value(block, row, column)), v - 1, v + 2


def test_figure_3_sets_robust_against_natural_accuracy():
    plan = planned(1, preset="quick", figures="fig3")
    order = [*(f"AT, {k}/8 eps" for k in range(1, 8)), "Adversarial", "IAAT", "IAAT (no warm)"]
    assert set(order) == set(plan.table.figures["fig3"].rows)
    value = lambda block, row, column: 2 * order.index(row) + (50 if column == "natural" else 10)
    ax, = drawn(table1_iaat.fig3(Scripted(plan, value), plan.blocks[0])).axes
    points = [[list(line.get_xdata()), list(line.get_ydata())] for line in (c.lines[0] for c in ax.containers)]
    assert points == [[[50 + 2 * i for i in range(8)], [10 + 2 * i for i in range(8)]], [[66], [26]], [[68], [28]]]
    across, along = (bars.get_segments() for bars in ax.containers[1].lines[2])
    assert np.allclose(across[0][:, 0], [65, 68]) and np.allclose(along[0][:, 1], [25, 28])


def test_figure_4_sweeps_the_test_radius():
    plan = planned(1, preset="quick", figures="fig4")
    value = lambda block, row, column: 10 * ("Adversarial", "AT, 2/8 eps", "IAAT").index(row) + 255 * getattr(block.columns[column], "eps", 0) / 64
    ax, = drawn(table1_iaat.fig4(Scripted(plan, value), plan.blocks[0])).axes
    for i, c in enumerate(ax.containers):
        assert list(c.lines[0].get_xdata()) == [0, 1, 2, 4, 6, 8, 10, 12, 16]
        assert np.allclose(c.lines[0].get_ydata(), 10 * i + 0.25 * 255 / 64 * np.array([0, 1, 2, 4, 6, 8, 10, 12, 16]) / 8)


def test_figure_9_holds_all_networks(tmp_path):
    plan = planned(3, preset="quick")
    value = lambda block, row, column: 100 * (row == "IAAT") - block.columns[column].steps / 100 - 10 * plan.blocks.index(block)
    first, *others = (table3_iaat.fig9(Scripted(plan, value), b) for b in plan.blocks)
    assert others == [None, None]
    lines = [c.lines[0] for c in drawn(first).axes[0].containers]
    for i, line in enumerate(lines):
        assert list(line.get_xdata()) == [10, 30, 100, 200, 500] and np.allclose(line.get_ydata(), 100 - np.array([10, 30, 100, 200, 500]) / 100 - 10 * i)
    results = run(table3_iaat.TABLE, **TINY | dict(epochs=1), rows="IAAT", columns="clean", outputs=str(tmp_path))
    results.figure("fig9", table3_iaat.fig9)
    assert [p.name for p in tmp_path.glob("table3_iaat/quick/*.png")] == ["fig9.png"]
    cells = {c: [len(results.of(b, "IAAT", c)) for b in results.plan.blocks] for c in ("natural", "PGD-10", "PGD-2000")}
    assert cells == {c: [1, 1, 1] for c in cells}
