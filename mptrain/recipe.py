"""The recipe: one strict YAML file that describes a whole run.

The schema below is the documentation of the format; `mptrain schema` prints it as JSON
schema. Parsing the file (line numbers, duplicate keys, `--set`) is in `recipe_file.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, StringConstraints, model_validator

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9._-]+$", max_length=100)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Task = Literal[
    "text-classification",
    "token-classification",
    "question-answering",
    "image-classification",
    "audio-classification",
    "causal-lm",
]
Precision = Literal["fp32", "fp16", "int8", "int8_emb4", "compressed"]
CoreMlPrecision = Literal["fp32", "fp16"]
CoreMlTarget = Literal["iOS15", "iOS16", "iOS17", "iOS18"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Strict):
    path: str = Field(description="packaged:NAME, a local folder, or a hub name")
    task: Task = Field(description="what the model does; decides the head, the metric and the data columns")
    attn: Literal["sdpa", "eager"] = "sdpa"
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="replaces every dropout probability of the model's config"
    )
    trust_remote_code: bool = Field(False, description="also needs --allow-code on the command line")
    modeling: str | None = Field(None, description="a local .py file with the model class; also needs --allow-code")


class Calibration(Strict):
    samples: Annotated[int, Field(gt=0)] = 300
    batch_size: Annotated[int, Field(gt=0)] = 16


class Split(Strict):
    """Makes the splits that the data lacks."""

    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    test: Annotated[float, Field(gt=0, lt=1)] = 0.2
    group: str | None = Field(None, description="column whose values never cross splits, e.g. the film of a review")


class Data(Strict):
    source: str | None = Field(
        None, description="packaged:NAME, a `datasets` folder or a hub name; then train/validation/test are split names"
    )
    config: str | None = Field(None, description="configuration name of a hub data set")
    train: str | None = Field(None, description="a csv, tsv, jsonl or parquet file, or a split name of `source`")
    validation: str | None = None
    test: str | None = None
    split: Split = Split()
    text: str | None = Field(None, description="column; the default depends on the task")
    text_pair: str | None = None
    label: str | None = None
    tokens: str | None = None
    tags: str | None = None
    question: str | None = None
    context: str | None = None
    answers: str | None = None
    image: str | None = None
    audio: str | None = None
    max_length: Annotated[int, Field(gt=0)] = Field(128, description="tokens; audio: samples at the model's rate")
    stride: Annotated[int, Field(gt=0)] | None = Field(
        None,
        description="question answering: tokens of overlap; causal LM: tokens from one scoring window to the next,"
        " below max_length, default: half of it",
    )
    max_samples: Annotated[int, Field(gt=0)] | None = Field(None, description="cap on each split, for trying out")
    calibration: Calibration = Calibration()


class Train(Strict):
    epochs: Annotated[float, Field(gt=0)]
    lr: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(gt=0)] = Field(32, description="per process and micro-step")
    accumulation: Annotated[int, Field(gt=0)] = Field(1, description="micro-steps to one optimizer step")
    eval_batch_size: Annotated[int, Field(gt=0)] = 64
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.06, description="fraction of the stage's steps")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="0 switches clipping off")
    group_by_length: bool = Field(True, description="batches of similar length; only for text")
    keep_best: bool = Field(True, description="end with the epoch that is best on validation")
    patience: Annotated[int, Field(gt=0)] | None = Field(
        None, description="stop after so many epochs without a better validation result"
    )
    checkpoint_steps: Annotated[int, Field(gt=0)] = Field(100, description="optimizer steps between checkpoints")
    log_steps: Annotated[int, Field(gt=0)] = 10


class Schedule(Strict):
    """When masks begin and when they are final. end 0 means: prune at once, before training."""

    start: Annotated[float, Field(ge=0)] = 0
    end: Annotated[float, Field(ge=0)]
    unit: Literal["epoch", "step"] = "epoch"

    @model_validator(mode="after")
    def _ordered(self):
        if self.start > self.end:
            raise ValueError(f"start ({self.start:g}) must not be after end ({self.end:g})")
        return self


class Keep(Strict):
    """Fraction kept. Give exactly one budget, or `heads` and `ffn` together."""

    encoder_params: Fraction | None = Field(None, description="of the parameters of all attention and FFN layers")
    macs: Fraction | None = Field(None, description="of the multiply-adds of one forward pass at `data.max_length`")
    latency: Fraction | None = Field(
        None,
        description="of the layers' latency, measured on this host at batch 1, `data.max_length` and the first of"
        " `evaluate.latency.threads`",
    )
    heads: Fraction | None = None
    ffn: Fraction | None = None

    @model_validator(mode="after")
    def _one(self):
        budgets = [n for n in ("encoder_params", "macs", "latency") if getattr(self, n) is not None]
        pair = self.heads is not None or self.ffn is not None
        if len(budgets) + pair != 1 or (pair and (self.heads is None or self.ffn is None)):
            raise ValueError("give exactly one of encoder_params, macs, latency, or heads and ffn together")
        return self


class _Prune(Strict):
    schedule: Schedule = Schedule(end=0)
    min_heads: Annotated[int, Field(ge=1)] = Field(1, description="kept in every layer")
    min_ffn: Annotated[int, Field(ge=1)] = Field(8, description="channels kept in every layer")
    round_ffn: Annotated[int, Field(ge=1)] = Field(8, description="FFN widths are multiples of this")
    ignore: list[str] = Field(
        [], description="modules left alone: names such as encoder.layer.3, or regular expressions after 're:'"
    )


class Movement(_Prune):
    """Movement sparsity (Sanh et al. 2020) as NNCF 2.x defined it, or driven by a target."""

    method: Literal["movement"]
    keep: Keep | None = Field(None, description="target; a cubic top-k schedule reaches it")
    regularization: Annotated[float, Field(gt=0)] | None = Field(
        None, description="the NNCF 2.x way: importance regularization factor; the sparsity follows from it"
    )
    score: Literal["block", "shared"] = Field("block", description="shared: one score per head and per FFN channel")
    attention_block: tuple[int, int] = (32, 32)
    score_lr: Annotated[float, Field(gt=0)] | None = Field(None, description="default: the stage's lr")
    threshold: float | None = Field(None, description="tau_0; default: automatic from the scores at warm-up start")

    @model_validator(mode="after")
    def _target(self):
        if (self.keep is None) == (self.regularization is None):
            raise ValueError("give exactly one of keep (a target) and regularization (the NNCF 2.x way)")
        if self.schedule.end == 0:
            raise ValueError("movement needs a warm-up: give schedule.end")
        return self


class Fisher(_Prune):
    """Fisher mask search (Kwon et al. 2022), at once or gradually during the warm-up."""

    method: Literal["fisher"]
    keep: Keep
    rescale: bool = Field(False, description="least-squares refit of the kept columns at the boundary")


class Magnitude(_Prune):
    """Baseline: L2 norm of the weights of a head or channel."""

    method: Literal["magnitude"]
    keep: Keep


Prune = Annotated[Movement | Fisher | Magnitude, Field(discriminator="method")]


class Qat(Strict):
    """Quantization-aware training through nncf.quantize on the torch model."""

    mode: Literal["qat"]
    weights: Literal["symmetric", "asymmetric"] = "symmetric"
    activations: Literal["symmetric", "asymmetric"] = "symmetric"
    embeddings: Literal["fp32", "int8"] = Field("int8", description="int4 embeddings: export precision int8_emb4")
    ignore: list[str] = Field(
        [], description="modules kept in fp32: names such as encoder.layer.3, or regular expressions after 're:'"
    )
    bits: dict[str, Literal[4, 8]] = Field({}, description="weight bits by module pattern; default 8")
    smooth_quant: bool = False
    start: Literal["joint", "after_prune"] = Field(
        "joint", description="joint: fake quantizers act during the pruning warm-up; after_prune: from the boundary on"
    )
    carry: Literal["slice", "recalibrate"] = Field(
        "slice", description="at the boundary, slice the learned ranges per channel or calibrate anew"
    )


class Ptq(Strict):
    """Post-training quantization through nncf.quantize, with calibration data."""

    mode: Literal["ptq"]
    preset: Literal["performance", "mixed"] = Field(
        "mixed", description="performance: symmetric; mixed: symmetric weights, asymmetric activations"
    )
    embeddings: Literal["fp32", "int8"] = "int8"
    ignore: list[str] = []
    bits: dict[str, Literal[4, 8]] = {}
    smooth_quant: bool = True
    fast_bias_correction: bool = True


Method = Literal["rtn", "scale", "gptq"]
Granularity = Literal["tensor", "channel", "block"]


class WeightOverride(Strict):
    """What is different for the modules that a pattern matches."""

    method: Method | None = None
    bits: Literal[4, 8] | None = None
    granularity: Granularity | None = None
    block_size: Annotated[int, Field(gt=0)] | None = None
    symmetric: bool | None = None


class WeightOnly(Strict):
    """int4 or int8 weights, float activations; no training. Exports store these very integers."""

    mode: Literal["weight_only"]
    method: Method = Field(
        "gptq",
        description="rtn: round to nearest; scale: search of the scales, weighted by calibration inputs;"
        " gptq: error-compensated rounding with calibration data",
    )
    bits: Literal[4, 8] = 4
    size_budget: Annotated[float, Field(gt=0)] | None = Field(
        None, description="stored bits per compressed weight, scales included: 4 or 8 bits to each by its sensitivity"
    )
    granularity: Granularity = Field("block", description="what shares a scale: a weight, a row, a block of a row")
    block_size: Annotated[int, Field(gt=0)] = Field(32, description="columns to a block; must divide every weight")
    symmetric: bool = True
    embeddings: Literal["fp32", "int8", "same"] = Field("int8", description="int8: a scale per row; same: as the rest")
    lm_head: Literal["fp32", "int8", "same"] = Field("int8", description="must equal embeddings where they are tied")
    overrides: dict[str, WeightOverride] = Field({}, description="by module pattern; a later one wins")
    ignore: list[str] = Field([], description="modules kept in fp32: substrings, or regular expressions after 're:'")


Quantize = Annotated[Qat | Ptq | WeightOnly, Field(discriminator="mode")]


Bits = Annotated[int, Field(ge=1, le=8)]


class TableOverride(Strict):
    """What differs for the modules of a pattern."""

    bits: Bits | None = None
    granularity: Literal["tensor", "channel_group"] | None = None
    group_size: Annotated[int, Field(gt=0)] | None = None
    cluster_dim: Annotated[int, Field(gt=0)] | None = None
    per_channel_scale: bool | None = None


class TableTraining(Strict):
    """The table entries train with the stage (and all that is not palettized); the last step is kept."""

    refresh: Annotated[int, Field(ge=0)] = Field(
        0,
        description="optimizer steps between new assignments of weights to entries; 0: the assignments stay;"
        " 1 kept most of an OPT at 2 and 3 bits",
    )
    lr: Annotated[float, Field(gt=0)] | None = Field(None, description="of the table entries; default: the stage's lr")


class Palettize(Strict):
    """Weights as indices into tables of 2^bits entries (k-means)."""

    method: Literal["kmeans", "skm"] = Field(
        description="kmeans: needs no data; skm: weights count by their squared gradients on calibration data"
    )
    bits: Bits = 4
    size_budget: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="stored bits per palettized weight, tables and scales included: 1, 2, 3, 4, 6 or 8 bits to each by"
        " its sensitivity on calibration data, except where overrides, embeddings or lm_head give a number",
    )
    granularity: Literal["tensor", "channel_group"] = Field(
        "channel_group", description="one table for a weight, or one for every group of output channels"
    )
    group_size: Annotated[int, Field(gt=0)] = Field(
        16, description="channels of a group; where it does not divide the channels, the next smaller that does"
    )
    cluster_dim: Annotated[int, Field(gt=0)] = Field(
        1, description="neighbouring weights that share an index; a weight takes bits / cluster_dim bits"
    )
    per_channel_scale: bool = Field(False, description="a scale for every output channel, besides the tables")
    embeddings: bool | Bits = Field(True, description="also embeddings; a number gives their bits")
    lm_head: bool | Bits = Field(True, description="also the output layer of a language model, unless tied")
    ignore: list[str] = Field(
        [], description="modules left alone: names such as encoder.layer.3, or regular expressions after 're:'"
    )
    overrides: dict[str, TableOverride] = Field({}, description="by module pattern; a later one wins")
    finetune: TableTraining | None = Field(None, description="train the tables; needs `train`")


class Distill(Strict):
    """loss = (1 - weight) * task + weight * T^2 * KL(student/T || teacher/T) + hidden + attention terms."""

    weight: Annotated[float, Field(ge=0, le=1)] = 0.9
    temperature: Annotated[float, Field(gt=0)] = 2.0
    hidden: Annotated[float, Field(ge=0)] = Field(0.0, description="weight of the mean squared error of hidden states")
    attention: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of the error of attention maps, head average; needs attn: eager"
    )


class LossScaling(Strict):
    """`dynamic`, a number (a static scale), or these fields.

    Times `growth` after `interval` good steps in a row, times `backoff` at an overflow; the step is skipped.
    """

    init: Annotated[float, Field(gt=0)] = 65536.0
    growth: Annotated[float, Field(gt=1)] = 2.0
    backoff: Annotated[float, Field(gt=0, lt=1)] = 0.5
    interval: Annotated[int, Field(gt=0)] | None = Field(2000, description="null: static")
    floor: Annotated[float, Field(gt=0)] = 1.0
    ceiling: Annotated[float, Field(gt=0)] = 16777216.0
    hysteresis: Annotated[int, Field(gt=0)] = Field(1, description="overflows before it backs off")
    patience: Annotated[int, Field(gt=0)] = Field(
        10, description="overflows in a row at the floor that end the run, with a diagnosis"
    )

    @model_validator(mode="after")
    def _ordered(self):
        if not self.floor <= self.init <= self.ceiling:
            raise ValueError(f"init ({self.init:g}) must be from floor ({self.floor:g}) to ceiling ({self.ceiling:g})")
        return self


def _loss_scale(value: Any) -> Any:
    if value == "dynamic":
        return {}
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
        return {"init": value, "floor": value, "ceiling": value, "interval": None}
    if isinstance(value, (dict, LossScaling)):
        return value
    raise ValueError(f"must be 'dynamic', a positive number or a mapping, got {value!r}")


ShortPrecision = Literal["fp32", "bf16-master", "fp16-master", "bf16-split"]


class MixedPrecision(Strict):
    """A short name (fp32, bf16-master, fp16-master, bf16-split), or these fields; for every stage that trains."""

    compute: Literal["fp32", "bf16", "fp16"] = Field(description="dtype of forward, backward and the weights they see")
    master: Literal["fp32", "split"] = Field(
        "fp32", description="split: the bf16 weight is the high half of its master, 2 bytes a parameter less"
    )
    keep_fp32: list[str] = Field(
        [], description="parameters whose modules compute in fp32: substrings, 're:REGEX', or 'norms'"
    )
    loss_scale: (
        Annotated[
            LossScaling,
            BeforeValidator(_loss_scale, json_schema_input_type=Literal["dynamic"] | PositiveFloat | LossScaling),
        ]
        | None
    ) = Field(None, description="default: dynamic for fp16, 1 for bf16")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value not in get_args(ShortPrecision):
            raise ValueError(f"must be a mapping or one of {', '.join(get_args(ShortPrecision))}, got {value!r}")
        compute, _, kind = value.partition("-")
        return {"compute": compute, "master": "split" if kind == "split" else "fp32"}

    @model_validator(mode="after")
    def _fits(self):
        if self.master == "split" and self.compute != "bf16":
            raise ValueError(f"master split needs compute bf16, got {self.compute}")
        if self.compute == "fp32" and (self.keep_fp32 or self.loss_scale is not None):
            raise ValueError("keep_fp32 and loss_scale need compute bf16 or fp16; with fp32 drop them")
        return self


class Stage(Strict):
    id: Name
    start: str | None = Field(
        None, alias="from", description="stage id to start from, or 'model'; default: the previous stage"
    )
    train: Train | None = None
    teacher: str | None = Field(None, description="a stage id, a model path, or 'self': the stage's own start")
    prune: Prune | None = None
    quantize: Quantize | None = None
    palettize: Palettize | None = None
    distill: Distill | None = None

    @model_validator(mode="after")
    def _whole(self):
        if self.distill and not self.teacher:
            raise ValueError("distill needs a teacher: give teacher: STAGE, PATH or self")
        if self.teacher and not self.distill:
            raise ValueError("teacher is given but distill is not: add distill: {weight: 0.9} or drop teacher")
        if not (self.train or self.prune or self.quantize or self.palettize):
            raise ValueError("the stage does nothing: give train, prune, quantize or palettize")
        if self.palettize and self.quantize:
            raise ValueError("a weight is an integer or a table entry: give quantize or palettize, or two stages")
        if self.palettize and self.palettize.finetune and not self.train:
            raise ValueError("palettize.finetune needs train: give epochs and lr, or drop finetune")
        if self.distill and not self.train:
            raise ValueError("distill needs train")
        if isinstance(self.quantize, Qat) and not self.train:
            raise ValueError("quantize mode qat needs train; mode ptq does not")
        if isinstance(self.quantize, Ptq | WeightOnly) and (self.train or self.prune):
            raise ValueError(f"quantize mode {self.quantize.mode} goes in a stage of its own, without train and prune")
        if self.prune:
            end = self.prune.schedule.end
            if end > 0 and not self.train:
                raise ValueError("prune.schedule needs train; without train use end: 0")
            if self.train and self.prune.schedule.unit == "epoch" and end >= self.train.epochs:
                raise ValueError(
                    f"prune.schedule.end ({end:g} epochs) must be before train.epochs ({self.train.epochs:g}):"
                    " the shrunk model needs fine-tuning"
                )
        return self


class OpenVino(Strict):
    id: Name
    format: Literal["openvino"]
    of: list[str] = Field(description="stage ids")
    precision: list[Precision] = Field(
        ["fp32", "int8", "compressed"],
        description="each stage has those that fit it; compressed: the integers of a weight-only stage; fp16: weights"
        " stored half, and in fp32 what a search finds that fp16 would break",
    )
    shapes: Literal["dynamic"] = "dynamic"


class CoreMlShapes(Strict):
    """Sizes of the batch and of the length in tokens (images have a batch alone)."""

    kind: Literal["fixed", "enumerated", "ranged"] = "ranged"
    batch: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)] = Field(
        [1, 64], description="fixed: one size; enumerated: all of them; ranged: lowest and highest"
    )
    length: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)] = [1, 128]

    @model_validator(mode="after")
    def _sizes(self):
        for name in ("batch", "length"):
            sizes = getattr(self, name)
            if self.kind == "fixed" and len(sizes) != 1:
                raise ValueError(f"kind fixed takes one {name}, got {sizes}")
            if self.kind == "ranged" and (len(sizes) > 2 or sizes != sorted(sizes)):
                raise ValueError(f"kind ranged takes [lowest, highest] or one {name}, got {sizes}")
        return self


class CoreMl(Strict):
    """A Core ML package (mlprogram)."""

    id: Name
    format: Literal["coreml"]
    of: list[str] = Field(description="stage ids")
    precision: list[CoreMlPrecision] = ["fp32", "fp16"]
    minimum_deployment_target: CoreMlTarget = "iOS18"
    shapes: CoreMlShapes = CoreMlShapes()
    route: Literal["export", "trace"] = Field("export", description="torch.export, or a trace for models it refuses")
    scaled_tables: bool = Field(
        False, description="write tables with a scale to each row, which crash on some GPUs (coremltools issue 2688)"
    )
    cache: Annotated[int, Field(gt=0)] | None = Field(
        None,
        description="causal-lm: generate with a key-value cache of so many tokens, kept in (float16) states; batch 1",
    )

    @model_validator(mode="after")
    def _cached(self):
        if self.cache is None:
            return self
        if self.minimum_deployment_target != "iOS18":
            raise ValueError(
                f"cache: {self.minimum_deployment_target} has no states; give minimum_deployment_target: iOS18"
            )
        if self.shapes != CoreMlShapes() or self.route != "export":
            given = f"shapes: {self.shapes.model_dump()}" if self.shapes != CoreMlShapes() else f"route: {self.route}"
            raise ValueError(f"cache: sets its own shapes (batch 1) and the route export; drop {given}")
        return self


class CoreAi(Strict):
    """A Core AI asset (.aimodel, iOS 27 and macOS 27), scored by executing it on this host's CPU."""

    id: Name
    format: Literal["coreai"]
    of: list[str] = Field(description="stage ids")
    precision: list[Literal["fp32", "fp16"]] = Field(
        ["fp32", "fp16"], description="of the arithmetic; weights are stored as they were compressed"
    )
    shapes: Literal["dynamic"] = "dynamic"
    cache: Annotated[int, Field(gt=0)] | None = Field(
        None, description="causal-lm: generate with a key-value cache of so many tokens, one token to a call; fp32"
    )

    @model_validator(mode="after")
    def _cached(self):
        if self.cache is not None and self.precision != ["fp32"]:
            raise ValueError(f"cache: Core AI holds it in fp32 here; give precision: [fp32], got {self.precision}")
        return self


