"Networks whose accuracy flatters, and sound ones, on the digits: for the tests of what is measured beside an accuracy."
import functools

import torch
import torch.nn.functional as F
from torch import nn

from adaptive_at import datasets as ds
from adaptive_at.attacks import PGD
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
    "logits x 0.01": lambda: after(lambda z: 0.01 * z, robust),
    "rounded, gradient straight through": lambda: before(lambda x: x + ((x * 16).round() / 16 - x).detach(), robust),
    "dropout stopped": lambda: fitted(dropping),
    "probabilities": lambda: after(lambda z: z.softmax(1), robust),
}
