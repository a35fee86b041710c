"""Which dimension of a value is which, told by the module that gives it."""

from typing import Any

import diffusers
import pytest
import tiny
import torch
from diffusers.models.normalization import RMSNorm
from diffusers.models.resnet import Downsample2D
from diffusers.models.transformers.sana_transformer import GLUMBConv
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dreamreader.edits import Steer
from dreamreader.engine import Reader, Record
from dreamreader.engine._axes import axes_of, describe_open
from dreamreader.errors import ClockUnknown, InvalidInput, UnknownName

MAP = ("rows", "features", "height", "width")
LAST = ("rows", "height", "width", "features")
SHAPE = (2, 8, 5, 8)  # as many features as cells on one side: only the module can tell


class ChannelNorm(nn.Module):
    """A norm with one weight for each channel of a feature map."""

    def __init__(self, width: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(8, 8), LAST),
        (nn.LayerNorm(8), LAST),
        (nn.Embedding(9, 8), LAST),
        (RMSNorm(8, 1e-5), LAST),
        (nn.Conv2d(8, 8, 1), MAP),
        (nn.GroupNorm(2, 8), MAP),
        (nn.BatchNorm2d(8), MAP),
        (nn.AvgPool2d(2), MAP),
        (ChannelNorm(8), MAP),
        (nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), MAP),
        (nn.Sequential(nn.Linear(3, 8), nn.ReLU()), LAST),
        (Downsample2D(8, use_conv=True), MAP),
        (GLUMBConv(8, 8), MAP),
        (nn.SiLU(), None),
        (nn.Sequential(nn.Conv2d(8, 8, 1), nn.Linear(8, 8)), LAST),
        (nn.ModuleList([nn.Conv2d(8, 8, 1), nn.Linear(8, 8)]), None),
        (nn.ModuleList([nn.Linear(8, 8)]), None),  # may have been turned
        (nn.ModuleList([nn.Conv2d(3, 8, 1)]), None),
    ],
)
def test_modules_say_where_their_features_are(module: nn.Module, expected: Any) -> None:
    assert axes_of(SHAPE, module) == expected


def test_a_layer_without_sizes_is_told_by_the_module_around_it() -> None:
    around = nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU())
    assert axes_of(SHAPE, around[1], [around]) == MAP
    assert axes_of((2, 8, 5), nn.Conv1d(3, 8, 1)) == ("rows", "features", "tokens")
    assert axes_of((2, 5, 8), nn.Linear(8, 8)) == ("rows", "tokens", "features")


CHANNELS = ("rows", "features", "tokens")
TOKENS = ("rows", "tokens", "features")


class Snake(nn.Module):
    """One number for each channel of [rows, channels, samples]."""

    def __init__(self, width: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.alpha * x).sin()


@pytest.mark.parametrize("samples", [5, 6])
def test_layers_without_sizes_between_convolutions_have_channels_first(samples: int) -> None:
    net = nn.Sequential(nn.Conv1d(4, 6, 1), nn.GELU(), nn.Dropout(0.1), Snake(6))
    shape = (2, 6, samples)
    assert all(axes_of(shape, each, [net]) == CHANNELS for each in [*net, net])
    x = torch.randn(2, 4, samples)
    net.eval()
    with torch.no_grad(), Reader(net).recording("1") as cache:
        net(x)
    value = net[1](net[0](x))
    assert torch.equal(cache["1"].tensor[:, 0], value.transpose(1, 2))


def test_three_dimensions_are_tokens_and_features_where_linear_layers_are_around() -> None:
    mlp = nn.Sequential(nn.Conv1d(4, 6, 1), nn.GELU(), nn.Flatten(2), nn.Linear(6, 6), nn.GELU())
    assert axes_of((2, 6, 5), mlp[1], [mlp]) == CHANNELS
    assert axes_of((2, 6, 6), mlp[4], [mlp]) == axes_of((2, 6, 6), mlp) == TOKENS
    mixed = nn.ModuleList([nn.Conv1d(6, 6, 1), nn.Linear(6, 6)])
    assert axes_of((2, 6, 6), mixed) is axes_of((2, 6, 6), nn.GELU(), [mixed]) is None
    assert axes_of((2, 6, 5), mixed) == CHANNELS and axes_of((2, 5, 6), mixed) == TOKENS
    patches = nn.ModuleList([nn.Conv2d(3, 6, 2)])  # [rows, 6, 6]: six patches of six features
    assert axes_of((2, 6, 6), patches) == axes_of((2, 6, 5), patches) == TOKENS
    turned = Conv1D(6, 4)
    outer = nn.ModuleList([turned, nn.Conv1d(6, 6, 1)])
    assert axes_of((2, 6, 6), turned, [outer]) == TOKENS


