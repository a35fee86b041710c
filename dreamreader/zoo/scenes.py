"""Captioned scenes of coloured shapes: the world that the embedded models are trained on.

A scene has one or two objects on a plain background, with or without a frame around the picture.
A caption may leave attributes out; the scene then follows the stated, deliberately biased
distribution of `UNSAID_COLOR` and `UNSAID`, so that trained models have measurable habits.
"""

import hashlib
import math
import random
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw

SIZE_PX = 64
SUPERSAMPLE = 4

COLORS = {
    "red": (220, 30, 40),
    "green": (30, 160, 60),
    "blue": (40, 70, 225),
    "yellow": (245, 220, 40),
    "orange": (250, 130, 20),
    "purple": (135, 45, 185),
    "cyan": (50, 210, 230),
    "pink": (250, 130, 190),
}
BACKGROUNDS = {
    "white": (245, 245, 245),
    "gray": (140, 140, 140),
    "black": (15, 15, 15),
    "brown": (100, 65, 35),
}
FRAME_COLOR = (0, 95, 95)
FRAME_PX = 4
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = {"small": 9.0, "large": 13.0}  # half extent of the bounding box, pixels
ROWS = {"top": 17, "middle": 32, "bottom": 47}  # centre of the object, pixels
COLUMNS = {"left": 17, "center": 32, "right": 47}
JITTER_PX = 2

HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"),
        ("blue", "triangle"),
        ("green", "cross"),
        ("orange", "circle"),
        ("pink", "square"),
    }
)

# What the scene is when the caption does not say: the usual value, and how often it is that one.
UNSAID_COLOR = {
    "circle": ("red", 0.8),
    "square": ("blue", 0.8),
    "triangle": ("green", 0.8),
    "star": ("yellow", 0.8),
    "cross": ("purple", 0.8),
}
UNSAID = {"size": ("large", 0.8), "place": ("middle center", 0.8), "background": ("white", 0.8)}
SAID = {"color": 0.9, "size": 0.8, "place": 0.85, "background": 0.85}  # how often a caption says it
TWO_OBJECTS = 0.25
FRAMED = 0.3  # a frame is there exactly when the caption says so
HELD_OUT_CAPTIONS = 16  # one caption in 16, by hash, is never trained on


@dataclass(frozen=True)
class Obj:
    """One object; `said` names the attributes that the caption mentions."""

    shape: str
    color: str
    size: str
    row: str
    column: str
    said: frozenset[str] = frozenset({"color", "size", "place"})

    def phrase(self) -> str:
        words = ["a"]
        words += [self.size] if "size" in self.said else []
        words += [self.color] if "color" in self.said else []
        words += [self.shape]
        if "place" in self.said:
            words += ["at", "the", self.row, self.column]
        return " ".join(words).replace("a orange", "an orange")


@dataclass(frozen=True)
class Scene:
    """One or two objects, a background, perhaps a frame."""

    objects: tuple[Obj, ...]
    background: str
    frame: bool = False
    background_said: bool = True

    def caption(self) -> str:
        text = " and ".join(o.phrase() for o in self.objects)
        if self.background_said:
            text += f" on a {self.background} background"
        return text + (" with a frame" if self.frame else "")

    def held_out(self) -> bool:
        """Whether training never shows this caption, by its hash or by a colour-shape pair."""
        return caption_held_out(self.caption()) or self.pair_held_out()

    def pair_held_out(self) -> bool:
        return any((o.color, o.shape) in HELD_OUT_PAIRS for o in self.objects)


