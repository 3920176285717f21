"ImageNet from a folder: what is read, cropped and streamed, against torchvision; training and evaluating on files as on tensors."
import copy, os, shutil, time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies as st
from PIL import Image
from torch import nn
from torchvision import datasets as tvd, transforms as tvt
from torchvision.transforms import functional as tvf

from adaptive_at.data import datasets as ds
from adaptive_at.base import rng
from adaptive_at.attacks import PGD
from adaptive_at.corruptions import MeanCorruptionError, samples
from adaptive_at.evaluation import AutoAttack, Clean, Images, WhiteBox, evaluate, evaluation
from adaptive_at.algorithms.baselines import Training
from adaptive_at.algorithms.daat import daat
from adaptive_at.networks import Network, pooled
from adaptive_at.training import Monitor, Run, State, train
from helpers import numbers, same
from test_datasets import refused
from test_evaluation import short  # noqa: F401

EPS = 8/255
KINDS = [("RGB", (61, 83)), ("L", (300, 47)), ("CMYK", (90, 90)), ("RGBA", (40, 257)), ("RGB", (500, 375))]   # mode; width and height


def picture(size, seed): return Image.fromarray((255 * numbers(7, 5, 3, seed=seed)).byte().numpy()).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "A data folder with an ImageNet of three classes: 13 training and 6 test images of several modes and odd sizes, some of them PNGs named JPEG as in the real one."
    root = tmp_path_factory.mktemp("data")
    for p, (part, counts) in enumerate({"train": (5, 5, 3), "val": (2, 2, 2)}.items()):
        for k, n in enumerate(counts):
            folder = root / "imagenet" / part / f"n0{3 - k}"
            folder.mkdir(parents=True)
            for i in range(n):
                mode, size = KINDS[(i + k) % 5]
                picture(size, 100 * p + 10 * k + i).convert(mode).save(folder / f"{part}_{7 * i % 5}.JPEG", "PNG" if mode == "RGBA" else "JPEG")
    return root


@pytest.fixture
def own(root, tmp_path):
    "A copy that may be spoiled."
    shutil.copytree(root / "imagenet", tmp_path / "imagenet")
    return tmp_path


def workers(n, monkeypatch): monkeypatch.setattr(ds, "loaders", lambda: n)


def in_memory(data):
    "The same dataset, read once and for all."
    def whole(split): return ds.Split(split.x[torch.arange(len(split))], split.y)
    return ds.Dataset(data.info, whole(data.train), None, whole(data.test))


@pytest.fixture
def read(monkeypatch):
    "The files read so far, by name."
    names, rgb = [], ds.rgb
    monkeypatch.setattr(ds, "rgb", lambda path: (names.append(os.path.basename(os.path.dirname(path)) + "/" + os.path.basename(path)), rgb(path))[1])
    return names


# What is read

def test_images_labels_and_order_are_torchvisions(root):
    data = ds.load("imagenet", root)
    as_measured = tvt.Compose([tvt.Resize(256), tvt.CenterCrop(224), tvt.PILToTensor()])
    for split, part in ((data.train, "train"), (data.test, "val")):
        theirs = tvd.ImageFolder(root / "imagenet" / part, as_measured)
        assert data.info.classes == tuple(theirs.classes) and split.y.tolist() == theirs.targets and split.x.shape == (len(theirs), 3, 224, 224)
        every = split.x[torch.arange(len(split))]
        assert every.dtype == torch.uint8 and split.y.dtype == torch.int64
        for image, (x, y) in zip(every, theirs): assert torch.equal(image, x)
        assert len({image.numpy().tobytes() for image in every}) == len(split)   # all different: a slip of an index would show


def test_files_are_indexed_as_a_tensor_is(root, read):
    split = ds.load("imagenet", root).train
    x, whole, index = split.x, in_memory(ds.load("imagenet", root)).train.x, torch.tensor([12, 0, 7, 7])
    del read[:]
    part = split.part(index)
    assert not read and torch.equal(part.y, split.y[index]) and len(part) == 4
    assert torch.equal(part.x[torch.tensor([1, 2])], whole[[0, 7]]) and len(read) == 2
    assert torch.equal(x[index], whole[index]) and torch.equal(x[3:6], whole[3:6])
    unit = ds.to_unit(x)
    assert torch.equal(unit[index], ds.to_unit(whole[index])) and unit.shape == x.shape and unit.device == x.device == torch.device("cpu")


