"Networks against published sizes, torchvision's, and the papers' released layouts written out with plain functions."
import copy
import os
import platform
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings, strategies as st
from torch import nn
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torchvision.models.resnet import BasicBlock, Bottleneck

from adaptive_at import networks as nets
from adaptive_at.attacks import PGD
from adaptive_at.base.errors import UserError
from adaptive_at.base.identity import spec_hash
from adaptive_at.networks import (CIFAR10_IAAT, CIFAR10_RICE, CIFAR100_SAAT, IMAGENET, MNISTCNN, NETWORKS, SVHN_RICE, TRADES_NET, VGG16, IAATWideResNet,
                                  ImageNetResNet50, NarrowResNet, PreActResNet18, ResNet18, ResNet50, SmallCNN, ThinConv2d, WideResNet, approve_folding, fingerprint, folded, in_mode)
from helpers import buffers, labels, noise, numbers, same

pytestmark = pytest.mark.trains

GRAY = ("mnistcnn", "mnistcnn-half", "mnistcnn-trades", "smallcnn")


def channels(name): return 1 if name in GRAY else 3


def classes(name): return 1000 if "imagenet" in name else 10


def near(a, b, rel=1e-5): return torch.allclose(a, b, rtol=rel, atol=rel * float(b.detach().abs().max()))


# Stored runs: the same key gives the same weights for ever, and the same spec the same hash

@pytest.mark.parametrize("spec, key, image, n, weights, identity", [
    (ResNet18(), 0, 3, 10, "d75106229d9ec3cd", "f4b3280266dc"), (ResNet18(), 2**63 + 5, 3, 100, "6a9328cb699137c6", "f4b3280266dc"),
    (NarrowResNet(), 7, 1, 10, "06fa80422a423a5a", "831e047b1459"), (NarrowResNet(), 0, 3, 10, "bb9c264df5c81c38", "831e047b1459"),
    (NarrowResNet(width_factor=4), 7, 1, 10, "cdab3f0f1bb3a8c5", "b0cb97c7267f")])
def test_stored_runs_keep_their_weights_and_their_identity(spec, key, image, n, weights, identity):
    assert fingerprint(spec.build(n, image, key)) == weights
    assert spec_hash(spec) == identity


@pytest.mark.parametrize("spec, image", [(ResNet50(), 3), (PreActResNet18(), 3), (WideResNet(depth=10, width_factor=1), 3), (IAATWideResNet(depth=8, width_factor=1), 3),
                                         (VGG16(), 3), (MNISTCNN(**TRADES_NET), 1), (SmallCNN(), 1)])
def test_weights_are_a_function_of_the_key(spec, image):
    before = torch.get_rng_state()
    one, again, other = spec.build(10, image, key=3), spec.build(10, image, key=3), spec.build(10, image, key=4)
    assert fingerprint(one) == fingerprint(again) != fingerprint(other)
    assert torch.equal(torch.get_rng_state(), before)


# Sizes

PUBLISHED = {   # ten classes; ImageNet: torchvision's documentation
    "resnet18": 11_173_962, "resnet34": 21_282_122, "resnet50": 23_520_842, "resnet101": 42_512_970, "resnet152": 58_156_618,
    "imagenet-resnet50": 25_557_032, "imagenet-resnet101": 44_549_160, "imagenet-resnet152": 60_192_808,
    "preactresnet18": 11_172_170,   # 11,171,146 without the last batch norm
    "wrn28-10": 36_479_194, "wrn34-10": 46_160_474, "wrn32-10": 46_160_474,
    "vgg16": 14_728_266, "mnistcnn": 3_274_634, "mnistcnn-trades": 21_840, "smallcnn": 312_202}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers_of_parameters(name): assert NETWORKS[name].size(classes(name), channels(name)) == PUBLISHED[name]


