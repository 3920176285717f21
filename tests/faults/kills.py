"Kill a table's process again and again, let it finish, and compare."
import random
from collections import Counter
from dataclasses import dataclass, field

from .bench import COLUMNS, METHODS, Process, contents, differences, drawn, reference, table_of

HOW = ["time", "before", "time", "torn", "time", "after", "table"]


@dataclass
class Kills:
    "What came of it."
    phases: Counter = field(default_factory=Counter)    # kills, by what was being done
    how: Counter = field(default_factory=Counter)
    methods: Counter = field(default_factory=Counter)
    stores: int = 0                                     # that were killed in, and then finished
    wrong: list[str] = field(default_factory=list)

    @property
    def landed(self): return sum(self.phases.values())

    def __str__(self):
        told = lambda counter: ", ".join(f"{n} {k}" for k, n in counter.most_common())
        same = self.landed if not self.wrong else f"fewer than {self.landed}"
        return (f"{self.landed} kills in {self.stores} stores ({told(self.phases)}; {told(self.how)}; {told(self.methods)}): {same} of {self.landed} ended identical to the undisturbed run"
                + "".join(f"\n  {text}" for text in self.wrong))


def campaign(folder, kills, seed=0, methods=METHODS, report_line=lambda line: None):
    "Kill `kills` processes, one to three in each store, each at a random moment; the methods take turns."
    rng, result, expected = random.Random(seed), Kills(), {}
    while result.landed < kills and result.stores < 3 * kills:
        method = methods[result.stores % len(methods)]
        if method not in expected: expected[method] = reference(method, folder/f"reference {len(expected)}")
        outputs, log = folder/f"store {result.stores}", folder/f"{result.stores}.log"
        told = []
        for _ in range(min(rng.randint(1, 3), kills - result.landed)):
            how = HOW[result.landed % len(HOW)]
            kill = drawn(rng, how, expected[method])
            process = Process(log, table_of(outputs, method), kill)
            code = process.wait()
            if code == -9:
                result.phases[process.doing] += 1
                result.how[how] += 1
                result.methods[method] += 1
                told.append(f"{kill.how} {kill.when:.3g} while {process.doing}")
            elif code != 0: result.wrong.append(f"{method}: exit code {code} after {told}:\n{log.read_text()}")
        code = Process(log, table_of(outputs, method)).wait()
        result.stores += 1
        if code != 0: result.wrong.append(f"{method}: exit code {code} after {told}:\n{log.read_text()}")
        elif different := differences(contents(outputs), expected[method].contents): result.wrong.append(f"{method}, killed {told}: {'; '.join(different)}")
        report_line(f"{result.landed:>3} kills  {method}: {'; '.join(told) or 'none landed'}")
    return result


def shared(folder, processes=4, methods=METHODS, called=None):
    "Run one table in several processes at once on an empty store, all with the process id `called` as in containers: what was wrong, and what was worked on how often."
    logs = [folder/f"{i}.log" for i in range(processes)]
    begun = [Process(log, table_of(folder/"outputs", *methods), called=called) for log in logs]
    codes = [p.wait(600) for p in begun]
    said = "".join(log.read_text() for log in logs)
    worked = Counter(line for line in said.splitlines() if line.startswith("working: "))
    trained = {log.name: log.read_text().count("working: train") for log in logs}
    wrong = [f"exit codes {codes}\n{said}"] * any(codes) + [f"{line}: {n} times" for line, n in worked.items() if n > 1]
    runs, evaluations = (sum(line.startswith(f"working: {what}") for line in worked) for what in ("train", "evaluate"))
    expected = (len(methods) + 1, len(methods) * len(COLUMNS))
    if (runs, evaluations) != expected: wrong.append(f"{runs} runs and {evaluations} evaluations instead of {expected[0]} and {expected[1]}")
    return wrong, f"{processes} processes{' with one process id' if called else ''} on an empty store trained {runs} runs ({', '.join(str(n) for n in trained.values())}) and made {evaluations} evaluations, each once"
