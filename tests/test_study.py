"The study: one protocol for all rows, and every reading that a paper leaves open."
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from adaptive_at.tables.frontier import draw
from adaptive_at.papers.study import STUDIED, TABLE, VARIANTS, frontier
from adaptive_at.tables.parameters import TABLES, about, check_parameters
from adaptive_at.tables.plan import Plan, open_session


def planned(tmp_path, **parameters):
    return Plan(TABLE, open_session(check_parameters("study", dict(device="cpu", dry_run=True, outputs=str(tmp_path)) | parameters)))


@pytest.mark.parametrize("preset", ["quick", "fast", "paper"])
def test_rows_differ_in_their_method_only(tmp_path, preset):
    block, = planned(tmp_path, preset=preset, figures="all").blocks
    runs = {row: run for row, (run,) in block.runs.items()}
    assert set(block.rows) == {"Natural", *STUDIED} and set(runs) == set(block.rows) | set(VARIANTS)
    common = {row: (r.dataset, r.content, r.network, r.augment, r.monitor, r.seed, r.training) for row, r in runs.items() if not r.start}
    assert len(set(common.values())) == 1
    assert {row for row, r in runs.items() if r.start} == {row for row in VARIANTS if row.startswith("DRA")} and all(r.start == runs["Natural"] for r in runs.values() if r.start)
    assert {r.training.lr for r in runs.values() if r.start} == {0.01} != {r.training.lr for r in runs.values() if not r.start}  # fine-tuning has a rate of its own
    methods = [r.method for r in runs.values()]
    assert all(a != b for i, a in enumerate(methods) for b in methods[:i])  # no variant that is another one under a second name


def test_every_row_is_judged_by_autoattack_at_one_radius(tmp_path):
    block, = planned(tmp_path, preset="fast").blocks
    assert set(block.cells) == {"Natural", *STUDIED} and all(("AA", "last") in cells for cells in block.cells.values())
    assert block.columns["AA"].eps == block.columns["PGD-20"].eps == 8/255


def test_the_command_for_a_copy_on_two_cores(tmp_path):
    "An image folder, a small network that trains two rows side by side, a subset and fewer epochs; all of it is told as a departure."
    for part in ("train", "test"):
        for name in "ab": (tmp_path/"copy"/part/name).mkdir(parents=True)
    from PIL import Image
    for i, folder in enumerate(sorted((tmp_path/"copy").glob("*/*"))):
        for k in range(8): Image.new("RGB", (32, 32), (30 * i, 20 * k, 0)).save(folder/f"{k}.png")
    plan = planned(tmp_path, preset="fast", datasets=f"imagefolder:{tmp_path/'copy'}", network="early", train_examples=8, epochs=2, test_examples=4)
    block, = plan.blocks
    run, = block.runs["AT"]
    assert plan.workers(block) > 0 and run.network.threads == 1 and run.training.epochs == 2 and run.train_examples == 8
    assert plan.overrides == ["datasets=imagefolder copy", "test_examples=4 of 16", "network=narrow ResNet (width 24, early stride)", "epochs=2 of 30", "train_examples=8 of 16"]


def test_the_frontier_has_a_point_with_its_intervals_for_every_row(tmp_path):
    plan = planned(tmp_path, preset="quick")
    told = {row: 50. + i for i, row in enumerate(STUDIED)}
    results = SimpleNamespace(interval=lambda block, row, column: (told[row] + 20 * (column == "natural"),) * 3)
    fig = frontier(results, plan.blocks[0])
    left, right = fig.axes
    points = sorted((100 - x, y) for c in left.containers for x, y in zip(*c.lines[0].get_data()))  # the axis is of errors
    assert points == sorted((v + 20, v) for v in told.values())
    assert {t.get_text() for t in left.texts} - {""} == set(STUDIED)
    assert {t.get_text() for t in fig.legends[0].get_texts()} == {"baselines", "DAAT", "IAAT", "SAAT", "CAT", "front"}
    plt.close(fig)


@pytest.mark.parametrize("naturals", [(45., 52.), (97., 98.), (40., 99.)])
def test_the_frontiers_axis_is_readable_however_near_the_points_are(naturals):
    points = pd.DataFrame([{"row": f"r{i}", "run": f"{i}", "paper": "DAAT", "cost": 100 + 50 * i, "front": True} | dict.fromkeys(("natural", "natural_low", "natural_high"), natural) | dict.fromkeys(("AA", "AA_low", "AA_high"), 30. - i)
                           for i, natural in enumerate(naturals)])
    fig = draw(points)
    for ax in fig.axes:
        low, high = sorted(ax.get_xlim())
        assert sum(low <= tick <= high for tick in ax.get_xticks()) >= 2 and all(t.get_text() for t in ax.get_xticklabels())
    plt.close(fig)


def test_it_is_registered_with_its_own_parameters():
    assert set(about("study")) == {"eps"} and TABLES["study"][1] == "frontier | variants"
