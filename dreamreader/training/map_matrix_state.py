"""The moments of a matrix of maps, as its folder has them between two recordings."""

import json

from dreamreader._checked import damage_error
from dreamreader._files import explain_disk_errors, write_atomic
from dreamreader.mapping import MomentMatrix
from dreamreader.training.folder import TrainingFolder

FOLDS = ("fit", "choose", "score")
STATES = "moments"  # folder


def read_state(folder: TrainingFolder, fold: str) -> MomentMatrix | None:
    """What was summed of the prompts of one purpose; None where nothing was.

    Raises:
        InvalidInput: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = folder.path / STATES / f"{fold}.safetensors"
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            notes = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise damage_error(path, str(error), "start in another folder") from None
    if notes.get("run") != folder.run:
        return None
    return MomentMatrix.of_state(tensors, json.loads(notes["matrix"]))


def write_state(folder: TrainingFolder, fold: str, state: MomentMatrix) -> None:
    """Replaces what was summed before, whole or not at all."""
    from safetensors.torch import save

    tensors, values = state.state_dict()
    notes = {"run": folder.run, "matrix": json.dumps(values)}
    content = save({name: each.contiguous() for name, each in tensors.items()}, notes)
    with explain_disk_errors(folder.path):
        write_atomic(folder.path / STATES / f"{fold}.safetensors", content)
