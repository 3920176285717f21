"Corrupted images: the package's own, seeds, files, the store they share, and the columns made of them."
import json
import random
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError

import imagecorruptions
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_image
from torch import nn

from adaptive_at import corruptions
from adaptive_at.data import datasets as ds
from adaptive_at.base import rng
from adaptive_at.base.errors import UserError
from adaptive_at.base.identity import spec_hash
from adaptive_at.corruptions import (ALEXNET, COMMON, OFFICIAL, STANDARD, Computed, Corruption, MeanCorruptionError, Official, corrupt, samples, source)
from adaptive_at.evaluation import Images, evaluation
from helpers import digits, numbers, robust_digits

QUICK = ("gaussian_noise", "contrast", "jpeg_compression")   # fractions of a millisecond per image


def photos(n=8, side=32):
    "Real colour images: squares from a photograph, uint8 [n,3,side,side]."
    picture = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)
    return torch.stack([picture[:, 190 + 12 * i:190 + 12 * i + side, 50 + 60 * i:50 + 60 * i + side] for i in range(n)])


def some_digits(n): return Images(ds.to_unit(digits().test.x[:n]), digits().test.y[:n], torch.arange(n))


def distance(a, b): return float((ds.to_unit(a) - ds.to_unit(b)).square().mean().sqrt())


# Images

def test_the_names_are_the_package_s():
    assert list(STANDARD) == imagecorruptions.get_corruption_names("common") and list(COMMON) == imagecorruptions.get_corruption_names("all")


@pytest.mark.parametrize("name", COMMON)
def test_each_image_is_corrupted_by_itself(name):
    "The result hangs on the pixels, the corruption, the severity and the place: not on the batch, the order, or any global state."
    x, index = photos(5), torch.tensor([3, 0, 17, 4, 999])
    state = np.random.get_state()
    whole = corrupt(x, name, 3, index)
    assert whole.shape == x.shape and whole.dtype == torch.uint8 and not torch.equal(whole, x)
    np.random.seed(5), random.seed(5), torch.manual_seed(5)
    order = torch.tensor([4, 1, 2])
    before = random.getstate(), torch.random.get_rng_state(), np.random.get_state()[1].copy()
    assert torch.equal(corrupt(x[order], name, 3, index[order]), whole[order])
    assert random.getstate() == before[0] and torch.equal(torch.random.get_rng_state(), before[1]) and (np.random.get_state()[1] == before[2]).all()
    assert not torch.equal(corrupt(x, name, 4, index), whole)
    np.random.set_state(state)


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "motion_blur", "snow", "frost", "fog", "elastic_transform", "speckle_noise", "spatter"])
def test_two_places_get_different_random_numbers(name):
    x = photos()[5:6].expand(6, -1, -1, -1)
    assert len({corrupt(x, name, 3, torch.arange(6))[i].numpy().tobytes() for i in range(6)}) > 1


@pytest.mark.parametrize("severity", [1, 5])
@pytest.mark.parametrize("name", COMMON)
def test_a_large_colour_image_is_what_the_package_makes_of_it(name, severity):
    x = photos(2)
    for i, place in enumerate((7, 8)):
        seed = rng.key("corruption", name, severity, place) % 2**32
        np.random.seed(seed)
        options = {"seed": seed} if name in ("impulse_noise", "glass_blur") else {}
        theirs = imagecorruptions.corrupt(np.ascontiguousarray(x[i].permute(1, 2, 0).numpy()), severity, name, **options)
        assert torch.equal(corrupt(x, name, severity, torch.tensor([7, 8]))[i], torch.tensor(theirs).permute(2, 0, 1))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 31, 40), (1, 33, 33), (3, 32, 32)])
def test_small_and_grey_images(shape):
    "Of an even image these two corruptions are known: V + 0.1, and itself; the package cuts off what is behind the point."
    x = torch.full((3, *shape), 100, dtype=torch.uint8)
    assert corrupt(x, "brightness", 1, torch.arange(3)).unique().tolist() == [125]
    same = corrupt(x, "contrast", 5, torch.arange(3))
    assert same.shape == x.shape and set(same.unique().tolist()) <= {99, 100}


