"""Plants single faults in one package and says which of them no test sees.

    python benchmarks/mutants.py dreamreader/store --tests tests/store --faults 60

A fault is a swapped comparison or operator, a constant off by one, a condition turned round, a
statement or an argument left out. The tests run once with coverage, so that a fault first meets
those that reach its line, the quick ones in front; what they let through meets the others too,
as many as --seconds allow.
Faults are planted in copies of the checkout. The choice follows --seed, each file has its share of
them. With --record a stopped run goes on where it was, as long as the package stays as it is.
Some survivors change nothing that could be seen: read each before you write a test. Exit status 1
where fewer than --goal are caught. Needs pytest-cov.
"""

import argparse
import ast
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COMPARED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
COMPUTED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Add,
}
# Calls that only words, types, the pace or what a power cut leaves depend on.
SILENT_CALLS = {"dataclass", "cast", "TypeVar", "warn", "overload", "fsync", "flush", "sleep"}
# Arguments without which, or with others, a call mostly does the same.
SILENT_ARGUMENTS = {"dtype", "device", "strict", "exist_ok", "parents", "encoding", "stacklevel"}
SILENT_ARGUMENTS |= {"timeout", "kw_only", "maxsize", "missing_ok", "ignore_errors", "repr"}
SIZE = 256  # of buffers, caches and chunks, where one more is as good
# What every test imports, once for all of them.
PRELOADED = ["torch", "diffusers", "transformers", "pytest", "numpy", "pyarrow", "safetensors"]

NO_TESTS = 5  # pytest's exit status
TIME_OVER = (signal.SIGALRM, signal.SIGPROF)
PRELOADED_ALREADY = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]


@dataclass(frozen=True)
class Fault:
    """One change of one file."""

    file: str  # below the root
    statement: int  # line
    line: int
    column: int
    last: int
    was: str
    now: str
    source: str  # of the whole file with the fault

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.was} -> {self.now}"


class Planter(ast.NodeVisitor):
    """Walks a module, and makes one fault of every place that has one."""

    def __init__(self, file: str, source: str):
        self.file, self.code = file, source.encode()
        self.starts = [0]
        for line in self.code.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.faults: list[Fault] = []
        self.statement = 1

    def visit(self, node: ast.AST) -> None:
        if is_silent(node):
            return
        outer = self.statement
        if isinstance(node, ast.stmt):
            self.statement = node.lineno
        for place, now in changed(node):
            self._plant(place, now)
        for child in children(node):
            self.visit(child)
        self.statement = outer

    def _plant(self, node: Any, now: str) -> None:
        first = self.starts[node.lineno - 1] + node.col_offset
        last = self.starts[node.end_lineno - 1] + node.end_col_offset
        was = self.code[first:last].decode()
        source = (self.code[:first] + now.encode() + self.code[last:]).decode()
        lines = (self.statement, node.lineno, node.col_offset, node.end_lineno)
        self.faults.append(Fault(self.file, *lines, was, now, source))


def is_silent(node: ast.AST) -> bool:
    """Whether only words, types or a class's shape depend on the code of a node."""
    match node:
        case ast.Raise() | ast.Assert() | ast.JoinedStr() | ast.Import() | ast.ImportFrom():
            return True  # the condition above a raise is turned round instead
        case ast.FunctionDef(name="__repr__") | ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
        case ast.keyword(arg=name):
            return name in SILENT_ARGUMENTS
        case ast.BinOp(op=ast.LShift(), left=ast.Constant()):
            return True  # a size in megabytes
        case ast.Call(func=func):
            return called(func) in SILENT_CALLS
    return False


