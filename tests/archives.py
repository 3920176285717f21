"""Tiny CIFAR-10, CIFAR-100, SVHN and MNIST in the official file formats, so that `load` takes its real path with every checksum on.

    archives.here(tmp_path/"data", monkeypatch)        # this process reads tmp_path/"data" as the official data
    env = archives.environment(tmp_path/"data")        # so does any Python process (papermill, a kernel) started with env=env

The images are scikit-learn's digits, enlarged and coloured, so that a network learns them in a few steps. Only constants are changed: file lists,
md5 sums and sizes, here and in torchvision's classes. In another process a `sitecustomize.py` on PYTHONPATH does it; the package knows nothing of it.
"""
import dataclasses, functools, gzip, hashlib, importlib.util, io, json, operator, os, pickle, struct, sys, tarfile
from importlib.abc import MetaPathFinder
from pathlib import Path

N_TRAIN, N_TEST = 300, 200
NAMES = ("cifar10", "cifar100", "svhn", "mnist")


# The content

def images(name: str, n: int, first: int):
    "`n` images uint8 [n,H,W,C] and labels int64 [n], from digit number `first` on; what `load` must give, in the order of the files."
    import numpy as np
    from sklearn.datasets import load_digits
    digits = load_digits()
    take = np.arange(first, first + n)
    grey, y = (digits.images[take] / 16 * 255).round().astype("uint8"), digits.target[take].astype("int64")
    if name == "mnist": return np.pad(grey.repeat(3, 1).repeat(3, 2), ((0, 0), (2, 2), (2, 2)))[..., None], y
    tint = take % 10                                               # a colour, and CIFAR-100's second digit
    colour = np.random.default_rng(0).integers(80, 256, (10, 3))[tint]
    x = (grey.repeat(4, 1).repeat(4, 2)[..., None] * (colour / 255)[:, None, None, :]).round().astype("uint8")
    return x, 10 * y + tint if name == "cifar100" else y


def expected(name: str):
    "Training and test (images, labels) of the tiny archive."
    return images(name, N_TRAIN, 0), images(name, N_TEST, N_TRAIN)


# The formats

def write(root: Path, name: str, packed: bool = False) -> dict:
    "Write one dataset under `root`, or only the archives that torchvision downloads; returns the constants that describe it."
    content, archive = formats(name)
    for path, raw in (archive if packed else content).items():
        (Path(root) / path).parent.mkdir(parents=True, exist_ok=True)
        (Path(root) / path).write_bytes(raw)
    files, sums = ({path: hashlib.md5(raw).hexdigest() for path, raw in some.items()} for some in (content, archive))
    return {"archives": sums, "official": {"files": files, "n_train": N_TRAIN, "n_test": N_TEST}}


def formats(name: str) -> tuple[dict[str, bytes], dict[str, bytes]]:
    "The files that are read, and those that are downloaded: path under the data folder -> content."
    return _formats(name, N_TRAIN, N_TEST)


@functools.cache
def _formats(name: str, n_train: int, n_test: int) -> tuple[dict[str, bytes], dict[str, bytes]]:
    content = {"cifar10": cifar10, "cifar100": cifar100, "svhn": svhn, "mnist": mnist}[name](*expected(name))
    if name == "svhn": return content, content
    if name == "mnist": return content, {f"{path}.gz": gzip.compress(raw) for path, raw in content.items()}
    with tarfile.open(fileobj=(out := io.BytesIO()), mode="w:gz") as tar:
        for path, raw in content.items():
            entry = tarfile.TarInfo(path)
            entry.size = len(raw)
            tar.addfile(entry, io.BytesIO(raw))
    return content, {f"{'cifar-10' if name == 'cifar10' else 'cifar-100'}-python.tar.gz": out.getvalue()}


def rows(x):
    "CIFAR's: one image a row, all red pixels first, row by row."
    return x.transpose(0, 3, 1, 2).reshape(len(x), -1)


def cifar10(train, test) -> dict[str, bytes]:
    from adaptive_at.data.datasets import CIFAR10_CLASSES
    folder, fifth = "cifar-10-batches-py", N_TRAIN // 5
    parts = {f"data_batch_{i + 1}": [a[i * fifth:(i + 1) * fifth] for a in train] for i in range(5)} | {"test_batch": test}
    files = {f"{folder}/{part}": {"batch_label": part, "data": rows(x), "labels": y.tolist()} for part, (x, y) in parts.items()}
    files[f"{folder}/batches.meta"] = {"num_cases_per_batch": fifth, "label_names": CIFAR10_CLASSES.split(), "num_vis": 3072}
    return {path: pickle.dumps(entry, protocol=2) for path, entry in files.items()}


