"""Several trainings in one batch: each row is what its own adapters give."""

import pytest
import torch
from reft.subjects import SITES, pipeline, settings

from dreamreader.errors import InvalidInput
from dreamreader.reft import Reft, sweep


@pytest.mark.parametrize("per_step", [None, 3], ids=["one", "each step"])
def test_a_row_is_what_its_own_adapters_give(per_step: int | None):
    reader, refts = pipeline(), []
    for rank, variant in ((1, "loreft"), (3, "direft"), (1, "bias")):
        reft = Reft.for_sites(reader, SITES, rank, variant, per_step=per_step, **settings())
        for each in reft.parameters():
            torch.nn.init.normal_(each, std=0.2)
        refts.append(reft)
    asked = {"seeds": 3, "output_type": "latent", **settings()}
    prompts, alpha = ["a cat", "a dog", "a tree", "a cat"], [1.0, 0.5, 1.0, 0.0]
    edits = sweep(refts, [1, 0, 2, 1], alpha, branch="cond")
    found = reader.run(prompts, edits=edits, **asked).images
    for row, number in enumerate([1, 0, 2, 1]):
        own = refts[number].edits(alpha[row], branch="cond")
        alone = reader.run(prompts, edits=own, **asked).images
        torch.testing.assert_close(found[row], alone[row], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[3], reader.run(prompts, **asked).images[3])


def test_what_does_not_fit_together_is_refused():
    one = Reft({"a": 4}, 2)
    with pytest.raises(InvalidInput, match=r"sweep: sites differ: \('a',\) and \('b',\)"):
        sweep([one, Reft({"b": 4}, 2)], [0, 1])
    with pytest.raises(InvalidInput, match="sweep: steps differ: None and 2"):
        sweep([one, Reft({"a": 4}, 2, steps=2)], [0, 1])
    with pytest.raises(InvalidInput, match="sweep: diagonal differ: False and True"):
        sweep([one, Reft({"a": 4}, 2, "diagonal")], [0, 1])
    with pytest.raises(InvalidInput, match="sweep: there are no trainings; adapter says which"):
        sweep([], [0])
    stepped = [Reft({"a": 4}, 2, steps=2) for _ in range(2)]
    with pytest.raises(InvalidInput, match="sweep: at is for one training; adapter says which"):
        sweep(stepped, [0, 1], at=[1, 1])


def test_tokens_are_compared_by_what_they_choose():
    def masked(*mask: bool) -> Reft:
        return Reft({"a": 4}, 2, tokens=torch.tensor(mask))

    assert len(sweep([Reft({"a": 4}, 2, tokens=each) for each in ([0, 1], (0, 1))], [0, 1])) == 1
    assert len(sweep([masked(True, False), masked(True, False)], [0, 1])) == 1
    with pytest.raises(InvalidInput, match="sweep: tokens differ"):
        sweep([masked(True, False), masked(False, True)], [0, 1])