def test_the_lengths_of_a_call_decide_in_blocks_with_both_kinds_of_layers() -> None:
    mixed = nn.ModuleList([nn.Conv1d(6, 6, 1), nn.Linear(9, 9)])
    assert axes_of((2, 6, 7), mixed, lengths=[6]) == TOKENS
    assert axes_of((2, 7, 6), mixed, lengths=[6]) == CHANNELS


class Encoder(nn.Module):
    """Layers with tokens first, called with [rows, tokens, features]."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        turned = x.transpose(0, 1)
        many = (turned,) * 3 if isinstance(self.layer, nn.MultiheadAttention) else (turned,)
        found = self.layer(*many)
        return (found[0] if isinstance(found, tuple) else found).transpose(0, 1)


@pytest.mark.parametrize(
    ("layer", "site"),
    [
        (nn.LSTM(8, 8), "layer"),
        (nn.GRU(8, 8), "layer"),
        (nn.MultiheadAttention(8, 2), "layer"),
        (nn.TransformerEncoderLayer(8, 2, 16), "layer"),
        (nn.TransformerEncoderLayer(8, 2, 16), "layer.norm2"),
        (nn.LSTM(8, 8, batch_first=True), "layer"),
    ],
)
def test_layers_with_tokens_first_are_read_and_edited_by_rows(layer: Any, site: str) -> None:
    net, x = Encoder(layer).eval(), torch.randn(2, 5, 8)
    swapped = bool(getattr(layer, "batch_first", False))
    with torch.no_grad(), Reader(net).recording(site) as cache:
        y = net(x)
    expected = y.transpose(0, 1) if swapped else y
    assert torch.equal(cache[site].tensor[:, 0], expected)
    push = torch.zeros(8)
    push[0] = 1.0
    with torch.no_grad(), Reader(net).editing(Steer(site, push, 1.0, rows=[1])):
        moved = net(x) - y
    moved = moved.transpose(0, 1) if swapped else moved
    assert bool((moved[1, :, 0] != 0).all()) and not bool(moved[0].any())
    assert not bool(moved[..., 1:].any())


def test_four_dimensions_of_a_language_model_are_heads_in_attention_only() -> None:
    assert axes_of((2, 3, 7, 8), nn.Linear(8, 8), lengths=[7]) is None
    assert axes_of((3, 2, 7, 8), nn.ModuleList([nn.Linear(8, 8)]), lengths=[7]) is None
    assert axes_of((3, 1, 1, 8), nn.Linear(8, 8), lengths=[1]) is None
    streams = axes_of((2, 7, 3, 8), nn.Linear(8, 8), lengths=[7])
    assert streams == ("rows", "tokens", "heads", "features")
    assert axes_of((2, 3, 7, 8), nn.Conv2d(3, 3, 1), lengths=[7]) == MAP
    assert 'layout="rows features height width"' in describe_open("0", nn.SiLU(), (2, 3, 7, 8))
    holder = tiny.language_model("llama")[0].model.layers[0].self_attn
    text = describe_open("0", nn.SiLU(), (2, 3, 7, 8), [holder])
    assert 'layout="rows tokens heads features"' in text


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_every_module_of_an_audio_decoder_has_channels_first() -> None:
    vae = diffusers.AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 2],
        decoder_channels=8,
        decoder_input_channels=4,
        audio_channels=2,
    ).eval()
    found: dict[str, Any] = {}
    names = {module: name for name, module in vae.named_modules()}

    def keep(module: nn.Module, _: Any, output: Tensor) -> None:
        name, around = names[module], []
        while name:
            name = name.rpartition(".")[0]
            around.append(vae.get_submodule(name))
        found[names[module]] = axes_of(output.shape, module, around)

    handles = [each.register_forward_hook(keep) for each in vae.decoder.modules()]
    with torch.no_grad():
        vae.decode(torch.randn(1, 4, 4))
        vae.decode(torch.randn(1, 4, 16))
    for handle in handles:
        handle.remove()
    assert len(found) > 20 and set(found.values()) == {CHANNELS}


def recorded(net: nn.Module, x: Tensor, request: Any = "0") -> tuple[Any, Tensor]:
    with torch.no_grad(), Reader(net).recording(request) as cache:
        y = net(x)
    return cache["0"], y


def test_a_linear_layer_of_four_dimensions_is_read_and_edited_at_its_last_one() -> None:
    net, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8, 5, 8)
    found, y = recorded(net, x)
    assert found.hw == (8, 5) and torch.equal(found.tensor[:, 0], y.flatten(1, 2))
    push = torch.zeros(8)
    push[0] = 1.0
    with torch.no_grad(), Reader(net).editing(Steer("0", push, alpha=1.0)):
        moved = net(x) - y
    assert bool((moved[..., 0] != 0).all()) and not bool(moved[..., 1:].any())


def test_what_no_module_tells_is_refused_and_can_be_said() -> None:
    net, x = nn.Sequential(nn.SiLU()), torch.randn(2, 3, 4, 5)
    with pytest.raises(InvalidInput, match=r"0: SiLU gives \[2, 3, 4, 5\].*layout="):
        recorded(net, x)
    found, y = recorded(net, x, Record("0", layout="rows features height width"))
    assert found.hw == (4, 5)
    assert torch.equal(found.tensor[:, 0], y.flatten(2).transpose(1, 2))
    turned, _ = recorded(net, x, Record("0", layout="rows tokens heads features"))
    assert turned.axes == ("rows", "steps", "tokens", "heads", "d_head")
    assert torch.equal(turned.tensor[:, 0], y)
    with (
        torch.no_grad(),
        Reader(net).editing(Steer("0", torch.ones(3), 1.0, layout="rows features height width")),
    ):
        assert torch.allclose(net(x), y + 1 / 3**0.5) or torch.allclose(net(x), y + 1)


@pytest.mark.parametrize(
    ("layout", "error", "text"),
    [
        ("rows colour", UnknownName, "colour"),
        ("rows tokens", InvalidInput, "rows and features among them"),
        ("rows rows features", InvalidInput, "every dimension once"),
    ],
)
def test_layouts_are_checked(layout: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Record("0", layout=layout)


def test_a_layout_of_another_rank_is_refused() -> None:
    with pytest.raises(InvalidInput, match="names 3 dimensions, its values are"):
        recorded(
            nn.Sequential(nn.SiLU()),
            torch.randn(2, 3, 4, 5),
            Record("0", layout="rows tokens features"),
        )


def test_every_module_of_a_unet_and_its_decoder_is_read_as_hooks_see_it() -> None:
    pipe = tiny.pipeline("sd")
    pipe.set_progress_bar_config(disable=True)
    reader = Reader(pipe)
    seen: dict[str, Tensor] = {}
    modules = reader._subject.modules()

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, Tensor) and value.dim() == 4:
                seen.setdefault(name, value.detach().clone())

        return hook

    maps = [name for name in modules if name.startswith(("unet.", "vae.decoder."))]
    handles = [modules[name].register_forward_hook(keep(name)) for name in maps]
    run = {"output_type": "pt", **tiny.arguments("sd", 1)}
    reader.run("a red cat", seeds=0, **run)
    for handle in handles:
        handle.remove()
    checked = 0
    names = [name for name in seen if not name.endswith("nonlinearity")][::7]
    for name in names:
        found = reader.run("a red cat", seeds=0, record=name, **run).cache[name]
        last = found.tensor.select(1, 0) if len(found.branches) > 1 else found.tensor
        rows = seen[name][:1].flatten(2).transpose(1, 2)
        assert torch.equal(last[0, 0], rows[0]), name
        checked += 1
    assert checked > 10


class Stranger(diffusers.StableDiffusionPipeline):
    """A pipeline with a loop of its own, whose guidance is not known."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize("request_", ["record", "rows 0", "rows 3", "per row"])
