"Networks whose accuracy flatters, and sound ones, on the digits: for the tests of what is measured beside an accuracy."
import functools

import torch
import torch.nn.functional as F
from torch import nn

from adaptive_at.data import datasets as ds
from adaptive_at.attacks import KL, PGD
from adaptive_at.networks import NarrowResNet
from helpers import digits, seeded

EPS = 0.12


def fitted(make, attack=None, epochs=12, seed=0, rate=0.01):
    "A network trained on 600 digits with Adam; in eval mode."
    def train():
        model, data = make(), digits().train
        x, y = ds.to_unit(data.x[:600]), data.y[:600]
        optimiser = torch.optim.Adam(model.parameters(), rate)
        for epoch in range(epochs):
            model.train()
            for part in torch.randperm(len(y)).split(100):
                x_in = attack(model, x[part], y[part], EPS) if attack else x[part]
                optimiser.zero_grad()
                F.cross_entropy(model(x_in), y[part]).backward()
                optimiser.step()
        return model.eval()
    return seeded(seed, train)


def convolutional(): return nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
def dense(act=nn.ReLU): return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), act(), nn.Linear(64, 64), act(), nn.Linear(64, 10))
def dropping(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10))


@functools.cache
def natural(): return fitted(convolutional)
@functools.cache
def robust(): return fitted(convolutional, PGD(EPS / 4, 5), epochs=20)


# Masked: what stands between the images and a network, or between a network and its logits

class Function(nn.Module):
    "A function as a layer."
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, x): return self.f(x)


def before(f, model=natural): return nn.Sequential(Function(f), model()).eval()
def after(f, model=natural): return nn.Sequential(model(), Function(f)).eval()


class Backward(torch.autograd.Function):
    "The identity with a gradient of its own."
    @staticmethod
    def forward(ctx, x, f):
        ctx.f, ctx.x = f, x
        return x.clone()
    @staticmethod
    def backward(ctx, grad): return ctx.f(grad, ctx.x), None


class Dropping(nn.Module):
    "Dropout that eval mode does not stop."
    def __init__(self): super().__init__(); self.net = fitted(dropping)
    def forward(self, x):
        for layer in self.net: x = F.dropout(x, 0.5, training=True) if isinstance(layer, nn.Dropout) else layer(x)
        return x


class OfTheBatch(nn.Module):
    "Batch norm that eval mode does not stop: the images of a batch hide each other."
    def __init__(self): super().__init__(); self.net = natural()
    def forward(self, x):
        for layer in self.net: x = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True) if isinstance(layer, nn.BatchNorm2d) else layer(x)
        return x


class Apart(nn.Module):
    "Two networks; the louder one gives no gradient."
    def __init__(self): super().__init__(); self.heard, self.silent = fitted(dense), natural()
    def forward(self, x): return 0.2 * self.heard(x) + self.silent(x.detach())


def two_faced(z): return z if torch.is_grad_enabled() else z.flip(1).flip(1) + 2 * z.roll(1, 1)


MASKED = {
    "rounded images": lambda: before(lambda x: (x * 6).round() / 6),
    "rounded features": lambda: nn.Sequential(natural()[:3], Function(lambda h: (h * 4).floor() / 4), natural()[3:]).eval(),
    "probabilities, saturated": lambda: after(lambda z: (20 * z).softmax(1)),
    "logits x 1e4": lambda: after(lambda z: 1e4 * z),
    "logits x 30": lambda: after(lambda z: 30 * z),
    "noisy images": lambda: before(lambda x: x + 0.3 * torch.randn_like(x)),
    "noisy logits": lambda: after(lambda z: z + 3 * torch.randn_like(z)),
    "gradient is no number": lambda: before(lambda x: x + 0 * (x - x).abs().sqrt()),
    "gradient is no number in a third of the images": lambda: before(lambda x: torch.where((x.sum((1, 2, 3)) % 1 < 0.33).view(-1, 1, 1, 1), x + 0 * (x - x).abs().sqrt(), x)),
    "logits are no numbers": lambda: after(lambda z: z / (0 * z)),
    "dropout in eval mode": Dropping,
    "batch norm of the batch": OfTheBatch,
    "gradient reversed": lambda: before(lambda x: Backward.apply(x, lambda g, x: -g)),
    "louder half detached": Apart,
    "soft thresholds": lambda: before(lambda x: (200 * (x * 4 - (x * 4).floor() - 0.5)).sigmoid() / 4 + (x * 4).floor() / 4),
    "one answer for gradients, another without": lambda: after(two_faced),
    "logits x 0.01": lambda: after(lambda z: 0.01 * z, robust),   # cross-entropy on a flat softmax points away from the class, and nowhere: 87% stand, and 73% under the margin
    "forward without gradient": lambda: before(lambda x: x.detach()),
    "normalised twice": lambda: before(lambda x: (x / 255 - 0.3) / 0.4),
}