def test_a_device_is_where_images_go_and_files_stay(root):
    moved = ds.load("imagenet", root).to("meta")   # stands in for a GPU: a tensor there has a shape and no values
    assert moved.train.x[torch.tensor([1, 2])].device.type == moved.train.y.device.type == "meta"
    assert moved.train.x.names is ds.load("imagenet", root).train.x.names and "meta" in repr(moved.test) and "3x224x224" in repr(moved.test)


def test_importing_and_planning_reads_nothing(tmp_path):
    info = ds.info("imagenet", tmp_path)
    assert (info.label, info.shape, len(info.classes), info.n_train, info.n_val, info.n_test, info.unit, info.augment, info.identity) == (
        "ImageNet", (3, 224, 224), 1000, 1_281_167, 0, 50_000, 8/255, ds.ResizedCrop(), "imagenet")
    assert not ds.available("imagenet", tmp_path) and not any(tmp_path.iterdir())


def test_a_dry_run_prints_the_plan_without_images(tmp_path, capsys):
    from adaptive_at.tables.parameters import check_parameters
    from adaptive_at.papers.table1_daat import TABLE
    from adaptive_at.tables.plan import Plan, open_session
    asked = dict(preset="paper", datasets="imagenet", network="imagenet-resnet50", device="cpu", rows="Standard AT", columns="natural", figures="none", outputs=str(tmp_path), data_root=str(tmp_path))
    plan = Plan(TABLE, open_session(check_parameters(TABLE.name, asked | dict(dry_run=True))))
    assert "ImageNet" in plan.show().to_html() and plan.blocks[0].runs["Standard AT"][0].augment == ds.ResizedCrop()
    assert str(tmp_path / "imagenet") in refused(Plan, TABLE, open_session(check_parameters(TABLE.name, asked)))


# What the folder says

def test_a_part_of_imagenet_says_so(root):
    info = ds.info("imagenet", root)
    assert info.label == "ImageNet (subset of 3 classes)" and info.classes == ("n01", "n02", "n03") and (info.n_train, info.n_val, info.n_test) == (13, 0, 6)
    assert ds.available("imagenet", root) and (info.shape, info.unit, info.augment) == ((3, 224, 224), 8/255, ds.ResizedCrop())


def test_all_of_imagenet_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(ds, "IMAGENET", ds.replace(ds.IMAGENET, n_train=2000, n_test=1000))
    for part, n in (("train", 2), ("val", 1)):
        for k in range(1000):
            (tmp_path / "imagenet" / part / f"n{k:08}").mkdir(parents=True)
            for i in range(n): (tmp_path / "imagenet" / part / f"n{k:08}" / f"{i}.JPEG").touch()
    assert ds.info("imagenet", tmp_path).label == "ImageNet"
    (tmp_path / "imagenet/train/n00000007/1.JPEG").unlink()
    assert ds.info("imagenet", tmp_path).label == "ImageNet (subset of 1000 classes)"


def test_identity_follows_names_and_sizes_and_not_the_place(own, root):
    def identity(where=own): return ds.info("imagenet", where).identity
    first, one = identity(), own / "imagenet/train/n01"
    assert first == identity(root) and len(first) == 16
    seen = [first]
    for change in (lambda: (one / "train_0.JPEG").rename(one / "other.JPEG"), lambda: shutil.copy(one / "train_2.JPEG", one / "more.JPEG"),
                   lambda: (one / "other.JPEG").write_bytes((one / "other.JPEG").read_bytes() + b"\0"), lambda: (one / "more.JPEG").rename(own / "imagenet/train/n02/more.JPEG")):
        change()
        seen.append(identity())
    assert len(set(seen)) == len(seen)
    raw = bytearray((one / "other.JPEG").read_bytes())
    raw[-1] = 1
    (one / "other.JPEG").write_bytes(raw)
    assert identity() == seen[-1]   # pixels do not count, as the documentation says


def test_the_list_of_files_is_kept_until_a_file_comes_or_goes(own, monkeypatch):
    scans, scan = [], ds.scan_folder
    monkeypatch.setattr(ds, "scan_folder", lambda *args: (scans.append(1), scan(*args))[1])
    folders = [f for f in [*own.rglob("*")] if f.is_dir()]
    def at(seconds): [os.utime(f, (seconds, seconds)) for f in folders]
    at(time.time() - 100)
    data = ds.load("imagenet", own)
    assert ds.load("imagenet", own).train.x.names is data.train.x.names and ds.info("imagenet", own) == data.info and len(scans) == 1
    (own / "imagenet/val/n02/val_0.JPEG").unlink()
    assert len(ds.load("imagenet", own).test) == 5 and ds.info("imagenet", own).n_test == 5
    at(time.time())
    n = len(scans)
    ds.info("imagenet", own); ds.info("imagenet", own)
    assert len(scans) == n + 2   # changed within the clock's resolution, perhaps