def children(node: ast.AST) -> Iterator[ast.AST]:
    """What belongs to the running code of a node: no annotations, decorators or docstrings."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params", "bases"):
            continue
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, ast.AST):
                yield each


def changed(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Places in a node, each with code that makes it a fault."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in COMPARED:
            yield node, rewritten(node, ops=[COMPARED[type(op)]()])
        case ast.BinOp(op=op, left=left, right=right) if type(op) in COMPUTED:
            if not (is_text(left) or is_text(right)):
                yield node, rewritten(node, op=COMPUTED[type(op)]())
        case ast.BoolOp(op=op):
            yield node, rewritten(node, op=ast.And() if isinstance(op, ast.Or) else ast.Or())
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield node, ast.unparse(operand)
        case ast.Constant(value=bool(value)):
            yield node, str(not value)
        case ast.Constant(value=int(value)) if abs(value) < SIZE:
            yield node, str(value + 1)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield node, rewritten(node, body=orelse, orelse=body)
        case ast.If(test=test) if is_plain(test):
            yield test, f"(not {ast.unparse(test)})"
        case ast.comprehension(ifs=tests):
            for test in filter(is_plain, tests):
                yield test, f"(not {ast.unparse(test)})"
        case ast.Expr(value=ast.Call(func=func)) if called(func) not in SILENT_CALLS:
            yield node, "pass"
        case ast.AugAssign():
            yield node, "pass"
        case ast.Call(keywords=[*keywords]):
            for keyword in keywords:
                if keyword.arg not in SILENT_ARGUMENTS | {None}:
                    kept = [each for each in keywords if each is not keyword]
                    yield node, rewritten(node, keywords=kept)


def is_plain(test: ast.AST) -> bool:
    """Whether a condition has no part that is turned round by itself."""
    return isinstance(test, (ast.Name, ast.Attribute, ast.Call, ast.Subscript))


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))
    )


def called(func: ast.AST) -> str:
    return getattr(func, "attr", getattr(func, "id", ""))


def rewritten(node: ast.AST, **fields: Any) -> str:
    """A node's code with some of its fields replaced."""
    values = dict(ast.iter_fields(node)) | fields
    return f"({ast.unparse(ast.fix_missing_locations(type(node)(**values)))})"


def faults_of(package: Path) -> list[Fault]:
    """Every fault that could be planted in a package or a file."""
    found = []
    for path in sorted(package.rglob("*.py")) if package.is_dir() else [package]:
        source = path.read_text()
        planter = Planter(str(path.relative_to(ROOT)), source)
        planter.visit(ast.parse(source))
        found += planter.faults
    return found


def choose(faults: list[Fault], seed: int) -> list[Fault]:
    """All faults in a random order, of which any first part has each file's share."""
    draw, files = random.Random(seed), {}
    for fault in faults:
        files.setdefault(fault.file, []).append(fault)
    placed = []
    for each in files.values():
        draw.shuffle(each)
        placed += [((n + draw.random()) / len(each), fault) for n, fault in enumerate(each)]
    return [fault for _, fault in sorted(placed, key=lambda pair: pair[0])]


@dataclass
class Record:
    """What a run has found so far, kept in a file where one is given.

    Attributes:
        package: digest of its sources: another package is another record.
        files: of tests that have run without a fault.
        times: seconds of each test. lines: tests that reach each line of each file.
        outcomes: of each fault that was tried.
    """

    package: str
    files: list[str] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    outcomes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path | None, package: Path) -> "Record":
        sources = sorted(package.rglob("*.py")) if package.is_dir() else [package]
        digest = hashlib.sha256(b"\0".join(each.read_bytes() for each in sources)).hexdigest()
        if file is None or not file.exists():
            return cls(digest)
        found = cls(**json.loads(file.read_text()))
        if found.package != digest:
            sys.exit(f"{file} is of another {package.name}: take another file")
        return found

    def write(self, file: Path | None) -> None:
        if file is not None:
            file.with_suffix(".part").write_text(json.dumps(asdict(self)))
            file.with_suffix(".part").replace(file)


class Times:
    """A pytest plugin that writes the seconds of each test by its name."""

    def __init__(self, file: Path):
        self.file, self.seconds = file, {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration

    def pytest_sessionfinish(self) -> None:
        self.file.write_text(json.dumps(self.seconds))


class Limits:
    """A pytest plugin that keeps the order of tests, and ends one that takes far too long."""

    def __init__(self, seconds: dict[str, float], order: Sequence[str]):
        self.seconds, self.place = seconds, {test: n for n, test in enumerate(order)}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: self.place[item.nodeid])  # the conftest has slow files first

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        most = 30 + 10 * self.seconds.get(nodeid, 0)
        signal.setitimer(signal.ITIMER_PROF, most)  # of the processor: others may keep it busy
        signal.alarm(round(8 * most))  # of one that waits


