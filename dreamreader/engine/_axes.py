"""Which dimension of a value is which: told by the module that gives it, never by the rank alone.

Linear layers, embeddings, norms of tokens and attention have their features last; convolutions,
group norms, poolings and the blocks of UNets and autoencoders have them first. What is neither is
told by comparing the value with the sizes of the module's own layers, what has no sizes by the
module around it. What stays open is refused: the request can name the dimensions with `layout`.
"""

from collections.abc import Iterable, Sequence
from functools import cache

from torch import nn

from dreamreader.engine import _families as families
from dreamreader.engine._subject import parts
from dreamreader.errors import InvalidInput, UnknownName

NAMES = ("rows", "tokens", "heads", "features", "height", "width", "frames")
Axes = tuple[str, ...]

_FIRST = (
    nn.modules.conv._ConvNd,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.Upsample,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
)
_LAST = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention)
# Work on each number alone: what comes in has the same dimensions as what goes out.
_KEEPING = (
    nn.Identity,
    nn.modules.dropout._DropoutNd,
    nn.ELU,
    nn.GELU,
    nn.LeakyReLU,
    nn.Mish,
    nn.ReLU,
    nn.Sigmoid,
    nn.SiLU,
    nn.Softplus,
    nn.Tanh,
)

# Their blocks hand feature maps [rows, features, ...] to each other, whatever stands inside.
_MAPS = (
    "diffusers.models.unets.",
    "diffusers.models.autoencoders.",
    "diffusers.models.controlnets.",
    "diffusers.models.adapter",
    "diffusers.models.resnet",
    "diffusers.models.downsampling",
    "diffusers.models.upsampling",
    "diffusers.models.attention_processor",
    "diffusers.models.transformers.transformer_2d",
    "diffusers.models.transformers.dual_transformer_2d",
    "diffusers.models.transformers.sana_transformer.GLUMBConv",
    "torchvision.models.resnet.",
    "transformers.models.resnet.",
)
_SPREAD = {4: ("height", "width"), 5: ("frames", "height", "width")}

