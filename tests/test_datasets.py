"Datasets: official formats and their checksums, downloads, image folders, batches, augmentation."
import functools, http.server, os, shutil, subprocess, sys, threading, time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

import archives
from adaptive_at.data import datasets as ds
from adaptive_at.base.errors import UserError


def refused(call, *args):
    "The one sentence with which `call` refuses."
    with pytest.raises(UserError) as caught: call(*args)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and ". " not in text, text
    return text


def flip_byte(path, at=-20):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.fixture
def root(tmp_path, monkeypatch): return archives.here(tmp_path / "data", monkeypatch)


@pytest.fixture(scope="module")
def numbers():
    "A split of 57 images of which each shows its own index and class."
    index = torch.arange(57)
    return ds.Split(index.to(torch.uint8)[:, None, None, None].expand(57, 1, 4, 4).contiguous(), index % 5)


# The official datasets

@pytest.mark.parametrize("name", archives.NAMES)
def test_official_archives_give_the_images_and_labels_that_were_written(name, root):
    data = ds.load(name, root)
    for split, (x, y) in zip((data.train, data.test), archives.expected(name)):
        assert split.x.dtype == torch.uint8 and split.y.dtype == torch.int64 and split.x.is_contiguous()
        assert torch.equal(split.x, torch.from_numpy(x).permute(0, 3, 1, 2))   # image n, channel, row, column
        assert split.y.tolist() == y.tolist()
    assert data.val is None and data.train.x.shape[1:] == data.info.shape
    assert (data.info.n_train, data.info.n_val, data.info.n_test) == (len(data.train), 0, len(data.test))
    assert ds.load(name, root).train.x is data.train.x   # read once


@pytest.mark.parametrize("name", archives.NAMES)
def test_a_flipped_byte_is_refused_before_anything_runs(name, root):
    for file in ds.OFFICIAL[name].files:
        flip_byte(root / file)
        for call in (ds.check, ds.load): assert str(root / file) in refused(call, name, root)
        flip_byte(root / file)
    ds.check(name, root)


def test_mnist_does_not_read_an_unchecked_binary_copy(root):
    processed = root / "MNIST/processed"
    processed.mkdir()
    for part in ("training.pt", "test.pt"): torch.save((torch.zeros(3, 28, 28), torch.zeros(3)), processed / part)
    assert len(ds.load("mnist", root).train) == archives.N_TRAIN


def test_official_identities_come_from_the_checksums_alone(root, monkeypatch):
    tiny = {name: ds.info(name, "nowhere").identity for name in archives.NAMES}
    monkeypatch.undo()
    official = {name: ds.info(name, "nowhere").identity for name in archives.NAMES}
    assert len({*tiny.values(), *official.values()}) == 8


def test_the_checksums_and_classes_are_torchvisions():
    from torchvision import datasets as tv
    for name, cls in (("cifar10", tv.CIFAR10), ("cifar100", tv.CIFAR100)):
        listed = {file: md5 for file, md5 in cls.train_list + cls.test_list} | {cls.meta["filename"]: cls.meta["md5"]}
        assert ds.OFFICIAL[name].files == {f"{cls.base_folder}/{file}": md5 for file, md5 in listed.items()}
    assert ds.OFFICIAL["svhn"].files == {file: md5 for _, file, md5 in (tv.SVHN.split_list[s] for s in ("train", "test"))}
    assert [f"MNIST/raw/{f.removesuffix('.gz')}" for f, _ in tv.MNIST.resources] == list(ds.OFFICIAL["mnist"].files)
    assert [len(ds.info(n, "").classes) for n in ("digits", *archives.NAMES)] == [10, 10, 100, 10, 10]


def test_another_process_takes_the_tiny_archives_for_the_official_ones(tmp_path):
    env = archives.environment(tmp_path / "data")
    code = ("import sys, adaptive_at.data.datasets as ds\n"
            "assert not {'torchvision', 'sklearn', 'PIL', 'scipy'} & set(sys.modules)   # cheap to import\n"
            "for name in ('cifar10', 'cifar100', 'svhn', 'mnist'): print(len(ds.load(name, sys.argv[1]).train), ds.info(name, '').n_train)")
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path / "data")], env=env, capture_output=True, text=True)
    assert out.stdout.split() == ["300"] * 8, out.stderr


# Downloads