def test_the_other_sizes_follow_from_their_layers():
    def wide(n, k): return 27 * 16 + sum((9 * a * b + 9 * b * b + a * b + 2 * (a + b)) + (n - 1) * (18 * b * b + 4 * b) for a, b in ((16, 16*k), (16*k, 32*k), (32*k, 64*k))) + 128*k + 64*k * 10 + 10
    assert NETWORKS["wrn28-4"].size(10) == wide(4, 4)
    for k in (3, 5, 7): assert NETWORKS[f"wrn34-{k}"].size(10) == wide(5, k)
    assert NETWORKS["wrn34-1"].size(10) == wide(5, 1) - 16 * 16   # 16 channels stay 16: no convolution in the first shortcut
    assert NETWORKS["mnistcnn-half"].size(10, 1) == 26 * 16 + (25 * 16 + 1) * 32 + (49 * 32 + 1) * 256 + 257 * 10
    # IAAT: convolutions, a 1x1 one to ten scores, and a weight and bias for each score
    pairs = [(160, 160), (160, 160)] * 5 + [(160, 320)] + [(320, 320)] * 9 + [(320, 640)] + [(640, 640)] * 9
    assert NETWORKS["wrn32-10-iaat"].size(10) == 27 * 160 + 9 * sum(a * b for a, b in pairs) + 640 * 10 + 2 * 10


def test_a_size_is_that_of_the_network_built():
    for spec in (NarrowResNet(), SmallCNN(), IAATWideResNet(depth=8, width_factor=1)):
        assert spec.size(7, 1) == sum(p.numel() for p in spec.build(7, 1).parameters())


# Features and classifier

@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_the_classifier_of_the_features(name):
    with torch.device("meta"):
        net, side = NETWORKS[name].build(classes(name), channels(name)), 224 if "imagenet" in name else 28 if name in GRAY else 32
        x = torch.empty(2, channels(name), side, side)
        assert net.features(x).shape == (2, net.width) and net(x).shape == net.classifier(net.features(x)).shape == (2, classes(name))


SMALL = {"resnet50": (ResNet50(), 3), "imagenet-resnet50": (ImageNetResNet50(), 3), "preactresnet18": (PreActResNet18(), 3), "wrn": (WideResNet(depth=10, width_factor=2), 3),
         "wrn-iaat": (IAATWideResNet(depth=8, width_factor=2), 3), "vgg16": (VGG16(), 3), "mnistcnn": (MNISTCNN(), 1), "smallcnn": (SmallCNN(dropout=0.), 1)}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_both_halves_give_the_same_numbers(name, mode):
    spec, image = SMALL[name]
    net, x = spec.build(10, image).train(mode == "train"), numbers(3, image, 32, 32)
    assert torch.equal(net(x), net.classifier(net.features(x)))


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(["wrn", "wrn-iaat", "vgg16"]), st.integers(5, 41), st.integers(5, 41))
def test_convolutional_networks_take_any_image(name, height, width):
    net = BUILT.setdefault(name, SMALL[name][0].build(10).eval())
    with torch.no_grad(): assert net.features(numbers(2, 3, height, width)).shape == (2, net.width)


BUILT = {}


def test_a_pixel_may_be_attacked_through_each():
    for name, (spec, image) in SMALL.items():
        if name == "imagenet-resnet50": continue
        net, x = spec.build(10, image).eval(), numbers(2, image, 28, 28)
        if name == "smallcnn": nn.init.ones_(net.classifier.weight[0])   # it starts at zero, where nothing has a gradient
        assert (PGD(0.1, 1)(net, x, labels(2, 10), 0.1, noise(2)) - x).abs().amax() > 0.09, name


# torchvision's networks have the same layers in the same order

def filling(v, seed):
    "Weights of variance 2 / fan in; batch norms away from the identity."
    if v.dim() == 0: return v   # a counter
    return (numbers(*v.shape, seed=seed) - 0.5) * (24 / v[0].numel())**0.5 if v.dim() > 1 else numbers(*v.shape, seed=seed) + 0.5