def test_rows_are_refused_where_the_layout_of_branches_is_unknown(request_: str) -> None:
    pipe = Stranger(**tiny.pipeline("sd").components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    reader, site = Reader(pipe), "unet.mid_block"
    push = torch.ones(32)
    block = {
        "record": lambda: reader.recording(site),
        "rows 0": lambda: reader.editing(Steer(site, push, rows=[0])),
        "rows 3": lambda: reader.editing(Steer(site, push, rows=[3])),
        "per row": lambda: reader.editing(Steer(site, push, alpha=[0.0, 1.0])),
    }[request_]
    with pytest.raises(ClockUnknown, match="Stranger lays out its guidance"):
        with block():
            pipe(["a red cat", "a tree"], output_type="latent", **tiny.arguments("sd", 1))
    with reader.editing(Steer(site, push)):  # one that needs no rows runs
        pipe(["a red cat", "a tree"], output_type="latent", **tiny.arguments("sd", 1))


class Blocks(nn.Module):
    """Blocks around layers with tokens first, called with [rows, tokens, features]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attn = nn.MultiheadAttention(8, 2)
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.transpose(0, 1))
        return self.mlp(self.attn(x, x, x)[0]).transpose(0, 1)


@pytest.mark.parametrize("site", ["norm", "mlp", "mlp.0", "mlp.1"])
def test_modules_beside_layers_with_tokens_first_are_refused_and_can_be_said(site: str) -> None:
    net, x = Blocks().eval(), torch.randn(2, 5, 8)
    with pytest.raises(InvalidInput, match=rf"{site}: \w+ gives \[5, 2, 8\].*tokens rows features"):
        with torch.no_grad(), Reader(net).recording(site):
            net(x)
    seen: list[Tensor] = []
    handle = net.get_submodule(site).register_forward_hook(lambda *given: seen.append(given[2]))
    said = Record(site, layout="tokens rows features")
    with torch.no_grad(), Reader(net).recording(said) as cache:
        net(x)
    handle.remove()
    assert torch.equal(cache[site].tensor[:, 0], seen[0].transpose(0, 1))
    with torch.no_grad(), Reader(net).recording("attn") as cache:
        net(x)
    assert cache["attn"].tensor.shape == (2, 1, 5, 8)


def test_convolutions_alone_leave_equal_sizes_open() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"a": nn.Conv1d(6, 6, 1), "b": nn.SiLU()})
            self.block = Turning()

    class Turning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(6, 6, 1)

    net = Net()
    assert axes_of((2, 6, 6), net.block, [net]) is None
    assert axes_of((2, 6, 6), net.inner["b"], [net.inner, net]) is None
    assert axes_of((2, 6, 6), net.block.conv, [net.block, net]) == CHANNELS
    assert axes_of((2, 6, 5), net.block, [net]) == CHANNELS
    assert axes_of((2, 5, 6), net.block, [net]) is None  # its convolution may have been turned


def test_as_many_rows_as_tokens_are_told_by_classes_that_are_known() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

    mine, known = Mine(), tiny.language_model("llama")[0].model.layers[0].mlp
    for module, around in ((mine, []), (mine.linear, [mine])):
        assert axes_of((4, 4, 8), module, around, lengths=[4], rows=4) is None
        assert axes_of((4, 5, 8), module, around, lengths=[5], rows=4) == TOKENS
        assert axes_of((1, 1, 8), module, around, lengths=[1], rows=1) == TOKENS
    assert axes_of((4, 4, 8), known.up_proj, [known], lengths=[4], rows=4) == TOKENS


def test_streams_before_the_tokens_are_told_by_the_number_of_rows() -> None:
    head = nn.Linear(8, 8)
    streams = ("rows", "heads", "tokens", "features")
    assert axes_of((3, 2, 7, 8), head, lengths=[7], rows=3) == streams
    assert axes_of((2, 2, 7, 8), head, lengths=[7], rows=2) is None
    assert axes_of((2, 3, 7, 8), head, lengths=[7], rows=3) is None
