"""`dreamreader sae`: what an autoencoder is worth, what its latents respond to, other formats."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dreamreader.cli.errors import report_errors
from dreamreader.cli.subject import MODEL_HELP, Device, Dtype

if TYPE_CHECKING:
    from dreamreader.sae import SparseAutoencoder

app = typer.Typer(
    help="Sparse autoencoders: measure, look at latents, convert. `dreamreader run SPEC` trains "
    "them; docs/sae.md shows a spec.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

File = Annotated[Path, typer.Argument(metavar="AUTOENCODER", help="A file, or a folder of others.")]


@app.command("eval")
@report_errors
def evaluate(
    file: File,
    store: Annotated[Path, typer.Option(help="Folder of a harvest of its site.")],
    site: Annotated[str | None, typer.Option(help="By default that of the autoencoder.")] = None,
    branch: Annotated[str | None, typer.Option(help="Guidance branch; all by default.")] = None,
    rows: Annotated[int, typer.Option(help="Rows that are measured.", min=1)] = 65_536,
    splice: Annotated[
        int,
        typer.Option(help="Prompts of the store to run with reconstructions in place.", min=0),
    ] = 0,
    attributes: Annotated[
        str | None,
        typer.Option(help="Columns that latents are probed for, such as tense,number."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples that are probed.", min=1)] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write a page.")] = None,
) -> None:
    """Measure an autoencoder on rows of a store, beside random and shuffled controls.

    \b
    Reconstruction; probes of one, two and five latents and absorption, where samples have
    attributes, as scenes do; with --splice what the model loses with reconstructions in place.
    Example:
      dreamreader sae eval autoencoder.safetensors --store activations --branch cond -o eval.html
    """
    from dreamreader.cli.console import console, table
    from dreamreader.training.sae_page import describe_unsettled, write_evaluation
    from dreamreader.training.sae_scores import evaluate_stored

    sae = _open(file)
    columns = None if attributes is None else [each for each in attributes.split(",") if each]
    found, place = evaluate_stored(
        sae, store, site, branch, rows, columns=columns, samples=samples, splice=splice
    )
    if out is not None:
        write_evaluation(f"{file.stem}: evaluation", place, found, out)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    names = ("fvu", "l0", "dead", "shrinkage", "lottery")
    more = {
        "AUROC of 1": lambda s: s.get("probes", {}).get("1", {}).get("auroc"),
        "absorbed": lambda s: s.get("absorbed"),
        "recovered": lambda s: s.get("splice", {}).get("recovered"),
    }
    there = {t: f for t, f in more.items() if any(f(s) is not None for s in found.values())}
    listed = table("", "FVU", "L0", "dead", "shrinkage", "lottery", *there, right=names)
    for title, scores in found.items():
        values = [scores[n] for n in names] + [each(scores) for each in there.values()]
        listed.add_row(title, *("–" if v is None else f"{v:.4g}" for v in values))
    console().print(listed)
    for line in describe_unsettled(found):
        console().print(line)
    if out is not None:
        console().print(out)


@app.command()
@report_errors
def dashboard(
    file: File,
    site: Annotated[str | None, typer.Option(help="By default that of the autoencoder.")] = None,
    model: Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)] = "shapes-unet",
    prompts: Annotated[
        Path | None, typer.Option(help="A text a line; by default captions of scenes.")
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", help="Rows that are run.", min=1)] = 128,
    features: Annotated[str | None, typer.Option(help="Latents, such as 3,17,204.")] = None,
    order: Annotated[str, typer.Option(help="activity, correlation or frequency.")] = "activity",
    shown: Annotated[int, typer.Option(help="Latents on the page.", min=1)] = 40,
    branch: Annotated[str | None, typer.Option(help="Guidance branch.")] = "cond",
    steps: Annotated[int | None, typer.Option(help="Denoising steps of a run.", min=1)] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("latents.html"),
    neuronpedia: Annotated[
        Path | None,
        typer.Option(help="Of a language model: also write Neuronpedia's feature objects."),
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
) -> None:
    """Write a page of latents: the rows that they are strongest on, where, when, and with what.

    \b
    Example:
      dreamreader sae dashboard autoencoder.safetensors -n 64 --order correlation -o latents.html
    """
    from dreamreader.cli.console import console
    from dreamreader.errors import InvalidInput
    from dreamreader.sae import collect_examples, write_dashboard, write_neuronpedia
    from dreamreader.specs.subject import is_language
    from dreamreader.zoo import SETTINGS, load

    sae = _open(file)
    place = site or sae.metadata.get("site")
    if not place:
        raise InvalidInput(f"{file} does not say its site; give --site")
    chosen = None if features is None else _numbers(features)
    reader = load(model, device, dtype)
    if is_language(reader) and prompts is None:
        raise InvalidInput(f"{model} reads texts: give --prompts, a file with a text a line")
    if neuronpedia is not None and not is_language(reader):
        raise InvalidInput("--neuronpedia: its activations are of texts, this model draws pictures")
    rows, labels = _rows(prompts, count)
    arguments = {} if is_language(reader) else dict(SETTINGS)
    if steps is not None:
        arguments["num_inference_steps"] = steps
    found = collect_examples(
        reader,
        sae,
        place,
        rows,
        seeds=list(range(len(rows))),
        labels=labels,
        branch=None if is_language(reader) else branch,
        **arguments,
    )
    page = write_dashboard(
        found.examples,
        out,
        title=f"Latents of {place}",
        images=found.images,
        texts=found.texts,
        features=chosen,
        order=order,
        count=shown,
    )
    console().print(page)
    if neuronpedia is not None and found.texts is not None:
        path = write_neuronpedia(
            found.examples, neuronpedia, found.texts, model=model, source=place, features=chosen
        )
        console().print(path)


@app.command()
@report_errors
def convert(
    file: File,
    out: Annotated[Path, typer.Argument(help="File (ours) or folder (others).")],
    to: Annotated[
        str, typer.Option("--to", help="dreamreader, saelens or dictionary_learning.")
    ] = "dreamreader",
    of: Annotated[
        str | None, typer.Option("--from", help="Format, where files do not tell.")
    ] = None,
) -> None:
    """Read an autoencoder in one format and write it in another.

    \b
    Example:
      dreamreader sae convert sae_lens_folder autoencoder.safetensors
      dreamreader sae convert autoencoder.safetensors for-saelens --to saelens
    """
    from dreamreader.cli.console import console
    from dreamreader.sae import write_sae

    sae = _open(file, of)
    if to == "dreamreader":
        sae.save(out)
    else:
        write_sae(sae, out, to)
    console().print(out)


def _open(file: Path, of: str | None = None) -> "SparseAutoencoder":
    """An autoencoder of ours, or of another library."""
    from dreamreader.sae import SparseAutoencoder, read_sae

    if of is None and file.suffix == ".safetensors" and file.is_file():
        return SparseAutoencoder.load(file)
    return read_sae(file, of)


def _numbers(features: str) -> list[int]:
    from dreamreader.errors import InvalidInput

    try:
        return [int(each) for each in features.split(",")]
    except ValueError:
        raise InvalidInput(
            f"--features: numbers of latents with commas between, such as 3,17, got {features!r}"
        ) from None


def _rows(prompts: Path | None, count: int) -> tuple[list[str], dict[str, list[str | None]]]:
    """Texts of a file, or captions of scenes with their attributes."""
    from dreamreader.errors import InvalidInput

    if prompts is not None:
        try:
            lines = prompts.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInput(f"--prompts: {error}") from error
        kept = [line for line in lines if line.strip()][:count]
        if not kept:
            raise InvalidInput(f"--prompts: {prompts} has no texts")
        return kept, {}
    from dreamreader.specs.data import scene_items
    from dreamreader.specs.parts import Scenes

    items = list(scene_items(Scenes.model_validate({"count": count})))  # as those of a spec
    names = list(items[0].columns)
    labels = {name.removeprefix("source_"): [i.columns[name] for i in items] for name in names}
    return [item.prompt for item in items], labels