@pytest.fixture
def server(tmp_path):
    "A server of the official archives on this machine; `.asked` lists what was fetched."
    asked = []
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
        def do_GET(self): asked.append(self.path); super().do_GET()   # asking whether it is there is a HEAD
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path / "served"))
    served.asked, served.url = asked, f"http://127.0.0.1:{served.server_port}"
    served.handle_error = lambda *args: None   # a client that closes early is no concern of what the tests capture
    threading.Thread(target=served.serve_forever, args=(0.02,), daemon=True).start()
    yield served
    served.shutdown(); served.server_close()


@pytest.mark.parametrize("name", archives.NAMES)
def test_download_is_quiet_whole_and_done_once(name, tmp_path, monkeypatch, server, capsys):
    archives.apply(archives.describe(tmp_path / "served", (name,), packed=True, server=server.url), monkeypatch)
    data = tmp_path / "data"
    assert not ds.available(name, data)
    ds.check(name, data)
    assert not data.exists()   # a check leaves nothing behind
    assert len(ds.load(name, data).train) == archives.N_TRAIN and ds.available(name, data)
    fetched = len(server.asked)
    assert len(ds.load(name, data).test) == archives.N_TEST and len(server.asked) == fetched
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"fetching {ds.OFFICIAL[name].label} into {data}"] and not said.err
    assert {p.name for p in data.iterdir()} <= {f.split("/")[0] for f in ds.OFFICIAL[name].files} | {f".{name}.lock"}


def test_what_a_killed_download_left_is_not_taken_for_data(tmp_path, monkeypatch, server):
    archives.apply(archives.describe(tmp_path / "served", ("mnist",), packed=True, server=server.url), monkeypatch)
    part = tmp_path / "data/.mnist.part/MNIST/raw"
    part.mkdir(parents=True)
    for file in ds.OFFICIAL["mnist"].files: (tmp_path / "data/.mnist.part" / file).write_bytes(b"half")
    assert len(ds.load("mnist", tmp_path / "data").train) == archives.N_TRAIN


def test_a_broken_download_is_one_sentence_and_leaves_no_data(tmp_path, monkeypatch, server):
    archives.apply(archives.describe(tmp_path / "served", ("cifar10",), packed=True, server=server.url), monkeypatch)
    flip_byte(tmp_path / "served/cifar-10-python.tar.gz")
    assert "could not be fetched" in refused(ds.load, "cifar10", tmp_path / "data")
    assert ds.missing("cifar10", tmp_path / "data")
    (tmp_path / "served/cifar-10-python.tar.gz").unlink()
    assert "404" in refused(ds.load, "cifar10", tmp_path / "data")


@pytest.mark.parametrize("name", archives.NAMES)
def test_an_archive_in_the_data_folder_needs_no_network(name, tmp_path, monkeypatch):
    archives.apply(archives.describe(tmp_path / "data", (name,), packed=True, server="http://127.0.0.1:9"), monkeypatch)
    ds.check(name, tmp_path / "data")
    assert len(ds.load(name, tmp_path / "data").train) == archives.N_TRAIN


def test_no_network_is_said_at_once(tmp_path, monkeypatch):
    archives.apply(archives.describe(tmp_path / "served", server="http://127.0.0.1:9"), monkeypatch)   # nobody listens there
    for name in archives.NAMES:
        for call in (ds.check, ds.load):
            text = refused(call, name, tmp_path / "data")
            assert ds.OFFICIAL[name].label in text and str(tmp_path / "data") in text and "http://127.0.0.1:9/" in text
    assert not (tmp_path / "data").exists()


def test_a_server_or_name_server_that_never_answers_is_given_up(monkeypatch):
    def silent(*args, **kw):
        time.sleep(20)
        raise OSError
    monkeypatch.setattr("urllib.request.urlopen", silent)
    start = time.monotonic()
    assert not ds.reachable("http://silent.invalid/", seconds=0.3)
    assert time.monotonic() - start < 1


def test_a_data_folder_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch, server):
    archives.apply(archives.describe(tmp_path / "served", ("mnist",), packed=True, server=server.url), monkeypatch)
    (tmp_path / "data").write_text("a file, not a folder")
    assert str(tmp_path / "data") in refused(ds.load, "mnist", tmp_path / "data")


# Names

@pytest.mark.parametrize("name", ["cifar", "", "CIFAR10", "imagefolder", "imagefolder:"])
def test_an_unknown_name_is_refused_with_the_valid_ones(name):
    for call in (ds.check, ds.info, ds.load):
        text = refused(call, name, "data")
        assert repr(name) in text and all(valid in text for valid in ds.NAMES)
    assert not ds.available(name, "data") or name == "imagefolder:"


