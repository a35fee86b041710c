"""The commands that every kind of job has: run, plan, show, verify, diff, report, schema, runs."""

import json
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dreamreader.cli.errors import check_folder, report_errors
from dreamreader.cli.subject import SpecDevice, SpecDtype, with_subject
from dreamreader.errors import InvalidInput

if TYPE_CHECKING:
    from dreamreader.jobs.job import SpecJob

DIFFERS = 1

SpecOrFolder = Annotated[
    Path, typer.Argument(help="Spec file (YAML or JSON), or the folder of a job.")
]
Folder = Annotated[Path, typer.Argument(help="Folder of a job.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value with a dotted key, e.g. seeds.count=4.")
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Folder of the result. [default: runs/<name>]")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be done, as `plan` does; little is run.")
]
LimitGB = Annotated[
    float | None,
    typer.Option(help="Stop a harvest before it has more GB (10^9 bytes) than this.", min=0),
]
EngineName = Annotated[
    Literal["local", "ray"], typer.Option("--engine", help="This process, or workers with Ray.")
]
Workers = Annotated[
    int | None, typer.Option(help="Of Ray; one for each GPU, or machine, by default.", min=1)
]
Address = Annotated[
    str | None, typer.Option(help="Of a running Ray cluster; RAY_ADDRESS, or one started here.")
]


@report_errors
def run(
    spec: SpecOrFolder,
    overrides: Overrides = None,
    out: Out = None,
    dry_run: DryRun = False,
    limit_gb: LimitGB = None,
    engine: EngineName = "local",
    workers: Workers = None,
    address: Address = None,
    device: SpecDevice = None,
    dtype: SpecDtype = None,
    show: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
) -> None:
    """Run a job of any kind; a stopped one goes on where it was, a complete one is left as it is.

    \b
    Examples:
      dreamreader run examples/patch-colour.yaml
      dreamreader run examples/steer-colour.yaml seeds.count=4 method.strengths=[0,2] -o runs/steer
      dreamreader run examples/harvest/attention.yaml -o activations --limit-gb 20
      dreamreader run examples/reft/frame.yaml --dry-run
      dreamreader run runs/steer
    """
    options = {"limit_gb": limit_gb, "engine": engine_of(engine, workers, address)}
    run_job(spec, with_subject(overrides, device, dtype), out, dry_run, options, show)


@report_errors
def plan(
    spec: SpecOrFolder,
    overrides: Overrides = None,
    device: SpecDevice = None,
    dtype: SpecDtype = None,
) -> None:
    """Print what a spec would do: rows or samples, sites, estimated memory and time.

    Opens the subject and runs a little, to learn shapes and times.

    \b
    Examples:
      dreamreader plan examples/patch-colour.yaml seeds.count=16
      dreamreader plan examples/probes/colour.yaml
    """
    run_job(spec, with_subject(overrides, device, dtype), None, True, {})


@report_errors
def show(
    path: Annotated[
        Path, typer.Argument(help="Folder of a job, spec file, or file of an adapter or probe.")
    ],
) -> None:
    """Print what a folder has, what a spec says with all defaults, or what a file was trained on.

    \b
    Examples:
      dreamreader show runs/where-colour-enters
      dreamreader show examples/harvest/attention.yaml
      dreamreader show frame/adapter.safetensors
    """
    from dreamreader.cli.console import console

    if path.suffix == ".safetensors":
        show_file(path)
        return
    if not path.is_dir():
        from dreamreader.jobs.kinds import job_type, kind_of_file

        job = job_type(kind_of_file(path)).from_file(path)
        console().print(_yaml(job.spec.model_dump(mode="json")))
        return
    kind = _kind_of_folder(path)
    folder = kind.folder_type(path)
    state = folder.state()
    console().print(f"{kind.kind}, {state}, fingerprint {folder.label()}")
    if state == "complete":
        for line in kind.summary(folder):
            console().print(line)