def caption_held_out(caption: str) -> bool:
    digest = hashlib.sha256(caption.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_CAPTIONS == 0


def sample_scene(rng: random.Random, objects: int | None = None) -> Scene:
    """Draws a scene and which of its attributes the caption says.

    Args:
        rng: source of all choices.
        objects: 1 or 2; drawn with `TWO_OBJECTS` when None.

    Returns:
        A scene whose unsaid attributes follow `UNSAID_COLOR` and `UNSAID`.
    """
    if objects is None:
        objects = 2 if rng.random() < TWO_OBJECTS else 1
    found = tuple(_sample_object(rng) for _ in range(objects))
    if objects == 2:
        found = tuple(_place_evenly(rng, obj) for obj in found)
        while not _apart(*found):
            found = tuple(_place_evenly(rng, obj) for obj in found)
    said = rng.random() < SAID["background"]
    background = (
        rng.choice(list(BACKGROUNDS)) if said else _usual(rng, UNSAID["background"], BACKGROUNDS)
    )
    return Scene(found, background, rng.random() < FRAMED, said)


def render(scene: Scene, rng: random.Random | None = None) -> Image.Image:
    """Draws a scene, 64 x 64 RGB, with smooth edges.

    Args:
        scene: what to draw.
        rng: moves each object by up to `JITTER_PX` pixels; no movement when None.
    """
    side = SIZE_PX * SUPERSAMPLE
    picture = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(picture)
    for obj in scene.objects:
        dx, dy = (rng.uniform(-JITTER_PX, JITTER_PX) for _ in "xy") if rng else (0.0, 0.0)
        centre = (COLUMNS[obj.column] + dx, ROWS[obj.row] + dy)
        draw_shape(draw, obj.shape, centre, SIZES[obj.size], COLORS[obj.color])
    if scene.frame:
        draw.rectangle(
            (0, 0, side - 1, side - 1), outline=FRAME_COLOR, width=FRAME_PX * SUPERSAMPLE
        )
    return picture.reduce(SUPERSAMPLE)


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, centre: tuple[float, float], half: float, fill
) -> None:
    """Draws one shape whose bounding box is `2 * half` pixels wide, in supersampled coordinates."""
    cx, cy, r = (v * SUPERSAMPLE for v in (*centre, half))
    if shape == "circle":
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill)
    elif shape == "square":
        draw.rectangle((cx - 0.9 * r, cy - 0.9 * r, cx + 0.9 * r, cy + 0.9 * r), fill=fill)
    elif shape == "triangle":
        draw.polygon([(cx, cy - r), (cx + r, cy + 0.8 * r), (cx - r, cy + 0.8 * r)], fill=fill)
    elif shape == "star":
        corners = [
            (cx + q * math.sin(i * math.pi / 5), cy - q * math.cos(i * math.pi / 5))
            for i in range(10)
            for q in [r * 1.1 if i % 2 == 0 else r * 0.42]
        ]
        draw.polygon(corners, fill=fill)
    elif shape == "cross":
        arm = 0.36 * r
        draw.rectangle((cx - r, cy - arm, cx + r, cy + arm), fill=fill)
        draw.rectangle((cx - arm, cy - r, cx + arm, cy + r), fill=fill)
    else:
        raise ValueError(f"shape {shape!r}; there are {', '.join(SHAPES)}")


def _sample_object(rng: random.Random) -> Obj:
    said = frozenset(name for name in ("color", "size", "place") if rng.random() < SAID[name])
    shape = rng.choice(SHAPES)
    color = (
        rng.choice(list(COLORS)) if "color" in said else _usual(rng, UNSAID_COLOR[shape], COLORS)
    )
    size = rng.choice(list(SIZES)) if "size" in said else _usual(rng, UNSAID["size"], SIZES)
    places = [f"{row} {column}" for row in ROWS for column in COLUMNS]
    place = rng.choice(places) if "place" in said else _usual(rng, UNSAID["place"], places)
    return Obj(shape, color, size, *place.split(), said=said)


def _place_evenly(rng: random.Random, obj: Obj) -> Obj:
    """The object with an even place, said in the caption: two objects are told apart by place."""
    return replace(
        obj, row=rng.choice(list(ROWS)), column=rng.choice(list(COLUMNS)), said=obj.said | {"place"}
    )


def _usual(rng: random.Random, usual: tuple[str, float], options) -> str:
    value, share = usual
    return value if rng.random() < share else rng.choice([o for o in options if o != value])


def _apart(a: Obj, b: Obj) -> bool:
    """Whether two objects cannot touch: two columns or two rows between them."""
    rows, columns = list(ROWS), list(COLUMNS)
    return (
        abs(rows.index(a.row) - rows.index(b.row)) == 2
        or abs(columns.index(a.column) - columns.index(b.column)) == 2
    )
