"""Finding what a person named: embedded model, fetched language model, folder or hub id."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dreamreader.errors import InvalidInput, UnknownName

if TYPE_CHECKING:
    from dreamreader.engine import Reader


def open_reader(name: str) -> "Reader":
    """A `Reader` of the named subject.

    Args:
        name: an embedded model, a language model of `zoo fetch`, a folder that diffusers or
            transformers wrote, or a hub id.

    Raises:
        UnknownName: nothing has this name; the nearest that exist are named.
        InvalidInput: a language model that has not been fetched, or a folder without a whole model.
    """
    from dreamreader.zoo import MODELS, load
    from dreamreader.zoo.fetch import SOURCES, installed

    with quiet():
        if name in SOURCES:
            path = installed(name)
            if path is None:
                raise InvalidInput(
                    f"{name} is not here yet: `dreamreader zoo fetch {name}` gets it"
                )
            return _language_model_file(path)
        folder = Path(name)
        if (folder / "config.json").is_file() and not (folder / "model_index.json").is_file():
            return _language_model(name)
        try:
            return load(name)
        except UnknownName:
            hint = "Or give a folder that diffusers or transformers wrote, or a hub id."
            raise UnknownName("model", name, [*MODELS, *SOURCES], hint) from None


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the progress bars and notices of diffusers and transformers while models load."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [
        (module, module.get_verbosity()) for module in (diffusers_logging, transformers_logging)
    ]
    for module, _ in before:
        module.set_verbosity(logging.ERROR)
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module, level in before:
            module.set_verbosity(level)
            module.enable_progress_bar()


def _language_model(name: str) -> "Reader":
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dreamreader.engine import Reader

    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or ["unreadable"])[0]
        raise InvalidInput(f"{name}: not a whole transformers model ({first})") from error
    return Reader(model.eval(), tokenizer=tokenizer)


def _language_model_file(path: Path) -> "Reader":
    from dreamreader.engine import Reader
    from dreamreader.zoo.fetch import load_language_model

    model, tokenizer = load_language_model(path)
    return Reader(model, tokenizer=tokenizer)