Export = Annotated[OpenVino | CoreMl | CoreAi, Field(discriminator="format")]


def cache_of(export: Export) -> int | None:
    """Tokens of the key-value cache that an export keeps; None without one."""
    return None if isinstance(export, OpenVino) else export.cache


class Latency(Strict):
    batch: list[Annotated[int, Field(gt=0)]] = [1, 8]
    length: list[Annotated[int, Field(gt=0)]] = Field([32, 128], description="tokens; ignored for images")
    threads: list[Annotated[int, Field(gt=0)] | Literal["all"]] = [1, "all"]
    runs: Annotated[int, Field(gt=0)] = Field(15, description="alternating rounds over the variants")


class Evaluate(Strict):
    latency: Latency = Latency()
    floor: bool = Field(True, description="text classification: also score TF-IDF + logistic regression")
    multiple_choice: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="causal LM: paths of multiple_choice task files of lm-eval, scored on every exported variant"
    )


class Gates(Strict):
    """Checked at the end; a missed gate is exit status 3. Fractions, not percent."""

    max_drop: Annotated[float, Field(ge=0)] | None = None
    min_size_ratio: Annotated[float, Field(gt=0)] | None = None
    min_speedup: dict[str, Annotated[float, Field(gt=0)]] = Field({}, description="e.g. {b1_s128_t1: 1.8}")
    parity: Annotated[float, Field(gt=0)] | None = Field(
        1e-4, description="|fp32 export - torch|, largest logit difference; not of those with a float16 cache"
    )
    agreement: Annotated[float, Field(gt=0, le=1)] | None = Field(
        0.9,
        description="share of decisions (argmax) that every other export has in common with its torch model",
    )
    fused_attention: Literal["all"] | Annotated[int, Field(ge=0)] | None = "all"


