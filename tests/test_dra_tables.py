"DRA's Tables 1 to 7 and Figs. 3 to 5: what the rows, columns and recipes are, tiny runs, the figures, the calibration."
import importlib
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch

from adaptive_at.data import datasets
from adaptive_at.attacks import KL, NormalStart, PGD
from adaptive_at.base.identity import spec_hash
from adaptive_at.data.datasets import Augment
from adaptive_at.algorithms.dra import CLEAN, DRA, FINE_TUNE, FINE_TUNE_MNIST, MNIST_TRAINING, Replay, accuracy, dra_finetune, dra_finetune_constant, dra_finetune_mnist
from adaptive_at.evaluation import AutoAttack, WhiteBox, decode_verdicts, evaluate, evaluation
from adaptive_at.intervals import wilson
from adaptive_at.algorithms.baselines import MART_RESNET18, Training, at, mart, natural, trades
from adaptive_at.networks import in_mode
from adaptive_at.objectives import MART, TRADES
from adaptive_at.papers.table3_dra import calibration, fig3
from adaptive_at.papers.table4_dra import ATTACKED, SHARES, attack, fig4, success_rate
from adaptive_at.tables.parameters import check_parameters
from adaptive_at.tables.plan import Plan, open_session
from adaptive_at.base.rng import RandomStream, key
from adaptive_at.tables.results import Results, execute, substitution_note

from helpers import digits, robust_digits

def module(n): return importlib.import_module(f"adaptive_at.papers.table{n}_dra")


def planned(n, outputs, preset="paper", **parameters):
    told = dict(preset=preset, device="cpu", outputs=str(outputs), dry_run=preset == "paper") | parameters
    return Plan(module(n).TABLE, open_session(check_parameters(f"table{n}_dra", told)))


def block(n, tmp_path, **parameters):
    block, = planned(n, tmp_path, **parameters).blocks
    return block


def run_of(block, row): return block.runs[row][0]


# Table 1: two kinds of images

def test_table_1_has_a_block_for_each_kind_of_images_with_its_own_radius_and_label(tmp_path):
    cifar, mnist = planned(1, tmp_path).blocks
    assert (cifar.info.name, cifar.protocol.eps, cifar.shown, cifar.network.label) == ("cifar10", 8/255, ["natural", "PGD eps=8/255"], "ResNet-18")
    assert (mnist.info.name, mnist.protocol.eps, mnist.shown, mnist.network.label) == ("mnist", 0.3, ["natural", "PGD eps=0.3"], "CNN (2 conv + 2 fc)")
    assert cifar.columns["PGD eps=8/255"] == WhiteBox(PGD(8/255 / 20, 20), 8/255) and mnist.columns["PGD eps=0.3"] == WhiteBox(PGD(0.3 / 20, 20), 0.3)


def test_table_1_on_cifar_10_is_the_familys(tmp_path):
    cifar, _ = planned(1, tmp_path).blocks
    e = 8/255
    assert [run_of(cifar, r).method for r in cifar.rows] == [natural(), at(e), trades(e, beta=1.), trades(e), mart(e)]
    assert [run_of(cifar, r).training for r in cifar.rows] == [CLEAN, Training(), Training(), Training(), MART_RESNET18]
    assert {run_of(cifar, r).augment for r in cifar.rows} == {Augment(crop=4, flip=True)} and run_of(cifar, "Vanilla").network.mean == ()


def test_table_1_on_mnist_attacks_as_trades_script_does(tmp_path):
    _, mnist = planned(1, tmp_path).blocks
    vanilla, madry, one, six, ours = (run_of(mnist, r) for r in mnist.rows)
    assert vanilla.method == natural() and madry.method.attack == PGD(0.01, 40)
    assert six.method.attack == PGD(0.01, 40, KL(), NormalStart(0.001)) and (one.method.objective, six.method.objective) == (TRADES(1.), TRADES(6.))
    assert ours.method.attack == PGD(0.01, 40, start=NormalStart(0.001)) and ours.method.objective == MART(5.)
    assert {run_of(mnist, r).method.radius.eps for r in mnist.rows[1:]} == {0.3}
    assert {run_of(mnist, r).training for r in mnist.rows} == {MNIST_TRAINING} and {run_of(mnist, r).augment for r in mnist.rows} == {Augment(crop=4)}
    assert [MNIST_TRAINING.lr_at(e) for e in (0, 53, 54, 74, 89)] == pytest.approx([0.01, 0.01, 1e-3, 1e-4, 1e-5]) and (MNIST_TRAINING.epochs, MNIST_TRAINING.weight_decay) == (100, 2e-4)