def test_enlarging_and_averaging_by_hand():
    x = digits().test.x[:2]
    large = np.kron(x.numpy()[:, 0], np.ones((4, 4), dtype=np.uint8))
    for name in ("gaussian_noise", "defocus_blur", "frost"):
        got = corrupt(x, name, 2, torch.tensor([0, 1]))
        for i in range(2):
            np.random.seed(rng.key("corruption", name, 2, i) % 2**32)
            theirs = imagecorruptions.corrupt(large[i], 2, name).astype(float)
            want = np.array([[theirs[4 * r:4 * r + 4, 4 * c:4 * c + 4].mean() for c in range(8)] for r in range(8)])
            assert np.abs(got[i, 0].numpy() - want).max() <= 0.5


def test_where_no_drop_falls_the_image_stays():
    "At this place the package's own `spatter` divides 0 by 0 and casts NaN to a pixel."
    x, place = photos(1), 77
    np.random.seed(rng.key("corruption", "spatter", 1, place) % 2**32)
    with np.errstate(invalid="raise"), pytest.raises(FloatingPointError):
        imagecorruptions.corrupt(np.ascontiguousarray(x[0].permute(1, 2, 0).numpy()), 1, "spatter")
    assert torch.equal(corrupt(x, "spatter", 1, torch.tensor([place])), x)
    assert not torch.equal(corrupt(x, "spatter", 1, torch.tensor([place + 1])), x)


def test_places_and_labels_stay():
    "Each corrupted image is nearer to its own original than to any other one."
    def shape(x): return nn.functional.normalize((v := ds.to_unit(x).flatten(1)) - v.mean(1, True))
    x = photos()
    for name in QUICK: assert (shape(corrupt(x, name, 1, torch.arange(8))) @ shape(x).T).argmax(1).tolist() == list(range(8))


def test_severity_is_severity():
    x, index = photos(), torch.arange(8)
    far = torch.tensor([[distance(corrupt(x, name, s, index), x) for s in range(1, 6)] for name in COMMON])
    assert (far.mean(0).diff() > 0).all() and (far[:, 4] > far[:, 0]).sum() >= 18   # `saturate` takes colour away at 1 and 2, and adds some from 3 on
    assert (far > 0).all()


def test_severe_corruptions_of_digits_cost_accuracy():
    names = ("gaussian_noise", "defocus_blur", "fog", "contrast")
    images, model = some_digits(60), robust_digits()
    right = torch.tensor([[float((model(ds.to_unit(x)).argmax(1) == images.y).float().mean()) for x in Computed().images(name, images)] for name in names]).mean(0)
    assert (model(images.x).argmax(1) == images.y).float().mean() >= right[0] > right[2] > right[4]


# The package is missing

@pytest.fixture(params=["not installed", "of another publisher"])
def missing(request, monkeypatch):
    if request.param == "not installed": monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    def absent(name): raise PackageNotFoundError(name)
    monkeypatch.setattr(corruptions, "version", absent)


def test_without_the_package_there_is_one_sentence(missing, tmp_path):
    for column in (Corruption(), MeanCorruptionError(source=Computed(tmp_path, "CIFAR-10-C"))):
        said = column.needs()
        assert 'pip install "adaptive_at[corruptions]"' in said and said.endswith(".") and "\n" not in said
        assert ("CIFAR-10-C" in said) is bool(column.source.instead)
        with pytest.raises(UserError, match="pip install"): column.standing(robust_digits(), some_digits(3))
        spec_hash(column), column.note, column.library   # an evaluation can still be named
    assert not list(tmp_path.rglob("*.npy"))


def test_with_the_package_nothing_is_needed():
    assert Corruption().needs() == "" and Computed().library == "imagecorruptions-imaug 1.1.5"


# Kept images

def test_kept_images_are_those_computed_and_are_computed_once(tmp_path, monkeypatch):
    images, kept = some_digits(6), Computed(tmp_path)
    want = {name: Computed().images(name, images) for name in QUICK}
    assert all(torch.equal(kept.images(name, images), want[name]) and want[name].shape == (5, 6, 1, 8, 8) for name in QUICK)
    files = sorted(tmp_path.rglob("*.npy"))
    assert [f.name for f in files] == sorted(f"{n}.npy" for n in QUICK) and len({f.parent for f in files}) == 1
    assert np.load(files[0]).shape == (30, 8, 8, 1) and np.load(files[0]).dtype == np.uint8   # CIFAR-10-C's layout
    monkeypatch.setattr(corruptions, "corrupt", None)
    assert all(torch.equal(Computed(tmp_path).images(name, images), want[name]) for name in QUICK)


