"Damage a file of a store, run the table again, and compare: recovered, or one sentence that says what to do, never another number."
import contextlib
import os
import random
import re
import shutil
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from adaptive_at.base.errors import UserError
from adaptive_at.store.audit import damages, stored

from .bench import Kill, Process, contents, differences, reference, table_of

FAULTS = ["truncate", "flip", "delete", "empty", "swap"]
FINISHED = ["spec.json", "history.csv", "last.pt", "previous.pt", "best.pt", "radius.npz", "evals/clean-*.json", "evals/whitebox-*.json", "table1_daat/quick/table.csv"]
BEGUN = ["spec.json", "history.csv", "last.pt", "previous.pt", "best.pt", "within.pt"]
ATTACKED = ["evals/*.part.json"]
CASES = [(state, name, fault) for state, names in (("finished", FINISHED), ("begun", BEGUN), ("attacked", ATTACKED)) for name in names for fault in FAULTS]
METHOD, OTHER = "DAAT", "CAT"


@dataclass
class Damages:
    "What came of it."
    outcomes: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __str__(self):
        n = sum(self.outcomes.values()) + len(self.wrong)
        return f"{n} damaged files ({', '.join(f'{n} {k}' for k, n in self.outcomes.most_common())}): {len(self.wrong)} wrong numbers or tracebacks" + "".join(f"\n  {text}" for text in self.wrong)


def spoil(path: Path, fault: str, other: Path, rng: random.Random) -> None:
    "Do it."
    content = bytearray(path.read_bytes())
    if fault == "truncate": path.write_bytes(content[:rng.randrange(1, len(content))])
    if fault == "empty": path.write_bytes(b"")
    if fault == "delete": path.unlink()
    if fault == "swap": shutil.copy(other, path)
    if fault == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)


def one(folder: Path, name: str) -> Path:
    "The file of this name, of the method that was damaged (the bank of which moves: it is a DAAT)."
    found = [p for p in (folder.glob(name) if "/quick/" in name else folder.glob(f"runs/*daat*/{name}"))]
    assert found, f"{name} is not in {folder}"
    return sorted(found)[0]


class Bases:
    "Stores to damage copies of: finished, begun (killed inside an epoch), and attacked (killed inside AutoAttack)."
    def __init__(self, folder: Path):
        self.folder, self.expected = folder, reference(METHOD, folder/"finished")
        self.other = reference(OTHER, folder/"other")
        self.logs = folder/"log"
        for n in range(1, self.expected.files):   # the first kill that leaves all that is to be damaged
            if not (folder/"begun").exists() and self._leaves("begun", n, BEGUN): continue
            if (folder/"begun").exists() and self._leaves("attacked", n, ATTACKED): break

    def _leaves(self, name: str, n: int, files: list[str]) -> bool:
        outputs = self.folder/"trial"
        shutil.rmtree(outputs, ignore_errors=True)
        Process(self.logs, table_of(outputs, METHOD), Kill("after", n)).wait()
        if not all(list(outputs.glob(f"runs/*daat*/{f}")) for f in files): return False
        outputs.rename(self.folder/name)
        return True

    def swapped(self, state: str, path: Path, name: str) -> Path:
        "A file of the same kind that is not this one."
        if name == "within.pt": return path.with_name("last.pt")
        if name.startswith("evals/"): return next(p for p in sorted((self.folder/"finished").glob("runs/*daat*/evals/*.json")) if p.name != path.name)
        return one(self.other.folder, name) if "/quick/" in name else next(self.other.folder.glob(f"runs/*-cat-*/{name}"))


def again(outputs: Path, what: Path, said: list[str]) -> str:
    "Run the table, doing what its sentences say; the outcome, or what was wrong."
    for _ in range(3):
        try:
            with contextlib.redirect_stdout(Said(said)): table_of(outputs, METHOD)()
            return ""
        except UserError as e:
            text = str(e)
            said.append(text)
            if "\n" in text or "Traceback" in text or what.name not in text: return f"no good sentence: {text}"
            if "delete it" in text: what.unlink()
            elif "run the same command again" not in text: return f"no way out: {text}"
        except Exception: return f"a traceback:\n{traceback.format_exc()}"
    return f"the sentences do not end: {said}"


class Said:
    "Where printed lines go."
    def __init__(self, lines): self.lines = lines
    def write(self, text): self.lines += [line for line in text.splitlines() if line]
    def flush(self): pass


def damaged(bases: Bases, state: str, name: str, fault: str, outputs: Path, rng: random.Random) -> tuple[str, str]:
    "Damage one file; the outcome, and what was wrong with it."
    shutil.copytree(bases.folder/state, outputs)
    path, said = one(outputs, name), []
    other = bases.swapped(state, path, name)
    if name in ("last.pt", "best.pt") and state == "finished":
        for p in outputs.glob("runs/*daat*/evals/*"): p.unlink()   # so that the weights are needed again
    spoil(path, fault, other, rng)
    touched = path.read_bytes() if path.exists() else None
    if name == "radius.npz":   # only figures read it
        from adaptive_at.store.runs import Store
        from .bench import FAULTY, parameters
        from adaptive_at.tables.parameters import check_parameters
        from adaptive_at.tables.plan import Plan, open_session
        with contextlib.redirect_stdout(Said([])): run = Plan(FAULTY, open_session(check_parameters("table1_daat", parameters(outputs, METHOD)))).blocks[0].runs[METHOD][0]
        try: Store(outputs/"runs").radius(run)
        except UserError as e: said.append(str(e))
        else: return "", "a damaged bank was read"
    if wrong := again(outputs, path, said): return "", wrong
    found, expected = contents_but(outputs, path), dict(bases.expected.contents)
    same = path.exists() and path.read_bytes() == touched or touched is None and not path.exists()
    if same and (name in ("previous.pt", "best.pt", "last.pt")):   # nothing needed it; verification must name it, or it is gone
        expected.pop(path.relative_to(outputs).as_posix())
        found.pop(path.relative_to(outputs).as_posix(), None)
        if touched is not None and not any(path.name in text for text in damages(stored(path.parent))): return "", f"verification does not name it: {damages(stored(path.parent))}"
    if different := differences(found, expected): return "", f"{'; '.join(different)} (said: {said[-3:]})"
    sentences = [text for text in said if re.search(r"delete it|run the same command again", text)]
    return ("left aside, and named by verification" if same and name == "previous.pt" else "recovered after one sentence" if sentences else "recovered"), ""


def contents_but(outputs: Path, path: Path) -> dict:
    "All that can be read; a checkpoint that is still damaged cannot."
    try: return contents(outputs)
    except Exception:
        aside = path.with_suffix(".unread")
        os.rename(path, aside)
        try: return contents(outputs)
        finally: os.rename(aside, path)


def campaign(folder: Path, cases=CASES, seed=0, report_line=lambda line: None, bases: Bases|None = None) -> Damages:
    "Every case once, the places of flips and cuts at random."
    rng, result, bases = random.Random(seed), Damages(), bases or Bases(folder)
    for i, (state, name, fault) in enumerate(cases):
        outcome, wrong = damaged(bases, state, name, fault, folder/f"case {i}", rng)
        if wrong: result.wrong.append(f"{fault} {name} of a {state} store: {wrong}")
        else: result.outcomes[outcome] += 1
        shutil.rmtree(folder/f"case {i}")
        report_line(f"{i + 1:>3}  {fault} {name} ({state}): {wrong or outcome}")
    return result