@pytest.mark.parametrize("n, measured, how", [(1, False, "on one GPU, other networks by their operations (this CPU takes far longer)"), (2, True, "measured on this device")])
def test_on_a_cpu_mnists_networks_train_side_by_side_at_the_measured_cost_and_a_gpus_cost_is_named_as_such(tmp_path, monkeypatch, capsys, n, measured, how):
    monkeypatch.setattr("adaptive_at.tables.plan.cores", lambda: 3)
    plan = planned(n, tmp_path)
    assert plan.measured() == measured and plan.workers(plan.blocks[-1]) == 3
    plan.show()
    assert how in capsys.readouterr().out


def test_on_digits_both_labels_of_table_1_are_one_evaluation_and_other_images_get_one_label(tmp_path):
    quick = block(1, tmp_path, preset="quick")
    assert quick.shown == ["natural", "PGD eps=0.3", "PGD eps=8/255"] and quick.columns["PGD eps=0.3"] == quick.columns["PGD eps=8/255"] == WhiteBox(PGD(0.25 / 20, 20), 0.25)
    assert block(1, tmp_path, datasets="cifar100").shown == ["natural", "PGD eps=8/255"]


# Table 2

def test_table_2_is_the_papers_recipe_for_mnist(tmp_path):
    mnist = block(2, tmp_path)
    ours = run_of(mnist, "Ours")
    assert ours.method == dra_finetune_mnist(0.3) and ours.method.attack == DRA(2/3, 20) and ours.training == FINE_TUNE_MNIST and ours.start == run_of(mnist, "Vanilla trained")
    assert [run_of(mnist, f"Trades(1/lambda={b:g})").method.objective.beta for b in (1, 0.5, 0.1)] == [1., 0.5, 0.1]
    assert {run_of(mnist, r).augment for r in mnist.rows} == {Augment(crop=4)}
    small, large = mnist.columns["PGD-20 eps=0.1"], mnist.columns["PGD-20 eps=0.3"]
    assert (small.eps, small.attack.alpha, small.steps) == (pytest.approx(0.1), pytest.approx(0.005), 20) and (large.eps, large.attack.alpha, large.steps) == (0.3, 0.015, 20)


@pytest.mark.parametrize("preset, told, limit", [("paper", {}, 0), ("paper", {"aa_examples": 2000}, 2000), ("quick", {}, 200), ("quick", {"aa_examples": 50}, 50)])
def test_table_2_runs_autoattack_on_as_many_images_as_it_is_told_and_says_so(tmp_path, preset, told, limit):
    plan = planned(2, tmp_path, preset, columns="all", **told)
    assert plan.blocks[0].columns["AA"].limit == limit and all(not getattr(c, "limit", 0) for name, c in plan.blocks[0].columns.items() if name != "AA")
    assert [substitution_note(plan.blocks[0], "AA", plan)] == ([f"† AA on the first {limit} of these images: compare it within its column."] if limit else [""])
    assert ("; ".join(plan.overrides) != "") is bool(told)


def test_tables_1_and_2_share_what_is_the_same(tmp_path):
    _, one = planned(1, tmp_path).blocks
    two = block(2, tmp_path)
    assert run_of(one, "Vanilla").id == run_of(two, "Vanilla trained").id and run_of(one, "Trades(1/lambda=1)").id == run_of(two, "Trades(1/lambda=1)").id
    assert one.columns["PGD eps=0.3"] == two.columns["PGD-20 eps=0.3"]


# Tables 3 to 7 on CIFAR-10

@pytest.mark.parametrize("n", [3, 4, 5, 6])
def test_pgd_is_twenty_steps_of_a_twentieth(n, tmp_path):
    b = block(n, tmp_path, columns="all")
    for k in (2, 5, 8):
        column = b.columns[f"PGD-20 eps={k}/255"]
        assert (column.eps, column.attack) == (pytest.approx(k/255), PGD(column.eps / 20, 20)) and column.restarts == 1
    strong = b.columns["PGD-20 eps=8/255 (step eps/4)"]
    assert b.columns["AA"] == AutoAttack(8/255) and strong.attack == PGD(2/255, 20)
    assert b.columns["PGD-20 eps=8/255"].eps == strong.eps == b.columns["AA"].eps  # to the bit: warnings compare attacks in the same ball


