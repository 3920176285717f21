"Files from the world: some seventy odd image folders end in a right result or in one sentence, read into memory and streamed alike."
import copy, io, os, shutil, struct, time, unicodedata, warnings, zlib
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from matplotlib.cbook import is_math_text
from PIL import Image
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from adaptive_at.data import datasets as ds
from adaptive_at import training
from adaptive_at.attacks import PGD
from adaptive_at.data.datasets import balanced
from adaptive_at.figures import embeddings, styled
from adaptive_at.algorithms.baselines import Training, at
from adaptive_at.networks import MNISTCNN, VGG16, NarrowResNet, Network
from adaptive_at.papers.table1_daat import TABLE
from adaptive_at.tables.parameters import check_parameters
from adaptive_at.tables.plan import Plan, open_session
from adaptive_at.tables.results import Results
from adaptive_at.training import Monitor, Run, State, check_batches, train
from helpers import digits
from test_datasets import refused

CAT, DOG, WHITE = (200, 10, 10), (10, 10, 200), (255, 255, 255)
HALVES = np.repeat(np.array([[[250, 0, 0]], [[0, 0, 250]]], np.uint8), 16, 0).repeat(32, 1)   # 32x32, red above blue


def flat(colour, mode="RGB", size=(32, 32)): return Image.new(mode, size, colour)


def grey(value, dtype): return Image.fromarray(np.full((32, 32), value, dtype))


@pytest.fixture
def folder(tmp_path):
    "Two classes of flat images, two to train on and one to test."
    where = tmp_path / "data" / "own"
    for part, n in (("train", 2), ("test", 1)):
        for name, colour in (("cat", CAT), ("dog", DOG)):
            (where / part / name).mkdir(parents=True)
            for i in range(n): flat(colour).save(where / part / name / f"{i}.png")
    return where


# What changes a folder: each of these makes one that does

def image(picture, name="train/cat/0.png", **how):
    "In place of the first image, this one."
    def change(f):
        (f / "train/cat/0.png").unlink()
        picture.save(f / name, **how)
    return change


def raw(content, name="train/cat/0.png"):
    def change(f):
        (f / "train/cat/0.png").unlink()
        (f / name).write_bytes(content)
    return change


def more(name, colour=CAT):
    "One file more."
    def change(f):
        (f / name).parent.mkdir(parents=True, exist_ok=True)
        flat(colour).save(f / name)
    return change


def link(name, to):
    def change(f): (f / name).symlink_to(to)
    return change


def both(*changes):
    def change(f):
        for each in changes: each(f)
    return change


def renamed(old, new, parts=("train", "test")):
    def change(f):
        for part in parts: (f / part / old).rename(f / part / new)
    return change


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def encoded(picture, **how):
    picture.save(out := io.BytesIO(), **how)
    return out.getvalue()


def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(bits, kind, rows, *chunks, size=(32, 32)):
    "A PNG file that Pillow does not write."
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def fifo(f): os.mkfifo(f / "train/cat/pipe.png")


DEEP_RGB = (b"\0" + struct.pack(">HHH", 0x8080, 0x4040, 0x2020) * 32) * 32
NFC, NFD = (unicodedata.normalize(form, "zoé") for form in ("NFC", "NFD"))
LATIN = os.fsdecode("zoé".encode("latin-1"))
ANIMATED = encoded(flat(CAT), format="GIF", save_all=True, append_images=[flat(DOG)])
HALF = np.array(flat((0, 0, 200, 128), "RGBA"))
SOME = np.array(flat((*CAT, 255), "RGBA")); SOME[:, :16] = (9, 9, 9, 0)   # the left half is transparent
BAD_EXIF = encoded(flat(CAT), format="JPEG", quality=100, exif=b"Exif\0\0" + b"II*\0" + b"\xff" * 40)
PALETTE = flat(CAT).convert("P", palette=Image.Palette.ADAPTIVE)

