"""Files of other libraries: those that they wrote, and those made by their description."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreamreader.errors import DreamreaderError
from dreamreader.sae import (
    BatchTopK,
    JumpReLU,
    SampledTopK,
    SparseAutoencoder,
    TopK,
    fold,
    read_sae,
    write_sae,
)

DATA = Path(__file__).parent / "data"
WRITTEN = sorted(each.parent for each in DATA.rglob("expected.safetensors"))
HANDMADE = ("saeuron", "sdxl_unbox", "gemma_scope", "gemma_scope_2")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("folder", WRITTEN, ids=lambda each: str(each.relative_to(DATA)))
def test_files_of_the_packages_give_their_codes_and_reconstructions(folder):
    """Written by benchmarks/peers/sae_*.py, in environments of these packages."""
    expected = load_file(folder / "expected.safetensors")
    if folder.parent.name == "overcomplete":
        options = json.loads((folder / "options.json").read_text())
        sae = read_sae(folder / "sae.pt", "overcomplete", **options)
    else:
        sae = read_sae(folder)
    x = expected["x"]
    coarse = x.dtype == torch.bfloat16
    allowed = {"rtol": 2e-2, "atol": 2e-2} if coarse else {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(sae.encode(x), expected["codes"], **allowed)
    torch.testing.assert_close(sae(x), expected["output"], **allowed)
    assert sae.encode(x).count_nonzero() == expected["codes"].count_nonzero() > 0
    if sae.threshold is not None:
        assert sae.threshold.dtype == torch.float32


def test_every_format_has_a_file_that_is_tested():
    from dreamreader.sae.formats import READERS

    assert {each.parent.name for each in WRITTEN} | set(HANDMADE) == {*READERS, "gemma_scope_2"}


def test_facts_that_files_hold_are_kept():
    topk = read_sae(DATA / "saelens" / "before-6-topk")
    assert topk.selection == TopK(3) and topk.metadata["hook_name"] == "blocks.8.hook_resid_pre"
    rescaled = read_sae(DATA / "saelens" / "topk-rescaled")
    assert rescaled.rescale and not topk.rescale
    checkpoint = read_sae(DATA / "saelens" / "checkpoint")
    assert checkpoint.selection == BatchTopK(3) and checkpoint.rescale
    groups = read_sae(DATA / "dictionary_learning" / "MatryoshkaBatchTopKSAE")
    assert groups.groups == (6, 12, 24) and groups.selection == BatchTopK(3)
    assert read_sae(DATA / "saelens" / "bfloat16").W_dec.dtype == torch.bfloat16


def weights(seed: int = 0) -> dict[str, Tensor]:
    shapes = {"W_enc": (8, 24), "W_dec": (24, 8), "b_enc": (24,), "b_dec": (8,)}
    return {name: draw(*shape, seed=seed + n) for n, (name, shape) in enumerate(shapes.items())}


def write_by_hand(kind: str, path: Path, **changed) -> dict[str, Tensor]:
    """The files of a format as its description has them, and the tensors in them."""
    path.mkdir(exist_ok=True)
    w = weights()
    threshold = 0.2 + draw(24, seed=9).abs() / 5
    if kind == "sdxl_unbox":
        state = {
            "encoder.weight": w["W_enc"].T,
            "decoder.weight": w["W_dec"].T,
            "pre_bias": w["b_dec"],
            "latent_bias": w["b_enc"],
            "stats_last_nonzero": torch.zeros(24, dtype=torch.long),
        }
        torch.save({"state_dict": state | changed}, path / "state_dict.pth")
        torch.save(draw(24, seed=7), path / "mean.pt")
        config = {"n_dirs_local": 24, "d_model": 8, "k": 3, "auxk": 256}
        (path / "config.json").write_text(json.dumps(config | {"dead_steps_threshold": 2441}))
    elif kind == "saeuron":
        own = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"]}
        own |= {"W_dec": w["W_dec"], "b_dec": w["b_dec"]}
        save_file({name: each.contiguous() for name, each in own.items()}, path / "sae.safetensors")
        config = {"expansion_factor": 3, "normalize_decoder": True, "num_latents": 0, "k": 3}
        config |= {"batch_topk": True, "sample_topk": False, "input_unit_norm": False}
        (path / "cfg.json").write_text(
            json.dumps({**config, "multi_topk": False, "d_in": 8} | changed)
        )
    elif kind == "gemma_scope":
        arrays = {name: each.numpy() for name, each in {**w, "threshold": threshold}.items()}
        np.savez(path / "params.npz", **(arrays | changed))
    else:
        small = {name.replace("W_", "w_"): each for name, each in w.items()}
        save_file({**small, "threshold": threshold} | changed, path / "params.safetensors")
        config = {"architecture": "jump_relu", "model_name": "gemma-v3-270m-pt", "l0": 60}
        (path / "config.json").write_text(json.dumps(config))
    return {**w, "threshold": threshold}


@pytest.mark.parametrize("kind", HANDMADE)
def test_files_made_by_the_description_of_a_format(kind, tmp_path):
    """No package writes these files: SAeUron and sdxl-unbox are scripts, Gemma Scope is data."""
    w, x = write_by_hand(kind, tmp_path), draw(10, 8, seed=99)
    sae = read_sae(tmp_path)
    centred = x - w["b_dec"] if kind in ("saeuron", "sdxl_unbox") else x
    acts = centred @ w["W_enc"] + w["b_enc"]
    if kind in ("saeuron", "sdxl_unbox"):
        best = acts.topk(3, dim=1)
        codes = torch.zeros_like(acts).scatter(1, best.indices, best.values.relu())
    else:
        codes = acts.relu() * (acts > w["threshold"])
    torch.testing.assert_close(sae.encode(x), codes)
    torch.testing.assert_close(sae(x), codes @ w["W_dec"] + w["b_dec"])
    if kind == "sdxl_unbox":
        assert torch.equal(sae.statistics["mean"], draw(24, seed=7)) and sae.aux.k == 256
    if kind == "saeuron":
        assert sae.metadata["trained_with"] == "batch_topk"


def test_saeuron_normalises_each_row_where_its_file_says_so(tmp_path):
    w = write_by_hand("saeuron", tmp_path, input_unit_norm=True)
    x = 3 + draw(10, 8, seed=99)
    mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    acts = ((x - mean) / (std + 1e-5) - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    best = acts.topk(3, dim=1)
    codes = torch.zeros_like(acts).scatter(1, best.indices, best.values.relu())
    rebuilt = (codes @ w["W_dec"] + w["b_dec"]) * std + mean
    torch.testing.assert_close(read_sae(tmp_path)(x), rebuilt)


def test_factors_that_files_before_6_leave_to_the_reader(tmp_path):
    """A factor of each latent's value in the decoder, and one of the inputs that no file holds."""
    plain = read_sae(DATA / "saelens" / "before-6-standard")
    shutil.copytree(DATA / "saelens" / "before-6-standard", tmp_path / "sae")
    factor = 1 + draw(24).abs()
    changed_tensors(tmp_path / "sae" / "sae_weights.safetensors", scaling_factor=factor)
    with pytest.raises(DreamreaderError, match="does not say finetuning_scaling_factor"):
        read_sae(tmp_path / "sae")
    changed_config(tmp_path / "sae", finetuning_scaling_factor=True, normalize_activations=True)
    sae, x = read_sae(tmp_path / "sae", input_scale=2.0), draw(9, 8)
    codes = plain.encode(2 * x)
    torch.testing.assert_close(sae.encode(x), codes)
    torch.testing.assert_close(sae(x), ((codes * factor) @ plain.W_dec + plain.b_dec) / 2)