def test_the_fine_tuned_rows_start_from_the_clean_run(tmp_path):
    three, five, six = (block(n, tmp_path) for n in (3, 5, 6))
    vanilla, ours = run_of(three, "Vanilla trained"), run_of(three, "Ours")
    assert vanilla.method == natural() and vanilla.training == CLEAN and ours == replace(vanilla, method=dra_finetune(8/255), training=FINE_TUNE, start=vanilla)
    assert [run_of(three, f"Trades(1/lambda={b})").method for b in (0.05, 0.01)] == [trades(8/255, beta=0.05), trades(8/255, beta=0.01)]
    for row in ("ours + PGD", "ours + DRA"): assert run_of(five, row).start.id == vanilla.id and run_of(five, row).method.objective == Replay()
    for row in five.rows[:4]: assert run_of(five, row).start is None and run_of(five, row).training == Training()
    assert [run_of(six, r).method.attack.p for r in six.rows[1:]] == [1/6, 1/3, 1/2, 1] and all(run_of(six, r).start.id == vanilla.id for r in six.rows[1:])
    assert run_of(six, "p=1/3").method == dra_finetune_constant(8/255)


def test_table_5_compares_the_attacks_alone(tmp_path):
    b = block(5, tmp_path)
    for name in ("Madry's", "TRADES", "ours"):
        pgd, dra = (run_of(b, f"{name} + {attack}").method for attack in ("PGD", "DRA"))
        assert pgd.objective == dra.objective and (pgd.radius.eps * 255, dra.radius.eps * 255) == (pytest.approx(2.55), pytest.approx(1)) and dra.attack == DRA(1/3, 5)


def test_runs_are_shared_between_the_tables(tmp_path):
    three, four, five, six, seven = (block(n, tmp_path) for n in (3, 4, 5, 6, 7))
    same = [("Vanilla trained", three), ("ResNet-50 (vanilla)", four), ("Vanilla trained", five), ("p=0", six), ("ResNet-50 (Vanilla trained)", seven)]
    assert len({run_of(b, row).id for row, b in same}) == 1
    assert len({run_of(b, row).id for row, b in [("Ours", three), ("ResNet-50 (ours)", four), ("ResNet-50 (DRA Trained)", seven)]}) == 1
    assert run_of(five, "ours + DRA").id == run_of(six, "p=1/3").id
    one, _ = planned(1, tmp_path).blocks
    assert run_of(one, "Vanilla").id == run_of(four, "ResNet-18 (vanilla)").id


def test_in_quick_the_tables_train_26_runs_in_all(tmp_path):
    "20 epochs each; a fine-tuned row keeps its own rate and schedule."
    runs = {r.id: r for n in range(1, 8) for r in (seeds[0] for seeds in block(n, tmp_path, preset="quick").runs.values())}
    assert len(runs) == 26 and {r.training.epochs for r in runs.values()} == {20}
    tuned = [r for r in runs.values() if r.start]
    assert len(tuned) == 10 and {r.training.lr for r in tuned} == {0.01} and {r.training.lr for r in runs.values() if not r.start} == {0.1}
    assert {r.training.schedule for r in tuned} == {FINE_TUNE.schedule, FINE_TUNE_MNIST.schedule}


def test_table_4_gives_each_row_its_network(tmp_path):
    paper, quick = block(4, tmp_path), block(4, tmp_path, preset="quick")
    assert [run_of(paper, r).network.label for r in paper.rows] == [n for n in ("ResNet-18", "ResNet-34", "ResNet-50", "ResNet-101") for _ in range(2)]
    assert [run_of(quick, r).network.width_factor for r in quick.rows] == [w for w in (8, 16, 24, 32) for _ in range(2)]
    assert all(run_of(b, r).network == run_of(b, r).start.network for b in (paper, quick) for r in b.rows[1::2])


def test_the_parameters_reach_the_rows(tmp_path):
    told, digits = block(3, tmp_path, p=0.5, factor=2., eps=0.05), block(3, tmp_path, preset="quick")
    assert run_of(told, "Ours").method == dra_finetune(0.05, 0.5, factor=2.) and run_of(told, "Trades(1/lambda=0.05)").method.radius.eps == 0.05
    assert run_of(digits, "Ours").method == dra_finetune(0.25, factor=1.2) and run_of(block(6, tmp_path, preset="quick"), "p=1").method == dra_finetune_constant(0.25, 1., factor=1.2)
    four = block(4, tmp_path, factor=3.)
    assert four.columns[attack(2, 4)].attack == DRA(4/12) and four.columns[attack(2, 4)].eps == pytest.approx(6/255)
    assert run_of(block(2, tmp_path, p=1., factor=2.), "Ours").method == dra_finetune_mnist(0.3, 1., factor=2.)


# DRA as the attack of an evaluation

