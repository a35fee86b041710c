"""Opening what a person named: embedded model, fetched language model, folder, file or hub id."""

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dreamreader.errors import InvalidInput, UnknownName, first_line, nearest
from dreamreader.zoo.catalog import MODELS, WEIGHTS
from dreamreader.zoo.hub import cached_file, failure, hub_file

if TYPE_CHECKING:
    import torch

    from dreamreader.engine import Reader

PIPELINE, LANGUAGE = "model_index.json", "config.json"  # what diffusers and transformers write
NEITHER = f"no {PIPELINE} (a pipeline of diffusers) and no {LANGUAGE} (a model of transformers)"


@dataclass(frozen=True)
class NamedModel:
    """What a name means.

    Attributes:
        name: as it was given.
        kind: `pipeline` (diffusers), `language` (transformers) or `gguf` (one file).
        source: what `from_pretrained` takes: a folder or a hub id; the path of a GGUF file.
        content: of its model_index.json or config.json.
    """

    name: str
    kind: Literal["pipeline", "language", "gguf"]
    source: str
    content: dict[str, Any] = field(default_factory=dict)


def load(
    name: str | Path,
    device: "str | int | torch.device" = "cpu",
    dtype: "str | torch.dtype" = "float32",
    adapter: str | Path | None = None,
) -> "Reader":
    """A `Reader` of an embedded model, a language model of `zoo fetch`, a folder, or a hub id.

    Folders and hub ids are pipelines of diffusers where they have a model_index.json, else language
    models of transformers, opened with their tokenizer.

    Args:
        name: one of `list_models()`, of `dreamreader zoo list`, a folder, a GGUF file, or a hub id.
        device: where it computes: `cpu`, `cuda`, `cuda:1`, `mps` and so on.
        dtype: of its weights: `float32`, `bfloat16`, `float16`, `float64` or one of torch, or
            `auto`: the one in which they are stored. Embedded models are float32 then.
        adapter: what PEFT saved beside a language model, or LoRA weights of a pipeline, merged into
            the weights, see `merge_adapter`.

    Raises:
        UnknownName: nothing has this name; the nearest that exist are named.
        InvalidInput: this torch has no such device, the model is not whole, the hub does not give
            it, or the adapter belongs to another one.

    Example:
        >>> reader = dreamreader.load("shapes-unet")
        >>> images = reader.run("a red circle", seeds=0).images
    """
    from dreamreader._devices import device_of, dtype_of, move
    from dreamreader.engine import Reader

    target = device_of(device)
    wanted = "auto" if dtype == "auto" else dtype_of(dtype)
    with quiet():
        found = locate(name)
        if found.kind == "pipeline":
            model, tokenizer = _pipeline(found, wanted), None
        else:
            model, tokenizer = _language_model(found, wanted)
        if adapter is not None:
            from dreamreader.zoo.adapter import merge_adapter

            model = merge_adapter(model, adapter)
        if target.type != "cpu":
            move(model, target, None)
    return Reader(model, tokenizer=tokenizer)


def load_pipeline(
    name: str | Path,
    device: "str | int | torch.device" = "cpu",
    dtype: "str | torch.dtype" = "float32",
) -> Any:
    """The diffusers pipeline that `load` would wrap, with its progress bar off.

    Raises:
        UnknownName, InvalidInput: as `load` does; also for a language model.
    """
    reader = load(name, device, dtype)
    if not hasattr(reader.subject, "components"):
        raise InvalidInput(f"{name} is a {type(reader.subject).__name__}, no diffusers pipeline")
    return reader.subject