# Layers of torch that take sequences with the tokens first unless they are told `batch_first`.
_SEQUENCE = (
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
_ERNIE = "diffusers.models.transformers.transformer_ernie_image.ErnieImage"
# Whether the tokens come first: in what a class gives, and in the modules inside it.
_TOKENS_FIRST = {
    "transformers.models.xlnet.modeling_xlnet.XLNetModel": (False, True),
    "transformers.models.fsmt.modeling_fsmt.EncoderLayer": (True, True),
    "transformers.models.fsmt.modeling_fsmt.DecoderLayer": (True, True),
    "transformers.models.longformer.modeling_longformer.LongformerSelfAttention": (False, True),
    "transformers.models.led.modeling_led.LEDEncoderSelfAttention": (False, True),
    "diffusers.pipelines.kolors.text_encoder.Embedding": (True, False),
    "diffusers.pipelines.kolors.text_encoder.GLMTransformer": (True, True),
    _ERNIE + "SharedAdaLNBlock": (True, True),
    _ERNIE + "AdaLNContinuous": (True, True),
    _ERNIE + "Attention": (False, False),
}
# Whose models have several vectors for each token, and those of one kind side by side.
_STREAMS_FIRST = "transformers.models.prophetnet."
# Whose models hand [rows, tokens, features] to each other, but for those above.
_ROWS_FIRST = ("transformers.", "diffusers.")
# Wrappers of a layer, which hand on what it gives.
_PASSING = ("torch.", "peft.")


def parse_axes(layout: str, label: str) -> str:
    """A layout in words, checked.

    Raises:
        UnknownName, InvalidInput: a name that is none of the dimensions, or no rows or features.

    Example:
        >>> parse_axes("rows tokens  features", "Record")
        'rows tokens features'
    """
    names = layout.split() if isinstance(layout, str) else []
    for name in names:
        if name not in NAMES:
            raise UnknownName(f"dimension in the layout of {label}", name, NAMES)
    if len(set(names)) != len(names) or not {"rows", "features"} <= set(names):
        raise InvalidInput(
            f"{label}: layout names every dimension once, rows and features among them, as in "
            f"'rows features height width', got {layout!r}"
        )
    return " ".join(names)


def axes_of(
    shape: Sequence[int],
    module: nn.Module,
    around: Sequence[nn.Module] = (),
    lengths: Iterable[int] = (),
    turned: bool | None = None,
    rows: int | None = None,
    turning: dict[nn.Module, bool] | None = None,
) -> Axes | None:
    """Names of the dimensions of a value of this shape at a module; None where they stay open.

    Args:
        around: the modules that hold it, the nearest first.
        lengths: numbers of tokens that the running call of a language model has.
        turned: whether two middle dimensions of a projection were transposed since; None where
            that is unknown.
        rows: sequences in that call.
        turning: keeps what a walk through a model found, for the other sites of the same call.
    """
    known = set(lengths)
    if len(shape) < 3:
        return ("rows", "features")[: len(shape)]
    if len(shape) == 3:
        return _of_three(shape, module, around, known, rows, {} if turning is None else turning)
    if len(shape) > 5:
        return None
    root = _of_root(module, shape)
    if root is not None:
        return root
    if len(shape) == 4 and known and _own_side(module, shape) != "first":
        holders = [module, *around]
        if heads := _heads(holders) or _declared_heads(holders):
            return _split(shape, heads, known, turned)
    side = _output_side(module, shape) or _nearest_side(module, around, shape)
    if side == "first":
        return ("rows", "features", *_SPREAD[len(shape)])
    if side != "last":
        return None
    if len(shape) == 4:
        if known:  # outside of attention
            return _of_streams(shape, [module, *around], known, rows)
        if heads := _heads([module, *around]):
            return _split(shape, heads, known, turned)
    return ("rows", *_SPREAD[len(shape)], "features")


def describe_open(
    name: str, module: nn.Module, shape: Sequence[int], around: Sequence[nn.Module] = ()
) -> str:
    """Why the dimensions of a value are not known, and what to do."""
    holders = [module, *around]
    inside = len(shape) == 4 and (_heads(holders) or _declared_heads(holders))
    example = "rows tokens heads features" if inside else "rows features height width"
    dimensions = "tokens and which features"
    if len(shape) == 3:
        example = 'rows tokens features" or layout="tokens rows features'
        dimensions = "rows, which tokens and which features"
    return (
        f"{name}: {type(module).__name__} gives {list(shape)}, and which of these are "
        f"{dimensions} cannot be told from its own sizes; name the dimensions, for example with "
        f'layout="{example}"'
    )


def _of_three(
    shape: Sequence[int],
    module: nn.Module,
    around: Sequence[nn.Module],
    lengths: set[int],
    rows: int | None,
    turning: dict[nn.Module, bool],
) -> Axes | None:
    """Three dimensions: features last, unless a layer, the lengths or the sizes say first."""
    holders = [module, *around]
    tokens_first = _tokens_first(holders)
    if tokens_first:
        return ("tokens", "rows", "features")
    side = _own_side(module, shape)
    turns = side is None and _has_convolutions(holders)
    if side is None and turns and (shape[1] in lengths) != (shape[2] in lengths):
        side = "first" if shape[2] in lengths else "last"
    if side is None:
        side = _output_side(module, shape) or _nearest_side(module, around, shape)
    if side is None and turns:
        if not lengths or not _has_parts(module) or not _is_rows_first(holders):
            return None
    if side == "first":
        return ("rows", "features", "tokens")
    if tokens_first is None and _may_be_turned(holders, shape, rows, turning):
        return None
    return ("rows", "tokens", "features")


def _of_streams(
    shape: Sequence[int], modules: Sequence[nn.Module], lengths: set[int], rows: int | None
) -> Axes | None:
    """Several vectors for each token, before or behind the tokens; None where either would fit."""
    if any(type(each).__module__.startswith(_STREAMS_FIRST) for each in modules):
        return ("rows", "heads", "tokens", "features")
    if shape[1] in lengths:
        return ("rows", "tokens", "heads", "features") if shape[2] not in lengths else None
    if shape[2] in lengths and shape[0] == rows != shape[1]:  # else the second may be the rows
        return ("rows", "heads", "tokens", "features")
    return None


def _tokens_first(modules: Sequence[nn.Module]) -> bool | None:
    """Whether tokens come before rows, by the nearest class that says so; None where none does."""
    for depth, module in enumerate(modules):
        told = _look_up_class(type(module))
        if told is not None:
            return told[depth > 0]
        if isinstance(module, _SEQUENCE):
            return not _is_batch_first(module)
    return None


@cache
def _look_up_class(kind: type) -> tuple[bool, bool] | None:
    """What a class, or one that it is made of, says of its values and of those inside it."""
    names = (f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__)
    return next((_TOKENS_FIRST[name] for name in names if name in _TOKENS_FIRST), None)


def _is_batch_first(module: nn.Module) -> bool:
    if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
        module = next(iter(module.layers), module)
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        module = module.self_attn
    return bool(getattr(module, "batch_first", False))


def _may_be_turned(
    modules: Sequence[nn.Module],
    shape: Sequence[int],
    rows: int | None,
    turning: dict[nn.Module, bool],
) -> bool:
    """Whether tokens may come before rows, as sizes and the code around a module say nothing."""
    if rows is not None and (shape[0] != shape[1] or shape[0] < 2):
        return False  # the number of rows tells
    known = _is_rows_first(modules)
    if rows is not None and not known:
        return True
    outermost = None
    for module in modules:  # from the inside out
        if known and is_model(type(module)):
            break  # its parts may be turned, it gives what all of its library's models do
        outermost = module
    if outermost is None:
        return False
    if outermost not in turning:
        turning[outermost] = any(
            isinstance(each, _SEQUENCE) and not _is_batch_first(each) for each in parts(outermost)
        )
    return turning[outermost]


def _has_parts(module: nn.Module) -> bool:
    """Whether it holds other modules; `children` takes ten times as long to say."""
    held = module._modules  # in most modules there is none
    return bool(held) and any(each is not None for each in held.values())


def _is_rows_first(modules: Sequence[nn.Module]) -> bool:
    """Whether the code around a module is of a library that has rows before tokens."""
    for module in modules:
        if _has_parts(module):
            place = f"{getattr(type(module).forward, '__module__', '')}."
            if not place.startswith(_PASSING):
                return place.startswith(_ROWS_FIRST)
    return False


@cache
def is_model(kind: type) -> bool:
    """Whether a class is a whole model of transformers or diffusers."""
    return any(base.__name__ in ("PreTrainedModel", "ModelMixin") for base in kind.__mro__)


def _has_convolutions(modules: Sequence[nn.Module]) -> bool:
    """Whether the nearest module with layers has some with their features first."""
    sizes = (_sizes(module, 3) for module in modules)
    return bool(next((first for first, last in sizes if first or last), ()))


def _output_side(module: nn.Module, shape: Sequence[int]) -> str | None:
    """What a module says of its own output: a chain of layers gives what its last layer gives."""
    chain = list(module.children()) if type(module).forward is nn.Sequential.forward else []
    return _last_side(chain, shape) or _side(module, shape)


def _last_side(chain: Sequence[nn.Module], shape: Sequence[int]) -> str | None:
    """What the last layer of a chain says, those that keep every dimension left out."""
    for module in reversed(chain):
        if not isinstance(module, _KEEPING):
            return _output_side(module, shape)
    return None


def _side(module: nn.Module, shape: Sequence[int]) -> str | None:
    """`first` or `last`: where the values of a module have their features, by its layers' sizes."""
    own = _own_side(module, shape)
    if own is not None:
        return own
    first, last = _sizes(module, len(shape))
    is_first, is_last = shape[1] in first, shape[-1] in last
    place = f"{type(module).__module__}.{type(module).__qualname__}"
    if place.startswith("diffusers.models.attention_processor."):
        if len(shape) == 3:
            return "last" if shape[-1] in last else None
        return "first" if shape[1] in last else None  # images go in and out as [rows, features, ..]
    if is_first and place.startswith(_MAPS):
        return "first"
    if is_first == is_last:
        return None
    if shape[1] == shape[-1] and _has_parts(module):
        return None  # it may have turned what its layers give: the number fits either way
    return "first" if is_first else "last"


def _nearest_side(
    module: nn.Module, around: Sequence[nn.Module], shape: Sequence[int]
) -> str | None:
    """What the modules around say: in a chain the layer before, else the sizes of the nearest."""
    for outer in around:
        chain = list(outer.children()) if isinstance(outer, nn.Sequential) else []
        before = next((at for at, each in enumerate(chain) if each is module), 0)
        side = _last_side(chain[:before], shape) or _side(outer, shape)
        if side is not None:
            return side
        if any(_sizes(outer, len(shape))):
            return None  # it has layers of its own, and they leave it open
        module = outer
    return None


def _own_side(module: nn.Module, shape: Sequence[int]) -> str | None:
    """What one layer says: by its class, and of a norm of another library by its weights."""
    plain = getattr(type(module).forward, "__module__", "").startswith("torch.")
    if plain and isinstance(module, _FIRST):
        return "first"
    if plain and isinstance(module, _LAST):
        return "last"
    if _has_parts(module):
        return None
    name = type(module).__name__
    if "RMSNorm" in name or name == "LpNorm":
        return "last"
    if _is_turned_linear(module):
        return "last"
    sizes = {tuple(each.shape) for each in module.parameters(recurse=False)}
    if (1, shape[1], *(1,) * (len(shape) - 2)) in sizes and shape[1] > 1:
        return "first"  # a weight for each channel
    if any(len(each) > 1 and each[0] == max(each) == shape[1] for each in _gains(sizes)):
        return "first"
    flat = {each[0] for each in sizes if len(each) == 1} - {1}  # one number says no dimension
    if not flat or isinstance(module, _FIRST):
        return None
    if (shape[-1] in flat) != (shape[1] in flat):
        return "last" if shape[-1] in flat else "first"
    return None


def _gains(sizes: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Shapes such as (features, 1, 1): a weight for each channel of a feature map."""
    return [each for each in sizes if each and all(size == 1 for size in each[1:])]


def _is_turned_linear(module: nn.Module) -> bool:
    """Whether it is the linear layer of transformers whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _sizes(module: nn.Module, rank: int) -> tuple[frozenset[int], frozenset[int]]:
    """Widths that the layers inside have as first and as last dimension.

    Of a value of three dimensions a convolution over images says nothing: it was flattened.
    """
    first: set[int] = set()
    last: set[int] = set()
    for each in module.modules():
        if isinstance(each, nn.modules.conv._ConvNd):
            if rank > 3 or len(each.kernel_size) == 1:
                first |= {each.in_channels, each.out_channels}
        elif isinstance(each, nn.GroupNorm):
            first.add(each.num_channels)
        elif isinstance(each, nn.modules.batchnorm._NormBase):
            first.add(each.num_features)
        elif isinstance(each, nn.Linear):
            last |= {each.in_features, each.out_features}
        elif _is_turned_linear(each):
            last |= set(each.weight.shape)  # pyright: ignore[reportArgumentType]
        elif isinstance(each, nn.Embedding):
            last.add(each.embedding_dim)
        elif isinstance(each, nn.LayerNorm | nn.RMSNorm):
            last.add(each.normalized_shape[-1])
    return frozenset(first), frozenset(last)


def _of_root(module: nn.Module, shape: Sequence[int]) -> Axes | None:
    """Pictures and latents that a whole diffusers model takes and gives."""
    if not _is_diffusers_model(type(module)):
        return None
    config = module.config
    names = ("in_channels", "out_channels", "latent_channels")
    counts = {size for name in names if isinstance(size := getattr(config, name, None), int)}
    fitting = [axis for axis in range(1, len(shape)) if shape[axis] in counts]
    if fitting[:1] == [1] and not (len(shape) == 5 and 2 in fitting):
        return ("rows", "features", *_SPREAD[len(shape)])
    if len(shape) == 5 and fitting[:1] == [2]:
        return ("rows", "frames", "features", "height", "width")
    return None


@cache
def _is_diffusers_model(kind: type) -> bool:
    return any(base.__name__ == "ModelMixin" for base in kind.__mro__) and any(
        base.__module__.startswith("diffusers.") for base in kind.__mro__
    )


def _heads(modules: Sequence[nn.Module]) -> set[int]:
    """Numbers of heads of the attention that holds a module; empty where none does."""
    for module in modules:
        facts = families.attention_facts(module)
        if facts is not None:
            counts = {tap.heads for tap in facts.ports.values() if tap.heads}
            return (counts | {facts.heads}) - {0}  # 0: it has no ports
    return set()


def _declared_heads(modules: Sequence[nn.Module]) -> set[int]:
    """Numbers of heads that the nearest attention of another kind has among its attributes."""
    for module in modules:
        facts = [vars(module)]
        if "Attention" in type(module).__name__:
            facts.append(getattr(getattr(module, "config", None), "__dict__", {}))
        named = (item for each in facts for item in each.items())
        counts = {count for name, count in named if "heads" in name and type(count) is int}
        if counts:
            return counts
    return set()


def _split(
    shape: Sequence[int], heads: set[int], lengths: set[int], turned: bool | None
) -> Axes | None:
    """Order of tokens and heads in [rows, ., ., features]; None where both orders would fit.

    A projection gives tokens before heads, so memory in another order was transposed since.
    """

    def fits(tokens: int, head: int) -> bool:
        known = head in heads or head == 1  # 1: latent values that all heads share
        return (not lengths or tokens in lengths) and known

    if shape[1] == shape[2] == 1:
        return ("rows", "tokens", "heads", "features")  # either order is the same
    tokens_first, heads_first = fits(shape[1], shape[2]), fits(shape[2], shape[1])
    if tokens_first and (turned is False or not heads_first):
        return ("rows", "tokens", "heads", "features")
    if heads_first and (turned or not tokens_first):
        return ("rows", "heads", "tokens", "features")
    return None