@pytest.mark.parametrize("spoil, says", [
    (lambda f: shutil.rmtree(f), "train/<wnid>/*.JPEG"), (lambda f: shutil.rmtree(f / "train"), "train/<wnid>/*.JPEG"), (lambda f: shutil.rmtree(f / "val"), "val/<wnid>/*.JPEG"),
    (lambda f: shutil.rmtree(f / "val/n02"), "'n02'"), (lambda f: (f / "train/n09").mkdir(), "'n09'"),
    (lambda f: [file.unlink() for file in (f / "val/n01").iterdir()], "n01 has no image"),
    (lambda f: [shutil.rmtree(f / part / k) for part in ("train", "val") for k in ("n01", "n02")], "two at least")])
def test_a_folder_that_is_not_imagenet_is_refused_early(own, spoil, says):
    spoil(own / "imagenet")
    for call in (ds.check, ds.load):
        text = refused(call, "imagenet", own)
        assert says in text and str(own / "imagenet") in text


# Random crops

def test_boxes_are_those_of_torchvision(monkeypatch):
    "RandomResizedCrop with our random numbers in place of its own."
    crop, draws = ds.ResizedCrop(), []
    fed = lambda: draws.pop(0)
    def empty(n): return SimpleNamespace(uniform_=lambda low, high: torch.as_tensor(low + (high - low) * fed()))
    def randint(low, high, size): return torch.tensor(int(fed() * (high - low)))
    monkeypatch.setattr(tvt.transforms, "torch", SimpleNamespace(log=torch.log, exp=torch.exp, tensor=torch.tensor, empty=empty, randint=randint))
    rejected = 0
    for i in range(400):
        width, height = (int(n) for n in (20 + 480 * numbers(2, seed=i)).tolist())
        if i % 4 == 0: width, height = 20, height   # tall ones, to which few boxes fit
        ours = rng.uniform(rng.key("boxes"), torch.tensor([i]), (40,))[0].tolist()
        tried = [ours[k:k + 4] for k in range(0, 40, 4)]
        t, l, h, w = crop.box(width, height, ours)
        fits = next((k for k in range(10) if crop.box(width, height, tried[k]) != crop.box(width, height, [])), 10)
        rejected += fits > 0
        del draws[:]
        for k in range(min(fits, 10)): draws.extend(tried[k][:2])
        if fits < 10: draws.extend(tried[fits])
        theirs = tvt.RandomResizedCrop.get_params(torch.zeros(3, height, width), list(crop.area), list(crop.ratio))
        assert (t, l, h, w) == pytest.approx(theirs, abs=1.01)   # theirs rounds in float32
    assert rejected > 60


@given(st.integers(1, 600), st.integers(1, 600), st.lists(st.floats(0, 1 - 2**-24), min_size=40, max_size=40))
def test_boxes_lie_inside_the_image(width, height, draws):
    t, l, h, w = ds.ResizedCrop().box(width, height, draws)
    assert 0 <= t and 0 <= l and h >= 1 and w >= 1 and t + h <= height and l + w <= width
    fallback = ds.ResizedCrop().box(width, height, [])
    assert fallback == tvt.RandomResizedCrop.get_params(torch.zeros(1, height, width), [2., 2.], [3/4, 4/3])   # an area that never fits


def test_crops_show_the_box_and_flips_mirror_it(root):
    crop, image = ds.ResizedCrop(), picture((300, 200), 5)
    flipped = 0
    for i in range(40):
        flip, *draws = rng.uniform(rng.key("crops"), torch.tensor([i]), (41,))[0].tolist()
        t, l, h, w = crop.box(300, 200, draws)
        seen = tvf.pil_to_tensor(image.crop((l, t, l + w, t + h)).resize((224, 224), Image.Resampling.BILINEAR))
        got = tvf.pil_to_tensor(crop.crop(image, [flip, *draws]))
        assert torch.equal(got, seen.flip(-1) if flip < 0.5 else seen)
        flipped += flip < 0.5
    assert 10 < flipped < 30


def test_an_example_looks_alike_in_any_batch_and_other_in_another_epoch(root):
    x, crop, order = ds.load("imagenet", root).train.x, ds.ResizedCrop(), torch.tensor([5, 0, 12, 3, 8])
    whole = crop.read(x, torch.arange(13), 1)
    assert torch.equal(torch.cat([crop.read(x, i, 1) for i in order.split(2)]), whole[order])
    assert sum(not torch.equal(a, b) for a, b in zip(whole, crop.read(x, torch.arange(13), 2))) > 6   # long thin ones always show their centre


