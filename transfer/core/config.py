"""The sections of an experiment, and what each of their keys means; ``experiment.py`` reads them from YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PRESETS = Path(__file__).parent.parent / "presets"


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values cannot change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BaseSection(Section):
    """One model, and how it is loaded."""

    model: str = Field(description="Model reference: zoo:<name>, path:<folder> or hub:<org/name>@<revision>.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Of the weights; what is fine-tuned is float32 (see the recipe's own dtype)."
    )
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:<number>.")


class ModelSection(BaseSection):
    """One model with its SAE."""

    sae: str = Field(description="SAE reference: zoo:<name>/<folder>, path:<folder or .pth>, saelens:<release>/<id>.")
    layer: int | None = Field(
        None, description="hidden_states index the SAE reads; from the SAE's metadata if left out."
    )


class DrawSection(Section):
    """How texts of a source without splits are dealt out; texts that occur twice are dealt once."""

    anchor: int = Field(ge=1, description="Texts of the anchor.")
    seed: int = Field(ge=1, description="Texts of the seed data.")
    evaluation: int = Field(ge=1, description="Texts to evaluate on.")
    facets: int = Field(0, ge=0, description="Topics to group the texts into by their words; 0: those of `topic`.")
    lacks: int | tuple[str, ...] = Field(
        0, description="Topics without any text in the seed data: their names, or how many are drawn."
    )
    random: int = Field(0, ge=0, description="Of the draw.")


class DataSection(Section):
    """Where the texts come from: one source with a split column or a `draw`, or three sources."""

    source: str | None = Field(
        "bundled:requests", description="Path (JSONL, CSV, parquet), hub:<id>@<rev> or bundled:…"
    )
    anchor: str | None = Field(None, description="Source of the anchor texts, when not a split of `source`.")
    seed: str | None = Field(None, description="Source of the seed data, when not a split of `source`.")
    evaluation: str | None = Field(None, description="Source of the evaluation texts, when not a split of `source`.")
    text: str = Field("text", description="Text column.")
    label: str | None = Field(None, description="Label column (two labels); by default `label` or `intent` if present.")
    topic: str | None = Field(None, description="Topic column; by default `topic` if present.")
    split: str | None = Field(
        None, description="Split column (anchor, seed, evaluation); by default `split` if present."
    )
    positive: str = Field("harmful", description="The label to detect.")
    layout: str = Field("", description="Label layout of a known toxicity set, such as surge: see transfer.tasks.")
    draw: DrawSection | None = Field(None, description="Deal the texts of `source` out, which then needs no splits.")


class HarvestSection(Section):
    """How activations are stored."""

    keep_residual: bool = Field(True, description="Keep the residual stream (needed by the residual map).")
    max_tokens: int = Field(512, ge=8, description="Longer texts are cut here, and counted.")
    token_budget: int = Field(8192, ge=64, description="Padded tokens a forward pass holds at most.")
    codes: str = Field(
        "sae",
        pattern=r"^(sae|dense(:\d+(\.\d+)?)?)$",
        description="sae: the SAE's own activation rule; dense[:<floor>]: every pre-activation above the floor.",
    )
    skip: tuple[Literal["space", "punctuation", "digits"], ...] = Field(
        (), description="Content tokens that do not count: pieces of nothing but space, punctuation or digits."
    )


AlignMethod = Literal["fused", "activation", "map", "unembedding", "sinkhorn", "relative", "gromov", "crosscoder"]


class AlignSection(Section):
    """How features are matched."""

    methods: tuple[AlignMethod, ...] = Field(("fused", "activation", "map", "unembedding", "sinkhorn"), min_length=1)
    use: AlignMethod = Field("sinkhorn", description="The method whose matches carry features from model to model.")
    min_support: int = Field(10, ge=2, description="Tokens a feature must fire on to be testable.")
    fit_fraction: float = Field(0.6, gt=0, lt=1, description="Documents to fit on; the rest is held out.")
    q_value: float = Field(0.1, gt=0, le=1, description="Matches above this q-value are not used.")
    n_null: int = Field(20, ge=1, description="Draws of the shuffled-corpus null.")
    reg: float = Field(0.05, gt=0, description="Entropic regularisation of the transport.")
    max_iter: int = Field(2000, ge=1)

    @model_validator(mode="after")
    def _use_is_fitted(self) -> AlignSection:
        if self.use not in self.methods:
            raise ValueError(f"align.use is {self.use!r}, which is not among align.methods {list(self.methods)}")
        return self


class CoverSection(Section):
    """What counts as covered and as relevant."""

    delta: str = Field(
        "quantile:0.5",
        description="quantile:<q> or scale:<share of the 95th percentile> of each feature's own activations on the "
        "anchor, or constant:<value>.",
    )
    always_on: float = Field(
        0.5, gt=0, le=1, description="Features firing on more than this share of the anchor are left out."
    )
    smoothing: float = Field(1e-3, gt=0, le=1, description="Weight of the uniform part in the smoothed divergences.")
    fdr: float = Field(0.1, gt=0, lt=1, description="False-discovery rate of the relevance judge.")
    min_docs: int = Field(3, ge=1, description="Anchor documents a feature must fire on.")
    least_missing: int = Field(
        30, ge=0, description="Below this many missing features the grid is called uninformative."
    )


class AskSection(Section):
    """How a chat model is asked, and what that may cost; prices and caps are those of a server."""

    key_variable: str = Field("", description="Environment variable that holds the key; empty for none.")
    concurrency: int = Field(8, ge=1, description="Requests in flight at most.")
    retries: int = Field(5, ge=0)
    timeout: float = Field(120.0, gt=0, description="Seconds to wait for one answer.")
    batch: int = Field(16, ge=1, description="Rows of a local model's forward pass.")
    device: str = Field("cpu", description="Where a local model runs, such as cuda.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Of a local model's weights.")
    price_prompt: float = Field(0.0, ge=0, description="Currency per million tokens read.")
    price_written: float = Field(0.0, ge=0, description="Currency per million tokens written.")
    max_cost: float | None = Field(None, ge=0, description="Cap in that currency, over all runs of this experiment.")
    max_tokens: int | None = Field(None, ge=0, description="Cap on tokens, over all runs of this experiment.")
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    omit: tuple[str, ...] = Field((), description="Request fields that the server does not take, such as seed.")
    served_by: str = Field(
        "", description="Under what a server's answers are kept; its address by default. Name one that moves."
    )


JudgeKind = Literal["statistical", "endpoint", "local"]


class JudgeSection(AskSection):
    """Who says what a feature is about and whether it matters, and what that may cost."""

    kind: JudgeKind = Field("statistical", description="statistical (offline), endpoint (a server) or local (a model).")
    rubric: str = Field("toxicity", description="Name of a rubric, or a YAML file.")
    threshold: Literal["Maybe", "Probably", "Yes"] = Field("Maybe", description="Least label of a relevant feature.")
    test: Literal["enrichment", "auroc", "information"] = Field(
        "enrichment", description="What the statistical judge goes by."
    )
    spans: int = Field(10, ge=1, description="Texts shown of a feature: half the top, half from all strata.")
    silent: int = Field(5, ge=0, description="Texts shown in which it does not fire.")
    quiz: int = Field(5, ge=3, description="Held-out texts of each side in a detection quiz.")
    shown_fraction: float = Field(0.6, gt=0, lt=1, description="Share of the texts that explanations may see.")
    model: str = Field("", description="The server's name of the model, or a model reference for `local`.")
    base_url: str = Field("http://localhost:8000/v1", description="Address of an OpenAI-compatible server.")

    @field_validator("threshold", mode="before")
    @classmethod
    def _yes_is_a_word(cls, value: Any) -> Any:
        return "Yes" if value is True else value  # YAML reads a bare Yes as true


class SynthSection(Section):
    """The two-step synthesis."""

    batch: int = Field(64, ge=1, description="Texts written at once.")
    features: int = Field(24, ge=1, description="Features asked for per arm.")
    steps: Literal[1, 2] = Field(2, description="1 spends the candidates of both steps on exploration (the ablation).")
    explore: int = Field(2, ge=2, description="Candidates of step 1 per feature and label in a full arm.")
    contrast: int = Field(2, ge=1, description="Candidates of step 2 per feature and label in a full arm.")
    strengths: tuple[float, ...] = Field(
        (0.0, 2.0, 4.0), min_length=1, description="Steering strengths tried in step 1."
    )
    examples: int = Field(4, ge=1, description="Anchor texts shown to the generator.")
    max_new_tokens: int = Field(32, ge=4)
    temperature: float = Field(0.8, gt=0)
    top_p: float = Field(0.9, gt=0, le=1)
    budget: int = Field(40, ge=2, description="Synthetic examples each arm adds to the seed data.")
    openings: bool = Field(
        True, description="Every other text starts with a few words of an anchor text, up to where its feature fires."
    )

    generator: Literal["steered", "guided", "chat"] = Field(
        "steered",
        description="steered: the model itself, steered; guided: its SAE also weighs every token; chat: `chat`.",
    )
    guide: float = Field(4.0, ge=0, description="Guided: nats that one threshold's worth of activation weighs.")
    guide_tokens: int = Field(16, ge=1, description="Guided: tokens compared at each step.")
    chat: str = Field("", description="Chat model: local:<model reference> or http(s)://…/v1#<model>.")
    asking: AskSection = Field(
        default_factory=lambda: AskSection.model_validate({}), description="How that chat model is asked; its caps."
    )
    per_request: int = Field(4, ge=1, description="Texts of one feature asked of the chat model at once.")
    format: Literal["query", "preference", "ab", "instruction"] = Field(
        "query", description="Kind of example; all but query need a chat model."
    )
    search: bool = Field(False, description="Search the steering strength of each feature before step 1.")
    probes: int = Field(6, ge=1, description="Strengths the search tries at most, those of `strengths` among them.")
    search_features: int = Field(8, ge=1, description="Features that strengths are tried on.")
    perplexity_cap: float = Field(
        2.0, ge=1, description="Largest median perplexity of steered texts, relative to unsteered ones."
    )
    retries: int = Field(0, ge=0, description="Further rounds for features of which no text was kept.")
    retry_budget: int | None = Field(None, ge=0, description="Texts all further rounds may take per label; no cap.")
    require: Literal["source", "target", "either", "both"] = Field(
        "source", description="Where a text must fire: the feature, its match in a target, either, or both."
    )
    duplicates: Literal["exact", "minhash"] = Field("exact", description="How near-duplicates are looked for.")
    decontaminate: int = Field(
        0,
        ge=0,
        description="Texts that share this many words in a row with an evaluation text are out; 0: whole copies.",
    )
    allow_harmful: bool = Field(
        False, description="Write texts of a harmful class from your own data (see transfer/synth/safety.py)."
    )

    @model_validator(mode="after")
    def _generator_fits(self) -> SynthSection:
        if self.generator == "chat" and not self.chat:
            raise ValueError("synth.generator is chat, but synth.chat names no model")
        if self.format != "query" and self.generator != "chat":
            raise ValueError(f"synth.format {self.format} needs synth.generator: chat")
        if self.search and self.generator == "chat":
            raise ValueError("synth.search looks for a steering strength, and a chat model is not steered")
        return self


Arm = Literal[
    "seed_only",
    "own",
    "mapped",
    "random",
    "shuffled",
    "full",
    "text",
    "generic",
    "k_center",
    "facility_location",
    "coverage_selection",
]


class TuneSection(Section):
    """The fine-tuning grid."""

    task: str = "intent"
    arms: tuple[Arm, ...] = Field(
        ("seed_only", "own", "mapped", "random", "shuffled", "full"),
        min_length=2,
        description="Training sets of each target; see transfer/grid/arms.py.",
    )
    writers: Literal["source", "all"] = Field(
        "source", description="Who writes for a model's features: that model itself, or every model."
    )
    dose: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (), description="Sizes of seed data that the target is also trained on alone: nested parts of the seed data."
    )
    recipes: tuple[str, ...] = Field(("head",), min_length=1, description="head, lora, paper-head, paper-lora.")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0, 1, 2), min_length=3)
    train: str | None = Field(None, description="Training data of a task that is trained on its own: a file or hub:….")
    evaluation: str | None = Field(None, description="What that task is judged on.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Fields of that task, such as layers of steering or ifeval of instruction."
    )
    base: BaseSection | None = Field(None, description="What that task trains, where it is none of `models`.")

    @model_validator(mode="after")
    def _no_repeats(self) -> TuneSection:
        for name, values in (
            ("seeds", self.seeds),
            ("recipes", self.recipes),
            ("arms", self.arms),
            ("dose", self.dose),
        ):
            if len(set(values)) < len(values):
                raise ValueError(f"tune.{name} repeats a value: {list(values)}")
        if "seed_only" not in self.arms:
            raise ValueError("tune.arms lacks seed_only, which every gain is counted from")
        return self


class Experiment(Section):
    """The whole experiment."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", description="Folder under runs/.")
    seed: int = Field(0, ge=0)
    processes: int = Field(2, ge=1, description="Worker processes, one torch thread each.")
    models: dict[str, ModelSection] = Field(min_length=1)
    data: DataSection = Field(default_factory=lambda: DataSection.model_validate({}))
    harvest: HarvestSection = Field(default_factory=lambda: HarvestSection.model_validate({}))
    align: AlignSection = Field(default_factory=lambda: AlignSection.model_validate({}))
    cover: CoverSection = Field(default_factory=lambda: CoverSection.model_validate({}))
    judge: JudgeSection = Field(default_factory=lambda: JudgeSection.model_validate({}))
    synth: SynthSection = Field(default_factory=lambda: SynthSection.model_validate({}))
    tune: TuneSection = Field(default_factory=lambda: TuneSection.model_validate({}))

    @model_validator(mode="after")
    def _writers_differ(self) -> Experiment:
        if self.tune.writers == "all" and self.synth.generator == "chat":
            raise ValueError("tune.writers is all, but with synth.generator chat one chat model writes everything")
        return self
