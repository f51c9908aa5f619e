"""How the small models are made: `small` and `grown` on a processor, `full` on an accelerator in half an hour."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dit_accel.samples.repertoire import BASIC, FULL, Repertoire
from dit_accel.samples.scenes.draw import Canvas
from dit_accel.samples.tiny_wan_model import TinyWanSizes


@dataclass(frozen=True)
class Pace:
    """When a stage of training is over.

    Args:
        steps: after so many steps.
        minutes: or after so many minutes of training, those before a kill counted in, if that is earlier. Learning
            rates and the like follow whichever is further, so that a stage ends well however fast a machine is.
            Default: steps alone.
    """

    steps: int
    minutes: float | None = None

    def done(self, step: int, seconds: float) -> float:
        """Share of the stage that is done after `step` steps and `seconds`: 1 and more when it is over."""
        timed = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        return max(step / self.steps, timed)


@dataclass(frozen=True)
class Crop:
    """One kind of step of the autoencoder: `batch` clips of `frames` frames of `side` x `side` pixels."""

    frames: int
    side: int
    batch: int


@dataclass(frozen=True)
class Draw:
    """One kind of step of the transformer.

    Args:
        latent_frames: how many latent frames of each clip, at their true places in time: the first, the last, and
            others at random. Few frames of a whole clip teach its motion at a fraction of its tokens; the ends are
            always there because rotary positions are relative and nothing else would say when a frame is.
        batch: clips per step.
        shares: how often a step is of this kind, in each phase of the training.
    """

    latent_frames: int
    batch: int
    shares: tuple[float, float, float]


@dataclass(frozen=True)
class Tuning:
    """Training of the decoder alone on clips as long as those that are generated.

    Its convolutions reach far back in time: one that saw nine frames in training renders the 33rd ten decibels worse
    than the first. Latents stay what they are, so that a transformer made with them needs no other weights.

    Args:
        pace: its length.
        canvas: size of the clips.
        window: pixels of a side of the part of them that is learnt from.
        batch: clips per step.
        edge_weight: as in `VaeRecipe`.
    """

    pace: Pace
    canvas: Canvas
    window: int
    batch: int = 1
    edge_weight: float = 0.5


@dataclass(frozen=True)
class VaeRecipe:
    """Training of the autoencoder.

    Args:
        crops: kinds of steps, in turn.
        pace: its length.
        tuning: of the decoder afterwards. Default None: none, as where crops are long enough.
        edge_weight: of the absolute error of differences between neighbouring pixels, beside that of the pixels.
        ema: share of the old average of the weights that a step keeps; 0 averages nothing.
        save_every: steps between checkpoints.
        rates: learning rates of Muon and of AdamW.
    """

    crops: tuple[Crop, ...]
    pace: Pace
    tuning: Tuning | None = None
    edge_weight: float = 0.0
    ema: float = 0.0
    save_every: int = 200
    rates: tuple[float, float] = (0.02, 2e-3)


@dataclass(frozen=True)
class Fade:
    """Weight of a loss: `first` until a share `begin` of the steps is done, `last` from `end` on, straight between.

    The probe's lessons come first and stay until they are learnt, as the flow-matching loss alone drowns them for long.
    """

    first: float = 1.0
    last: float = 0.1
    begin: float = 0.25
    end: float = 0.35

    def weight(self, done: float) -> float:
        """When a share `done` of the steps is done."""
        passed = (done - self.begin) / (self.end - self.begin)
        return self.first + (self.last - self.first) * min(1.0, max(0.0, passed))


@dataclass(frozen=True)
class FlowRecipe:
    """Training of the transformer and its text encoder.

    Args:
        canvas: size of the clips.
        clips: how many are encoded, once.
        encode_batch: at a time.
        draws: kinds of steps.
        pace: its length.
        ema: as in `VaeRecipe`.
        save_every: steps between checkpoints.
        shown: held-out captions; pictures of what the model makes of them are written on the way. 0: none are.
        show_every: steps between pictures, a multiple of `save_every`; the last is of the finished model.
        probe: weight of the probe's loss.
        rates: learning rates of Muon and of AdamW.
    """

    canvas: Canvas
    clips: int
    draws: tuple[Draw, ...]
    pace: Pace
    encode_batch: int = 8
    ema: float = 0.998
    save_every: int = 200
    shown: int = 2
    show_every: int = 400
    probe: Fade = Fade()
    rates: tuple[float, float] = (0.02, 2e-3)


@dataclass(frozen=True)
class CausalRecipe:
    """Fine-tuning for streams.

    Args:
        canvas, clips, encode_batch, ema, save_every: as in `FlowRecipe`.
        batch: clips per step; of excerpts that are shorter than the longest, as many more.
        pace: its length.
        rates: learning rates of Muon and of AdamW.
    """

    canvas: Canvas
    clips: int
    batch: int
    pace: Pace
    rates: tuple[float, float]
    encode_batch: int = 8
    ema: float = 0.99
    save_every: int = 100


@dataclass(frozen=True)
class Recipe:
    """All that makes a model.

    Args:
        name: of the table `RECIPES`.
        repertoire: what it is taught.
        sizes: of its parts.
        vae, flow, causal: the stages; the first is that of `start` where there is one.
        is_half: whether passes run in bfloat16 where PyTorch's autocast allows it.
        workers: processes that draw scenes.
        start: of the model that this one is grown from, whose autoencoder and text encoder it keeps. Default None: it
            is made from nothing.
    """

    name: str
    repertoire: Repertoire
    sizes: TinyWanSizes
    vae: VaeRecipe
    flow: FlowRecipe
    causal: CausalRecipe
    is_half: bool = False
    workers: int = 0
    start: Recipe | None = None


WHOLE_CLIPS = Tuning(Pace(400), Canvas(33, 64, 64), window=40)
SMALL = Recipe(
    name="small",
    repertoire=BASIC,
    sizes=TinyWanSizes(),
    # Single frames are cheap and teach colour.
    vae=VaeRecipe(
        crops=(Crop(1, 48, 16), Crop(9, 48, 4), Crop(5, 48, 4)),
        pace=Pace(1000),
        tuning=WHOLE_CLIPS,
    ),
    flow=FlowRecipe(
        canvas=Canvas(33, 64, 64),
        clips=1600,
        draws=(
            Draw(latent_frames=2, batch=9, shares=(0.50, 0.25, 0.10)),
            Draw(latent_frames=3, batch=6, shares=(0.40, 0.25, 0.20)),
            Draw(latent_frames=5, batch=3, shares=(0.10, 0.20, 0.20)),
            Draw(latent_frames=9, batch=2, shares=(0.00, 0.20, 0.25)),
            Draw(latent_frames=17, batch=1, shares=(0.00, 0.10, 0.25)),
        ),
        pace=Pace(4000),
    ),
    # A quarter of the learning rates that the model was made with.
    causal=CausalRecipe(Canvas(65, 64, 64, endless=True), 600, batch=1, pace=Pace(700), rates=(0.005, 5e-4)),
)
FULL_SIZES = TinyWanSizes(
    heads=6, layers=8, ffn_dim=704, latent_channels=12, vae_dim=32, vae_blocks=2, text_dim=128, text_layers=3
)
FULL_MODEL = Recipe(
    name="full",
    repertoire=FULL,
    sizes=FULL_SIZES,
    vae=VaeRecipe(
        # As long as the clips that are generated, see `Tuning`.
        (Crop(9, 64, 48), Crop(1, 64, 192), Crop(33, 64, 12)),
        Pace(12_000, minutes=7.0),
        edge_weight=1.0,
        ema=0.995,
    ),
    flow=FlowRecipe(
        canvas=Canvas(33, 64, 64),
        clips=24_000,
        encode_batch=64,
        draws=(
            Draw(latent_frames=3, batch=192, shares=(0.40, 0.15, 0.05)),
            Draw(latent_frames=5, batch=128, shares=(0.40, 0.25, 0.10)),
            Draw(latent_frames=9, batch=64, shares=(0.15, 0.30, 0.25)),
            Draw(latent_frames=17, batch=32, shares=(0.05, 0.30, 0.60)),
        ),
        pace=Pace(20_000, minutes=12.5),
        ema=0.998,
        save_every=500,
        shown=6,
        show_every=500,
    ),
    causal=CausalRecipe(
        Canvas(65, 64, 64, endless=True),
        clips=3000,
        batch=16,
        pace=Pace(4000, minutes=2.5),
        rates=(0.005, 5e-4),
        encode_batch=32,
    ),
    is_half=True,
    workers=8,
)
# The small model, grown to the layers and heads of the full one and taught further, on a processor.
GROWN = Recipe(
    name="grown",
    repertoire=BASIC,
    sizes=replace(SMALL.sizes, heads=FULL_SIZES.heads, layers=FULL_SIZES.layers, ffn_dim=FULL_SIZES.ffn_dim),
    vae=SMALL.vae,
    flow=FlowRecipe(
        canvas=Canvas(33, 64, 64),
        clips=2400,
        encode_batch=4,
        draws=(
            Draw(latent_frames=2, batch=18, shares=(0.35, 0.25, 0.10)),
            Draw(latent_frames=3, batch=12, shares=(0.25, 0.20, 0.12)),
            Draw(latent_frames=5, batch=8, shares=(0.20, 0.22, 0.20)),
            Draw(latent_frames=9, batch=4, shares=(0.12, 0.20, 0.30)),
            Draw(latent_frames=17, batch=2, shares=(0.08, 0.13, 0.28)),
        ),
        pace=Pace(1140),
        ema=0.995,
        save_every=50,
        show_every=200,
        probe=Fade(0.5, 0.2, 0.4, 0.5),
        rates=(0.008, 8e-4),
    ),
    causal=CausalRecipe(
        Canvas(65, 64, 64, endless=True), clips=600, batch=2, pace=Pace(514), rates=(0.005, 5e-4), save_every=50
    ),
    is_half=True,
    start=SMALL,
)
RECIPES = {recipe.name: recipe for recipe in (SMALL, FULL_MODEL, GROWN)}