# name -> (change, what the first training image looks like, how many training images there are)
RIGHT = {
    "as it is": (lambda f: None, CAT, 4),
    "16-bit PNG": (image(grey(0x8080, np.uint16)), (128,) * 3, 4),
    "16-bit PNG, white": (image(grey(0xFFFF, np.uint16)), WHITE, 4),
    "16-bit PNG, dark": (image(grey(200, np.uint16)), (1,) * 3, 4),
    "16-bit PNG, transparent": (image(grey(0x1234, np.uint16), transparency=0x1234), WHITE, 4),
    "16-bit RGB PNG": (raw(png(16, 2, DEEP_RGB)), (128, 64, 32), 4),
    "16-bit TIFF": (image(grey(0x4040, np.uint16), "train/cat/0.tif"), (64,) * 3, 4),
    "16-bit TIFF, big-endian": (image(grey(0x4040, ">u2"), "train/cat/0.tif"), (64,) * 3, 4),
    "16-bit TIFF, white is 0": (image(grey(0x4040, np.uint16), "train/cat/0.tiff", tiffinfo={262: 0}), (191,) * 3, 4),
    "16-bit PGM": (image(grey(0x8080, np.int32), "train/cat/0.pgm"), (128,) * 3, 4),
    "16-bit JPEG 2000": (image(grey(0x8080, np.uint16), "train/cat/0.jp2"), (128,) * 3, 4),
    "float TIFF": (image(grey(0.2, np.float32), "train/cat/0.tif"), (51,) * 3, 4),
    "float TIFF, white is 0": (image(grey(0.2, np.float32), "train/cat/0.tif", tiffinfo={262: 0}), (204,) * 3, 4),
    "JPEG 2000": (image(flat(CAT), "train/cat/0.jp2"), CAT, 4),
    "JPEG 2000, another name": (image(flat(CAT), "train/cat/0.j2k"), CAT, 4),
    "GIF": (image(flat(CAT), "train/cat/0.gif"), CAT, 4),
    "GIF, animated": (raw(ANIMATED, "train/cat/0.GIF"), CAT, 4),
    "GIF, transparent": (image(grey(3, np.uint8), "train/cat/0.gif", transparency=3), WHITE, 4),
    "one GIF more": (more("train/cat/9.gif"), CAT, 5),
    "WebP": (image(flat(CAT), "train/cat/0.webp", lossless=True), CAT, 4),
    "AVIF or JFIF": (image(flat((128,) * 3), "train/cat/0.jfif", format="JPEG"), (128,) * 3, 4),
    "RGBA, opaque": (image(flat((*CAT, 255), "RGBA")), CAT, 4),
    "RGBA, transparent": (image(flat((9, 9, 9, 0), "RGBA")), WHITE, 4),
    "RGBA, half": (image(Image.fromarray(HALF)), (127, 127, 227), 4),
    "grey and alpha": (image(flat((9, 0), "LA")), WHITE, 4),
    "palette": (image(PALETTE), CAT, 4),
    "palette, transparent": (image(grey(5, np.uint8).convert("P"), transparency=5), WHITE, 4),
    "one bit": (image(flat(1, "1")), WHITE, 4),
    "CMYK": (image(flat((0, 0, 0, 0), "CMYK"), "train/cat/0.tif"), WHITE, 4),
    "one pixel": (image(flat(CAT, size=(1, 1))), CAT, 4),
    "a line of pixels": (image(flat(CAT, size=(3, 90))), CAT, 4),
    "EXIF cannot be read": (raw(BAD_EXIF, "train/cat/0.jpg"), CAT, 4),
    "EXIF says 9": (image(flat(CAT), exif=turned(9)), CAT, 4),
    "capitals": (renamed("cat/0.png", "cat/0.PNG", ("train",)), CAT, 4),
    "checkpoints of notebooks": (both(more("train/.ipynb_checkpoints/x.png"), more("train/cat/.ipynb_checkpoints/0-checkpoint.png")), CAT, 4),
    "a hidden file": (more("train/cat/._0.png", DOG), CAT, 4),
    "a hidden file that is no image": (lambda f: (f / "train/cat/._0.png").write_bytes(b"\0\5\x16\7 Mac OS X"), CAT, 4),
    "__MACOSX": (both(more("train/__MACOSX/x.png"), more("train/cat/__MACOSX/._0.png"), more("test/__MACOSX/cat/x.png")), CAT, 4),
    "thumbnails of a NAS": (more("train/cat/@eaDir/0.png/thumb.jpg", DOG), CAT, 4),
    "other files": (both(lambda f: (f / "train/notes.txt").touch(), lambda f: (f / "train/cat/Thumbs.db").touch()), CAT, 4),
    "a folder in a class": (more("train/cat/deep/er/1.png"), CAT, 5),
    "a folder called like an image": (more("train/cat/1.png.png/1.png"), CAT, 5),
    "a link to its class": (link("train/cat/loop", "."), CAT, 4),
    "a link to its part": (link("train/cat/loop", ".."), CAT, 4),
    "a link to the folder": (link("train/cat/loop", "../.."), CAT, 4),
    "a link to everything": (link("train/cat/loop", "/"), CAT, 4),
    "links to each other": (both(more("a/1.png"), more("b/1.png"), link("a/to", "../b"), link("b/to", "../a"), link("train/cat/more", "../../a")), CAT, 6),
    "linked images": (both(more("elsewhere/x.png"), link("train/cat/x.png", "../../elsewhere/x.png"), link("train/cat/y", "../../elsewhere")), CAT, 6),
    "a link to no text": (link("train/cat/notes.txt", "nowhere"), CAT, 4),
    "decomposed names": (both(renamed("dog", NFC, ("train",)), renamed("dog", NFD, ("test",))), CAT, 4),
    "odd names": (renamed("dog", "€$x_1$ <b>&amp; 犬"), CAT, 4),
}
for o in range(2, 9):
    seen = HALVES if o == 2 else HALVES[::-1] if o in (3, 4) else None
    RIGHT[f"EXIF says {o}"] = (image(Image.fromarray(HALVES), exif=turned(o)), seen, 4)