# Digits

def test_digits_are_scikit_learns_split_once_and_for_all():
    from sklearn.datasets import load_digits
    raw, digits = load_digits(), ds.load("digits", "nowhere")
    x, y = (torch.cat([getattr(s, f) for s in (digits.train, digits.val, digits.test)]) for f in "xy")
    def bag(images, labels): return sorted((bytes(i), l) for i, l in zip(images, labels))
    seventeen = np.round(np.arange(17) * 255 / 16).astype(np.uint8)
    assert bag(x.flatten(1).tolist(), y.tolist()) == bag(seventeen[raw.data.astype(int)].tolist(), raw.target.tolist())
    for split, n in ((digits.train, 1197), (digits.val, 150), (digits.test, 450)):
        assert len(split) == n
        assert (split.y.bincount() - y.bincount() * n / len(y)).abs().max() <= 1   # in proportion
    assert ds.available("digits", "nowhere") and digits.info == ds.info("digits", "nowhere")


def test_other_digits_are_refused(monkeypatch):
    ds._read.cache_clear()
    train, *rest = ds.read_digits()
    monkeypatch.setattr(ds, "read_digits", lambda: (ds.Split(255 - train.x, train.y), *rest))
    assert "scikit-learn" in refused(ds.load, "digits", "nowhere")


# Image folders

@pytest.fixture
def folder(tmp_path):
    "Two classes; images of several sizes, modes and formats."
    where, rng = tmp_path / "own", np.random.default_rng(0)
    for part in ("train", "test"):
        for k, animal in enumerate(("cat", "dog")):
            (where / part / animal).mkdir(parents=True)
            for i in range(3):
                Image.fromarray(np.full((32, 32, 3), [100 * k, 10 * i, 7 if part == "train" else 9], np.uint8)).save(where / part / animal / f"{i}.png")
    Image.fromarray(rng.integers(0, 256, (40, 64), dtype=np.uint8)).save(where / "train/cat/grey.jpg")
    wide = np.zeros((64, 128, 3), np.uint8); wide[:, 32:96] = 200   # the centre square is bright
    Image.fromarray(wide).save(where / "train/dog/wide.bmp")
    (where / "train/dog/notes.txt").write_text("not an image")
    return where


def test_image_folder(folder):
    data = ds.load(f"imagefolder:{folder}", "nowhere")
    assert data.info.classes == ("cat", "dog") and data.info.label == "imagefolder own" and data.info.shape == (3, 32, 32)
    assert (data.info.n_train, data.info.n_val, data.info.n_test) == (len(data.train), 0, len(data.test)) == (8, 0, 6)
    assert data.train.y.tolist() == [0] * 4 + [1] * 4
    assert data.train.x[5, :, 3, 3].tolist() == [100, 10, 7] and data.test.x[2, :, 0, 31].tolist() == [0, 20, 9]
    grey, wide = data.train.x[3], data.train.x[7]
    assert torch.equal(grey[0], grey[1]) and (wide[:, :, 1:-1] == 200).all()
    assert ds.available(f"imagefolder:{folder}", "") and not ds.available(f"imagefolder:{folder}/train", "")


def test_the_jpeg_copy_of_cifar10_has_its_own_label(folder):
    copy = folder.rename(folder.parent / "cifar10-jpeg")
    assert ds.info(f"imagefolder:{copy}", "").label == "CIFAR-10 (JPEG copy)"


def test_a_relative_image_folder_starts_at_the_project(folder, monkeypatch):
    (folder.parent / "settings.ini").touch()
    (folder.parent / "nbs").mkdir()
    monkeypatch.chdir(folder.parent / "nbs")
    assert ds.info("imagefolder:own", "").identity == ds.info(f"imagefolder:{folder}", "").identity


def test_identity_follows_the_content_and_not_the_place(folder):
    def identity(where=folder): return ds.info(f"imagefolder:{where}", "").identity
    first = identity()
    assert identity(folder := shutil.move(folder, folder.parent / "moved")) == first
    changes = [lambda: flip_byte(folder / "train/dog/wide.bmp"),                                # same name and size
               lambda: [(folder / f"test/dog/{i}.png").rename(folder / f"test/dog/image{i}.png") for i in range(3)],
               lambda: (folder / "test/cat/2.png").rename(folder / "test/dog/2.png"),           # same name and place in the order, another class
               lambda: (folder / "train/cat/2.png").unlink()]
    seen = [first]
    for change in changes:
        change()
        seen.append(identity(folder))
    assert len(set(seen)) == len(seen)
    assert len(ds.load(f"imagefolder:{folder}", "").train) == 7