def test_other_images_places_or_versions_are_kept_elsewhere(tmp_path, monkeypatch):
    x, index = digits().test.x[:3], torch.arange(3)
    kept, other = Computed(tmp_path), x.clone()
    other[0, 0, 0, 0] += 1
    places = [kept.place(x, index), kept.place(other, index), kept.place(x, index + 1), kept.place(x.view(3, 1, 4, 16), index)]
    monkeypatch.setattr(corruptions, "version", lambda name: "2.0")
    assert len({*places, kept.place(x, index)}) == 5 and {p.parent for p in places} == {tmp_path}


def test_an_interrupted_computation_leaves_no_file(tmp_path, monkeypatch):
    images, whole, calls = some_digits(3), corruptions.corrupt, []
    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4: raise KeyboardInterrupt
        return whole(*args)
    monkeypatch.setattr(corruptions, "corrupt", interrupted)
    with pytest.raises(KeyboardInterrupt): Computed(tmp_path).images("contrast", images)
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and f.suffix != ".lock"]
    assert torch.equal(Computed(tmp_path).images("contrast", images), Computed().images("contrast", images))


@pytest.mark.parametrize("spoil", [lambda f: f.write_bytes(f.read_bytes()[:200]), lambda f: f.write_bytes(b"nonsense"), lambda f: np.save(f, np.zeros((30, 8, 8, 3), np.uint8)), lambda f: np.save(f, np.zeros((30, 8, 8, 1)))])
def test_a_damaged_file_is_one_sentence(spoil, tmp_path):
    images = some_digits(6)
    Computed(tmp_path).images("contrast", images)
    file, = tmp_path.rglob("*.npy")
    spoil(file)
    with pytest.raises(UserError, match=r"contrast\.npy .*(damaged|holds).*delete it"): Computed(tmp_path).images("contrast", images)


def test_two_processes_share_the_work(tmp_path):
    code = """if True:
        import sys, torch
        from adaptive_at import corruptions
        from adaptive_at.data import datasets as ds
        from adaptive_at.evaluation import Images
        whole, calls = corruptions.corrupt, []
        corruptions.corrupt = lambda *args: calls.append(args[1]) or whole(*args)
        data = ds.load("digits", "data")
        images = Images(ds.to_unit(data.test.x[:40]), data.test.y[:40], torch.arange(40))
        sums = [int(corruptions.Computed(sys.argv[1]).images(name, images).long().sum()) for name in ("snow", "fog", "contrast")]
        import json; print(json.dumps([len(calls), sums]))"""
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    (first, sums), (second, other) = (json.loads(p.communicate(timeout=120)[0]) for p in both)
    assert first + second == 3 * 5 and sums == other
    assert len(list(tmp_path.rglob("*.npy"))) == 3 and not list(tmp_path.rglob("*.part"))


# Official files

def official(root, name="CIFAR-10-C", n=12, names=QUICK):
    "Tiny files in the official layout: image i under corruption k at severity s is all 20 k + 5 s + i; labels i % 10."
    folder = root / name
    folder.mkdir()
    for k, corruption in enumerate(names):
        value = np.concatenate([20 * k + 50 * s + np.arange(n) for s in range(5)]) % 256
        np.save(folder / f"{corruption}.npy", np.broadcast_to(value.astype(np.uint8)[:, None, None, None], (5 * n, 32, 32, 3)))
    np.save(folder / "labels.npy", np.tile(np.arange(n) % 10, 5))
    return folder


def cifar_images(index): return Images(torch.zeros(len(index), 3, 32, 32), index % 10, index)


def test_official_files_are_read_by_place(tmp_path):
    official(tmp_path)
    index = torch.tensor([5, 0, 11])
    got = Official("CIFAR-10-C", tmp_path).images("contrast", cifar_images(index))
    assert got.shape == (5, 3, 3, 32, 32) and got.dtype == torch.uint8
    assert got.flatten(2).float().std(2).max() == 0
    assert got[:, :, 0, 0, 0].tolist() == [[(20 + 50 * s + int(i)) % 256 for i in index] for s in range(5)]