def test_an_evaluation_with_dra_attacks_what_is_right_and_nothing_else():
    data, model = digits(), robust_digits()
    index = datasets.balanced(data.test.y, 200)
    x, y = datasets.to_unit(data.test.x[index]), data.test.y[index]
    result = evaluate(evaluation(WhiteBox(DRA(0.5), 0.05), data.info.identity, "w", examples=200), model, data)
    with torch.no_grad(): right, fooled = model(x).argmax(1) == y, model(DRA(0.5)(model, x, y, 0.05)).argmax(1) != y
    assert right.sum() < 200 and torch.equal(decode_verdicts(result["standing"]), right & ~fooled) and 0 < (right & fooled).sum() < right.sum()
    assert result["zero_gradients"] == 0


def test_its_steps_are_capped_as_pgds_are(tmp_path):
    plan = planned(4, tmp_path, preset="quick")
    assert plan._capped(WhiteBox(DRA(steps=1000), 0.1)) == WhiteBox(DRA(steps=500), 0.1) and plan._capped(WhiteBox(DRA(), 0.1)) == WhiteBox(DRA(), 0.1)
    assert spec_hash(WhiteBox(DRA(1/12), 0.1)) != spec_hash(WhiteBox(DRA(2/12), 0.1))


# Tiny runs

@pytest.fixture(scope="module")
def outputs(tmp_path_factory): return tmp_path_factory.mktemp("outputs")


def executed(n, outputs, **parameters):
    told = dict(preset="quick", epochs=1, train_examples=128, test_examples=16) | parameters
    return execute(planned(n, outputs, **told), lambda line: None)


@pytest.mark.parametrize("n", range(1, 8))
def test_a_tiny_run_gives_the_whole_table(n, outputs):
    results = executed(n, outputs, figures="none")
    block, = results.plan.blocks
    assert len(results.frame) == len(block.rows) * len(block.shown) and results.frame.value.between(0, 100).all() and (results.frame.n == 16).all()
    assert not results.frame.warning.str.contains("diverged").any()
    assert (outputs/f"table{n}_dra"/"quick"/"table.csv").is_file()