@report_errors
def report(folder: Folder) -> None:
    """Write the report of a complete job anew.

    \b
    Example:
      dreamreader report runs/where-colour-enters
    """
    from dreamreader.cli.console import console

    kind = _kind_of_folder(folder)
    found = kind.folder_type(folder)
    found.need_complete()
    kind.write_report(found)
    for line in kind.summary(found):
        console().print(line)


@report_errors
def diff(first: Folder, second: Annotated[Path, typer.Argument(help="Another folder.")]) -> None:
    """Print what differs between two jobs: spec, weights, versions, results. Exit 1 if anything.

    \b
    Example:
      dreamreader diff runs/steer runs/steer-more-steps
    """
    from dreamreader.cli.console import console, table

    kinds = [_kind_of_folder(each) for each in (first, second)]
    if kinds[0] is not kinds[1]:
        raise InvalidInput(
            f"{first} is of the kind {kinds[0].kind}, {second} of {kinds[1].kind}; only folders of "
            "one kind can be compared"
        )
    found = kinds[0].diff(first, second)
    parts = (
        ("spec", found.spec),
        ("fingerprint", found.fingerprint),
        ("machine", found.machine),
        ("results", found.results),
    )
    for title, differences in parts:
        if differences:
            listed = table(title, str(first), str(second))
            for name, old, new in differences:
                listed.add_row(name, _shorten(old), _shorten(new))
            console().print(listed)
    for line in found.lines or (["no difference"] if found.is_same else []):
        console().print(line)
    if not found.is_same:
        raise typer.Exit(DIFFERS)


@report_errors
def verify(
    folder: Folder,
    rows: Annotated[
        int, typer.Option("--rows", "-n", help="Rows of an experiment to repeat.", min=1)
    ] = 8,
    seed: Annotated[int, typer.Option(help="Of the random sample of rows.", min=0)] = 0,
) -> None:
    """Check a complete job. Exit 1 if anything is wrong.

    A random sample of an experiment's rows is repeated, and every value compared to the bit; of
    other jobs every file is read and compared with its checksum.

    \b
    Examples:
      dreamreader verify runs/where-colour-enters --rows 20
      dreamreader verify activations
    """
    verify_folder(_kind_of_folder(folder), folder, rows, seed)


@report_errors
def schema(
    of: Annotated[
        str, typer.Argument(metavar="KIND_OR_SPEC", help="A kind of job, or a spec of one.")
    ] = "experiment",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File instead of standard output.")
    ] = None,
) -> None:
    """Print the JSON schema of spec files, for editors.

    With `# yaml-language-server: $schema=spec.schema.json` in its first line an editor checks and
    completes a spec.

    \b
    Examples:
      dreamreader schema --out spec.schema.json
      dreamreader schema harvest --out harvest.schema.json
    """
    from dreamreader._files import write_atomic
    from dreamreader.jobs.kinds import job_type, kind_of_file

    kind = job_type(kind_of_file(of) if Path(of).is_file() else of)
    text = json.dumps(kind.model.model_json_schema(), indent=2) + "\n"
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_atomic(out, text)


@report_errors
def runs(
    folder: Annotated[Path, typer.Argument(help="Folder with folders of jobs.")] = Path("runs"),
) -> None:
    """List the jobs in a folder: name, kind, fingerprint, and how much of each is there.

    \b
    Examples:
      dreamreader runs
      dreamreader runs experiments/2026
    """
    from dreamreader.cli.console import console, table
    from dreamreader.jobs.kinds import list_jobs

    listed = table("name", "kind", "fingerprint", "state")
    for each in list_jobs(folder):
        listed.add_row(*each)
    if not listed.row_count:
        raise InvalidInput(f"{folder}: no folder in it is of a job")
    console().print(listed)