def locate(name: str | Path) -> NamedModel:
    """Finds what a name means, without loading weights; asks the hub where nothing here has it.

    Raises:
        UnknownName, InvalidInput: as `load` does.
    """
    from dreamreader.zoo.fetch import SOURCES, installed

    text = str(name)
    if text in MODELS:
        if not (WEIGHTS / text / PIPELINE).is_file():
            raise InvalidInput(
                f"{text}: no weights at {WEIGHTS / text}; `dreamreader zoo train {text}` makes them"
            )
        return _in_folder(text, WEIGHTS / text)
    if text in SOURCES:
        file = installed(text)
        if file is None:
            raise InvalidInput(f"{text} is not here yet: `dreamreader zoo fetch {text}` gets it")
        return NamedModel(text, "gguf", str(file))
    path = Path(text).expanduser()
    if path.is_dir():
        return _in_folder(text, path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise InvalidInput(
                f"{path} is a file; give the folder that diffusers or transformers wrote, a GGUF "
                "file, or a hub id"
            )
        return NamedModel(text, "gguf", str(path))
    known = [*MODELS, *SOURCES]
    if not _is_hub_id(name) or ("/" not in text and nearest(text, known, cutoff=0.75)):
        hint = "Or give a folder that diffusers or transformers wrote, or a hub id."
        if "/" in text or isinstance(name, Path):
            hint = f"There is no folder {path} either."
        raise UnknownName("model", text, known, hint)
    try:
        return _on_hub(text)
    except InvalidInput as error:
        if "/" in text:
            raise
        raise UnknownName("model", text, known, f"As a hub id: {error}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the progress bars and notices of diffusers and transformers while models load."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    modules = (diffusers_logging, transformers_logging)
    before = [(each, each.get_verbosity(), each.is_progress_bar_enabled()) for each in modules]
    for module in modules:
        module.set_verbosity(logging.ERROR)
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module, level, shown in before:
            module.set_verbosity(level)
            if shown:
                module.enable_progress_bar()


def _is_hub_id(name: str | Path) -> bool:
    """Whether a name can be `owner/name`, or the name alone as the oldest models have it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if isinstance(name, Path):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _in_folder(name: str, folder: Path) -> NamedModel:
    if (folder / PIPELINE).is_file():
        return NamedModel(name, "pipeline", str(folder), _content(folder / PIPELINE))
    if (folder / LANGUAGE).is_file():
        return _model(name, str(folder), folder / LANGUAGE)
    if (folder / "adapter_config.json").is_file():
        raise InvalidInput(
            f"{folder}: an adapter of PEFT; open its base model, with adapter={folder.name!r}"
        )
    raise InvalidInput(f"{folder}: {NEITHER}")


def _model(name: str, source: str, config: Path) -> NamedModel:
    """A model of transformers, told from a part of a pipeline, which diffusers writes."""
    content = _content(config)
    if "_class_name" in content:
        raise InvalidInput(
            f"{name}: a {content['_class_name']}, one part of a pipeline; give the folder or hub "
            "id of the whole"
        )
    return NamedModel(name, "language", source, content)


def _on_hub(repo: str) -> NamedModel:
    """A hub id, by the file that its repository has."""
    config = cached_file(repo, LANGUAGE)
    if config is not None and "model_type" in _content(config) and not cached_file(repo, PIPELINE):
        return _model(repo, repo, config)  # as it was opened before: without asking the hub
    if (index := hub_file(repo, PIPELINE)) is not None:
        return NamedModel(repo, "pipeline", repo, _content(index))
    config = hub_file(repo, LANGUAGE)
    if config is None:
        raise InvalidInput(f"{repo} on the hub: {NEITHER}")
    return _model(repo, repo, config)


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInput(f"{file}: no JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise InvalidInput(f"{file}: an object expected, got {type(content).__name__}")
    return content


def _pipeline(found: NamedModel, dtype: "torch.dtype | Literal['auto']") -> Any:
    from diffusers import DiffusionPipeline

    # Parts that a pipeline was saved without: diffusers wants some of them named as None.
    absent = {name: None for name, kind in found.content.items() if kind == [None, None]}
    try:
        wanted = _find_dtype(found) if dtype == "auto" else dtype
        pipe = DiffusionPipeline.from_pretrained(found.source, dtype=wanted, **absent)
    except Exception as error:
        raise _not_whole(found, "diffusers pipeline", error) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _language_model(found: NamedModel, dtype: "torch.dtype | Literal['auto']") -> tuple[Any, Any]:
    """Model in eval mode, and its tokenizer."""
    if found.kind == "gguf":
        from dreamreader.zoo.fetch import load_language_model

        return load_language_model(Path(found.source), dtype)
    from transformers import AutoConfig, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(found.source)
        model, info = _class_for(found, config).from_pretrained(
            found.source, dtype=dtype, output_loading_info=True
        )
    except Exception as error:
        raise _not_whole(found, "transformers model", error) from error
    if missing := sorted(info["missing_keys"]):  # transformers fills them with random numbers
        raise InvalidInput(
            f"{found.name}: not a whole language model: its weights have no {missing[0]}"
            + (f" and {len(missing) - 1} others" if len(missing) > 1 else "")
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(found.source)
    except Exception as error:
        raise _not_whole(found, "transformers model: its tokenizer does not open", error) from error
    # Without its files, transformers makes one that knows special tokens only.
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder):
        raise InvalidInput(f"{found.name}: not a whole transformers model: its tokenizer is empty")
    return model.eval(), tokenizer


def _class_for(found: NamedModel, config: Any) -> Any:
    """The class of transformers that generates text with this configuration."""
    import transformers as t

    kinds = [(t.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, t.AutoModelForSeq2SeqLM)]
    if not config.is_encoder_decoder:
        kinds = [
            (t.MODEL_FOR_CAUSAL_LM_MAPPING, t.AutoModelForCausalLM),
            (t.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, t.AutoModelForImageTextToText),
        ]
    for known, cls in kinds:
        if type(config) in known:
            return cls
    if getattr(config, "auto_map", None):  # code of the model's own, which transformers refuses
        return t.AutoModelForCausalLM
    raise InvalidInput(
        f"{found.name}: {config.model_type} is no model of transformers that generates text; in "
        "Python, dreamreader.Reader(model) wraps any model"
    )


def _not_whole(found: NamedModel, kind: str, error: Exception) -> InvalidInput:
    """The error of another library, as one that says whether the hub or the model is the cause."""
    if isinstance(error, InvalidInput):
        return error
    if found.source == found.name and not Path(found.source).is_dir():
        said = failure(found.name, error)
        if said != f"{found.name}: {first_line(error)}":
            return InvalidInput(said)
    return InvalidInput(f"{found.name}: not a whole {kind} ({first_line(error)})")


def _find_dtype(found: NamedModel) -> "torch.dtype":
    """The dtype of most of the weights of a pipeline; float32 for embedded models.

    These are kept in float16 to be small, and were trained in float32.
    """
    from collections import Counter

    import torch
    from diffusers import DiffusionPipeline
    from safetensors import safe_open

    if found.name in MODELS:
        return torch.float32
    folder = Path(found.source)
    if not folder.is_dir():
        folder = Path(DiffusionPipeline.download(found.source))
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
    kinds["BF16"] = torch.bfloat16
    count: Counter[torch.dtype] = Counter()
    for file in sorted(folder.glob("*/*.safetensors")):
        if "." in file.stem:  # a variant, such as model.fp16.safetensors, which is not loaded
            continue
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118
                part = weights.get_slice(key)
                if part.get_dtype() in kinds:
                    count[kinds[part.get_dtype()]] += math.prod(part.get_shape())
    if not count:
        raise InvalidInput(
            f"{found.name}: dtype auto reads safetensors files, and there are none; name a dtype"
        )
    return count.most_common(1)[0][0]