@pytest.mark.parametrize("n, name", [(3, "fig3"), (4, "fig4"), (7, "fig5")])
def test_a_tiny_run_draws_the_figure(n, name, outputs):
    results = executed(n, outputs)
    results.figure(name, getattr(module(n), name))
    picture = (outputs/f"table{n}_dra"/"quick"/f"{name}.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 5000


# The figures' numbers, on a clean network that has learned something

@pytest.fixture(scope="module")
def vanilla(tmp_path_factory):
    return executed(3, tmp_path_factory.mktemp("vanilla"), rows="Vanilla trained", epochs=8, train_examples=0, test_examples=100)


def test_calibration_measures_the_clean_network_on_the_validation_part(vanilla):
    lines = calibration(vanilla, "Vanilla trained").data.reset_index()
    weak, strong = (line for _, line in lines.iterrows())
    assert weak.images == strong.images == "150 of the validation part" and (weak["PGD's step"], strong["PGD's step"]) == ("eps/20", "eps/4")
    data, block = digits(), vanilla.plan.blocks[0]
    model = vanilla.plan.store.model(run_of(block, "Vanilla trained"), data)
    index = datasets.balanced(data.val.y, 0)
    x, y, r = datasets.to_unit(data.val.x[index]), data.val.y[index], 2.55 / 8 * 0.25
    def left(attack, eps):
        with in_mode(model, "eval"), torch.no_grad(): return 100 * float((model(attack(model, x, y, eps, RandomStream(key("calibrate"), torch.arange(150)))).argmax(1) == y).float().mean())
    assert weak["PGD at 2.55 leaves"] == f"{left(PGD(r / 20, 20), r):.1f}%" and strong["PGD at 2.55 leaves"] == f"{left(PGD(r / 4, 20), r):.1f}%"
    assert weak["with factor"] == "1.2" and weak["DRA at 1 leaves"] == f"{left(DRA(), 1.2 / 8 * 0.25):.1f}%"
    found = float(weak["they are equal with factor"])
    assert 0.8 < found < 2 and abs(left(DRA(), found / 8 * 0.25) - left(PGD(r / 20, 20), r)) < 3 and float(strong["they are equal with factor"]) > found


def test_table_2_measures_dra_against_pgd_at_both_radii(vanilla, tmp_path):
    plan, (told,) = planned(2, tmp_path, "quick", rows="Vanilla trained", factor=0.5), vanilla.plan.blocks
    plan.blocks[0].runs["Vanilla trained"] = told.runs["Vanilla trained"]   # a clean network that is there already
    plan.store = vanilla.plan.store
    small, large = (line for _, line in module(2).strengths(Results(plan)).data.reset_index().iterrows())
    data = digits()
    index = datasets.balanced(data.val.y, 0)
    model, x, y = plan.store.model(run_of(told, "Vanilla trained"), data), datasets.to_unit(data.val.x[index]), data.val.y[index]
    def left(attack, eps): return accuracy(model, attack, x, y, eps)
    assert small.images == "150 of the validation part" and (small.radius, large.radius) == ("0.083", "0.25")
    assert (small["PGD-20 leaves"], large["PGD-20 leaves"]) == (f"{left(PGD(0.25 / 60, 20), 0.25 / 3):.1f}%", f"{left(PGD(0.25 / 20, 20), 0.25):.1f}%")
    assert small["DRA leaves"] == large["DRA leaves"] == f"{left(DRA(2/3, 20), 0.5 * 0.25 / 3):.1f}%" and small["with factor"] == "0.5"
    found = float(small["equal with factor"])   # of the table's own eps, not of the half that is used
    assert abs(left(DRA(2/3, 20), found * 0.25 / 3) - left(PGD(0.25 / 60, 20), 0.25 / 3)) < 5


def test_table_2_says_when_there_is_nothing_to_measure(tmp_path):
    assert module(2).strengths(Results(planned(2, tmp_path))) == "dry run: nothing was trained"
    assert module(2).strengths(Results(planned(2, tmp_path, "quick"))).startswith("nothing to compare")


def test_table_2_without_its_own_row_compares_nothing(vanilla, tmp_path, monkeypatch):
    two, plan = module(2), planned(2, tmp_path, "quick", rows="Vanilla trained")
    plan.blocks[0].runs["Vanilla trained"], plan.store = vanilla.plan.blocks[0].runs["Vanilla trained"], vanilla.plan.store
    monkeypatch.setattr(two, "rows", lambda p: {"Vanilla trained": natural()})
    assert two.strengths(Results(plan)).startswith("nothing to compare")


def test_calibration_says_when_there_is_nothing_to_measure(vanilla, tmp_path):
    assert calibration(vanilla, "Ours") == "Ours: not run"
    assert calibration(Results(planned(3, tmp_path)), "Vanilla trained") == "dry run: nothing was trained"


def test_fig_3_shows_an_image_that_both_attacks_fool(vanilla):
    fig = fig3(vanilla, vanilla.plan.blocks[0])
    clean, pgd, pgd_noise, dra, dra_noise, _ = fig.axes
    true = clean.get_title().removeprefix("clean: ")
    assert pgd.get_title() != f"PGD, seen as {true}" and dra.get_title() != f"DRA, seen as {true}"
    share = [float(ax.get_xlabel().split("\n")[1].split("%")[0]) for ax in (pgd_noise, dra_noise)]
    assert share[1] <= 34 < share[0]
    for picture, noise in ((pgd, pgd_noise), (dra, dra_noise)):
        change = picture.images[0].get_array()[..., 0] - clean.images[0].get_array()[..., 0]
        assert abs(change - noise.images[0].get_array()).max() < 1e-6 and noise.images[0].get_clim() == pgd_noise.images[0].get_clim()
    plt.close(fig)


class Told:
    "Results of verdicts that are told."
    def __init__(self, verdicts): self.verdicts = verdicts
    def of(self, block, row, column): return [{"standing": text} for text in self.verdicts[row, column]]


def test_success_counts_the_images_that_were_right():
    told = Told({("r", "natural"): ["11101", "11111"], ("r", "a"): ["10001", "01111"]})
    assert success_rate(told, None, "r", "a") == (pytest.approx(100 * 3/9), *wilson(100 * 3/9, 9))


def test_fig_4_draws_the_success_rates(outputs):
    results = executed(4, outputs)
    block = results.plan.blocks[0]
    fig = fig4(results, block)
    lines = list(fig.axes[0].containers)
    assert len(lines) == 6
    for container, (row, e) in zip(lines, [(row, e) for row in ATTACKED for e in (1, 2)]):
        x, y = container.lines[0].get_data()
        assert container.get_label() == rf"{run_of(block, row).network.label}, $\epsilon={e}$" and abs(x - [k / 12 for k in (0, *SHARES)]).max() < 0.02
        assert y[0] == 0 and list(y[1:]) == pytest.approx([success_rate(results, block, row, attack(e, k))[0] for k in SHARES])
    plt.close(fig)