def test_a_remembered_hash_is_given_up_when_a_file_changes(folder):
    def at(seconds):
        for file in folder.rglob("*.*"): os.utime(file, (seconds, seconds))
    now = time.time()
    at(now - 100)
    first = ds.info(f"imagefolder:{folder}", "").identity
    flip_byte(folder / "train/dog/wide.bmp")
    second = ds.info(f"imagefolder:{folder}", "").identity
    at(now)
    assert ds.info(f"imagefolder:{folder}", "").identity == second != first
    flip_byte(folder / "train/dog/wide.bmp")
    at(now)   # as if changed within the clock's resolution
    assert ds.info(f"imagefolder:{folder}", "").identity == first


@pytest.mark.parametrize("spoil, says", [
    (lambda f: shutil.rmtree(f / "train"), "no folder 'train'"),
    (lambda f: shutil.rmtree(f / "test"), "no folder 'test'"),
    (lambda f: (f / "test/dog").rename(f / "test/dgo"), "'dgo'"),
    (lambda f: (f / "train/emu").mkdir(), "'emu'"),
    (lambda f: [file.unlink() for file in (f / "test/dog").iterdir()], "dog has no image"),
    (lambda f: [shutil.rmtree(f / part / "dog") for part in ("train", "test")], "two at least"),
    (lambda f: shutil.rmtree(f), "no folder 'train'")])
def test_a_bad_image_folder_is_refused_early(folder, spoil, says):
    spoil(folder)
    for call in (ds.check, ds.info, ds.load):
        text = refused(call, f"imagefolder:{folder}", "nowhere")
        assert says in text and str(folder) in text


def test_a_broken_image_is_named(folder):
    broken = folder / "test/cat/1.png"
    for content in (b"", b"no image", broken.read_bytes()[:60]):
        broken.write_bytes(content)
        assert str(broken) in refused(ds.load, f"imagefolder:{folder}", "nowhere")


# Subsets and batches

@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(0, 50))
def test_balanced_takes_the_classes_in_turn(labels, n):
    seen, order = {}, []
    for i, k in enumerate(labels): seen[k] = seen.get(k, -1) + 1; order.append((seen[k], i))
    subset = ds.balanced(torch.tensor(labels), n).tolist()
    assert subset == [i for _, i in sorted(order)][:n or None]


@given(st.integers(1, 70), st.integers(-2**63, 2**63 - 1), st.booleans(), st.integers(0, 60))
@settings(max_examples=40)
def test_batches_keep_image_label_and_index_together(numbers, size, key, drop_last, n):
    subset = ds.balanced(numbers.y, n)
    epoch = list(ds.batches(numbers, size, key, subset=subset, drop_last=drop_last))
    sizes = [len(b.index) for b in epoch]
    full, rest = divmod(len(subset), size)
    assert sizes == [size] * full + [rest] * bool(rest and not drop_last)
    seen = torch.cat([b.index for b in epoch]).tolist() if epoch else []
    assert len(set(seen)) == len(seen) and set(seen) <= set(subset.tolist())
    assert drop_last or len(seen) == len(subset)
    for b in epoch:
        assert b.x.dtype == torch.float32 and b.x.shape[1:] == (1, 4, 4)
        assert torch.equal(b.x[:, 0, 0, 0] * 255, b.index.float()) and torch.equal(b.y, b.index % 5)


def test_the_order_depends_on_the_key_alone(numbers):
    def order(key, size): return torch.cat([b.index for b in ds.batches(numbers, size, key)]).tolist()
    assert order(1, 10) == order(1, 7) != order(2, 10) != list(range(57))


def test_pixels_are_on_the_unit_scale_exactly():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(ds.to_unit(pixels).double(), (pixels.double() / 255).float().double())