def run_job(
    spec: Path,
    overrides: tuple[str, ...],
    out: Path | None,
    dry_run: bool,
    options: dict[str, Any],
    open_report: bool = False,
    kind: str | None = None,
) -> None:
    """Runs or plans what a spec file or a folder is of, and prints what was found.

    Args:
        kind: of the spec; by default as it says.

    Raises:
        InvalidInput: overrides beside a folder, or an option of another kind.
    """
    from dreamreader._progress import terminal_display
    from dreamreader.cli.console import console
    from dreamreader.jobs.job import REPORT

    if not dry_run:
        check_folder(out)
    job, target = _open(spec, overrides, out, kind)
    if dry_run:
        console().print(f"{job.spec.name}: {getattr(job.spec, 'method', job.spec).kind}")
        console().print(str(job.plan()))
        return
    given = {name: value for name, value in options.items() if value is not None}
    if "limit_gb" in given and job.kind != "harvest":
        raise InvalidInput(f"--limit-gb is of a harvest; this is of the kind {job.kind}")
    lost = 0

    def follow(event: Any) -> None:
        nonlocal lost
        lost = int(event.numbers.get("lost", lost))
        display(event)

    target = job.folder if target is None else target
    try:
        with terminal_display(console(stderr=True)) as display:
            job.run(target, progress=follow, **given)
    except KeyboardInterrupt:
        console(stderr=True).print("the same command goes on after the last unit that is whole")
        raise
    if job.follows:
        return
    for line in job.summary(job.folder_type(target)):
        console().print(line)
    if lost:
        console().print(f"{lost} workers were lost; others computed their units")
    if open_report:
        webbrowser.open((target / REPORT).resolve().as_uri())


def verify_folder(kind: "type[SpecJob[Any]]", folder: Path, rows: int = 8, seed: int = 0) -> None:
    """Prints whether a folder is what it was; exits with 1 if it is not."""
    from dreamreader._progress import terminal_display
    from dreamreader.cli.console import console

    with terminal_display(console(stderr=True)) as display:
        verdict = kind.verify(folder, rows, seed, display)
    for line in verdict.lines:
        console().print(line)
    if not verdict.holds:
        raise typer.Exit(DIFFERS)


def show_file(path: Path) -> None:
    """Prints what a file of a training holds: a probe, or adapters."""
    from dreamreader.artifacts import load
    from dreamreader.cli.trained import show_adapter, show_probe
    from dreamreader.probes import Probe
    from dreamreader.reft import Reft

    found = load(path)
    if isinstance(found, Probe):
        show_probe(found)
    elif isinstance(found, Reft):
        show_adapter(found)
    else:
        raise InvalidInput(
            f"{path} holds {found.artifact_kind}; shown are probes and adapters (reft), and "
            "dreamreader.load_artifact reads all kinds"
        )


def engine_of(name: str, workers: int | None, address: str | None) -> Any:
    """The engine that the options choose; None for this process.

    Raises:
        InvalidInput: options of Ray without it, or Ray is not installed.
    """
    if name == "ray":
        from dreamreader.jobs.ray import RayEngine

        return RayEngine(workers, address)
    if workers is not None or address is not None:
        raise InvalidInput("--workers and --address are of --engine ray")
    return None


def _open(
    spec: Path, overrides: tuple[str, ...], out: Path | None, kind: str | None
) -> "tuple[SpecJob[Any], Path | None]":
    """The job of a spec file or of a folder, and where it goes."""
    from dreamreader.jobs.kinds import job_type, kind_of_file

    if spec.is_dir() and kind is None:
        if overrides or out is not None:
            raise InvalidInput(
                f"{spec} is a folder, which has its own spec; to change something, name a spec file"
            )
        return _kind_of_folder(spec).of_folder(spec), spec
    found = job_type(kind or kind_of_file(spec))
    return found.from_file(spec, overrides), out


def _kind_of_folder(folder: Path) -> "type[SpecJob[Any]]":
    from dreamreader.jobs.kinds import job_type, kind_of_folder

    return job_type(kind_of_folder(folder))


def _yaml(content: Any) -> str:
    import yaml

    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).rstrip()


def _shorten(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def register(app: typer.Typer) -> None:
    for command in (run, plan, show, report, diff, verify, schema, runs):
        app.command()(command)