def ours_and_theirs(spec, theirs, image=3):
    ours = spec.build(theirs.fc.out_features if hasattr(theirs, "fc") else 10, image).eval()
    mine, their = ours.state_dict(), theirs.state_dict()
    assert [v.shape for v in mine.values()] == [v.shape for v in their.values()]
    filled = {k: filling(v, i) for i, (k, v) in enumerate(their.items())}
    theirs.load_state_dict(filled)
    ours.load_state_dict(dict(zip(mine, filled.values())))
    return ours, theirs.eval()


def outputs(net, kinds, x):
    "What every layer of these kinds puts out (a copy: torchvision's ReLUs work in place), and the logits."
    seen = []
    handles = [m.register_forward_hook(lambda m, args, out: seen.append(out.clone())) for m in net.modules() if type(m) in kinds]
    with torch.no_grad(): seen.append(net(x))
    for h in handles: h.remove()
    return seen


def cifar(theirs):
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return theirs


@pytest.mark.parametrize("spec, theirs, side", [
    (ImageNetResNet50(), lambda: torchvision.models.resnet50(), 64),
    (ResNet50(), lambda: cifar(torchvision.models.resnet50(num_classes=10)), 16),
    (ResNet18(), lambda: cifar(torchvision.models.resnet18(num_classes=10)), 16)])
def test_residual_networks_equal_torchvisions_layer_by_layer(spec, theirs, side):
    ours, theirs = ours_and_theirs(spec, theirs())
    x = numbers(2, 3, side, side)
    a = outputs(ours, (nn.Conv2d, nn.BatchNorm2d, nets.BasicBlock, nets.Bottleneck), x)
    b = outputs(theirs, (nn.Conv2d, nn.BatchNorm2d, BasicBlock, Bottleneck), x)
    assert len(a) == len(b) > 40 and all(near(p, q, 1e-4) for p, q in zip(a, b))
    assert b[-1].std() > 0 and not near(b[-1][0], b[-1][1], 1e-4)


@pytest.mark.parametrize("name", ["resnet34", "resnet101", "resnet152", "imagenet-resnet101", "imagenet-resnet152"])
def test_the_deeper_ones_have_torchvisions_layers(name):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name.split("-")[-1])(num_classes=classes(name))
        if "imagenet" not in name: cifar(theirs)
        ours = NETWORKS[name].build(classes(name))
    assert [(v.shape, k.rpartition(".")[2]) for k, v in ours.state_dict().items()] == [(v.shape, k.rpartition(".")[2]) for k, v in theirs.state_dict().items()]


def test_vgg_has_torchvisions_convolutions():
    theirs = nn.Sequential(torchvision.models.vgg16_bn().features, nn.Flatten(), nn.Linear(512, 10))
    ours, theirs = ours_and_theirs(VGG16(), theirs)
    x = numbers(2, 3, 32, 32)
    a, b = (outputs(net, (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d), x) for net in (ours, theirs))
    assert len(a) == len(b) == 13 + 13 + 5 + 1 and all(near(p, q, 1e-4) for p, q in zip(a, b))


# The released layouts, with plain functions over the same tensors

def normal(x, weight=None, bias=None):
    "Batch norm in train mode."
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    x = (x - mean) / (var + 1e-5).sqrt()
    return x if weight is None else x * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def scaled(net):
    "Float64, with batch norms that are not the identity."
    for i, (name, p) in enumerate(net.double().named_parameters()):
        if p.dim() == 1: p.data = numbers(*p.shape, seed=i).double() + 0.5
    return net.train()


