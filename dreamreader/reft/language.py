"""Losses of language models: completions of prompts, and prompts that stay as they are."""

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from dreamreader.engine import Reader, input_device, is_encoder_decoder, tokenize
from dreamreader.errors import InvalidInput
from dreamreader.reft.losses import Batch, ModelLoss
from dreamreader.reft.model import Reft


class LanguageLoss(ModelLoss):
    """Next-token cross-entropy of completions; the prompt has no part in it.

    Prompts are padded on the left and completions on the right, so that a selection of tokens such
    as `tokens=[0, -1]` means the prompt's, as it does in `generate`.

    Args:
        reader: of a language model with a tokenizer.
        prompts, completions: one of each for a row.
        end: whether the end-of-text token belongs to a completion.

    Raises:
        InvalidInput: not as many completions as prompts, an empty text, or no tokenizer.
    """

    def __init__(
        self, reader: Reader, prompts: Sequence[str], completions: Sequence[str], end: bool = True
    ):
        super().__init__(reader)
        if not prompts or len(prompts) != len(completions):
            raise InvalidInput(
                f"every prompt needs a completion: got {len(prompts)} and {len(completions)}"
            )
        self.texts = [_ids(reader, *each, end) for each in zip(prompts, completions, strict=True)]
        self.rows, self.moments = len(self.texts), 1

    def terms(self, reft: Reft, batch: Batch) -> dict[str, Tensor]:
        texts = [self.texts[row] for row in batch.rows.tolist()]
        logits, labels = _logits(self, reft, texts)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return {"language": loss}


class LanguageKeep(ModelLoss):
    """Distance of the edited model's next tokens from the unedited ones', on given texts.

    Formula: mean over tokens of KL(unedited || edited).

    Args:
        reader: of a language model with a tokenizer. prompts: texts, one for a row.
    """

    def __init__(self, reader: Reader, prompts: Sequence[str]):
        super().__init__(reader)
        self.texts = [_ids(reader, each, "", False) for each in prompts]
        self.rows, self.moments = len(self.texts), 1

    def terms(self, reft: Reft, batch: Batch) -> dict[str, Tensor]:
        texts = [self.texts[row] for row in batch.rows.tolist()]
        with torch.no_grad():
            before, _ = _logits(self, None, texts)
        after, labels = _logits(self, reft, texts)
        real = torch.arange(labels.shape[1]) >= torch.tensor(
            [[labels.shape[1] - len(prompt)] for prompt, _ in texts]
        )
        wanted, found = (F.log_softmax(each.float(), -1) for each in (before, after))
        apart = F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
        return {"language": apart[real.to(apart.device)].mean()}


_Text = tuple[list[int], list[int]]


def _ids(reader: Reader, prompt: str, completion: str, end: bool) -> _Text:
    tokenizer = reader.tokenizer
    if reader.kind != "language" or tokenizer is None:
        raise InvalidInput("the loss of a language model needs one, with its tokenizer")
    if is_encoder_decoder(reader.subject):
        raise InvalidInput(f"{type(reader.subject).__name__}: the loss is that of decoders alone")
    [head], _ = tokenize(reader, [prompt])
    tail = list(tokenizer(completion, add_special_tokens=False).input_ids)
    if end and tokenizer.eos_token_id is not None:
        tail.append(tokenizer.eos_token_id)
    if completion and not tail:
        raise InvalidInput(f"completion {completion!r} has no tokens")
    return head, tail


def _logits(loss: ModelLoss, reft: Reft | None, texts: Sequence[_Text]) -> tuple[Tensor, Tensor]:
    """Logits [rows, tokens, words] and labels [rows, tokens], -100 outside of completions."""
    reader, model = loss.reader, loss.reader.subject
    before = max(len(prompt) for prompt, _ in texts)
    behind = max(len(completion) for _, completion in texts)
    ids = torch.full((len(texts), before + behind), reader.tokenizer.pad_token_id or 0)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, completion) in enumerate(texts):
        start, stop = before - len(prompt), before + len(completion)
        ids[row, start:stop] = torch.tensor([*prompt, *completion])
        mask[row, start:stop] = 1
        labels[row, before:stop] = ids[row, before:stop]
    device = input_device(model)
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    positions = reader.position_arguments(inputs)
    with _run_edited(loss, reft, before):
        logits = model(**inputs, **positions, use_cache=False).logits
    return logits, labels.to(logits.device)


@contextmanager
def _run_edited(loss: ModelLoss, reft: Reft | None, prompt: int):
    if reft is None:
        yield
        return
    if reft.steps is not None:
        raise InvalidInput("a language model has no denoising steps: train without per_step")
    if isinstance(reft.tokens, str):
        raise InvalidInput(
            f"tokens={reft.tokens!r}: words are not told apart from those of completions; give "
            "positions"
        )
    edits = [*reft.edits(graph=True), *loss._watching]
    with loss.reader.editing(edits, prompt_length=prompt):
        yield