RIGHT["EXIF of a JPEG"] = (image(Image.fromarray(HALVES), "train/cat/0.jpg", exif=turned(3), quality=100), HALVES[::-1], 4)
RIGHT["EXIF of a TIFF"] = (image(Image.fromarray(HALVES), "train/cat/0.tif", exif=turned(3)), HALVES[::-1], 4)
for o, (a, b) in {5: (0, 1), 6: (1, 0), 7: (1, 0), 8: (0, 1)}.items():
    sides = np.concatenate([HALVES[:16, :16] if a == 0 else HALVES[16:, :16], HALVES[:16, :16] if b == 0 else HALVES[16:, :16]], 1)
    RIGHT[f"EXIF says {o}"] = (RIGHT[f"EXIF says {o}"][0], np.concatenate([sides, sides]), 4)

# name -> (change, what the sentence says)
REFUSED = {
    "int32": (image(grey(70_000, np.int32), "train/cat/0.tif"), "32-bit"),
    "int32, dark": (image(grey(7, np.int32), "train/cat/0.tif"), "32-bit"),
    "float of 0 to 255": (image(grey(200., np.float32), "train/cat/0.tif"), "200"),
    "float below 0": (image(grey(-0.5, np.float32), "train/cat/0.tif"), "-0.5"),
    "NaN": (image(grey(np.nan, np.float32), "train/cat/0.tif"), "nan"),
    "16-bit RGB, transparent": (raw(png(16, 2, DEEP_RGB, chunk(b"tRNS", struct.pack(">HHH", 0x8080, 0x4040, 0x2020)))), "transparent"),
    "empty": (raw(b""), "0.png"),
    "text": (raw(b"no image"), "0.png"),
    "cut": (raw(encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)), format="PNG")[:600]), "0.png"),
    "larger than memory": (raw(png(8, 2, b"", size=(60_000, 60_000))), "0.png"),
    "HEIC": (raw(b"\0\0\0\x18ftypheic", "train/cat/0.heic"), "0.heic"),
    "HEIC, capitals, one more": (both(lambda f: (f / "train/cat/IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")), "IMG_1.HEIC"),
    "dangling": (link("train/cat/9.png", "nowhere.png"), "9.png"),
    "dangling class": (both(link("train/emu", "nowhere"), link("test/emu", "nowhere")), "emu"),
    "dangling folder": (link("train/cat/more", "nowhere"), "more"),
    "a link to itself": (link("train/cat/9.png", "9.png"), "9.png"),
    "cannot be read": (link("train/cat/9.png", "/proc/self/mem"), "9.png"),
    "no file": (fifo, "pipe.png"),
    "name in Latin-1": (more(f"train/cat/{LATIN}.png"), "UTF-8"),
    "class in Latin-1": (renamed("dog", LATIN), "UTF-8"),
    "folder in Latin-1": (more(f"train/cat/{LATIN}/1.png"), "UTF-8"),
    "composed and decomposed": (both(renamed("dog", NFC), more(f"train/{NFD}/0.png"), more(f"test/{NFD}/0.png")), "twice"),
    "only hidden images": (both(lambda f: shutil.rmtree(f / "test/dog"), more("test/dog/.0.png")), "no image"),
    "class in train only": (more("train/emu/0.png"), "'emu'"),
    "class in test only": (more("test/emu/0.png"), "'emu'"),
    "one class": (lambda f: [shutil.rmtree(f / part / "dog") for part in ("train", "test")], "two at least"),
    "no folder": (lambda f: shutil.rmtree(f / "test"), "no folder"),
    "a file for a folder": (both(lambda f: shutil.rmtree(f / "test"), lambda f: (f / "test").touch()), "no folder"),
}