# Batches

def test_batches_hold_the_right_images(root, monkeypatch):
    data = ds.load("imagenet", root)
    x = in_memory(data).train.x
    for n in (0, 2):
        workers(n, monkeypatch)
        subset = torch.tensor([0, 2, 3, 5, 7, 11, 12])
        plain = list(ds.batches(data.train, 3, 1, subset=subset))
        assert sorted(torch.cat([b.index for b in plain]).tolist()) == subset.tolist() and [len(b.y) for b in plain] == [3, 3, 1]
        for b in plain: assert torch.equal(b.x, ds.to_unit(x[b.index])) and torch.equal(b.y, data.train.y[b.index])
        for b in ds.batches(data.train, 5, 1, ds.ResizedCrop(), drop_last=True):
            assert torch.equal(b.x, ds.to_unit(ds.ResizedCrop().read(data.train.x, b.index, rng.key(1, "augment")))) and torch.equal(b.y, data.train.y[b.index])


@pytest.mark.parametrize("n", [0, 2])
def test_an_epoch_can_begin_at_any_batch(root, n, monkeypatch, read):
    workers(n, monkeypatch)
    data = ds.load("imagenet", root)
    for split, augment in ((data.train, ds.ResizedCrop()), (in_memory(data).train, ds.CROP_FLIP)):
        epoch = list(ds.batches(split, 4, 1, augment))
        for first in (1, 3, 4):
            del read[:]
            rest = list(ds.batches(split, 4, 1, augment, first=first))
            assert len(rest) == 4 - first and all(torch.equal(getattr(a, f), getattr(b, f)) for a, b in zip(epoch[first:], rest) for f in ("x", "y", "index"))
            if n == 0 and split is data.train: assert len(read) == sum(len(b.y) for b in rest)   # nothing is read for the batches before


def test_streaming_leaves_torchs_random_numbers_alone(root, monkeypatch):
    split = ds.load("imagenet", root).train
    for n in (0, 2):
        workers(n, monkeypatch)
        before = torch.get_rng_state()
        assert len(list(ds.batches(split, 8, 1, ds.ResizedCrop()))) == 2 and torch.equal(torch.get_rng_state(), before)


def test_workers_end_with_the_epoch_that_is_left_early(root, monkeypatch):
    workers(2, monkeypatch)
    started, init = [], ds.DataLoader.__iter__
    def remembered(self): it = init(self); started.extend(it._workers); return it
    monkeypatch.setattr(ds.DataLoader, "__iter__", remembered)
    for batch in ds.batches(ds.load("imagenet", root).train, 2, 1): break
    del batch
    assert len(started) == 2 and not any(p.is_alive() for p in started)


def test_there_is_a_core_left_for_training(monkeypatch):
    for cores, n in ((1, 0), (2, 1), (8, 7), (64, 16)):
        monkeypatch.setattr(ds, "cores", lambda: cores)
        assert ds.loaders() == n


@pytest.mark.parametrize("n", [0, 2])
def test_a_damaged_image_is_named_in_one_sentence(own, n, monkeypatch):
    workers(n, monkeypatch)
    broken = own / "imagenet/train/n02/train_2.JPEG"
    data = ds.load("imagenet", own)
    for content in (b"", b"no image", broken.read_bytes()[:300]):
        broken.write_bytes(content)
        for augment in (None, ds.ResizedCrop()): assert str(broken) in refused(lambda: list(ds.batches(data.train, 4, 1, augment)))
        assert str(broken) in refused(lambda: data.train.x[torch.arange(13)])


# Training and evaluating

@dataclass(frozen=True)
class Patches(Network):
    "One convolution over large patches with batch norm: quick on large images."
    threads = 1
    def parts(self, channels): return nn.Sequential(nn.Conv2d(channels, 16, 8, 8), nn.BatchNorm2d(16), nn.ReLU(), *pooled()), 16


def spec(data, **changes):
    method = daat(EPS, steps=1)
    return ds.replace(Run("imagenet", data.info.identity, Patches(), method, Training(epochs=2, batch=4), Monitor(PGD(EPS, 1), EPS, examples=5),
                          data.info.augment), **changes)


def trained(run, data, save=lambda state: None): return train(run, data, State(run, data), save, report_line=lambda line: None)


