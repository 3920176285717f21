"The names of `adaptive_at` itself: each from one module, whatever was imported before, and nothing loaded for the rest."
import json
import pkgutil
import subprocess
import sys

import adaptive_at
from adaptive_at import __all__ as NAMES

HEAVY = ("torch", "numpy", "pandas", "matplotlib", "IPython", "nbdev")


def printed(code): return json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def test_importing_the_package_loads_nothing():
    assert printed(f"import json, sys, adaptive_at; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))") == []


def test_public_names_are_the_same_things_in_both_orders():
    "Asked for in a fresh process, and after every module was imported; what a package holds by a sub-module's name would else be the module."
    everything = "import pkgutil\nfor m in pkgutil.walk_packages(adaptive_at.__path__, 'adaptive_at.'):\n    if not m.name.endswith('__main__'): importlib.import_module(m.name)\n"
    ask = "print(json.dumps({n: f'{v.__module__}.{v.__qualname__}' for n in adaptive_at.__all__ for v in [getattr(adaptive_at, n)]}))"
    begin = "import adaptive_at, importlib, json\n"
    first, last = printed(begin + ask), printed(begin + everything + ask)
    assert first == last and first.keys() == set(NAMES)
    assert all(place.startswith("adaptive_at.") and place.endswith(f".{name}") for name, place in first.items())


def test_no_public_name_is_a_module():
    modules = {m.name.rpartition(".")[2]: m.name for m in pkgutil.iter_modules(adaptive_at.__path__)}
    assert len(modules) > 15 and not modules.keys() & set(NAMES)
    assert {"PGD", "at", "daat", "trades", "Fixed", "DAAT", "train", "evaluate"} <= set(NAMES) and len(NAMES) == len(set(NAMES))


def test_a_name_that_is_not_there_is_an_attribute_error():
    assert not hasattr(adaptive_at, "digest") and "daat" in dir(adaptive_at)