def in_memory(f):
    for call in (ds.check, ds.info, ds.load): result = call(f"imagefolder:{f}", "nowhere")
    return result


def streamed(f):
    "The same folder as an ImageNet: every image is read."
    root = f.parent
    if (f / "test").exists(): (f / "test").rename(f / "val")
    f.rename(root / "imagenet")
    data = ds.load("imagenet", root)
    return ds.Dataset(ds.replace(data.info, shape=(3, 224, 224)), *(s and ds.Split(s.x[torch.arange(len(s))], s.y) for s in (data.train, None, data.test)))


@pytest.mark.parametrize("reader", [in_memory, streamed])
@pytest.mark.parametrize("name", RIGHT)
def test_an_odd_folder_is_read_rightly(name, reader, folder):
    change, seen, n = RIGHT[name]
    change(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)   # Pillow's, of an EXIF that cannot be read
        data = reader(folder)
    assert len(data.info.classes) == 2 and data.info.classes[0] == "cat"
    assert data.train.y.tolist() == [0] * (n - 2) + [1] * 2 and data.test.y.tolist() == [0, 1]
    scale = data.train.x.shape[-1] // 32
    seen = torch.from_numpy(np.broadcast_to(np.array(seen, np.uint8), (32, 32, 3)).copy()).permute(2, 0, 1)
    seen = seen.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    inside = [row for row in range(6, 26) if not 13 <= row <= 18]
    for rows in inside:
        for columns in inside[::4]:
            assert (data.train.x[0, :, rows * scale, columns * scale].int() - seen[:, rows * scale, columns * scale].int()).abs().max() <= 1, (rows, columns)
    flat_ones = data.train.x[-2:].float().mean((0, 2, 3))   # the dogs are as they were
    assert (flat_ones - torch.tensor(DOG)).abs().max() < 0.5


@pytest.mark.parametrize("reader", [in_memory, streamed])
@pytest.mark.parametrize("name", REFUSED)
def test_an_impossible_folder_is_one_sentence(name, reader, folder):
    change, says = REFUSED[name]
    change(folder)
    assert says in refused(reader, folder) or (reader is streamed and name in ("no folder", "a file for a folder"))


def test_torchvisions_formats_are_the_usual_ones(): assert sorted(ds.USUAL) == sorted(IMG_EXTENSIONS)


def test_the_corpus_is_large(): assert len(RIGHT) + len(REFUSED) >= 70


def identity(f): return ds.info(f"imagefolder:{f}", "").identity


