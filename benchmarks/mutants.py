"""Plants single faults in one package and says which of them no test sees.

    python benchmarks/mutants.py dreamreader/store --tests tests/store --faults 60

A fault is a swapped comparison or operator, a constant off by one, a condition turned round, a
statement or an argument left out. The tests run once with coverage, so that for each fault only
those run that reach its line, the quick ones first. Faults are planted in a copy of the checkout;
the choice follows --seed. Exit status 1 where fewer than --goal are caught.

Needs pytest-cov. Code that only other processes run counts as reached by all tests.
"""

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
# What only words of messages, types or the shape of a class depend on.
SILENT_CALLS = {"dataclass", "cast", "TypeVar", "warn", "overload"}
# Arguments without which a call mostly does the same.
SILENT_ARGUMENTS = {"dtype", "device", "strict", "exist_ok", "parents", "encoding", "stacklevel"}


@dataclass(frozen=True)
class Fault:
    """One change of one file."""

    file: str  # below the root
    line: int
    last: int  # line of its statement
    was: str
    now: str
    source: str  # of the whole file with the fault


class Planter(ast.NodeVisitor):
    """Walks a module, and makes one fault of every place that has one."""

    def __init__(self, file: str, source: str):
        self.file, self.source = file, source
        self.lines = source.splitlines(keepends=True)
        self.faults: list[Fault] = []
        self.statement: ast.stmt | None = None

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)):
            return  # words of messages; the condition above a raise is turned round instead
        outer = self.statement
        if isinstance(node, ast.stmt):
            self.statement = node
        for now in changed(node):
            self._plant(node, now)
        for child in children(node):
            self.visit(child)
        self.statement = outer

    def _plant(self, node: ast.AST, now: str) -> None:
        position: Any = node
        starts = [0]
        for line in self.lines:
            starts.append(starts[-1] + len(line.encode()))
        code = self.source.encode()
        first = starts[position.lineno - 1] + position.col_offset
        last = starts[position.end_lineno - 1] + position.end_col_offset
        was = code[first:last].decode()
        made = (code[:first] + now.encode() + code[last:]).decode()
        assert self.statement is not None
        end = self.statement.lineno if hasattr(self.statement, "body") else position.end_lineno
        self.faults.append(
            Fault(self.file, position.lineno, max(end, position.lineno), was, now, made)
        )


def children(node: ast.AST) -> Iterator[ast.AST]:
    """What belongs to the running code of a node: no annotations, decorators or docstrings."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params", "bases"):
            continue
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, ast.AST):
                yield each


def changed(node: ast.AST) -> Iterator[str]:
    """Code that could stand in the place of a node, each with one fault."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in COMPARED:
            yield rewritten(node, ops=[COMPARED[type(op)]()])
        case ast.BinOp(op=op, right=right) if type(op) in COMPUTED:
            if not any(isinstance(each, (ast.JoinedStr, ast.Constant)) and not number(each)
                       for each in (node.left, right)):  # fmt: skip
                yield rewritten(node, op=COMPUTED[type(op)]())
        case ast.BoolOp(op=op):
            yield rewritten(node, op=ast.And() if isinstance(op, ast.Or) else ast.Or())
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield ast.unparse(operand)
        case ast.Constant(value=bool(value)):
            yield str(not value)
        case ast.Constant(value=int(value)):
            yield str(value + 1)
        case ast.IfExp(body=body, orelse=orelse):
            yield f"({ast.unparse(orelse)} if {ast.unparse(node.test)} else {ast.unparse(body)})"
        case ast.If(test=test) | ast.While(test=test) if not isinstance(test, ast.Compare):
            return
        case ast.Expr(value=ast.Call(func=func)) if called(func) not in SILENT_CALLS:
            yield "pass"
        case ast.AugAssign():
            yield "pass"
        case ast.Call(func=func, keywords=[*keywords]) if called(func) not in SILENT_CALLS:
            for keyword in keywords:
                if keyword.arg not in SILENT_ARGUMENTS | {None}:
                    kept = [each for each in keywords if each is not keyword]
                    yield rewritten(node, keywords=kept)


def number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, (int, float))


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