@pytest.mark.parametrize("spec, strides", [(PreActResNet18(), (1, 1, 2, 1, 2, 1, 2, 1)), (WideResNet(depth=16, width_factor=2), (1, 1, 2, 1, 2, 1)), (WideResNet(depth=14, width_factor=1), (1, 1, 2, 1, 2, 1))])
def test_preactivation_networks_as_written_by_rice_and_trades(spec, strides):
    net, x = scaled(spec.build(10)), numbers(4, 3, 16, 16).double()
    p = iter([v for k, v in net.named_parameters()])   # in order: stem; per block bn1, conv1, bn2, conv2, shortcut; bn; linear
    h = F.conv2d(x, next(p), padding=1)
    for stride in strides:
        a = F.relu(normal(h, next(p), next(p)))
        conv1 = next(p)
        out = F.relu(normal(F.conv2d(a, conv1, stride=stride, padding=1), next(p), next(p)))
        out = F.conv2d(out, next(p), padding=1)
        h = out + (F.conv2d(a, next(p), stride=stride) if stride > 1 or conv1.shape[0] != conv1.shape[1] else h)
    g = F.relu(normal(h, next(p), next(p))).mean((2, 3))
    assert near(net.features(x), g, 1e-9) and near(net(x), F.linear(g, next(p), next(p)), 1e-9)
    assert next(p, None) is None


def test_iaats_wide_network_as_released():
    net, x = scaled(IAATWideResNet(depth=14, width_factor=1).build(10)), numbers(4, 3, 32, 32).double()
    p = iter([v for k, v in net.named_parameters()])
    h = F.conv2d(x, next(p), padding=1)
    assert h.shape[1] == 16
    for stride in (1, 1, 2, 1, 2, 1):
        out = F.conv2d(F.relu(normal(h)), next(p), stride=stride, padding=1)
        out = F.conv2d(F.relu(normal(out)), next(p), padding=1)
        if stride == 2:
            h = F.avg_pool2d(h, 3, 2, 1)
            h = torch.cat([h, torch.zeros_like(h)], 1)
        h = h + out
    h = F.relu(normal(h))
    assert near(net.features(x), h.flatten(1), 1e-9)
    scores = normal(F.conv2d(h, next(p).unsqueeze(-1)), next(p), next(p))
    assert near(net(x), F.avg_pool2d(scores, 8).flatten(1), 1e-9)
    assert next(p, None) is None


def test_the_mnist_networks_as_released():
    x = numbers(3, 1, 28, 28)
    for spec, padding in ((MNISTCNN(), 2), (MNISTCNN(**TRADES_NET), 0)):
        net = spec.build(10, 1).eval()
        w = list(net.parameters())
        h = F.max_pool2d(F.conv2d(x, w[0], w[1], padding=padding), 2).relu()
        h = F.max_pool2d(F.conv2d(h, w[2], w[3], padding=padding), 2).relu()
        assert near(net(x), F.linear(F.linear(h.flatten(1), w[4], w[5]).relu(), w[6], w[7]))
    net = SmallCNN().build(10, 1).eval()
    nn.init.normal_(net.classifier.weight)
    w = list(net.parameters())
    h = x
    for i in range(4):
        h = F.conv2d(h, w[2*i], w[2*i + 1]).relu()
        if i % 2: h = F.max_pool2d(h, 2)
    h = h.flatten(1)
    for i in (4, 5): h = F.linear(h, w[2*i], w[2*i + 1]).relu()
    assert near(net(x), F.linear(h, w[12], w[13]))


# Initial weights