def names_and_bytes(f):
    "The identity that a folder had before orientation, transparency and depth counted."
    h = ds.hashlib.sha256(b"RGB, shorter side 32, centre")
    for part in ("train", "test"):
        for path, _ in ImageFolder(f / part).samples:
            h.update(f"{os.path.relpath(path, f)} {ds.hashlib.sha256(open(path, 'rb').read()).hexdigest()}\n".encode())
    return h.hexdigest()[:16]


SAME = ["as it is", "RGBA, opaque", "16-bit RGB PNG", "palette", "CMYK", "EXIF says 9", "EXIF cannot be read", "EXIF of a TIFF", "a folder in a class", "linked images", "capitals"]
OTHER = ["16-bit PNG", "float TIFF", "RGBA, half", "palette, transparent", "EXIF says 3", "EXIF of a JPEG"]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated")
@pytest.mark.parametrize("name", [*SAME, *OTHER])
def test_the_identity_of_a_good_folder_stays_and_of_one_that_was_misread_changes(name, folder):
    RIGHT[name][0](folder)
    assert (identity(folder) == names_and_bytes(folder)) is (name in SAME)


def test_classes_and_images_have_torchvisions_order(folder):
    for name in ("Zebra/b.png", "Zebra/a.png", "_x/1.png", "ant 2/1.png", "ant 10/x/1.png", "ant 10/A.png", "ant 10/x.y/1.png", "ant 10/x/Z.png", "2/1.png", f"{NFC}/1.png", f"{NFD}s/1.png"):
        for part in ("train", "test"): more(f"{part}/{name}")(folder)
    classes, train, test = ds.scan_folder(folder)
    for part, ours in (("train", train), ("test", test)):
        theirs = ImageFolder(folder / part)
        assert ours == theirs.samples and classes == tuple(unicodedata.normalize("NFC", c) for c in theirs.classes)
    assert identity(folder) == names_and_bytes(folder)


@pytest.mark.parametrize("reader", [in_memory, streamed])
def test_a_folder_that_may_not_be_listed_is_one_sentence(reader, folder, monkeypatch):
    listed = os.scandir
    def scandir(path="."):
        if str(path).endswith("dog"): raise PermissionError(13, "Permission denied", str(path))
        return listed(path)
    monkeypatch.setattr(os, "scandir", scandir)
    assert "dog" in refused(reader, folder)


def test_a_format_that_cannot_be_read_is_said_before_images_are_streamed(folder):
    (folder / "test").rename(folder / "val")
    folder.rename(folder.parent / "imagenet")
    (folder.parent / "imagenet/val/dog/x.heic").write_bytes(b"\0\0\0\x18ftypheic")
    assert "x.heic" in refused(ds.info, "imagenet", folder.parent)


@pytest.mark.parametrize("name", ["imagefolder:~nobody-here/x", "imagefolder:" + "x" * 5000])
def test_a_folder_that_cannot_be_is_one_sentence(name):
    for call in (ds.check, ds.info, ds.load): refused(call, name, "data")


def test_a_folder_whose_own_name_is_not_utf8_is_refused_as_no_table_could_name_it(folder):
    for call in (ds.check, ds.info, ds.load): assert "UTF-8" in refused(call, f"imagefolder:{folder.rename(folder.parent / LATIN)}", "data") and (folder.parent / LATIN).rename(folder)


# Reading ahead

def streaming(folder, n=2):
    (folder / "test").rename(folder / "val")
    folder.rename(folder.parent / "imagenet")
    return ds.load("imagenet", folder.parent).train


def test_little_shared_memory_changes_no_image(folder, monkeypatch):
    split = streaming(folder)
    monkeypatch.setattr(ds, "loaders", lambda: 2)
    sent, arriving = [], ds.arriving
    def noted(loader):
        for x in arriving(loader):
            sent.append(type(x))
            yield x
    monkeypatch.setattr(ds, "arriving", noted)
    def epoch(room):
        monkeypatch.setattr(ds, "shared_room", lambda: room)
        return [(b.x, b.index) for b in ds.batches(split, 2, 1, ds.ResizedCrop())]
    one = 2 * 3 * 224 * 224
    large, small = epoch(6 * one), epoch(6 * one - 1)
    assert sent == 2 * [torch.Tensor] + 2 * [np.ndarray]
    assert all(torch.equal(a, b) and torch.equal(i, j) for (a, i), (b, j) in zip(large, small, strict=True))


