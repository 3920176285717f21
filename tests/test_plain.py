"Weights from elsewhere: matched by name, else by order, else by shape where that leaves no doubt; a normalisation under any common name; what no network holds is refused."
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from adaptive_at.attacks import PGD
from adaptive_at.store.transfer import export
from adaptive_at.algorithms.baselines import Training, at
from adaptive_at.networks import MNISTCNN, NarrowResNet
from adaptive_at.pretrained import NORMALISATION, plain
from adaptive_at.store.runs import Store
from adaptive_at.training import Monitor, Run
from helpers import digits, narrow, numbers
from test_datasets import refused

NARROW, CNN = NarrowResNet(width_factor=4), MNISTCNN(filters=(4, 6), hidden=12)


def written(path, weights):
    if path.suffix == ".safetensors": save_file({k: v.contiguous() for k, v in weights.items()}, path)
    else: torch.save(weights, path)
    return path


def equal(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def layers_renamed(model):
    "Under names whose alphabet is not the layers' order."
    prefixes = list(dict.fromkeys(k.rpartition(".")[0] for k in model.state_dict()))
    return {f"{'zyxwvutsrqponmlkjihgfedcba'[prefixes.index(k.rpartition('.')[0])]}.{k.rpartition('.')[2]}": v for k, v in model.state_dict().items()}


@pytest.mark.parametrize("file", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module."])
def test_our_own_names_are_matched_in_any_order(file, prefix, tmp_path):
    model = narrow(seed=5)
    shuffled = dict(reversed([(prefix + k, v) for k, v in model.state_dict().items()]))
    assert equal(plain(written(tmp_path/file, shuffled), NARROW, digits().info), model)


def test_tensors_without_order_are_matched_by_shape(tmp_path):
    model = CNN.build(10, 1, 3)
    for file in ("w.safetensors", "w.pt"):
        loaded = plain(written(tmp_path/file, layers_renamed(model)), CNN, digits().info)
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_two_layers_of_one_shape_and_no_order_are_refused(tmp_path):
    theirs = {k: v for k, v in layers_renamed(narrow(seed=5)).items()}
    text = refused(plain, written(tmp_path/"w.safetensors", theirs), NARROW, digits().info)
    assert "no order" in text and "torch.save" in text
    assert equal(plain(written(tmp_path/"w.pt", theirs), NARROW, digits().info), narrow(seed=5))


def test_tensors_without_order_of_another_network_are_refused(tmp_path):
    theirs = layers_renamed(CNN.build(10, 1, 3))
    assert "is not a CNN" in refused(plain, written(tmp_path/"w.safetensors", theirs), replace(CNN, hidden=13), digits().info)
    some = {k: v for k, v in theirs.items() if not k.startswith("z")}
    assert "is not a CNN" in refused(plain, written(tmp_path/"w.safetensors", some), CNN, digits().info)
    ours = {k: v for k, v in CNN.build(10, 1, 3).state_dict().items()}
    assert "is not a CNN" in refused(plain, written(tmp_path/"w.safetensors", ours), replace(CNN, hidden=13), digits().info)


@pytest.mark.parametrize("names", NORMALISATION, ids="-".join)
@pytest.mark.parametrize("file", ["w.pt", "w.safetensors"])
def test_a_normalisation_is_known_by_its_common_names(names, file, tmp_path):
    model, x = narrow(seed=5), numbers(4, 1, 8, 8)
    buffers = {f"normalize.{name}": torch.full((1, 1, 1, 1), value) for name, value in zip(names, (0.25, 0.5))}
    with torch.no_grad(): assert torch.equal(plain(written(tmp_path/file, buffers | model.state_dict()), NARROW, digits().info)(x), model.eval()((x - 0.25) / 0.5))


def colours():
    return replace(digits().info, shape=(3, 8, 8)), narrow(channels=3, seed=5), numbers(4, 3, 8, 8)


def test_one_number_normalises_all_channels(tmp_path):
    info, model, x = colours()
    theirs = {"mean": torch.tensor(0.25), "std": torch.tensor(0.5)} | model.state_dict()
    with torch.no_grad(): assert torch.equal(plain(written(tmp_path/"w.pt", theirs), NARROW, info)(x), model.eval()((x - 0.25) / 0.5))


def test_a_mean_of_0_to_255_is_noticed(tmp_path, capsys):
    info, model, x = colours()
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    loaded = plain(written(tmp_path/"w.pt", {"mean": mean, "std": std} | model.state_dict()), NARROW, info)
    assert "255" in capsys.readouterr().out
    with torch.no_grad(): assert torch.allclose(loaded(x), model.eval()((255 * x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)), atol=1e-4)


@pytest.mark.parametrize("mean, std", [([123., 116., 103.], [0.2] * 3), ([0.4] * 3, [58.] * 3), ([0.5] * 3, [0., 1., 1.]), ([0.5] * 3, [-1.] * 3), ([float("nan")] * 3, [1.] * 3), ([400.] * 3, [58.] * 3)])
def test_an_impossible_normalisation_is_refused(mean, std, tmp_path):
    info, model, _ = colours()
    assert "normalis" in refused(plain, written(tmp_path/"w.pt", {"mean": torch.tensor(mean), "std": torch.tensor(std)} | model.state_dict()), NARROW, info)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_noticed(wrong, tmp_path):
    theirs = narrow(seed=5).state_dict()
    theirs["classifier.bias"][3] = wrong
    assert "classifier.bias" in refused(plain, written(tmp_path/"w.pt", theirs), NARROW, digits().info)


def test_weights_of_a_network_without_our_dropout_fit(tmp_path):
    theirs = {k: v for k, v in layers_renamed(CNN.build(10, 1, 3)).items() if not k.endswith(".calls")}
    for file in ("w.pt", "w.safetensors"):
        loaded = plain(written(tmp_path/file, theirs), CNN, digits().info)
        with torch.no_grad(): assert torch.equal(loaded(x := numbers(4, 1, 8, 8)), CNN.build(10, 1, 3).eval()(x))


def test_our_own_export_brings_its_normalisation(tmp_path):
    data, spec = digits(), replace(NARROW, mean=(0.3,), std=(0.4,))
    run = Run("digits", data.info.identity, spec, at(0.1, steps=1), Training(epochs=1), Monitor(PGD(0.05, 1), 0.1, 20), train_examples=60)
    store = Store(tmp_path/"runs")
    store.train(run, data, report_line=lambda line: None)
    export(store.folder(run), tmp_path/"mine.safetensors")
    loaded, x = plain(tmp_path/"mine.safetensors", NARROW, data.info), numbers(4, 1, 8, 8)
    with torch.no_grad(): assert torch.equal(loaded(x), store.model(run, data)(x))