SOUND = {
    "natural": natural,
    "robust": robust,
    "natural, dense": lambda: fitted(dense),
    "robust, dense": lambda: fitted(dense, PGD(EPS / 4, 5), epochs=20),
    "natural, long": lambda: fitted(convolutional, epochs=60),
    "natural, residual": lambda: fitted(lambda: NarrowResNet(width_factor=4).build(10, 1)),
    "robust, residual": lambda: fitted(lambda: NarrowResNet(width_factor=4).build(10, 1), PGD(EPS / 4, 5)),
    "smooth, robust": lambda: fitted(lambda: dense(nn.Tanh), PGD(EPS / 4, 5)),
    "logits x 5": lambda: after(lambda z: 5 * z, robust),
    "rounded, gradient straight through": lambda: before(lambda x: x + ((x * 16).round() / 16 - x).detach(), robust),
    "dropout stopped": lambda: fitted(dropping),
    "probabilities": lambda: after(lambda z: z.softmax(1), robust),
}


# Not looked at while the limits were chosen; see test_masking

class FromTheImage(nn.Module):
    "Adds noise whose seed is the image: the same whenever it is asked."
    def __init__(self): super().__init__(); self.net = natural()
    def forward(self, x):
        with torch.no_grad(): noise = ((1e4 * x).sin() * 43758.5453).remainder(1) - 0.5
        return self.net(x + 0.6 * noise)


def shifted(x): return x.roll(tuple(int(torch.randint(-1, 2, ())) for _ in range(2)), (2, 3))
def off_the_grid(grad, x): return torch.where((x * 16 - (x * 16).round()).abs() > 0.05, torch.nan, grad)


def trades(make, epochs=12):
    "Trained on KL between clean and attacked predictions as well."
    def train():
        model, data = make(), digits().train
        x, y = ds.to_unit(data.x[:600]), data.y[:600]
        optimiser = torch.optim.Adam(model.parameters(), 0.01)
        for epoch in range(epochs):
            model.train()
            for part in torch.randperm(len(y)).split(100):
                x_adv = PGD(EPS / 4, 5, KL())(model, x[part], y[part], EPS)
                optimiser.zero_grad()
                z = model(x[part])
                (F.cross_entropy(z, y[part]) + 3 * KL()(model(x_adv), z.softmax(1)).mean()).backward()
                optimiser.step()
        return model.eval()
    return seeded(3, train)


class Ensemble(nn.Module):
    def __init__(self, *nets): super().__init__(); self.nets = nn.ModuleList(nets)
    def forward(self, x): return torch.stack([net(x) for net in self.nets]).mean(0)


class InDouble(nn.Module):
    "Computes in float64."
    def __init__(self): super().__init__(); self.net = fitted(dense, PGD(EPS / 4, 5), seed=5).double()
    def forward(self, x): return self.net(x.double()).float()


def modern(): return nn.Sequential(nn.Conv2d(1, 24, 3, 1, 1), nn.GroupNorm(4, 24), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(24, 32, 3, 1, 1), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


LATER_MASKED = {
    "noise seeded by the image": FromTheImage,
    "shifted at random": lambda: before(shifted),
    "signs of features": lambda: nn.Sequential(natural()[:1], Function(torch.sign), natural()[1:]).eval(),
    "gradient drawn at random": lambda: before(lambda x: Backward.apply(x, lambda g, x: torch.randn_like(g))),
    "logits through tanh": lambda: after(lambda z: 10 * (3 * z).tanh()),
    "gradient is no number off the grid": lambda: before(lambda x: Backward.apply(x, off_the_grid)),
}

LATER_SOUND = {
    "TRADES": lambda: trades(convolutional),
    "TRADES, residual": lambda: trades(lambda: NarrowResNet(width_factor=4).build(10, 1)),
    "linear": lambda: fitted(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), seed=1),
    "modern": lambda: fitted(modern, epochs=30, seed=2, rate=0.005),
    "modern, robust": lambda: fitted(modern, PGD(EPS / 4, 5), epochs=20, seed=2, rate=0.005),
    "ensemble": lambda: Ensemble(robust(), fitted(dense, PGD(EPS / 4, 5), seed=4)).eval(),
    "in float64": InDouble,
    "log-probabilities": lambda: after(lambda z: z.log_softmax(1), natural),
    "trained with FGSM": lambda: fitted(convolutional, PGD(EPS, 1), epochs=15, seed=6),
    "sigmoids, natural": lambda: fitted(lambda: dense(nn.Sigmoid), epochs=40, seed=7),
}
