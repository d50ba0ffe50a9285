"""The sections of a recipe: every key below the top level, its default, what it allows and what it means.

The descriptions are what users read in the recipe reference, in the JSON schema and in refusals.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from molae_compress.errors import RecipeError
from molae_compress.recipe.refusals import Section, exclusive
from molae_compress.recipe.values import Count, Length, Names, Positive, Ranks, Share, Size, Sources, Steps, Weight, Windows

BUDGETS = ("keep", "rank", "target_size", "max_kl")


class Init(Section):
    """A model from scratch: what `init` and `from_config` build with random latent experts, without weights or text."""

    place = "init"
    model_type: str | None = Field(
        default=None,
        description="Model type of transformers, for example `qwen3_moe`. Without it the configuration is that of `model`, "
        "of which no weights are read.",
    )
    config: dict[str, Any] = Field(
        default={},
        description="Values of the configuration, as transformers calls them; all others are the defaults of the type, or "
        "those of `model`.",
    )
    ranks: dict[str, Ranks] = Field(
        default={},
        description="Ranks of single experts modules, by name or `re:` and a regular expression: one, or a list of those of "
        "the input and the output side. The budget is for all other modules.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of all random weights.")


class Calibration(Section):
    """The text on which the model is watched while it is compressed; without this section compression is data-free."""

    place = "calibration"
    data: Sources | None = Field(
        default=None,
        description="Where the text comes from: one source, or a list of sources that are mixed evenly (see Sources "
        "of text). `null` if the Python caller hands the text over, or if the model writes all of it (`self_generated`).",
    )
    column: str = Field(default="text", description="Column or key that holds the text, for sources that have columns.")
    samples: Count = Field(default=256, description="Number of token windows.")
    sequence_length: Length = Field(default=2048, description="Tokens per window.")
    seed: int = Field(
        default=0, ge=0, description="Seed of the choice of windows where the text has more of them than `samples`."
    )
    self_generated: Literal["auto"] | Windows = Field(
        default="auto",
        description="Windows that the model writes itself, beside those of the text: they stand for all text that it knows. "
        "As many as the text falls short of `samples` are written after its own windows, those beyond that after nothing. "
        "`auto`: what the text falls short of, and an eighth of `samples`; none where the model predicts no next token. "
        "Without any text a number is needed. Writing costs two more passes over the model; 0 saves them.",
    )
    weighting: Literal["squared", "linear", "none"] = Field(
        default="squared",
        description="How much a token counts for an expert: by the square of the routing weight that the model gave "
        "it, by the weight itself, or the same for all tokens.",
    )
    batch_size: Count = Field(default=8, description="Windows per forward pass: a matter of memory and speed.")

    @property
    def writes(self) -> bool:
        """Whether the model is to write part of the text."""
        return self.self_generated != 0


class Basis(Section):
    """The form of the compressed experts: what is shared, and by how many."""

    place = "basis"
    profile: Literal["quality", "serving"] = Field(
        default="quality",
        description="`quality`: small groups of experts share a basis, which gives the best quality per byte. "
        "`serving`: one basis for all experts of a layer on each side, with equal ranks; fewest operations, and "
        "kernels made for ordinary experts run it.",
    )
    gate_up: Literal["joint", "separate"] = Field(
        default="joint", description="Whether the gate and up projections share one input basis or have one each."
    )
    experts_per_input_group: Literal["auto", "all"] | Count = Field(
        default="auto",
        description="Experts that share an input basis. `auto`: for quality 1, or 2 in layers where `allocate: spectrum` "
        "sees that pairs lose less and no output basis is shared; `all` for serving; for `method: paper` 4, or the "
        "largest divisor of the number of experts below 4.",
    )
    experts_per_output_group: Literal["auto", "all"] | Count = Field(
        default="auto",
        description="Experts that share an output basis. `auto`: for quality 1, or 2 in layers where `allocate: spectrum` "
        "sees that pairs lose less and all experts have one rank (`banks`); `all` for serving.",
    )
    cluster: bool = Field(
        default=True,
        description="Whether groups are of experts that read alike; otherwise of neighbours, as without measured spectra.",
    )
    down: Literal["latent", "dense"] = Field(
        default="latent", description="Whether the second (down) projection is compressed too or left at full width."
    )
    output: Literal["expert", "combined"] = Field(
        default="expert",
        description="What the output basis keeps most of: the outputs of the single experts, or their routed sum. The "
        "latter needs `experts_per_output_group: all`.",
    )
    metric: Literal["two-sided", "input"] = Field(
        default="two-sided",
        description="Where the error of the input basis is measured: at the output of the experts, or right after the "
        "first projection.",
    )
    storage: Literal["auto", "interpolative", "orthonormal"] = Field(
        default="auto",
        description="How a basis is written: `interpolative`, a selection of coordinates plus a remainder (fewer "
        "numbers), or `orthonormal` (quantises best). `auto`: interpolative for quality, orthonormal for serving and "
        "for `method: paper`.",
    )

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        output_group = self.experts_per_output_group
        if self.profile == "serving":
            form = "The serving profile is the layer form: one orthonormal basis for all experts on each side."
            for key, excluded in (("storage", "interpolative"), ("gate_up", "separate"), ("down", "dense")):
                if getattr(self, key) == excluded:
                    raise exclusive("basis.profile: serving", f"basis.{key}: {excluded}", form)
            for key in ("experts_per_input_group", "experts_per_output_group"):
                if isinstance(size := getattr(self, key), int):
                    raise exclusive("basis.profile: serving", f"basis.{key}: {size}", form)
        if self.down == "dense" and (self.output == "combined" or output_group != "auto"):
            key = "output: combined" if self.output == "combined" else f"experts_per_output_group: {output_group}"
            raise exclusive("basis.down: dense", f"basis.{key}", "A dense down projection has no output basis.")
        if self.output == "combined" and output_group != "all" and self.profile != "serving":
            raise RecipeError(
                f"`basis.output: combined` cannot go with `basis.experts_per_output_group: {output_group}`.",
                why="The routed sum of a layer has one subspace, which all experts of the layer must share.",
                remedy="Set `basis.experts_per_output_group: all`, or `basis.output: expert`.",
            )
        return self


class Budget(Section):
    """How much may remain: one of `keep`, `rank`, `target_size` and `max_kl`. Without any of them, `keep` is 0.6."""

    place = "budget"
    keep: Share | None = Field(
        default=None,
        description="Share of the parameters of the routed experts that are not ignored; 0.6 if no budget is given.",
    )
    rank: Count | Literal["full"] | None = Field(
        default=None,
        description="The same latent width (rank) everywhere, so that `allocate` has nothing to decide. `full` "
        "changes the form but not the function.",
    )
    target_size: Size | None = Field(
        default=None, description="Bytes of the whole compressed model on disk, for example 24GB."
    )
    max_kl: Positive | None = Field(
        default=None,
        description="The smallest model whose mean KL divergence from the original, in nats per token on text like the "
        "calibration text, is predicted to be at most this. Needs `calibration`, and three trial fits of every layer.",
    )
    allocate: Literal["spectrum", "uniform"] = Field(
        default="spectrum",
        description="`spectrum`: layers and sides that lose more get higher ranks. `uniform`: all get the same share.",
    )
    banks: Literal["auto"] | Count = Field(
        default="auto",
        description="Experts of a layer that need more get higher ranks: this many sets of experts may differ in rank. "
        "`auto`: 4 with `allocate: spectrum`, else 1. Experts that share a basis stay together.",
    )
    max_flops: Literal["auto"] | Positive | None = Field(
        default="auto",
        description="Most operations per token of the routed experts that are not ignored, as a share of those of the dense "
        "ones: ranks that take too many are given up for others. `auto`: 1, never slower than the original; "
        "with `rank` or `method: paper` no limit, but a warning. `null`: no limit, bytes above all.",
    )
    align: Literal["auto"] | Count = Field(
        default="auto",
        description="Ranks are multiples of this number, which suits kernels. `auto`: 8 for quality, halved as long as the "
        "hidden size has fewer than 32 such steps; for serving 128 from a hidden size of 4096 on, 64 from 512 on, and 8 "
        "below, where a step of 64 would be too coarse.",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_budget(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        given = [key for key in BUDGETS if data.get(key) is not None]
        if len(given) > 1:
            raise RecipeError(
                f"The recipe sets {len(given)} budgets: {', '.join(f'`budget.{key}: {data[key]}`' for key in given)}.",
                why="One decides the other.",
                remedy="Keep one of them.",
            )
        return data if given else {**data, "keep": 0.6}

    @model_validator(mode="after")
    def _banks_need_spectra(self) -> Self:
        if self.banks not in ("auto", 1):
            for key, value in (("allocate", "uniform"), ("rank", self.rank)):
                if value is not None and getattr(self, key) == value:
                    raise exclusive(f"budget.banks: {self.banks}", f"budget.{key}: {value}", "Then all ranks are the same.")
        return self


class Refit(Section):
    """What is fitted again, by least squares, once the shared bases stand."""

    place = "refit"
    cores: bool = Field(default=True, description="Refit each expert's own matrices on the tokens that were routed to it.")
    down: bool = Field(
        default=True, description="Refit the down projection on what the compressed first projection really delivers."
    )
    newton: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        default="auto",
        description="Conjugate gradients of the Gauss-Newton step that refines the input side against the activation as it "
        "is: bases and cores, or cores alone where more than four experts share a basis. Each costs a pass over the tokens. "
        "`auto`: 8, or 0 with `cores: false` or `basis.metric: input`. 0: the closed form alone.",
    )
    shrinkage: float = Field(
        default=2.0,
        ge=0,
        description="How strongly an expert with few tokens follows the average of its layer. 0: it trusts its own "
        "tokens alone.",
    )
    sequential: bool = Field(
        default=False,
        description="Calibrate each layer on what the compressed layers before it deliver, not the original ones. Slower.",
    )


class Heal(Section):
    """What is trained once the closed form stands, on the calibration text alone; off unless steps are given."""

    place = "heal"
    block_steps: Steps = Field(
        default=0,
        description="Steps of training for each experts module, towards the routed output of the dense one: 200 is a good "
        "number, 0 is none. Batches, rates and what is kept are chosen automatically.",
    )
    router_steps: Steps = Field(
        default=0,
        description="Steps of training for the routers of the whole compressed model, towards the predictions of the "
        "original; 0 is none. It costs two readings of the model a step and gives far less than `block_steps`.",
    )


class Finetune(Section):
    """Training of the compressed model as a whole, once it is complete; without this section there is none."""

    place = "finetune"
    router: bool = Field(default=False, description="Train the rows of the routers.")
    adapters: Count | None = Field(
        default=None,
        description="Train low-rank adapters (LoRA) of this rank, which are merged before the result is written. Where "
        "matrices of several experts lie in one tensor of two dimensions, they share one side of its adapter.",
    )
    adapter_targets: Names = Field(
        default=(),
        description="What the adapters adapt: names of latent tensors as for `latent`, or of linear layers of the model "
        "such as `q_proj`. All bases and cores if none are given.",
    )
    latent: Literal["all"] | Names | None = Field(
        default=None,
        description="Train latent tensors themselves: `all` of them, or those named, such as `core`, `core.down`, `encode`.",
    )
    data: Sources | None = Field(
        default=None, description="Where the text comes from, as in `calibration.data`; the calibration text if not given."
    )
    column: str = Field(default="text", description="Column or key that holds the text, for sources that have columns.")
    chat: bool = Field(
        default=False,
        description="The column holds conversations (lists of messages with `role` and `content`), which the chat template "
        "of the tokenizer turns into text.",
    )
    completion_only: bool = Field(
        default=False, description="Of conversations, learn only what the assistant says. Needs `chat`."
    )
    packing: bool = Field(
        default=True,
        description="Join texts and cut them into full windows, as calibration does. Otherwise each text is an example of "
        "its own, cut off at `sequence_length`.",
    )
    samples: Count = Field(
        default=1024, description="Number of windows, or of texts without packing; one in sixteen only measures."
    )
    sequence_length: Length = Field(default=1024, description="Tokens per window, or at most of a text.")
    seed: int = Field(default=0, ge=0, description="Seed of the choice and order of windows.")
    kl_weight: Weight = Field(
        default=1.0, description="Weight of the KL divergence from the original's predictions in what is minimised."
    )
    language_weight: Weight = Field(
        default=0.0, description="Weight of the language-model loss: how unlikely the text itself is found."
    )
    original: str | None = Field(
        default=None, description="Folder or hub id of the original model; by default where it was when it was compressed."
    )
    teacher: Literal["cached", "resident"] = Field(
        default="cached",
        description="`cached`: the original is read layer by layer, once, and its `teacher_top_k` likeliest tokens at every "
        "place are kept on disk, 8 bytes each. `resident`: it is loaded beside the compressed model, and all of its "
        "predictions count.",
    )
    teacher_top_k: Count = Field(default=64, description="Tokens kept at every place; the others count as one, together.")
    learning_rate: Literal["auto"] | Positive = Field(
        default="auto",
        description="Of Adam, at its height: a warm-up over a tenth of the steps leads to it, a cosine down to nothing. "
        "`auto` suits each of the ways, the size of each tensor, and how near the model is to the original.",
    )
    epochs: Count = Field(default=2, description="How many times every window is read.")
    batch_size: Count = Field(
        default=4,
        description="Windows per step, on each device. Few tokens do more in many small steps than in few large ones.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="What is computed in; what is trained is float32 in any case. `auto`: bfloat16 on a GPU, else float32.",
    )
    checkpoint_steps: Count = Field(
        default=200, description="Steps between two checkpoints, from which a killed training goes on."
    )
    trainer: dict[str, Any] = Field(
        default={},
        description="Further arguments of the `TrainingArguments` of transformers by their names: "
        "`gradient_accumulation_steps`, `gradient_checkpointing`, `report_to`, `fsdp` and so on.",
    )

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> Self:
        if not (self.router or self.adapters or self.latent):
            raise RecipeError(
                "`finetune` says nothing that is to be trained.",
                remedy="Add `router: true`, `adapters: 16` or `latent: all`, or several of them.",
            )
        if not self.kl_weight and not self.language_weight:
            raise RecipeError(
                "`finetune.kl_weight: 0` and `finetune.language_weight: 0` leave nothing to minimise.",
                remedy="Give one of them a weight above zero.",
            )
        for key, needed in (("completion_only", "chat"), ("adapter_targets", "adapters")):
            if getattr(self, key) and not getattr(self, needed):
                raise RecipeError(
                    f"`finetune.{key}` needs `finetune.{needed}`, which the recipe does not set.",
                    remedy=f"Add `{needed}`, or remove `{key}`.",
                )
        return self


class Evaluate(Section):
    """Text on which the original and the result are compared. Without this section nothing is compared."""

    place = "evaluate"
    data: Sources = Field(
        description="Where the text comes from, as in `calibration.data`. Use text that was not calibrated on."
    )
    column: str = Field(default="text", description="Column or key that holds the text, for sources that have columns.")
    samples: Count = Field(default=64, description="Number of token windows, the first ones of each source.")
    sequence_length: Length = Field(default=1024, description="Tokens per window.")
    batch_size: Count = Field(default=8, description="Windows per forward pass.")


class Gate(Section):
    """Limits that the evaluated result must keep, or the run ends with exit code 3. Needs `evaluate`."""

    place = "gate"
    max_kl: Positive | None = Field(
        default=None,
        description="Highest mean KL divergence of the result's predictions from the original's, in nats per token.",
    )
    max_perplexity_ratio: Positive | None = Field(
        default=None, description="Highest perplexity of the result, divided by that of the original."
    )


class Output(Section):
    """How the compressed model is written."""

    place = "output"
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="Type of the compressed tensors; `auto` is that of the source checkpoint."
    )
    max_shard_size: Size = Field(default=5_000_000_000, description="Largest size of one weights file.")


SECTIONS: dict[str, type[Section]] = {
    section.place: section for section in (Calibration, Basis, Budget, Refit, Heal, Finetune, Evaluate, Gate, Output, Init)
}
