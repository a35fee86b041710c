"""Parts of specs that say how adapters and probes are trained."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from dreamreader.errors import UnknownName
from dreamreader.specs.parts import Count, Data, Part, Seed

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]


class Keep(Part):
    """Prompts without a partner, on which the adapters shall change nothing."""

    data: Data
    weight: Positive = Field(
        default=1.0, description="Of their loss, beside the other with weight 1."
    )


class Training(Part):
    """How adapters are made and trained."""

    variant: Literal["loreft", "direft", "noreft", "diagonal", "bias"] = "loreft"
    rank: Count | dict[str, Count] = Field(default=8, description="Of all adapters, or by site.")
    per_step: bool = Field(
        default=False, description="An adapter for every denoising step, or one."
    )
    init: Literal["identity", "pyreft", "zero"] = Field(
        default="identity", description="First values; identity changes nothing, bit for bit."
    )
    loss: Literal["activations", "noise", "denoising", "language"] = Field(
        default="activations",
        description="Match the teacher's activations, or its noise predictions; denoise given "
        "pictures; predict the completions of a language model.",
    )
    trajectory: Literal["base", "teacher", "own"] = Field(
        default="base", description="Whose latents both prompts of a pair see."
    )
    keep: Keep | None = None
    optimizer: str | dict[str, dict[str, Any]] = Field(
        default="AdamW", description="A name of torch.optim, or {name: {option: value}}."
    )
    lr: Positive | None = Field(
        default=None, description="By default 0.01 with activations, else 0.005."
    )
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    decay: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.25, description="Share of the steps in which the rate of wsd falls."
    )
    warmup: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Steps of rising learning rate."
    )
    grad_clip: Positive | None = Field(
        default=None,
        description="Largest norm of all gradients; by default none with activations, else 1.",
    )
    steps: Count | None = Field(
        default=None,
        description="By default: activations 300, noise 150, denoising 200, language 100.",
    )
    batch_size: Count | None = Field(
        default=None, description="By default: activations 64, noise and denoising 16, language 8."
    )
    validation: Share = Field(
        default=0.125,
        description="Share of rows that are held out; they choose the state that is kept.",
    )
    validate_every: Count = 25
    patience: Count | None = Field(
        default=None, description="Validations without a better one, after which it ends."
    )
    seed: Seed = 0

    @field_validator("optimizer")
    @classmethod
    def _check_optimizer(
        cls, value: str | dict[str, dict[str, Any]]
    ) -> str | dict[str, dict[str, Any]]:
        from dreamreader.fitting.recipe import optimizers

        if isinstance(value, dict) and len(value) != 1:
            raise ValueError(f"is a name, or one name with options, got {list(value)}")
        name, known = value if isinstance(value, str) else next(iter(value)), optimizers()
        if name not in known:
            raise ValueError(str(UnknownName("optimizer", name, known)))
        return value

    @model_validator(mode="after")
    def _fits(self) -> "Training":
        if self.loss in ("noise", "denoising") and self.trajectory == "own":
            raise ValueError("trajectory: own is for the loss activations; give base or teacher")
        if self.patience is not None and not self.validation:
            raise ValueError("patience needs rows that are held out; give validation")
        return self

    @property
    def recipe(self) -> dict[str, Any]:
        """Arguments of `reft.train`, beside adapters and loss."""
        from dreamreader.reft.usual import USUAL

        same = (
            *("optimizer", "weight_decay", "schedule", "decay", "warmup"),
            *("validation", "validate_every"),
        )
        found = {name: getattr(self, name) for name in (*same, "patience", "seed")}
        for name, usual in USUAL[self.loss].items():
            found[name] = usual if getattr(self, name) is None else getattr(self, name)
        return found


class ProbeTraining(Part):
    """How a probe is made and trained; see `dreamreader.probes.fit`."""

    task: Literal["classify", "multilabel", "regress"] = "classify"
    hidden: list[Count] = Field(
        default_factory=lambda: [128, 128],
        max_length=2,
        description="Widths of hidden layers; [] is a linear probe.",
    )
    activation: Literal["relu", "gelu", "silu"] = "relu"
    per_step: Literal["each", "shared", "noise"] = Field(
        default="each",
        description="A probe for every step, one for all, or one conditioned on the noise level.",
    )
    pool: Literal["mean", "token", "flat"] = Field(
        default="mean", description="How tokens become rows."
    )
    loss: Literal["softmax", "sigmoid"] = "softmax"
    class_weights: Literal["balanced"] | dict[str, float] | None = None
    epochs: Count | None = Field(
        default=None, description="At most; by default 200, of rows from a store 5."
    )
    patience: Count | None = Field(
        default=None,
        description="Epochs without a better one, after which it ends; 10, of a store 2.",
    )
    lr: Positive = 1e-3
    batch_size: Count = 64
    jitter: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Noise on inputs in training, in deviations; about 1 to guide by."
    )
    holdout: Annotated[int, Field(ge=3)] = Field(
        default=5,
        description="One prompt of so many validates, and one is held out and only measures.",
    )
    seed: Seed = 0
    controls: bool = Field(
        default=True,
        description="Train shuffled labels, random features and another capacity as well.",
    )

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `probes.fit`, those that are left to it not among them."""
        return self.model_dump(exclude_none=True)