def run_pytest(there: Path, arguments: Sequence[str], plugin: Any) -> None:
    """Runs tests in a copy; the process ends with pytest's exit status."""
    import pytest

    os.setsid()  # so that what the tests start can be killed with them
    os.chdir(there)
    log = os.open("pytest.log", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    for stream in range(3):
        os.dup2(log, stream)
    # A fault of the same length and second as the one before would not be compiled anew.
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(there), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.path = [
        str(there),
        *(each for each in sys.path if ROOT not in (Path(each), *Path(each).parents)),
    ]
    status = pytest.main(
        ["-q", "-x", "-p", "no:cacheprovider", *PRELOADED_ALREADY, *arguments],
        plugins=[] if plugin is None else [plugin],
    )
    os._exit(int(status))


class Bench:
    """Copies of the checkout in which tests run."""

    def __init__(self, folder: Path, package: str, record: Record):
        self.folder, self.package, self.record = folder, package, record
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(PRELOADED)

    def copy(self, name: str) -> Path:
        """A copy of what git knows and of the native module."""
        there = self.folder / name
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        for each in [*listed, *(str(p.relative_to(ROOT)) for p in ROOT.glob("dreamreader/_C*"))]:
            if (ROOT / each).is_file() and not each.startswith("benchmarks/results"):
                (there / each).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / each, there / each)
        return there

    def pytest(self, there: Path, *arguments: str, plugin: Any = None) -> int:
        """Exit status of tests in a copy; below 0 where a signal ended them."""
        process = self.processes.Process(target=run_pytest, args=(there, arguments, plugin))
        process.start()
        process.join()
        try:
            os.killpg(process.pid or 0, signal.SIGKILL)
        except ProcessLookupError:
            pass
        return process.exitcode or 0

    def reach(self, there: Path, tests: Path) -> None:
        """Finds which tests of a file reach each line, and the seconds of each test."""
        times, data = self.folder / "times.json", there / ".coverage"
        folder = self.package if (ROOT / self.package).is_dir() else Path(self.package).parent
        coverage = [f"--cov={folder}", "--cov-context=test", "--cov-report="]
        data.unlink(missing_ok=True)
        status = self.pytest(there, str(tests), *coverage, plugin=Times(times))
        found = json.loads(times.read_text())
        if status not in (0, NO_TESTS):
            sys.exit(f"{tests} fails without a fault (exit status {status})")
        # A name that pytest would not find again would count as caught, whatever the fault.
        names = self.listed(there, list(found))
        if found and self.pytest(there, "--collect-only", names) != 0:
            sys.exit(f"pytest does not find the tests of {tests} by name: are some of them random?")
        self.record.files.append(str(tests))
        self.record.times |= found
        read = coverage_data(data)
        for file in read.measured_files():
            lines = self.record.lines.setdefault(str(Path(file).relative_to(there)), {})
            for line, contexts in read.contexts_by_lineno(file).items():
                names = set().union(*(reached_by(each, found) for each in contexts))
                lines[str(line)] = sorted({*lines.get(str(line), ()), *names})

    def listed(self, there: Path, tests: Sequence[str]) -> str:
        """An argument that stands for many tests."""
        (there / "chosen-tests.txt").write_text("\n".join(tests))
        return f"@{there / 'chosen-tests.txt'}"

    def chosen(self, fault: Fault) -> tuple[list[str], list[str]]:
        """Tests that reach a fault, and all others."""
        lines, times = self.record.lines.get(fault.file, {}), self.record.times
        names: set[str] = set()
        for first in (fault.line, fault.statement):
            names = names or set().union(
                *(lines.get(str(n), ()) for n in range(first, fault.last + 1))
            )
        rest = times.keys() - names
        return self.ordered(names & times.keys()), self.ordered(rest)

    def ordered(self, tests: Set[str]) -> list[str]:
        """Tests with the quick files in front: what a file's tests share is made once."""
        times, files = self.record.times, dict.fromkeys(map(file_of, tests), 0.0)
        for test in tests:
            files[file_of(test)] += times[test]
        return sorted(tests, key=lambda test: (files[file_of(test)], file_of(test), times[test]))

    def try_fault(self, there: Path, fault: Fault, others: float) -> str:
        """What becomes of a fault: "caught", "too slow" or "SURVIVED"."""
        target = there / fault.file
        before = target.read_text()
        target.write_text(fault.source)
        try:
            reaching, rest = self.chosen(fault)
            spent = accumulate(map(self.record.times.__getitem__, rest))
            rest = [test for test, at in zip(rest, spent, strict=True) if at <= others]
            for tests in filter(None, (reaching, rest)):
                limits = Limits(self.record.times, tests)
                status = self.pytest(there, self.listed(there, tests), plugin=limits)
                if status != 0:
                    return "too slow" if -status in TIME_OVER else "caught"
            return "SURVIVED"
        finally:
            target.write_text(before)