def test_a_slow_disk_is_waited_for(folder, monkeypatch):
    split = streaming(folder)
    monkeypatch.setattr(ds, "loaders", lambda: 1)
    monkeypatch.setattr(ds, "LOOK", 0.1)
    assert sorted(torch.cat([b.index for b in ds.batches(split, 2, 1, Late())]).tolist()) == [0, 1, 2, 3]


class Late(ds.Augment):
    def read(self, images, index, key): time.sleep(0.4); return super().read(images, index, key)


class Slow(ds.Augment):
    def read(self, images, index, key): time.sleep(30)


class Second(ds.Augment):
    def read(self, images, index, key):
        if os.path.exists(mark := os.path.join(images.folder, "begun")): time.sleep(30)
        open(mark, "w").close()
        return super().read(images, index, key)


class Killed(ds.Augment):
    def read(self, images, index, key): os.kill(os.getpid(), 9)


@pytest.mark.parametrize("augment", [Slow(), Killed()])
def test_images_that_never_arrive_are_one_sentence(augment, folder, monkeypatch):
    split = streaming(folder)
    monkeypatch.setattr(ds, "loaders", lambda: 1)
    monkeypatch.setattr(ds, "PATIENCE", 0.5)
    monkeypatch.setattr(ds, "LOOK", 0.2)
    began = time.monotonic()
    assert "reads images ahead" in refused(list, ds.batches(split, 2, 1, augment))
    assert time.monotonic() - began < 15


def test_a_worker_that_is_killed_during_a_step_is_said_when_its_batch_is_missed(folder, monkeypatch):
    split = streaming(folder)
    monkeypatch.setattr(ds, "loaders", lambda: 1)
    monkeypatch.setattr(ds, "LOOK", 0.2)
    others, found = psutil.Process().children(), ds.batches(split, 1, 1, Second())
    next(found)
    for child in psutil.Process().children():
        if child not in others: child.kill()
    began = time.monotonic()
    while time.monotonic() - began < 0.5: sum(range(1000))   # a step: the news of the death arrive here
    assert "reads images ahead" in refused(list, found)


# Somebody's own Dataset

def own(x=None, y=None, classes=3, n=12):
    x = torch.randint(0, 256, (n, 1, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)) if x is None else x
    y = torch.arange(n) % 3 if y is None else y
    info = ds.DatasetInfo("mine", "Mine", tuple(map(str, range(classes))), (1, 5, 5), n, 0, n, 0.1, ds.AS_IS, "mine")
    good = ds.Split(torch.full((3, 1, 5, 5), 7, dtype=torch.uint8), torch.arange(3))
    return ds.Dataset(info, ds.Split(x, y), None, good)


@pytest.mark.parametrize("how, says", [
    (dict(x=torch.rand(12, 1, 5, 5)), "float32"), (dict(x=255 * torch.rand(12, 1, 5, 5)), "float32"), (dict(x=torch.ones(12, 1, 5, 5, dtype=torch.int64)), "int64"),
    (dict(x=torch.rand(12, 1, 5, 5).round().to(torch.uint8)), "0 or 1"), (dict(x=torch.zeros(12, 5, 5, dtype=torch.uint8)), "[12, 5, 5]"),
    (dict(x=torch.zeros(12, 5, 5, 1, dtype=torch.uint8)), "[12, 5, 5, 1]"), (dict(x=np.zeros((12, 1, 5, 5), np.uint8)), "ndarray"),
    (dict(y=torch.arange(11) % 3), "one label for each"), (dict(y=torch.zeros(12, 1, dtype=torch.long)), "one label for each"), (dict(y=torch.arange(12) % 3 + 1), "1 to 3"),
    (dict(y=torch.arange(12) % 3 - 1), "-1 to 1"), (dict(y=(torch.arange(12) % 3).float()), "float32"), (dict(y=[0, 1, 2] * 4), "list"), (dict(classes=2), "0 to 2")])