def test_initial_weights_where_the_releases_differ_from_pytorch():
    wide = WideResNet(depth=10, width_factor=4).build(10)
    for m in wide.modules():   # N(0, 2 / (k k out))
        if isinstance(m, nn.Conv2d) and m.weight.numel() > 5000: assert abs(m.weight.std() / (2 / (m.weight[0, 0].numel() * m.out_channels))**0.5 - 1) < 0.05
    assert wide.classifier.bias.abs().max() == 0 and wide.classifier.weight.std() > 0
    small = SmallCNN().build(10, 1)
    assert all(p.abs().max() == 0 for p in small.classifier.parameters())
    third = [m for m in small.modules() if isinstance(m, nn.Conv2d)][2]
    assert third.bias.abs().max() == 0 and abs(third.weight.std() / (2 / (9 * 32))**0.5 - 1) < 0.05   # N(0, 2 / (k k in))
    image = ImageNetResNet50().build(10)
    assert abs(image.body[0].weight.std() / (2 / (49 * 64))**0.5 - 1) < 0.05
    assert abs(ResNet50().build(10).body[0].weight.abs().max() * 27**0.5 - 1) < 0.05   # U(+-1/sqrt(fan in)): PyTorch's


# Dropout

def test_dropout_is_keyed_resumes_and_leaves_torchs_generator_alone():
    spec, x = MNISTCNN(**TRADES_NET), numbers(8, 1, 28, 28)
    net = spec.build(10, 1).train()
    before = torch.get_rng_state()
    first = net(x)
    saved = {k: v.clone() for k, v in net.state_dict().items()}
    second = net(x)
    assert not torch.equal(first, second) and torch.equal(torch.get_rng_state(), before)
    resumed = spec.build(10, 1, key=9).train()
    resumed.load_state_dict(saved)
    assert torch.equal(resumed(x), second)
    was = buffers(net)
    with in_mode(net, "eval"): assert torch.equal(net(x), net(x))
    assert same(buffers(net), was)


def test_dropout_drops_its_share_and_keeps_the_mean():
    layer = nets.Dropout(0.25).train()
    h = layer(torch.ones(200, 500))
    assert torch.equal(h.unique(), torch.tensor([0., 1 / 0.75])) and abs((h == 0).float().mean() - 0.25) < 0.01
    assert not torch.equal(h[0], h[1]) and not torch.equal(h, layer(torch.ones(200, 500)))
    h = layer(torch.ones(2, 500))
    assert not torch.equal(h[1], layer(torch.ones(2, 500))[0])   # the next call's masks are new, also shifted by an example
    maps = nets.Dropout(0.5, channels=True).train()(torch.ones(40, 50, 3, 3))
    assert torch.equal(maps.amin((2, 3)), maps.amax((2, 3))) and abs((maps == 0).float().mean() - 0.5) < 0.05


def test_trades_net_drops_channels_then_units():
    net = MNISTCNN(**TRADES_NET).build(10, 1).train()
    maps, units = outputs(net, (nets.Dropout,), numbers(8, 1, 28, 28))[:2]
    assert maps.shape == (8, 20, 4, 4) and units.shape == (8, 50)
    assert 0.3 < (maps.amax((2, 3)) == 0).float().mean() < 0.8 and (units == 0).float().mean() > 0.4


# Names and normalisation

def test_a_name_nobody_knows():
    with pytest.raises(UserError) as e: nets.network("resnet19")
    assert "'resnet19'" in str(e.value) and all(name in str(e.value) for name in NETWORKS)
    assert nets.network("wrn34-10") == WideResNet(depth=34, width_factor=10)


def test_labels_are_the_tables():
    assert {n.label for n in NETWORKS.values()} >= {"ResNet-18", "ResNet-34", "ResNet-50", "ResNet-101", "ResNet-152", "PreAct ResNet-18", "VGG-16", "CNN (2 conv + 2 fc)",
                                                    "WideResNet-34-10", "WideResNet-32-10"}
    assert [NETWORKS[n].label for n in ("mnistcnn", "mnistcnn-half", "mnistcnn-trades")] == ["CNN (2 conv + 2 fc)", "CNN (2 conv + 2 fc: 16 and 32 filters, 256 units)", "CNN (2 conv + 2 fc: 10 and 20 filters, 50 units)"]
    assert len({spec_hash(n) for n in NETWORKS.values()}) == len(NETWORKS)