def test_official_files_are_checked(tmp_path):
    folder, files = official(tmp_path), Official("CIFAR-10-C", tmp_path)
    assert files.needs(QUICK) == ""
    with pytest.raises(UserError, match="other labels"): files.images("contrast", Images(torch.zeros(2, 3, 32, 32), torch.tensor([0, 2]), torch.arange(2)))
    with pytest.raises(UserError, match="other labels"): files.images("contrast", cifar_images(torch.tensor([10, 12])))
    with pytest.raises(UserError, match="snow.npy"): files.images("snow", cifar_images(torch.arange(3)))
    assert "snow.npy, frost.npy" in files.needs(("contrast", "snow", "frost")) and "labels" not in files.needs(("snow",))
    (folder / "contrast.npy").write_bytes((folder / "contrast.npy").read_bytes()[:1000])
    with pytest.raises(UserError, match="contrast.npy is damaged"): files.images("contrast", cifar_images(torch.arange(3)))
    np.save(folder / "labels.npy", np.arange(7))
    with pytest.raises(UserError, match="other labels"): files.images("gaussian_noise", cifar_images(torch.arange(1)))


def test_files_are_used_for_the_dataset_they_belong_to(tmp_path):
    official(tmp_path)
    info = {name: replace(digits().info, name=name) for name in ("digits", "cifar10", "cifar100", "mnist", "imagefolder:x/cifar10")}
    found = {name: source(i, tmp_path, "kept") for name, i in info.items()}
    assert found["cifar10"] == Official("CIFAR-10-C") and found["cifar10"].data_root == tmp_path
    assert all(isinstance(found[n], Computed) and found[n].folder == "kept" for n in info if n != "cifar10")
    assert "not CIFAR-100-C" in found["cifar100"].note and "not" not in found["digits"].note and "CIFAR-10-C" == found["cifar10"].note
    assert set(OFFICIAL) <= set(ds.OFFICIAL)


def test_official_files_need_no_package(missing, tmp_path):
    official(tmp_path)
    column = Corruption(QUICK, Official("CIFAR-10-C", tmp_path))
    class Bright(nn.Module):
        def forward(self, x): return torch.stack([x.flatten(1).mean(1) * 0, x.flatten(1).mean(1) - 0.5], 1)
    index = torch.tensor([0, 1, 10, 11])   # of classes 0 and 1
    assert column.needs() == ""
    value = {(k, s, i): (20 * k + 50 * s + i) % 256 for k in range(3) for s in range(5) for i in index.tolist()}
    want = [np.mean([(value[k, s, i] > 127.5) == i % 10 for k in range(3) for s in range(5)]) for i in index.tolist()]
    assert column.standing(Bright(), cifar_images(index)).tolist() == pytest.approx(want) and len(set(want)) > 1


# Columns

@dataclass(frozen=True)
class Given:
    "Images whose first pixel says at how many severities the model below is right about them, by corruption."
    right: tuple[tuple[int, ...], ...]   # per image, per corruption
    library = note = "given"
    def images(self, name, images):
        k = QUICK.index(name)
        return torch.stack([torch.tensor([255 * (s < self.right[i][k]) for i in images.index.tolist()], dtype=torch.uint8).view(-1, 1, 1, 1) for s in range(5)])


class Lit(nn.Module):
    "Class 1 for a bright pixel."
    def forward(self, x): return torch.cat([0.5 - x.flatten(1), x.flatten(1) - 0.5], 1)


RIGHT = ((5, 0, 3), (1, 1, 1), (0, 0, 0), (5, 5, 5), (4, 2, 0))
GIVEN = Images(torch.zeros(5, 1, 1, 1), torch.ones(5, dtype=torch.long), torch.arange(5))


@pytest.mark.parametrize("batch", [1, 2, 500])
def test_one_score_per_image(batch):
    column = Corruption(QUICK, Given(RIGHT))
    assert column.counts(Lit(), GIVEN, batch).tolist() == [list(r) for r in RIGHT]
    scores = column.standing(Lit(), GIVEN, batch=batch)
    assert scores.tolist() == pytest.approx([sum(r) / 15 for r in RIGHT]) and scores.dtype == torch.float64


def test_an_interrupted_column_goes_on():
    column, progress = Corruption(QUICK, Given(RIGHT)), []
    whole = column.standing(Lit(), GIVEN, save=lambda p: progress.append(dict(p)))
    assert progress[-1] == {"gaussian_noise": "51054", "contrast": "01052", "jpeg_compression": "31050"} and len(progress) == 3
    class Never(nn.Module):
        def forward(self, x): raise AssertionError("evaluated again")
    assert torch.equal(column.standing(Never(), GIVEN, saved=progress[-1]), whole)
    passes = []
    class Counted(Lit):
        def forward(self, x): passes.append(len(x)); return super().forward(x)
    assert torch.equal(column.standing(Counted(), GIVEN, saved=json.loads(json.dumps(progress[0]))), whole) and sum(passes) == 2 * 5 * 5