def trained(selection, **options) -> SparseAutoencoder:
    sae = SparseAutoencoder(8, 24, selection, tied=False, **options)
    sae.set_tensors({name: each / 2 for name, each in weights(3).items()})
    if sae.normalise in ("standardise", "average_norm"):
        sae.fit_normalisation(2 + 3 * draw(50, 8))
    if not isinstance(selection, TopK):
        sae.threshold = 0.3
    return sae.eval()


@pytest.mark.parametrize("format", ["saelens", "dictionary_learning"])
@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("normalise", ["none", "standardise", "average_norm"])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("selection", [TopK(3), BatchTopK(3), SampledTopK(3, l=2), JumpReLU()])
def test_what_is_written_for_others_computes_the_same(
    selection, rescale, normalise, applied, format, tmp_path
):
    """That the packages read these files is checked by benchmarks/peers/sae_written.py."""
    options = {"rescale": rescale, "normalise": normalise, "apply_b_dec_to_input": applied}
    sae, x = trained(selection, **options), 2 + 3 * draw(40, 8, seed=5)
    write_sae(sae, tmp_path, format)
    found = read_sae(tmp_path)
    torch.testing.assert_close(found.encode(x), sae.encode(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found(x), sae(x), rtol=1e-4, atol=1e-4)
    assert found.normalise == "none" and not found.rescale
    config = json.loads(
        (tmp_path / ("cfg.json" if format == "saelens" else "config.json")).read_text()
    )
    if format == "saelens":
        topk = isinstance(selection, TopK)
        assert config["architecture"] == ("topk" if topk else "jumprelu")
        assert config["normalize_activations"] == config["reshape_activations"] == "none"
        assert config["apply_b_dec_to_input"] is applied


def test_folding_leaves_thresholds_with_any_scale_of_inputs():
    """A threshold in units of decoder norms is not off by the factor that goes into the decoder."""
    sae = trained(BatchTopK(3), rescale=True, normalise="average_norm")
    sae.input_scale.fill_(7.0)
    folded, x = fold(sae), draw(60, 8, seed=5)
    assert torch.equal(folded.threshold, sae.threshold)
    assert torch.equal(folded.encode(x) > 0, sae.encode(x) > 0)
    assert not torch.allclose(folded.W_dec.norm(dim=1), sae.W_dec.norm(dim=1))
    torch.testing.assert_close(folded(x), sae(x), rtol=1e-4, atol=1e-5)


def test_thresholds_of_a_bfloat16_autoencoder_are_written_in_full(tmp_path):
    sae = trained(BatchTopK(3)).bfloat16()
    sae.threshold = 0.300390625 + 2**-14  # halfway between two bfloat16 numbers, and a little
    write_sae(sae, tmp_path, "saelens")
    assert torch.equal(read_sae(tmp_path).threshold, sae.threshold)
    assert load_file(tmp_path / "sae_weights.safetensors")["threshold"].dtype == torch.float32


def test_layer_norm_and_heads_stay_options_of_saelens(tmp_path):
    sae = trained(BatchTopK(3), normalise="layer_norm", reshape="hook_z")
    write_sae(sae, tmp_path, "saelens")
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["normalize_activations"] == "layer_norm"
    assert config["reshape_activations"] == "hook_z"
    x = draw(5, 2, 4)
    torch.testing.assert_close(read_sae(tmp_path)(x), sae(x))
    with pytest.raises(DreamreaderError, match="no autoencoder with normalise='layer_norm'"):
        write_sae(sae, tmp_path / "other", "dictionary_learning")


def changed_config(folder: Path, **changed) -> None:
    file = next(each for each in folder.iterdir() if each.name in ("cfg.json", "config.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def changed_tensors(file: Path, remove: str = "", **changed) -> None:
    found = load_file(file) if file.suffix == ".safetensors" else torch.load(file)
    found = {name: each for name, each in found.items() if name != remove} | changed
    save_file(found, file) if file.suffix == ".safetensors" else torch.save(found, file)


SAELENS, DL, SPARSIFY = (DATA / "saelens/jumprelu", DATA / "dictionary_learning", DATA / "sparsify")
NAN = torch.tensor([math.nan] + [0.5] * 23)


@pytest.mark.parametrize(
    "folder, change, said",
    [
        (SAELENS, lambda p: changed_config(p, architecture="gated"), "unknown architecture"),
        (SAELENS, lambda p: changed_config(p, d_sae=32), "d_sae=32, its weights have 24"),
        (SAELENS, lambda p: changed_config(p, temperature=2), "not known here: temperature"),
        (SAELENS, lambda p: changed_config(p, metadata={"sae_lens_version": "7.1.0"}), "7.1.0"),
        (
            SAELENS,
            lambda p: changed_config(p, normalize_activations="covariance_whitening"),
            "unknown normalize_activations",
        ),
        (
            SAELENS,
            lambda p: changed_config(p, normalize_activations="expected_average_only_in"),
            "give input_scale=",
        ),
        (SAELENS, lambda p: (p / "cfg.json").write_text("{"), "cfg.json is no JSON"),
        (SAELENS, lambda p: (p / "cfg.json").write_text("[]"), "no JSON object, but list"),
        (
            SAELENS,
            lambda p: changed_tensors(p / "sae_weights.safetensors", "b_enc"),
            "sae_weights.safetensors lacks b_enc",
        ),
        (
            SAELENS,
            lambda p: changed_tensors(p / "sae_weights.safetensors", W_skip=torch.ones(8, 8)),
            "has W_skip, which no such file has",
        ),
        (
            SAELENS,
            lambda p: changed_tensors(p / "sae_weights.safetensors", b_dec=torch.ones(9)),
            r"b_dec must be \[8\], got \[9\]",
        ),
        (
            SAELENS,
            lambda p: changed_tensors(p / "sae_weights.safetensors", threshold=NAN),
            "1 thresholds are NaN",
        ),
        (
            SAELENS,
            lambda p: (p / "sae_weights.safetensors").write_bytes(b"\x08" * 40),
            "no whole safetensors file",
        ),
        (
            DL / "BatchTopKSAE",
            lambda p: changed_tensors(p / "ae.pt", threshold=torch.tensor(math.nan)),
            "threshold is NaN",
        ),
        (
            DL / "BatchTopKSAE",
            lambda p: changed_tensors(p / "ae.pt", **{"encoder.bias": torch.ones(3)}),
            r"b_enc must be \[24\], got \[3\]",
        ),
        (
            DL / "BatchTopKSAE",
            lambda p: changed_config(p, trainer={"dict_class": "GatedAutoEncoder"}),
            "unknown dict_class",
        ),
        (DL / "BatchTopKSAE", lambda p: changed_config(p, trainer=None), "names no class"),
        (DL / "BatchTopKSAE", lambda p: (p / "config.json").unlink(), "give dict_class="),
        (DL / "AutoEncoder", lambda p: changed_tensors(p / "ae.pt", k=torch.tensor(3)), "has k"),
        (
            DL / "AutoEncoder",
            lambda p: torch.save(torch.nn.Linear(2, 2), p / "ae.pt"),
            "objects that run code",
        ),
        (DL / "AutoEncoder", lambda p: (p / "ae.pt").write_bytes(b"no"), "ae.pt"),
        (DL / "AutoEncoder", lambda p: torch.save([1], p / "ae.pt"), "no dictionary, but list"),
        (SPARSIFY / "topk", lambda p: changed_config(p, activation="groupmax"), "groupmax"),
        (SPARSIFY / "topk", lambda p: changed_config(p, skip_connection=True), "skip_connection"),
        (SPARSIFY / "topk", lambda p: changed_config(p, k="3"), "k is '3', expected int"),
        (SPARSIFY / "topk", lambda p: changed_config(p, d_in=9), "d_in=9, its weights have 8"),
        (SPARSIFY / "topk", lambda p: (p / "sae.safetensors").unlink(), "give format="),
    ],
)
def test_files_that_are_not_right_are_refused(folder, change, said, tmp_path):
    shutil.copytree(folder, tmp_path / "sae")
    change(tmp_path / "sae")
    with pytest.raises(DreamreaderError, match=said):
        read_sae(tmp_path / "sae")


@pytest.mark.parametrize(
    "kind, changed, said",
    [
        ("sdxl_unbox", {"W": torch.ones(1)}, "has W, which no such file has"),
        ("sdxl_unbox", {"pre_bias": "no"}, "pre_bias is no tensor, but str"),
        ("saeuron", {"rank": 3}, "not known here: rank"),
        ("gemma_scope", {"b_dec": np.array([None])}, "no .npz of numbers"),
        ("gemma_scope_2", {"affine_skip_connection": torch.ones(8, 8)}, "is a transcoder"),
        ("gemma_scope_2", {"threshold": NAN}, "1 thresholds are NaN"),
    ],
)
def test_files_made_by_hand_that_are_not_right_are_refused(kind, changed, said, tmp_path):
    write_by_hand(kind, tmp_path, **changed)
    with pytest.raises(DreamreaderError, match=said):
        read_sae(tmp_path)


def test_what_is_asked_of_read_and_write_must_be_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no"):
        read_sae(tmp_path / "nothing")
    with pytest.raises(DreamreaderError, match=r"files of no format are there \(none\)"):
        read_sae(tmp_path)
    with pytest.raises(DreamreaderError, match="unknown format of an autoencoder 'saelens6'"):
        read_sae(SAELENS, "saelens6")
    with pytest.raises(DreamreaderError, match="unknown option of saelens 'k'"):
        read_sae(SAELENS, k=3)
    with pytest.raises(FileNotFoundError):
        read_sae(SAELENS, "gemma_scope")
    with pytest.raises(DreamreaderError, match="unknown format that is written"):
        write_sae(trained(TopK(3)), tmp_path, "sparsify")
    sae = SparseAutoencoder(8, 24, BatchTopK(3))
    with pytest.raises(DreamreaderError, match="has none yet"):
        write_sae(sae, tmp_path, "saelens")
    with pytest.raises(DreamreaderError, match="whole numbers k"):
        write_sae(trained(BatchTopK(2.5)), tmp_path, "dictionary_learning")
    with pytest.raises(DreamreaderError, match="a whole module|objects that run code"):
        read_sae(DATA / "overcomplete" / "module.pt", "overcomplete")
    jump = DATA / "overcomplete" / "jump" / "sae.pt"
    with pytest.raises(DreamreaderError, match="thresholds of its own"):
        read_sae(jump, "overcomplete", k=3)


def test_an_autoencoder_without_a_threshold_yet_goes_to_dictionary_learning_and_back(tmp_path):
    write_sae(SparseAutoencoder(8, 24, BatchTopK(3)), tmp_path, "dictionary_learning")
    assert torch.load(tmp_path / "ae.pt")["threshold"].item() == -1
    assert read_sae(tmp_path).threshold is None
