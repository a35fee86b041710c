"""Every name opens through one function: folders, hub ids, files, embedded models."""

import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import constants
from tiny.embedded import untrained

import dreamreader as dr
from dreamreader import zoo
from dreamreader.errors import InvalidInput, UnknownName
from dreamreader.specs.parts import Subject
from dreamreader.specs.subject import open_subject

COMMIT = "0" * 40


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "pipeline"
    untrained().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def language(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "language"
    model, tokenizer = tiny.language_model("gpt2")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """An empty cache of the hub, which is switched off; gives what puts a folder into the cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the tries of the client

    def put(repo: str, folder: Path) -> None:
        home = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        shutil.copytree(folder, home / "snapshots" / COMMIT)
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(COMMIT)

    return put


@pytest.fixture
def answering(hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str], None]]:
    """A hub on this machine; gives what sets its one answer: status and error code."""
    answer = [404, "RepoNotFound"]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(answer[0])
            self.send_header("X-Error-Code", answer[1])
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *args: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    reach(monkeypatch, f"http://127.0.0.1:{server.server_port}")

    def set_answer(status: int, code: str) -> None:
        answer[:] = [status, code]

    yield set_answer
    server.shutdown()
    server.server_close()


def reach(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.mark.parametrize("kind", ["pipeline", "language"])
def test_a_folder_and_a_hub_id_are_the_same_thing_everywhere(kind, hub, request) -> None:
    folder = request.getfixturevalue(kind)
    hub("some-one/tiny", folder)
    hub("tiny-one", folder)
    readers = [dr.load(folder), dr.load("some-one/tiny"), dr.load("tiny-one")]
    readers.append(open_subject(Subject(model="some-one/tiny")))
    first = readers[0]
    assert hasattr(first.subject, "components") == (kind == "pipeline")
    for other in readers[1:]:
        assert type(other.subject) is type(first.subject)
        assert (other.tokenizer is None) == (kind == "pipeline")
        assert other.sites().names == first.sites().names


def test_a_hub_that_is_switched_off_or_not_reached_is_said(hub, language, monkeypatch) -> None:
    with pytest.raises(
        InvalidInput, match=r"some-one/tiny: not whole in the local cache .*OFFLINE"
    ):
        dr.load("some-one/tiny")
    with pytest.raises(UnknownName, match=r"unknown model 'tiny-one'; .* As a hub id: .*OFFLINE"):
        dr.load("tiny-one")
    reach(monkeypatch, "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(
        InvalidInput, match=r"the hub \(http://127.0.0.1:9\) could not be reached: "
    ):
        dr.load("some-one/tiny")
    hub("some-one/tiny", language)
    assert dr.load("some-one/tiny").tokenizer is not None  # the cache has it whole


def test_weights_that_are_not_in_the_cache_say_so(hub, language, pipeline, tmp_path) -> None:
    for folder, weights in ((language, "model"), (pipeline, "unet/diffusion_pytorch_model")):
        part = tmp_path / folder.name
        shutil.copytree(folder, part)
        (part / f"{weights}.safetensors").unlink()
        hub(f"some-one/{folder.name}", part)
        with pytest.raises(InvalidInput, match="not whole in the local cache"):
            dr.load(f"some-one/{folder.name}")
        with pytest.raises(InvalidInput, match=f"{part}: not a whole"):
            dr.load(part)


@pytest.mark.parametrize(
    "status, code, text",
    [
        (404, "RepoNotFound", r"unknown model 'some-one/tiny': the hub \(http.*\) has no such id"),
        (401, "RepoNotFound", r"unknown model 'some-one/tiny': the hub \(http.*\) has no such id"),
        (403, "GatedRepo", "some-one/tiny: the hub gives it only to those who accepted its terms"),
        (404, "EntryNotFound", r"some-one/tiny on the hub: no model_index.json .* no config.json"),
    ],
)
def test_what_the_hub_answers_is_said(answering, status, code, text) -> None:
    answering(status, code)
    with pytest.raises(InvalidInput, match=text):
        dr.load("some-one/tiny")


def test_typos_of_known_names_do_not_ask_the_hub(answering) -> None:
    answering(500, "Never")
    with pytest.raises(UnknownName, match="'shapes-unnet'; nearest: shapes-unet, .* or a hub id"):
        dr.load("shapes-unnet")
    with pytest.raises(
        UnknownName, match="'./no-such-folder'; .* There is no folder no-such-folder"
    ):
        dr.load("./no-such-folder")


def test_what_is_no_model_says_what_it_is(tmp_path, pipeline, language) -> None:
    with pytest.raises(InvalidInput, match="no model_index.json .* and no config.json"):
        dr.load(tmp_path)
    with pytest.raises(InvalidInput, match="a UNet2DConditionModel, one part of a pipeline"):
        dr.load(pipeline / "unet")
    with pytest.raises(InvalidInput, match=r"config.json is a file; give the folder"):
        dr.load(language / "config.json")
    for part in ("model.safetensors", "config.json"):
        shutil.copy(language / part, tmp_path)
    with pytest.raises(
        InvalidInput, match="not a whole transformers model: its tokenizer is empty"
    ):
        dr.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InvalidInput, match="no diffusers pipeline"):
        zoo.load_pipeline(language)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidInput, match="an adapter of PEFT; open its base model"):
        dr.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InvalidInput, match="config.json: an object expected, got list"):
        dr.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip_vision_model"}))
    with pytest.raises(InvalidInput, match="clip_vision_model is no model .* that generates text"):
        dr.load(tmp_path)


def test_a_head_without_weights_is_refused(tmp_path) -> None:
    model, tokenizer = tiny.language_model("gpt-neox")
    model.base_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        InvalidInput, match="not a whole language model: its weights have no .*(lm_head|embed_out)"
    ):
        dr.load(tmp_path)


def test_encoder_decoders_open_with_their_own_class(tmp_path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = tiny.language_model("gpt2")[1]
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    config = T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, **sizes)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert isinstance(dr.load(tmp_path).subject, T5ForConditionalGeneration)


@pytest.mark.parametrize("kind", ["pipeline", "language"])
def test_weights_have_the_dtype_asked_for(kind, request, tmp_path) -> None:
    folder = request.getfixturevalue(kind)

    def dtype_of(reader: dr.Reader) -> torch.dtype:
        return getattr(reader.subject, "unet", reader.subject).dtype

    assert dtype_of(dr.load(folder)) == torch.float32
    half = dr.load(folder, dtype="bfloat16")
    assert dtype_of(half) == torch.bfloat16
    half.subject.save_pretrained(tmp_path)
    if half.tokenizer is not None:
        half.tokenizer.save_pretrained(tmp_path)
    assert dtype_of(dr.load(tmp_path)) == torch.float32
    auto = dr.load(tmp_path, dtype="auto")
    assert dtype_of(auto) == torch.bfloat16
    assert auto.to(dtype=torch.float32) is auto and dtype_of(auto) == torch.float32
    assert dtype_of(auto.to("cpu", "float16")) == torch.float16


def test_embedded_models_are_float32_unless_told() -> None:
    assert dr.load("shapes-unet", dtype="auto").subject.unet.dtype == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is here")
def test_a_device_that_is_not_here_is_said_before_anything_is_opened(language) -> None:
    with pytest.raises(
        InvalidInput, match=r"device cuda(:0)?: (this torch has no CUDA|torch .* finds)"
    ):
        dr.load("no-such-model", device="cuda")
    with pytest.raises(InvalidInput, match="device cuda"):
        open_subject(Subject(model="no-such-model", device="cuda"))
    reader = dr.load(language)
    with pytest.raises(InvalidInput, match="device cuda"):
        reader.to("cuda", "float16")
    assert reader.subject.dtype == torch.float32


def test_devices_and_dtypes_that_do_not_exist(language) -> None:
    with pytest.raises(InvalidInput, match="device 'gpu' is none of torch; expected cpu, cuda"):
        dr.load(language, device="gpu")
    with pytest.raises(UnknownName, match="unknown dtype 'fp16'; nearest: float16, bfloat16"):
        dr.load(language, dtype="fp16")
    with pytest.raises(UnknownName, match="unknown dtype 'int8'"):
        dr.load(language).to(dtype=torch.int8)
