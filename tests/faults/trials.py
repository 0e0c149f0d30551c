"""Runs that are hit, what came of them, and the table of it at the end."""

import subprocess
import time
from collections import Counter, defaultdict
from contextlib import contextmanager

import pytest
import short_runs
import workers

HERE = "tests/faults/"
TALLY = defaultdict(lambda: [0, 0])  # kind of fault -> tried, survived


@contextmanager
def trial(kind):
    """One fault; it is survived when the block ends."""
    TALLY[kind][0] += 1
    yield
    TALLY[kind][1] += 1


def add(tally):
    for kind, counts in tally.items():
        TALLY[kind] = [a + b for a, b in zip(TALLY[kind], counts, strict=True)]


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several processes, which print nothing themselves
        session.config.workeroutput["faults"] = dict(TALLY)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    add(getattr(node, "workeroutput", {}).get("faults", {}))


def table(tally, skipped):
    """Its lines. skipped: why, of each test that was; a fault that could not be tried is none that was survived."""
    lines = [f"{'fault':<44}{'tried':>7}{'survived':>10}{'lost':>6}"]
    total = ("all", [sum(counts) for counts in zip(*tally.values(), strict=True)] or [0, 0])
    for kind, (tried, survived) in [*sorted(tally.items()), total]:
        lines.append(f"{kind:<44}{tried:>7}{survived:>10}{tried - survived:>6}")
    return lines + [f"skipped {n}: {reason}" for reason, n in sorted(Counter(skipped).items())]


def pytest_terminal_summary(terminalreporter):
    skips = [report for report in terminalreporter.stats.get("skipped", []) if report.nodeid.startswith(HERE)]
    skipped = [report.longrepr[2].removeprefix("Skipped: ") for report in skips]
    if TALLY or skipped:
        for line in ["", *table(TALLY, skipped)]:
            terminalreporter.write_line(line)


class Campaign:
    """The forge, what runs start from, and what they end in when nothing happens to them."""

    def __init__(self, folder):
        self.forge, self.folder = workers.forge(), folder
        self.start = short_runs.prepare(folder)
        self.references, self.logs = {}, 0

    def script(self, recipe):
        return "train_reward" if recipe == "reward_stage" else "train_ppo"

    def stage(self, recipe, where):
        return where / "run" / ("reward" if recipe == "reward_stage" else recipe)

    def begin(self, recipe, where, fault=None, **env):
        where.mkdir(parents=True, exist_ok=True)
        argv = short_runs.argv(self.start, recipe, where)
        return self.forge.start(self.script(recipe), argv, self.new_log(), fault, **env)

    def run(self, recipe, where, fault=None, more=(), **env):
        """A run to its end: exit code, and what it said."""
        argv = [*short_runs.argv(self.start, recipe, where), *more]
        return self.forge.run(self.script(recipe), argv, self.new_log(), fault, **env)

    def new_log(self):
        """A fresh one for each run, not where the run writes."""
        self.logs += 1
        return self.folder / f"log_{self.logs}"

    def finish(self, recipe, where, expected=None):
        """Run it again: it goes on to the end, which is the same as if nothing had been. Returns what it said."""
        code, said = self.run(recipe, where)
        assert code == 0, said[-3000:]
        found, expected = short_runs.results(self.stage(recipe, where)), expected or self.reference(recipe)["results"]
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name] == expected[name], name
        return said

    def reference(self, recipe):
        """Results of a run that nothing happened to, its seconds, and the path of each change to a file."""
        if recipe not in self.references:
            where, tell = self.folder / f"reference_{recipe}", self.folder / f"changes_{recipe}"
            if not self.references:
                self.run(recipe, self.folder / "warm")  # the first run of a forge is slower
            begun = time.monotonic()
            code, said = self.run(recipe, where, {"changes_of": str(where), "tell": str(tell)})
            seconds = time.monotonic() - begun
            assert code == 0, said[-3000:]
            results = short_runs.results(self.stage(recipe, where))
            assert len(results["metrics.jsonl"]) >= short_runs.STEPS
            assert len(results["events"]) >= short_runs.STEPS
            self.references[recipe] = {"results": results, "seconds": seconds, "changes": tell.read_text().split("\n")}
        return self.references[recipe]


@pytest.fixture(scope="session")
def campaign(tmp_path_factory):
    return Campaign(tmp_path_factory.mktemp("faults"))


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, mounted by calling it with options such as size=6m."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)