def test_a_depth_that_cannot_be():
    with pytest.raises(ValueError, match="6n"): WideResNet(depth=30)


@pytest.mark.parametrize("constants", [CIFAR10_RICE, CIFAR100_SAAT, SVHN_RICE, CIFAR10_IAAT, IMAGENET])
def test_normalisation_comes_first_and_changes_no_weight(constants):
    plain, net = NarrowResNet().build(10).eval(), NarrowResNet(**constants).build(10).eval()
    assert fingerprint(plain) == fingerprint(net) and spec_hash(NarrowResNet()) != spec_hash(NarrowResNet(**constants))
    x = numbers(3, 3, 16, 16)
    assert near(net(x), plain((x - torch.tensor(constants["mean"])[:, None, None]) / torch.tensor(constants["std"])[:, None, None]))
    assert not near(net(x), plain(x))


def test_normalisation_for_other_channels_is_refused():
    with pytest.raises(UserError, match="3 channels, but the images have 1"): NarrowResNet(**CIFAR10_RICE).build(10, 1)


# The layout of tensors

class Met(TorchFunctionMode):
    "Which thin strided convolutions are computed within, and whether in channels_last, as oneDNN decides it: by the strides of the images and of the filters."
    def __init__(self): super().__init__(); self.found = []
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.conv2d:
            x, weight, _, stride = args[:4]
            if weight.shape[2:] == (1, 1) and max(stride) > 1 and weight.shape[1] < 8:
                self.found.append(any(suggest_memory_format(v) is torch.channels_last for v in (x, weight)))
        return func(*args, **(kwargs or {}))


def layouts(net, x):
    with Met() as met: net(x)
    return met.found


THIN = [*((NarrowResNet(width_factor=w, strides=s), c) for w in (*range(1, 10), 12, 16, 24) for s in ((1, 2, 2), (2, 2, 2), (1, 3)) for c in (1, 3)),
        *((NETWORKS[name], channels(name)) for name in ("vgg16", "preactresnet18", "resnet50", *GRAY)), (WideResNet(depth=8, width_factor=1), 3), (IAATWideResNet(depth=8, width_factor=1), 3)]


def test_no_network_has_a_thin_strided_convolution_in_channels_last_on_a_cpu():
    "Processors without AVX-512 would write past its memory, whatever the layout of the images, and wherever the network was before."
    met = 0
    for spec, image in THIN:
        net = spec.build(10, image).eval()
        moved = spec.build(10, image).laid_out("cpu").to(memory_format=torch.channels_last).eval()   # as if it came from a GPU
        x = numbers(2, image, 28, 28)
        for images in (x, x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):   # the second lies in memory as image files are read
            for n in (net, moved): met += len(found := layouts(n, images)); assert not any(found), spec
    assert met > 200
    for name, spec in NETWORKS.items():
        with torch.device("meta"): net = spec.build(10, channels(name))
        assert any(isinstance(m, ThinConv2d) for m in net.modules()) == (name == "narrow-4") and net.memory_format is torch.channels_last, name


def test_the_layouts_of_the_test_would_show_one():
    conv = nn.Conv2d(4, 8, 1, 2, bias=False).to(memory_format=torch.channels_last)
    assert layouts(conv, numbers(2, 4, 8, 8)) == [True] and layouts(nn.Conv2d(4, 8, 1, 2), numbers(2, 4, 8, 8)) == [False]
    assert layouts(nn.Conv2d(4, 8, 1, 2), numbers(2, 8, 8, 4).permute(0, 3, 1, 2)) == [True]


def test_a_thin_convolution_gives_the_same_numbers():
    conv = nn.Conv2d(4, 8, 1, 2, bias=False)
    thin, x = copy.deepcopy(conv), numbers(2, 8, 8, 4).permute(0, 3, 1, 2)
    thin.__class__ = ThinConv2d
    conv(x.contiguous()).square().sum().backward()   # as it is, on these images, it could write past its memory
    thin(x).square().sum().backward()
    assert near(thin(x), conv(x.contiguous())) and near(thin.weight.grad, conv.weight.grad) and thin.weight.grad.shape == (8, 4, 1, 1)