def cifar100(train, test) -> dict[str, bytes]:
    from adaptive_at.data.datasets import CIFAR100_CLASSES
    folder = "cifar-100-python"
    files = {f"{folder}/{part}": {"data": rows(x), "fine_labels": y.tolist(), "coarse_labels": (y // 5).tolist()}
             for part, (x, y) in dict(train=train, test=test).items()}
    files[f"{folder}/meta"] = {"fine_label_names": CIFAR100_CLASSES.split(), "coarse_label_names": [f"group {i}" for i in range(20)]}
    return {path: pickle.dumps(entry, protocol=2) for path, entry in files.items()}


def svhn(train, test) -> dict[str, bytes]:
    "Matlab: images H,W,C,N; labels [N,1] of 1 to 10, where 10 is the digit 0."
    import numpy as np
    from scipy.io import savemat
    files = {}
    for part, (x, y) in dict(train=train, test=test).items():
        savemat(out := io.BytesIO(), {"X": x.transpose(1, 2, 3, 0), "y": np.where(y == 0, 10, y).astype("uint8")[:, None]}, do_compression=True)
        raw = bytearray(out.getvalue())
        raw[:116] = b"MATLAB 5.0 MAT-file".ljust(116)   # savemat puts the time there
        files[f"{part}_32x32.mat"] = bytes(raw)
    return files


def mnist(train, test) -> dict[str, bytes]:
    "IDX: big-endian magic number and sizes, then the bytes."
    files = {}
    for part, (x, y) in {"train": train, "t10k": test}.items():
        files[f"MNIST/raw/{part}-images-idx3-ubyte"] = struct.pack(">iiii", 0x803, len(x), 28, 28) + x.tobytes()
        files[f"MNIST/raw/{part}-labels-idx1-ubyte"] = struct.pack(">ii", 0x801, len(y)) + y.astype("uint8").tobytes()
    return files


# The constants, here or in another process

def patch_datasets(module, patch: dict, put=operator.setitem) -> None:
    "Describe the tiny archives in `adaptive_at.data.datasets`."
    for name, p in patch["sets"].items(): put(module.OFFICIAL, name, dataclasses.replace(module.OFFICIAL[name], **p["official"]))


def patch_torchvision(tv, patch: dict, put=setattr) -> None:
    "The same in `torchvision.datasets`; with another server, if the patch names one."
    server = patch.get("server")
    for name, p in patch["sets"].items():
        md5 = {Path(path).name: md5 for path, md5 in p["official"]["files"].items()}
        if name in ("cifar10", "cifar100"):
            cls = tv.CIFAR10 if name == "cifar10" else tv.CIFAR100
            for field in ("train_list", "test_list"): put(cls, field, [[file, md5[file]] for file, _ in getattr(cls, field)])
            put(cls, "meta", cls.meta | {"md5": md5[cls.meta["filename"]]})
            put(cls, "tgz_md5", p["archives"][cls.filename])
            if server: put(cls, "url", f"{server}/{cls.filename}")
        elif name == "svhn":
            put(tv.SVHN, "split_list", tv.SVHN.split_list | {s: [f"{server}/{file}" if server else url, file, md5[file]]
                                                             for s, (url, file, _) in tv.SVHN.split_list.items() if file in md5})
        else:
            put(tv.MNIST, "resources", [(file, p["archives"][f"MNIST/raw/{file}"]) for file, _ in tv.MNIST.resources])
            if server: put(tv.MNIST, "mirrors", [f"{server}/MNIST/raw/"])


def describe(root: Path, names=NAMES, packed: bool = False, server: str | None = None) -> dict:
    "Write the archives; returns the patch, which is plain JSON."
    return {"sets": {name: write(root, name, packed) for name in names}, "server": server}


def apply(patch: dict, monkeypatch) -> None:
    "Patch this process until the test ends."
    import torchvision.datasets
    import adaptive_at.data.datasets
    patch_datasets(adaptive_at.data.datasets, patch, monkeypatch.setitem)
    patch_torchvision(torchvision.datasets, patch, monkeypatch.setattr)


def here(root: Path, monkeypatch, names=NAMES) -> Path:
    "Write the archives under `root` and make this process take them for the official ones."
    apply(describe(root, names), monkeypatch)
    return Path(root)


def environment(root: Path, names=NAMES, packed: bool = False, server: str | None = None) -> dict[str, str]:
    "Write the archives under `root`; returns an environment in which every Python process takes them for the official ones."
    site = Path(f"{root}-site")
    site.mkdir(parents=True)
    (site / "patch.json").write_text(json.dumps(describe(root, names, packed, server)))
    (site / "sitecustomize.py").write_text(
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('tiny_archives', {str(Path(__file__).resolve())!r})\n"
        "archives = importlib.util.module_from_spec(spec); spec.loader.exec_module(archives)\n"
        f"archives.patch_on_import({str(site / 'patch.json')!r})\n")
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))}


def patch_on_import(patch_file: str) -> None:
    "Patch either module as soon as it has been imported."
    patch = json.loads(Path(patch_file).read_text())
    sys.meta_path.insert(0, Patcher({"adaptive_at.data.datasets": lambda m: patch_datasets(m, patch), "torchvision.datasets": lambda m: patch_torchvision(m, patch)}))


class Patcher(MetaPathFinder):
    "Finds nothing itself: lets the other finders find, and acts after the module has run."
    def __init__(self, after): self.after = after

    def find_spec(self, fullname, path, target=None):
        if fullname not in self.after: return None
        sys.meta_path.remove(self)
        try: spec = importlib.util.find_spec(fullname)
        finally: sys.meta_path.insert(0, self)
        run = spec.loader.exec_module
        def exec_module(module): run(module); self.after[fullname](module)
        spec.loader.exec_module = exec_module
        return spec