def test_a_dataset_that_is_none_is_refused_when_it_is_made(how, says):
    text = refused(lambda: own(**how))
    assert says in text and "'mine'" in text and "train" in text


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.int16])
def test_whole_labels_of_any_type_become_int64(kind):
    data = own(y=(torch.arange(12) % 3).to(kind))
    assert data.train.y.dtype == torch.int64 and data.train.y.tolist() == [0, 1, 2] * 4
    moved = data.to("cpu")
    assert type(moved) is ds.Dataset and moved.train.y.tolist() == data.train.y.tolist() and moved.val is None and moved.info is data.info


# Two folders of one name

def test_folders_of_one_name_are_told_apart():
    def info(path, label): return ds.replace(ds.DIGITS, name=f"imagefolder:{path}", label=label)
    infos = [info("/a/x/own", "imagefolder own"), info("/b/x/own", "imagefolder own"), info("/b/x/other", "imagefolder other"), ds.DIGITS,
             info("/a/cifar10-jpeg", "CIFAR-10 (JPEG copy)"), info("/b/cifar10-jpeg", "CIFAR-10 (JPEG copy)")]
    assert [i.label for i in ds.told_apart(infos)] == ["imagefolder a/x/own", "imagefolder b/x/own", "imagefolder other", ds.DIGITS.label,
                                                      "CIFAR-10 (JPEG copy) a/cifar10-jpeg", "CIFAR-10 (JPEG copy) b/cifar10-jpeg"]
    assert ds.told_apart(infos[:1]) == infos[:1] and ds.told_apart(2 * infos[:1]) == 2 * infos[:1]


# A batch of one image

@dataclass(frozen=True)
class Point(Network):
    "Batch norm of one number per channel and image."
    label, threads = "point", 1
    def parts(self, channels): return nn.Sequential(nn.Flatten(), nn.Linear(25 * channels, 6), nn.BatchNorm1d(6), nn.ReLU()), 6


def run_of(data, batch, network=Point(), epochs=2):
    return Run("mine", data.info.identity, network, at(0.1, steps=2), Training(epochs=epochs, batch=batch), Monitor(PGD(0.05, 1), 0.1, every=5))


def trained(r, data, **how):
    state = State(r, data)
    return train(r, data, state, report_line=lambda line: None, **how)


def test_a_last_batch_of_one_image_joins_the_one_before(monkeypatch):
    data, sizes = own(n=9), []
    with pytest.raises(ValueError, match="more than 1 value"): State(run_of(data, 4), data).model.train()(torch.rand(1, 1, 5, 5))
    assert State(run_of(data, 4), data).sizes(4) == [4, 5] and State(run_of(data, 8), data).sizes(8) == [9]
    assert State(run_of(data, 9), data).sizes(9) == [9] and State(run_of(data, 5), data).sizes(5) == [5, 4]
    step = training.train_step
    monkeypatch.setattr(training, "train_step", lambda method, model, bank, optimiser, batch, *rest: (sizes.append(batch.index.tolist()), step(method, model, bank, optimiser, batch, *rest))[1])
    state = trained(run_of(data, 4), data)
    assert [len(s) for s in sizes] == [4, 5] * 2 and all(sorted(sizes[i] + sizes[i + 1]) == [*range(9)] for i in (0, 2))
    assert all(np.isfinite(h["loss"]) for h in state.history)


def test_it_goes_on_after_any_batch_to_the_same_weights():
    data = own(n=9)
    r, saved = run_of(data, 4), []
    whole = trained(r, data, save=lambda state: saved.append(copy.deepcopy(state.state_dict())), should_save=lambda: True)
    assert [s["batch"] for s in saved] == [1, 0, 1, 0]
    for s in saved[:3]:
        state = State(r, data)
        state.load_state_dict(copy.deepcopy(s))
        train(r, data, state, report_line=lambda line: None)
        assert all(torch.equal(a, b) for a, b in zip(state.model.state_dict().values(), whole.model.state_dict().values()))