class Bench:
    """Copies of the checkout in which tests run."""

    def __init__(self, folder: Path, package: str, tests: list[str]):
        self.folder, self.package, self.tests = folder, package, tests

    def copy(self, name: str) -> Path:
        """A copy of what git knows and of the native module."""
        there = self.folder / name
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        for each in [*listed, *(str(p.relative_to(ROOT)) for p in ROOT.glob("dreamreader/_C*"))]:
            if (ROOT / each).is_file() and not each.startswith(("docs/", "benchmarks/results")):
                (there / each).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / each, there / each)
        return there

    def pytest(self, there: Path, *arguments: str, seconds: float) -> int:
        """Exit status of the tests in a copy; 1 where they take too long."""
        environment = os.environ | {"PYTHONPATH": str(there), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        try:
            return subprocess.run(
                [*command, *arguments], cwd=there, env=environment, timeout=seconds,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return 1

    def reach(self) -> tuple[dict[str, dict[int, set[str]]], dict[str, float]]:
        """Tests by file and line that they reach, and the seconds of each test."""
        there = self.copy("reach")
        report = self.folder / "times.xml"
        status = self.pytest(
            there, *self.tests, f"--cov={self.package}", "--cov-context=test", "--cov-report=",
            f"--junitxml={report}", "-o", "junit_family=xunit1", seconds=3600,
        )  # fmt: skip
        if status:
            sys.exit(f"the tests fail without a fault (exit status {status})")
        data = self.folder / "reach.json"
        subprocess.run(
            [sys.executable, "-m", "coverage", "json", "--show-contexts", "-q", "-o", str(data)],
            cwd=there, check=True,
        )  # fmt: skip
        lines = {
            file: {
                int(line): {name.partition("|")[0] for name in names if name}
                for line, names in each["contexts"].items()
            }
            for file, each in json.loads(data.read_text())["files"].items()
        }
        return lines, test_times(report)


def test_times(report: Path) -> dict[str, float]:
    """Seconds by node id."""
    from xml.etree import ElementTree

    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        found[f"{case.get('file')}::{case.get('name')}"] = float(case.get("time") or 0)
    return found


def chosen_tests(
    fault: Fault, lines: dict[str, dict[int, set[str]]], times: dict[str, float], seconds: float
) -> list[str]:
    """Tests that reach a fault, the quick ones first, as many as fit into the time."""
    reached = lines.get(fault.file, {})
    names = set().union(*(reached.get(n, set()) for n in range(fault.line, fault.last + 1)))
    # What runs at import, or in another process, is reached by any test.
    names = {name for name in names if name in times} or set(times)
    spent, found = 0.0, []
    for name in sorted(names, key=times.__getitem__):
        spent += times[name]
        if found and spent > seconds:
            break
        found.append(name)
    return found


def try_fault(bench: Bench, there: Path, fault: Fault, tests: list[str], seconds: float) -> bool:
    """Whether a test fails with the fault."""
    target = there / fault.file
    before = target.read_text()
    target.write_text(fault.source)
    try:
        listed = there / "chosen-tests.txt"
        listed.write_text("\n".join(tests))
        return bench.pytest(there, f"@{listed}", seconds=3 * seconds + 60) != 0
    finally:
        target.write_text(before)


def main() -> int:
    options = parse()
    found = faults_of((ROOT / options.package).resolve())
    random.Random(options.seed).shuffle(found)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options.package, options.tests)
        begun = time.monotonic()
        lines, times = bench.reach()
        print(f"{len(times)} tests in {time.monotonic() - begun:.0f} s; {len(found)} faults")
        found = found[: options.faults]
        copies = [bench.copy(f"copy-{n}") for n in range(options.processes)]
        caught = {}

        def work(number: int) -> None:
            for fault in found[number :: options.processes]:
                tests = chosen_tests(fault, lines, times, options.seconds)
                seen = try_fault(bench, copies[number], fault, tests, options.seconds)
                caught[fault] = seen
                state = "caught  " if seen else "SURVIVED"
                print(
                    f"{state} {fault.file}:{fault.line}: {fault.was} -> {fault.now} "
                    f"({len(tests)} tests)",
                    flush=True,
                )

        with ThreadPoolExecutor(options.processes) as pool:
            list(pool.map(work, range(options.processes)))
    share = sum(caught.values()) / len(caught)
    print(f"{sum(caught.values())} of {len(caught)} faults caught: {share:.0%}")
    return 0 if share >= options.goal else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("package", help="package or file, e.g. dreamreader/store")
    parser.add_argument("--tests", nargs="+", required=True, help="folders or files of tests")
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=30.0, help="of tests for one fault")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--goal", type=float, default=0.9, help="share that has to be caught")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
