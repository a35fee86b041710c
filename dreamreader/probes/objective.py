"""What a probe is trained to do: losses and class weights."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.probes.labels import Targets, Task

LOSSES = ("softmax", "sigmoid")


@dataclass(frozen=True)
class ProbeObjective:
    """The loss of a task.

    Attributes:
        loss: `softmax`, cross-entropy within each attribute; `sigmoid`, binary cross-entropy of
            every label (the only one of `multilabel`); `squared`, of regression.
        weights: of each output: of the rows of that class, or of the positives of that label.
    """

    task: Task
    loss: str
    weights: Float[Tensor, " outputs"]

    def losses(
        self, logits: Float[Tensor, "count rows outputs"], targets: Targets
    ) -> Float[Tensor, " count"]:
        """The loss of each MLP: the (weighted) mean over rows."""
        weights = self.weights.to(logits)
        if self.task.kind == "regress":
            return (logits - targets).square().mean((1, 2))
        if self.task.kind == "multilabel":
            wanted = targets.expand_as(logits)
            each = F.binary_cross_entropy_with_logits(
                logits, wanted, pos_weight=weights, reduction="none"
            )
            return each.mean((1, 2))
        total = logits.new_zeros(len(logits))
        for number, part in enumerate(self.task.parts.values()):
            own, classes = logits[..., part], targets[:, number]
            share = weights[part][classes]  # [rows]
            share = share / share.sum()
            if self.loss == "softmax":
                total = total - own.log_softmax(-1)[:, _range(classes), classes] @ share
            else:
                wanted = F.one_hot(classes, own.shape[-1]).to(own).expand_as(own)
                each = F.binary_cross_entropy_with_logits(own, wanted, reduction="none")
                total = total + each.mean(-1) @ share
        return total


def objective(
    task: Task, loss: str, class_weights: str | Mapping[str, float] | None, counts: Tensor
) -> ProbeObjective:
    """The objective of a task with its class weights.

    Args:
        class_weights: None for all 1; `balanced` for n / (K n_k), in multilabel tasks (n - n_k) /
            n_k; or numbers by label.
        counts: rows to train on of each output, then their number in all [outputs + 1].

    Raises:
        UnknownName: of the loss, the class weights or a label among them.
        InvalidInput: weights are not positive, or the task has no classes.
    """
    if loss not in LOSSES:
        raise UnknownName("loss of a probe", loss, LOSSES)
    labels = task.labels
    weights = torch.ones(len(labels))
    if class_weights is not None and task.kind == "regress":
        raise InvalidInput("class_weights: regression has no classes")
    if isinstance(class_weights, str):
        if class_weights != "balanced":
            raise UnknownName("class weights", class_weights, ("balanced",))
        own, n = counts[:-1].double(), counts[-1]
        if task.kind == "multilabel":
            weights = ((n - own) / own).float()
        else:
            sizes = [len(each) for each in task.classes.values() for _ in each]
            weights = (n / (own * torch.tensor(sizes))).float()
    elif class_weights is not None:
        for label, value in class_weights.items():
            if label not in labels:
                raise UnknownName("label in class_weights", label, labels)
            if not 0 < value < float("inf"):
                raise InvalidInput(f"class_weights: {label} must be positive, got {value}")
            weights[labels.index(label)] = value
    fixed = {"multilabel": "sigmoid", "regress": "squared"}
    return ProbeObjective(task, fixed.get(task.kind, loss), weights)


def count_rows(task: Task, targets: Targets) -> Tensor:
    """Rows of each output and of all, [outputs + 1]; of regression rows alone count."""
    n = torch.tensor([len(targets)])
    if task.kind == "regress":
        return torch.cat([n.expand(len(task.labels)), n])
    if task.kind == "multilabel":
        return torch.cat([targets.sum(0).long().cpu(), n])
    sizes = [len(each) for each in task.classes.values()]
    each = [torch.bincount(targets[:, a].cpu(), minlength=k) for a, k in enumerate(sizes)]
    return torch.cat([*each, n])


def check_counts(task: Task, counts: Tensor) -> None:
    """Refuse rows to train on that lack a class; `counts` as `counted` gives them.

    Raises:
        InvalidInput: a class has no rows, or all rows have the same.
    """
    if task.kind == "regress":
        return
    n = int(counts[-1])
    for attribute, part in task.parts.items():
        own, names = counts[:-1][part].tolist(), task.classes[attribute]
        what = f"labels of {attribute!r}" if attribute else "labels"
        if n in own:
            only = names[own.index(n)]
            raise InvalidInput(f"{what}: all {n} rows to train on are {only!r}")
        if 0 in own:
            raise InvalidInput(
                f"{what}: no row to train on is {names[own.index(0)]!r}; give more rows, or leave "
                "it out of the classes"
            )


def _range(classes: Tensor) -> Tensor:
    return torch.arange(len(classes), device=classes.device)