def test_other_layers_than_stock_ones_are_in_doubt_and_a_gpu_is_not():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.filters = nn.Parameter(torch.zeros(8, 4, 1, 1))
    class Other(nn.Conv2d): pass
    risky = (nn.Conv2d(4, 8, 1, 2), nn.Conv2d(16, 32, 1, 2, groups=4), nn.Conv2d(7, 8, 1, (1, 2)), Other(4, 8, 1), Raw(), nn.ConvTranspose2d(16, 4, 1, 2),
             nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 1, 2)))
    sound = nn.Conv2d(8, 8, 1, 2), nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 3, 2, 1), nn.Linear(4, 4), Other(8, 8, 1, 2), nn.BatchNorm2d(4), ThinConv2d(4, 8, 1, 2)
    for m in risky: assert nets.memory_format(nn.Sequential(m)) == torch.contiguous_format and nets.memory_format(m, "cuda") == torch.channels_last, m
    for m in sound: assert nets.memory_format(nn.Sequential(m)) == torch.channels_last, m
    assert nets.memory_format(nn.Sequential(nn.Conv3d(1, 1, 1)), "cuda") == torch.contiguous_format   # channels_last is of four dimensions


def test_a_thin_network_trains_in_both_precisions_in_one_process_on_a_processor_without_avx512():
    "In a process of its own: what is written past its memory kills it."
    code = """
import torch
from dataclasses import dataclass
from torch import nn
from adaptive_at.networks import NarrowResNet, Network, pooled
@dataclass(frozen=True)
class Turned(Network):
    "Channels go to the end for a norm and come back, as in ConvNeXt."
    def parts(self, channels):
        class Body(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem, self.norm, self.thin, self.end = nn.Conv2d(channels, 4, 3, padding=1), nn.LayerNorm(4), nn.Conv2d(4, 8, 1, 2, bias=False), nn.Sequential(*pooled())
            def forward(self, x): return self.end(self.thin(self.norm(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))
        return Body(), 8
torch.set_num_threads(1)
for spec in (*(NarrowResNet(width_factor=w) for w in (1, 3, 4, 7)), Turned()):
    for lowered in (False, True, False):
        nets = spec.build(10, 1).train(), spec.build(10, 1).train().to(memory_format=torch.channels_last)   # the second as if it came from a GPU
        for net in nets:
            for x in (torch.rand(128, 1, 8, 8), torch.rand(128, 8, 8, 1).permute(0, 3, 1, 2)):
                with torch.autocast('cpu', torch.bfloat16, enabled=lowered): net(x).float().square().sum().backward()
            assert all(p.grad.isfinite().all() for p in net.parameters())
print(torch.backends.cpu.get_cpu_capability())
"""
    env = os.environ | {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-500:]}"
    if platform.machine() == "x86_64": assert done.stdout.strip() in ("AVX2", "DEFAULT")


# Batch norm folded into convolutions

def used(spec, image):
    "A network in float64 with running statistics and weights far from the initial ones, in eval mode."
    net = spec.build(10, image).double().eval()
    for i, (name, p) in enumerate(sorted(net.state_dict().items())):
        if p.dim() == 1 and "num_batches" not in name: p.copy_(0.5 + numbers(len(p), seed=i).double())
    return net


@pytest.mark.parametrize("spec, image, side, n, left", [
    (NarrowResNet(), 1, 8, 9, 0), (ResNet18(), 3, 8, 20, 0), (NETWORKS["resnet50"], 3, 8, 53, 0), (NarrowResNet(**CIFAR10_RICE), 3, 16, 9, 0), (VGG16(), 3, 32, 13, 0),
    (PreActResNet18(), 3, 8, 8, 9), (WideResNet(depth=10, width_factor=1), 3, 8, 3, 4), (IAATWideResNet(depth=8, width_factor=1), 3, 32, 4, 4), (SmallCNN(), 1, 28, 0, 0)])