def test_networks_that_train_on_one_image_still_do():
    data = own(n=9)
    assert State(run_of(data, 4, NarrowResNet(width_factor=4)), data).sizes(4) == [4, 4, 1]   # maps of several pixels
    assert State(run_of(data, 4, MNISTCNN(filters=(4, 4), hidden=8)), data).sizes(4) == [4, 4, 1]                     # no batch norm


def test_vgg16_trains_on_129_digits():
    few = balanced(digits().train.y, 129)
    assert State(replace(run_of(digits(), 128, VGG16()), train_examples=129), digits()).sizes(128) == [129] and len(few) == 129


def test_a_batch_that_is_one_image_for_a_process_is_refused():
    data = own(n=9)
    assert "point" in refused(trained, run_of(data, 1), data)
    assert "2 processes" in refused(lambda: trained(run_of(own(n=10), 4), own(n=10), team=type("Two", (training.SingleProcess,), {"size": 2})()))
    assert "point" in refused(trained, replace(run_of(data, 4), train_examples=1), data)
    check_batches(run_of(own(n=12), 4), State(run_of(own(n=12), 4), own(n=12)), type("Two", (training.SingleProcess,), {"size": 2})())


def folders_of_one_name(folder, *homes):
    "Copies of a folder, given as the datasets of a table."
    for home in homes: shutil.copytree(folder, folder.parent / home)
    return ",".join(f"imagefolder:{folder.parent / home}" for home in homes)


def planned(datasets, tmp_path, table=TABLE, **asked):
    q = dict(preset="quick", datasets=datasets, device="cpu", rows="Natural", columns="natural", figures="none", outputs=str(tmp_path / "outputs"), data_root=str(tmp_path))
    return Plan(table, open_session(check_parameters(table.name, q | asked)))


def test_a_table_of_two_folders_of_one_name_tells_them_apart(folder, tmp_path):
    plan = planned(folders_of_one_name(folder, "a/own", "b/own"), tmp_path)
    labels = ["imagefolder a/own", "imagefolder b/own"]
    assert [b.info.label for b in plan.blocks] == labels and [plan.named(b) for b in plan.blocks] == labels
    results = Results(plan)
    assert list(results.frame.dataset.unique()) == labels and all(label in results.heading() for label in labels)
    assert len({run.id for b in plan.blocks for runs in b.runs.values() for run in runs}) == 1   # the content is the same: one run, which is trained once


def test_figures_of_folders_in_other_scripts_do_not_replace_each_other(folder, tmp_path):
    plan = planned(folders_of_one_name(folder, "x", "犬", "猫", "鳥"), tmp_path, replace(TABLE, figures={}), figures="fig4")
    Results(plan).figure("fig4", lambda results, block: plt.figure())
    plt.close("all")
    assert len([*(tmp_path / "outputs").rglob("*.png")]) == 4


# Names of classes

NAMES = ("5$ or 10$", r"$\frac$", "a_b", "_c", "<b>&amp;", "犬", "é", "two\nlines", "$x^$", "\U0010FFFD")


def test_odd_names_of_classes_are_drawn_letter_by_letter():
    y, rng = np.arange(60) % 10, np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fig = embeddings({"map": rng.normal(size=(60, 3)) + y[:, None]}, y, {}, NAMES)
        fig.canvas.draw()
    shown = [t.get_text() for t in fig.axes[0].texts]
    plt.close(fig)
    assert len(shown) == len(set(shown)) == 10
    assert not any(is_math_text(t) for t in shown)
    assert [t.replace(r"\$", "$") for t in shown][:5] == list(NAMES[:5]) and shown[6] == "é"


def test_a_dollar_in_a_table_begins_no_formula():
    assert "mathjax_ignore" in styled(pd.DataFrame({"a": [1]}, index=["5$ and 10$"]), "caption", []).to_html()