def test_mean_corruption_error_is_the_papers_formula():
    "Errors summed over severities, divided by AlexNet's, averaged over corruptions; here per dataset, there per image."
    right = (numbers(7, 15, seed=3) * 6).long()
    errors = {name: [100 * float((right[:, k] <= s).float().mean()) for s in range(5)] for k, name in enumerate(STANDARD)}   # right at the first severities
    want = np.mean([sum(errors[name]) / (5 * ALEXNET[name]) for name in STANDARD])
    assert float(MeanCorruptionError(relative=True).score(right).mean()) == pytest.approx(want)
    assert float(MeanCorruptionError().score(right).mean()) == pytest.approx(np.mean(list(errors.values())) / 100)
    assert "not divided" in MeanCorruptionError().note and "relative to AlexNet" in MeanCorruptionError(relative=True).note


def test_alexnet_s_errors_are_the_published_ones():
    "Rounded, as in Hendrycks and Dietterich (2019)."
    assert [round(v) for v in ALEXNET.values()] == [89, 89, 92, 82, 83, 79, 80, 87, 83, 82, 56, 85, 65, 72, 61]


def test_columns_refuse_what_they_cannot_do():
    with pytest.raises(UserError, match="'rain' is not a corruption; choose from gaussian_noise"): Corruption(("snow", "rain"))
    with pytest.raises(UserError, match="'' is not a corruption"): Corruption(())
    with pytest.raises(UserError, match="saturate"): MeanCorruptionError(("snow", "saturate"), relative=True)


def test_identity_knows_the_source_and_not_the_place():
    base = Corruption(QUICK, Computed("here"))
    assert spec_hash(base) == spec_hash(Corruption(QUICK, Computed("there", "CIFAR-10-C"))) == spec_hash(Corruption(QUICK))
    others = [Corruption(QUICK, Official("CIFAR-10-C", "here")), Corruption(QUICK, Official("CIFAR-100-C", "here")), Corruption(QUICK[:2]), MeanCorruptionError(QUICK), MeanCorruptionError(QUICK, relative=True), Corruption()]
    assert len({evaluation(c, "content", "weights").id for c in [base, *others]}) == 1 + len(others)


def test_cost_is_a_third_of_a_pass_per_version():
    assert Corruption().steps == 32 and MeanCorruptionError().steps == 25 and Corruption(("snow",)).steps == 2


def test_the_columns_of_the_papers_on_digits(tmp_path):
    images, model = some_digits(12), robust_digits()
    everything, one = Corruption(source=Computed(tmp_path)), Corruption(("fog",), Computed(tmp_path))
    counts = everything.counts(model, images)
    assert counts.shape == (12, 19) and 0 <= counts.min() and counts.max() == 5
    assert torch.equal(one.standing(model, images), counts[:, COMMON.index("fog")].double() / 5)
    error = MeanCorruptionError(source=Computed(tmp_path)).standing(model, images)
    assert torch.allclose(error, 1 - counts[:, :15].double().mean(1) / 5)
    part = Images(images.x[4:7], images.y[4:7], images.index[4:7])
    assert torch.equal(everything.standing(model, part), everything.standing(model, images)[4:7])   # kept in another file, but the same images


# Figure

def test_samples_shows_the_original_and_each_corruption():
    images = some_digits(3)
    figure = samples(images, QUICK, severity=5)
    shown = {ax.get_title(): np.asarray(ax.images[0].get_array()).squeeze() for ax in figure.axes if ax.images}
    assert list(shown) == ["original", "gaussian noise", "contrast", "jpeg compression"]
    assert np.allclose(shown["original"], images.x[0, 0]) and np.allclose(shown["contrast"], ds.to_unit(corrupt(digits().test.x[:1], "contrast", 5, torch.arange(1)))[0, 0])
    colour = Images(ds.to_unit(photos(1)), torch.tensor([0]), torch.tensor([0]))
    assert samples(colour, ("snow",)).axes[0].images[0].get_array().shape == (32, 32, 3)
    plt.close("all")