def test_a_step_never_waits_for_the_device():
    "Fake tensors have no values: whatever would read one on the host raises."
    torch.ones((), requires_grad=True).backward()   # autograd counts the devices once: a fake one, counted then, would forbid later tests to fork
    with FakeTensorMode():
        split = ds.Split(torch.zeros(50, 3, 32, 32, dtype=torch.uint8, device="cuda"), torch.zeros(50, dtype=torch.int64, device="cuda"))
        for augment in (ds.CROP_FLIP, ds.Augment(crop=4, pad="reflect", flip=True)):
            epoch = list(ds.batches(split, 20, 0, augment))
            assert [tuple(b.x.shape) for b in epoch] == [(20, 3, 32, 32)] * 2 + [(10, 3, 32, 32)]
            assert {t.device.type for b in epoch for t in (b.x, b.y, b.index)} == {"cuda"}


def test_augmentation_does_not_depend_on_the_batch_size(numbers):
    split = ds.Split(torch.arange(57 * 64).view(57, 1, 8, 8).remainder(251).to(torch.uint8), numbers.y)
    def epoch(size): return torch.cat([b.x for b in ds.batches(split, size, 4, ds.CROP_FLIP)])
    assert torch.equal(epoch(10), epoch(57)) and not torch.equal(epoch(57), torch.cat([b.x for b in ds.batches(split, 57, 4)]))


# Augmentation

augments = st.builds(ds.Augment, crop=st.integers(0, 4), pad=st.sampled_from(["zeros", "reflect"]), flip=st.booleans())


@given(augments, st.integers(-2**63, 2**63 - 1), st.sampled_from([(1, 5, 5), (3, 8, 6), (2, 5, 9)]), st.sampled_from([torch.uint8, torch.float32]))
@settings(max_examples=60)
def test_every_image_is_a_window_of_its_padded_self(augment, key, shape, dtype):
    index = torch.tensor([3, 0, 7])
    x = torch.randint(1, 255, (3, *shape), generator=torch.Generator().manual_seed(0)).to(dtype)
    out, (_, h, w), p = augment(x, index, key), shape, augment.crop
    assert out.shape == x.shape and out.dtype == dtype
    padded = F.pad(x.float(), (p,) * 4, "reflect" if augment.pad == "reflect" else "constant")
    for i in range(3):
        windows = (padded[i, :, t:t + h, l:l + w] for t in range(2*p + 1) for l in range(2*p + 1))
        assert any(torch.equal(v, out[i].float()) for window in windows for v in ((window, window.flip(-1)) if augment.flip else (window,)))


@given(augments, st.permutations(range(12)), st.integers(1, 12))
@settings(max_examples=40)
def test_an_example_is_moved_alike_in_any_batch(augment, order, size):
    x, order = torch.arange(12 * 75).view(12, 3, 5, 5).float(), torch.tensor(order)
    whole = augment(x, torch.arange(12), 5)
    assert torch.equal(torch.cat([augment(x[i], i, 5) for i in order.split(size)]), whole[order])


def test_crops_and_flips_are_uniform_and_change_with_the_key():
    n, index = 8100, torch.arange(8100)
    x = torch.arange(1, 145, dtype=torch.float32).view(1, 1, 12, 12).expand(n, 1, 12, 12)
    out = ds.CROP_FLIP(x, index, 1)
    flipped = out[:, 0, 5, 5] > out[:, 0, 5, 6]
    assert abs(flipped.float().mean() - 0.5) < 4 * 0.5 / n**0.5
    centre = torch.where(flipped, out[:, 0, 5, 6], out[:, 0, 5, 5]).long() - 1   # came from here: row 5 + dy, column 5 + dx
    found = (centre // 12 - 1) * 9 + centre % 12 - 1
    counts = found.bincount(minlength=81)
    assert counts.shape == (81,) and ((counts - 100)**2 / 100).sum() < 80 + 5 * 160**0.5   # chi-square, 80 degrees of freedom
    assert not torch.equal(out, ds.CROP_FLIP(x, index, 2)) and ds.AS_IS(x, index, 1) is x


def test_the_crop_does_not_depend_on_whether_flips_are_on():
    x, index = torch.rand(40, 1, 8, 8), torch.arange(40)
    plain, both = ds.Augment(crop=2)(x, index, 1), ds.Augment(crop=2, flip=True)(x, index, 1)
    assert all(torch.equal(b, p) or torch.equal(b, p.flip(-1)) for p, b in zip(plain, both))


def test_an_impossible_augmentation_is_refused():
    assert "'mirror'" in refused(lambda: ds.Augment(pad="mirror"))
    assert "-1" in refused(lambda: ds.Augment(crop=-1))
    assert "8x8" in refused(ds.Augment(crop=8, pad="reflect"), torch.zeros(1, 1, 8, 8), torch.arange(1), 0)