def test_a_folded_network_is_the_same_function_without_its_batch_norms(spec, image, side, n, left):
    net, x = used(spec, image), numbers(2, image, side, side).double().requires_grad_()
    norms = [m for m in net.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    logits = net(x)
    slope = torch.autograd.grad(logits[:, 3].sum(), x)[0]
    was = {k: v.clone() for k, v in net.state_dict().items()}
    assert approve_folding(net, x) or not n
    with folded(net):
        inside = net(x)
        assert near(inside, logits, 1e-10) and near(torch.autograd.grad(inside[:, 3].sum(), x)[0], slope, 1e-9)
        away = sum("forward" in vars(m) for m in norms)
        assert (away, len(norms) - away) == (n, left)
    assert torch.equal(net(x), logits) and same(was, net.state_dict()) and all(p.grad is None and p.requires_grad for p in net.parameters())


def test_folding_leaves_train_mode_alone_and_ends_with_an_exception():
    net, x = NarrowResNet(width_factor=4).build(10, 1), numbers(6, 1, 8, 8)
    net.body[1].eval()   # frozen by hand: this one is folded
    net.body[1].running_mean.fill_(0.5)
    twin = NarrowResNet(width_factor=4).build(10, 1)
    twin.load_state_dict(net.state_dict())
    twin.body[1].eval()
    want = twin(x)
    assert approve_folding(net, x)
    with pytest.raises(ZeroDivisionError):
        with folded(net):
            assert near(net(x), want) and not torch.equal(net(x), want)
            with folded(net): assert near(net(x), want)   # once is enough
            assert "forward" in vars(net.body[0]) and "forward" not in vars(net.body[3].conv1)
            1 / 0
    assert not any("forward" in vars(m) for m in net.modules())
    for _ in range(2): twin(x)
    assert int(net.body[3].bn1.num_batches_tracked) == int(twin.body[3].bn1.num_batches_tracked) == 3 and int(net.body[1].num_batches_tracked) == 0


def test_what_is_folded_is_lowered_once_and_to_what_autocast_would_make_of_it():
    net, x = used(NarrowResNet(width_factor=4), 1).float(), numbers(2, 1, 8, 8)
    assert approve_folding(net, x)
    for dtype in (torch.bfloat16, torch.float16):
        with folded(net): high = {m: m.forward.keywords for m in net.modules() if "forward" in vars(m) and hasattr(m.forward, "keywords")}
        with torch.autocast("cpu", dtype), folded(net):
            assert {t.dtype for m in high for t in m.forward.keywords.values()} == {dtype}
            got = net(x)
            for m, fp32 in high.items(): m.forward = partial(m._conv_forward, **fp32)
            assert got.dtype == dtype and torch.equal(got, net(x))


def test_an_attack_folds_in_eval_mode_only_and_with_the_weights_it_meets():
    net, x, y = NarrowResNet(width_factor=4).build(10, 1).eval(), numbers(6, 1, 8, 8), labels(6, 10)
    read = []
    assert approve_folding(net, x)
    net.body[2].register_forward_pre_hook(lambda m, args: read.append("forward" in vars(net.body[1])))   # the ReLU behind the batch norm
    PGD(0.01, 3)(net, x, y, 0.1, noise(6))
    assert read == [True] * 3
    PGD(0.01, 3, mode="train")(net, x, y, 0.1, noise(6))
    assert read[3:] == [False] * 3
    before = PGD(0.01, 3)(net, x, y, 0.1, noise(6))
    with torch.no_grad(): net.body[0].weight.neg_()
    assert not torch.equal(PGD(0.01, 3)(net, x, y, 0.1, noise(6)), before)
