"""Arms of a study: the three models, and controls that each change one part of the idea."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from collapse.config import RunConfig
from collapse.models.losses import combined_loss
from collapse.utils.errors import UserError


@dataclass(frozen=True)
class Arm:
    """What one model of a study trains, and how it is shown. A new control is a row of ARMS."""

    name: str  # in results: key, and folder of its trainings
    title: str
    color: str  # Okabe & Ito's first, then Tol's, for colour-blind readers
    marker: str
    cost: float  # of a step, relative to model 1: a first guess for the time left
    lm: Literal["none", "true", "shuffled"] = "none"  # which tokens the LM loss predicts
    # What precedes an input: nothing, the engram of another input, or one learned embedding.
    prefix: Literal["none", "engram", "constant"] = "none"
    compressor: Literal["both", "lm", "none"] = "both"  # which losses train the engram's compressor
    anchor: Literal["none", "kl", "l2"] = "none"  # penalty on leaving the initial model
    shared_scale: bool = False  # the LM loss enters Adam's second moment alone
    weight: float | None = None  # of LM loss or anchor; None: --lm-weight
    epochs: float = 1.0  # as a factor of the study's

    @property
    def label(self) -> str:
        """The name in messages: `model 2`."""
        return self.name.replace("model", "model ")

    @property
    def sort_key(self) -> tuple[int, float, float]:
        """Orders tables: as in ARMS, then by weight and by factor of epochs."""
        names = [arm.name for arm in ARMS]
        return names.index(self.name.partition("@")[0]), self.weight or 0.0, self.epochs

    @property
    def needs_lm_head(self) -> bool:
        return self.lm != "none" or self.anchors_tokens

    @property
    def anchors_tokens(self) -> bool:
        """Whether its anchor is a loss per target token, weighed against the other loss."""
        return self.anchor == "kl"

    def config_in(self, config: RunConfig) -> RunConfig:
        """The study's settings with this arm's epochs, which the learning rate's schedule spans."""
        return dataclasses.replace(config, epochs=self.epochs_of(config.epochs))

    def epochs_of(self, epochs: int) -> int:
        """The arm's own epochs, where the study has `epochs`; rounded up."""
        return math.ceil(round(epochs * self.epochs, 6))

    def weight_in(self, config: RunConfig) -> float:
        return config.lm_weight if self.weight is None else self.weight

    def loss(self, cls_loss, lm_loss, config: RunConfig):
        """What is minimized, of classification loss and LM loss; anchors are added later."""
        directs = self.lm != "none" and not self.shared_scale
        return combined_loss(cls_loss, lm_loss if directs else None, self.weight_in(config))


ARMS = (
    Arm("model1", "Classification Only", "#0072B2", "o", cost=1.0),
    Arm("model2", "Dual Head", "#D55E00", "s", cost=2.8, lm="true"),
    Arm("model3", "Dual + Engram", "#009E73", "^", cost=3.3, lm="true", prefix="engram"),
    # LM targets shuffled within the step's rows: their unigrams are right, their order is not.
    Arm("shuffled-lm", "Shuffled LM", "#CC79A7", "D", cost=2.8, lm="shuffled"),
    # No LM loss: a KL penalty keeps the next-token distribution close to the initial model's.
    Arm("kl", "KL to the start", "#56B4E9", "v", cost=4.2, anchor="kl"),
    # No LM head: half the squared distance of the backbone's trained weights from their start,
    # times the weight, is added to the classification loss (L2-SP, Li et al. 2018).
    Arm("l2-start", "L2 to the start", "#E69F00", "P", cost=1.0, anchor="l2", weight=0.01),
    # Steps follow the classification gradient alone, divided by Adam's scale of model 2, so they
    # are smaller. A trainable LM head learns as in model 2, so that the scale stays model 2's.
    Arm("shared-scale", "Shared scale", "#000000", "X", cost=3.3, lm="true", shared_scale=True),
    # Model 3 without an engram: the projector's input is zero, so its bias is the prefix.
    Arm("constant-prefix", "Constant prefix", "#332288", "<", 2.9, lm="true", prefix="constant"),
    # Model 3 whose compressor keeps its random weights; gradients pass through it.
    Arm(
        "frozen-compressor",
        "Frozen compressor",
        color="#882255",
        marker=">",
        cost=3.3,
        lm="true",
        prefix="engram",
        compressor="none",
    ),
    # Model 3 whose compressor learns from the LM loss alone; the rest learns from both losses.
    Arm(
        "lm-only-engram",
        "LM-only engram",
        color="#999933",
        marker="p",
        cost=5.0,
        lm="true",
        prefix="engram",
        compressor="lm",
    ),
    # Model 1 for about the time that model 2 takes.
    Arm("longer", "Longer", "#117733", "*", cost=1.0, epochs=2.5),
)
# Name in --models -> arm.
BY_NAME = {arm.name.removeprefix("model"): arm for arm in ARMS}


def find_arm(name: str) -> Arm:
    """The arm that --models or a results file names.

    NAME@NUMBER sets its weight, longer@NUMBER its factor of epochs. Raises UserError for an unknown
    name or a number out of range.
    """
    key, _, number = name.removeprefix("model").partition("@")
    if key not in BY_NAME:
        raise UserError(f"--models {name} is none of {', '.join(BY_NAME)}.")
    arm = BY_NAME[key]
    if not number:
        return arm
    longer = arm.epochs != 1
    lowest, highest = (1, math.inf) if longer else (0, math.inf if arm.anchor == "l2" else 1)
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    takes_one = longer or arm.needs_lm_head or arm.anchor == "l2"
    if not takes_one or not lowest <= value < highest:
        kind = "factor" if longer else "weight"
        raise UserError(f"--models {name}: {arm.label} takes no such {kind}.")
    if longer and value == arm.epochs:
        return arm
    value = abs(value)  # -0 is 0
    text = f"{value:g}" if float(f"{value:g}") == value else repr(value)
    title = f"{arm.title}, {text} times" if longer else f"{arm.title}, weight {text}"
    own = {"epochs": value} if longer else {"weight": value}
    return dataclasses.replace(arm, name=f"{arm.name}@{text}", title=title, **own)


def chosen_arms(config: RunConfig) -> list[Arm]:
    """The arms of --models. Raises UserError for an unknown name, or batches without pairs."""
    arms = list(dict.fromkeys(find_arm(name) for name in config.models))
    if config.batch_size < 2 and any(arm.prefix == "engram" for arm in arms):
        raise UserError("--batch-size is 1: model 3 trains on pairs and needs 2 or more.")
    return arms