def equal(a, b):
    "Weights, banks and everything measured."
    measured = lambda state: [{k: v for k, v in entry.items() if k != "seconds"} for entry in state.history]
    return same(a.model.state_dict(), b.model.state_dict()) and torch.equal(a.bank.eps, b.bank.eps) and torch.equal(a.bank.realised, b.bank.realised) and measured(a) == measured(b)


def test_training_repeats_bit_for_bit_with_any_number_of_workers(root, monkeypatch):
    data = ds.load("imagenet", root)
    run, saved = spec(data), []
    workers(0, monkeypatch)
    state = trained(run, data, lambda s: saved.append(copy.deepcopy(s.state_dict())))
    assert equal(state, trained(run, data)) and (state.bank.realised > 0).all() and len(state.history) == 2
    workers(2, monkeypatch)
    assert equal(state, trained(run, data))
    resumed = State(run, data)
    resumed.load_state_dict(saved[0])
    assert equal(state, train(run, data, resumed, report_line=lambda line: None))
    assert not equal(state, trained(ds.replace(run, seed=1), data))


@pytest.mark.parametrize("augment", [ds.AS_IS, ds.Augment(crop=20, pad="reflect", flip=True)])
def test_training_on_files_equals_training_on_tensors(root, augment, monkeypatch):
    workers(2, monkeypatch)
    data = ds.load("imagenet", root)
    run = spec(data, augment=augment, train_examples=10)
    assert equal(trained(run, data), trained(run, in_memory(data)))


def test_measuring_reads_no_more_images_than_it_needs(root, read, monkeypatch):
    workers(0, monkeypatch)
    data = ds.load("imagenet", root)
    trained(spec(data, training=Training(epochs=1, batch=4)), data)
    assert len(read) == 2 + 13 + 5 + 5   # two to compare the folded network with, an epoch, and five images of each part


@pytest.mark.parametrize("column", [Clean(), WhiteBox(PGD(EPS/4, 2), EPS), AutoAttack(EPS, batch_size=2), AutoAttack(EPS, limit=3)], ids=["clean", "white-box", "autoattack", "three images"])
def test_evaluation_reads_a_batch_at_a_time_and_gives_the_same(root, column, short, monkeypatch):  # noqa: F811
    data = ds.load("imagenet", root)
    model = trained(spec(data, training=Training(epochs=1, batch=4)), data).model.eval()
    sizes, get = [], ds.ImageFiles.__getitem__
    monkeypatch.setattr(ds.ImageFiles, "__getitem__", lambda self, index: (x := get(self, index), sizes.append(len(x)))[0])
    files = evaluate(ds.replace(evaluation(column, data.info.identity, ""), batch=2), model, data)
    n = 3 if getattr(column, "limit", 0) else 6
    assert files["n"] == n and max(sizes[:n // 2]) <= 2   # afterwards: up to 500 for the facts behind the warnings
    assert files == evaluate(ds.replace(evaluation(column, data.info.identity, ""), batch=2), model, in_memory(data))


def test_corruptions_of_files_are_made_a_batch_at_a_time_and_kept_nowhere(root, tmp_path, monkeypatch):
    class Remainder(nn.Module):   # another class whenever a pixel is another one
        def forward(self, x): return nn.functional.one_hot((255 * x.double()).round().sum((1, 2, 3)).long() % 3, 3).float()
    data, memory = ds.load("imagenet", root), in_memory(ds.load("imagenet", root))
    model, sizes, read = Remainder().eval(), [], ds.ImageFiles.read
    monkeypatch.setattr(ds.ImageFiles, "read", lambda self, *args: (x := read(self, *args), sizes.append(len(x)))[0])
    column = MeanCorruptionError(("gaussian_noise", "contrast", "impulse_noise")).placed(data.info, tmp_path, tmp_path / "kept")
    e, progress = ds.replace(evaluation(column, data.info.identity, ""), batch=4), []
    files = evaluate(e, model, data, save=lambda p: progress.append(dict(p)))
    assert column.relative and files["n"] == 6 and sizes == 3 * [4, 2] and not any(tmp_path.iterdir())
    assert files == evaluate(e, model, memory) == evaluate(ds.replace(e, batch=5), model, data) and len(list(tmp_path.rglob("*.npy"))) == 3   # those of tensors are kept
    assert [sum(map(len, p.values())) for p in progress] == [4, 6, 10, 12, 16, 18]
    for part in progress:
        del sizes[:]
        assert evaluate(e, model, data, saved=part) == files and sum(sizes) == 18 - sum(map(len, part.values()))
    one = Images(ds.to_unit(data.test.x), data.test.y, torch.arange(6))
    assert samples(one, ("contrast",)).axes[1].images[0].get_array().shape == (224, 224, 3)