def file_of(test: str) -> str:
    return test.partition("::")[0]


def reached_by(context: str, tests: dict[str, float]) -> set[str]:
    """Tests of a file that a context of coverage stands for."""
    name, _, phase = context.partition("|")
    if phase == "setup":  # what a fixture makes may be looked at by any test of the file
        return set(tests)
    return {name} & set(tests)


def coverage_data(file: Path) -> Any:
    """What coverage has written into a file; nothing where no line was reached."""
    from coverage import CoverageData

    data = CoverageData(str(file))
    data.read()
    return data


def list_tests(given: list[str]) -> list[Path]:
    """Files of tests in folders."""
    paths = [ROOT / each for each in given]
    files = [f for path in paths for f in (sorted(path.rglob("test_*.py")) or [path])]
    return [file.relative_to(ROOT) for file in files]


def main() -> int:
    options = parse()
    begun, package = time.monotonic(), (ROOT / options.package).resolve()
    record = Record.read(options.record, package)
    every = faults_of(package)
    faults, writing = choose(every, options.seed)[: options.faults], threading.Lock()

    def late() -> bool:
        return time.monotonic() - begun > 60 * options.minutes

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.package, record)
        there = bench.copy("copy-0")
        for file in list_tests(options.tests):
            if str(file) not in record.files and not late():
                bench.reach(there, file)
                record.write(options.record)
        print(f"{sum(record.times.values()):.0f} s of tests, {len(every)} faults", flush=True)

        def work(number: int) -> None:
            there = bench.copy(f"copy-{number}")
            for fault in faults[number :: options.processes]:
                if str(fault) not in record.outcomes and not late():
                    outcome = bench.try_fault(there, fault, options.seconds)
                    with writing:
                        record.outcomes[str(fault)] = outcome
                        record.write(options.record)
                    print(f"{outcome:8} {fault}", flush=True)

        with ThreadPoolExecutor(options.processes) as pool:
            list(pool.map(work, range(options.processes)))
    found = [record.outcomes[str(each)] for each in faults if str(each) in record.outcomes]
    caught = len(found) - found.count("SURVIVED")
    print(f"{caught} of {len(found)} faults caught, {found.count('too slow')} by their slowness")
    return 0 if caught >= options.goal * len(found) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", help="package or file, e.g. dreamreader/store")
    parser.add_argument("--tests", nargs="+", required=True, help="folders or files of tests")
    parser.add_argument("--faults", type=int, default=60, help="how many are planted (60)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of faults (0)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of tests elsewhere (60)")
    parser.add_argument("--minutes", type=float, default=60.0, help="no new fault after (60)")
    parser.add_argument("--processes", type=int, default=1, help="faults tried at once (1)")
    parser.add_argument("--record", type=Path, help="file of a run that may go on later")
    parser.add_argument("--goal", type=float, default=0.9, help="share that is caught (0.9)")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # before the server of processes loads torch
    sys.exit(main())