class Planning(Strict):
    """What `--dry-run` assumes while the model or the data is not on this machine."""

    model_type: str = Field("bert", description="the default configuration of this transformers model type")
    config: dict[str, int] = Field({}, description="what differs from that default, e.g. {hidden_size: 384}")
    train_rows: Annotated[int, Field(gt=0)] = 10_000


class Output(Strict):
    dir: str
    resume: Literal["auto", "never"] = "auto"


class Recipe(Strict):
    version: Literal["mptrain/v1"] = Field(alias="schema")
    name: Name
    description: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    model: Model
    data: Data
    precision: Annotated[
        MixedPrecision, BeforeValidator(lambda v: v, json_schema_input_type=ShortPrecision | MixedPrecision)
    ] = Field(MixedPrecision(compute="fp32"), description="default: plain fp32 training")
    stages: Annotated[list[Stage], Field(min_length=1)]
    export: Annotated[list[Export], Field(min_length=1)]
    evaluate: Evaluate = Evaluate()
    gates: Gates = Gates()
    planning: Planning = Planning()
    output: Output

    @model_validator(mode="after")
    def _references(self):
        if self.evaluate.multiple_choice and self.model.task != "causal-lm":
            raise ValueError(f"evaluate.multiple_choice: is for task causal-lm, not for {self.model.task}; drop it")
        seen: list[str] = []
        for index, stage in enumerate(self.stages):
            where = f"stages.{stage.id}"
            if stage.id in seen:
                raise ValueError(f"{where}: the id {stage.id!r} is used twice")
            if stage.id in ("model", "self", "baseline", "pruned"):
                raise ValueError(f"{where}: the id {stage.id!r} is reserved; choose another")
            if stage.start is not None and stage.start not in ["model", *seen]:
                raise ValueError(f"{where}.from: {stage.start!r} is not 'model' or an earlier stage {seen}")
            start = self.start_of(stage)
            before = self.stage(start) if start != "model" else stage
            palettized = before is not stage and before.palettize and not stage.palettize
            if palettized or (before is not stage and isinstance(before.quantize, WeightOnly)):
                raise ValueError(
                    f"{where}.from: {start!r} holds compressed weights, which nothing may change after:"
                    " start from the stage before it"
                )
            if stage.teacher == "self" and index == 0 and stage.start is None:
                raise ValueError(f"{where}.teacher: 'self' needs an earlier stage to start from")
            if self.precision.master == "split" and stage.prune and stage.prune.schedule.end > 0:
                raise ValueError(
                    f"{where}.prune.schedule: masks act on the compute weights, and with precision.master split those"
                    " are half of the master: use precision.master fp32, or prune at once (end: 0)"
                )
            if self.precision.master == "split" and stage.palettize and stage.palettize.finetune:
                raise ValueError(
                    f"{where}.palettize.finetune: table entries stand in the compute weights, and with precision.master"
                    " split those are half of the master: use precision.master fp32"
                )
            seen.append(stage.id)
        ids = [e.id for e in self.export]
        if len(set(ids)) != len(ids):
            raise ValueError(f"export: ids must differ, got {ids}")
        for export in self.export:
            for stage_id in export.of:
                if stage_id not in seen:
                    raise ValueError(f"export.{export.id}.of: {stage_id!r} is not a stage; stages are {seen}")
            if (tokens := cache_of(export)) is not None:
                self._check_cache(f"export.{export.id}.cache", tokens)
        return self

    def _check_cache(self, where: str, tokens: int) -> None:
        if self.model.task != "causal-lm":
            raise ValueError(f"{where}: is for task causal-lm, not for {self.model.task}; drop it")
        if tokens < self.data.max_length:
            raise ValueError(
                f"{where}: {tokens} tokens are fewer than data.max_length, {self.data.max_length}, by which the"
                " export is scored: raise it"
            )

    def stage(self, stage_id: str) -> Stage:
        return next(s for s in self.stages if s.id == stage_id)

    def start_of(self, stage: Stage) -> str:
        """The id of the stage that `stage` starts from, or "model"."""
        if stage.start is not None:
            return stage.start
        index = self.stages.index(stage)
        return self.stages[index - 1].id if index else "model"
