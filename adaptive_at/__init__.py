"""Adaptive adversarial training: `from adaptive_at import PGD, at, daat, train, scored, ...`.

Each name is imported from its module when it is first asked for, so that `import adaptive_at` loads nothing.
"""
__version__ = "0.1.0"

from importlib import import_module as _import_module

_PUBLIC = {   # module -> its names that are public here
    'base.errors': 'UserError',
    'base.schedules': 'Milestones Ramp',
    'data.datasets': 'Augment Dataset Split load',
    'networks': 'Classifier IAATWideResNet MNISTCNN NarrowResNet Network PreActResNet18 ResNet18 ResNet34 ResNet50 VGG16 WideResNet',
    'attacks': 'CleanStart CrossEntropy FGSM FriendlyPGD KL Margin NormalStart PGD UniformStart',
    'deepfool': 'DeepFool',
    'radius': 'Bank DAAT Fixed LinearDAAT PiecewiseDAAT RadiusRule RuleContext',
    'objectives': 'AdversarialCE MART TRADES',
    'awp': 'AWP',
    'algorithms.baselines': 'Method OneCycle Training at fat mart natural trades',
    'algorithms.daat': 'daat',
    'algorithms.saat': 'StrengthAdaptivePGD rice_at rice_trades saat saat_down saat_up satrades_up',
    'algorithms.iaat': 'IAAT iaat iaat_baseline mixup_at',
    'algorithms.cat': 'CAT adp_adv adv_ls cat',
    'algorithms.dra': 'DRA dra_finetune madry_dra pgd_finetune trades_dra',
    'training': 'Monitor Run State train train_step',
    'evaluation': 'AutoAttack Clean Transfer WhiteBox evaluate',
    'pretrained': 'plain scored',
    'store.runs': 'Store',
}
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names.split()}
__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str):
    if name not in _HOMES: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = globals()[name] = getattr(_import_module(f'{__name__}.{_HOMES[name]}'), name)
    return value


def __dir__() -> list[str]: return sorted({*globals(), *__all__})
