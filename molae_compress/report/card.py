"""The model card of an artifact: `README.md`, Markdown with the front matter that the hub reads.

It holds no timings and nothing of this machine but the recipe, so that equal runs write equal cards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from molae_compress.errors import human_bytes
from molae_compress.planning import described
from molae_compress.recipe.files import write_yaml
from molae_compress.report.report import LayerReport, Report
from molae_compress.tensors import shape_from_dict

# What a derived model takes over from the card of the model it was made from.
_KEPT_KEYS = ("license", "license_name", "license_link", "language")
_TAGS = ("molae", "mixture-of-experts", "latent-experts", "compression")
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_LOADING = """\
## How to load it

The package must be imported first; everything after that is plain transformers.

```python
import molae_compress  # registers the format: pip install molae-compress
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

**Without that import, transformers only warns and leaves the experts at random values**: the model loads, and answers
nonsense. `molae-compress verify path/to/this/folder` checks the files, their hashes and that they load. For programs that
cannot have the package, `molae-compress expand path/to/this/folder dense-model` writes ordinary dense experts: the size of
the original model, the quality of this one."""

_LIMITS = """\
## Limits

- It is an approximation of the original model and inherits its limits and biases. Test it on your own task first.
- Its distance to the original differs from text to text; calibrated models are closest on text like the calibration text.
- Only {changed} were changed. {kept} experts, attention and embeddings are the original's, {exactness}."""


def model_card(report: Report, base_readme: str | None) -> str:
    """Writes the card.

    Args:
        report: of the run; only what it measured is shown.
        base_readme: the card of the original model, of which licence and language are kept; None if it has none.

    Returns:
        Markdown that ends in a newline.
    """
    base = _base(report.model)
    # An explicit start and end: the hub reads the first lines between two rows of dashes.
    front = f"---\n{write_yaml(_front_matter(base, base_readme))}---"
    sections = [
        front,
        _introduction(base),
        _measured(report),
        _LOADING,
        _making(report),
        _calibration(report),
        *([_finetuning(report)] if report.finetuned else []),
        *([_warnings(report)] if report.warnings else []),
        _layer_table(report),
        _limits(report),
    ]
    return "\n\n".join(sections) + "\n"


def scratch_card(report: Report) -> str:
    """The card of a model with random weights, to be trained; `report` is that of `report_for`."""
    plan = report.plan
    rows = [
        ("parameters in routed experts", f"{plan['dense_parameters']:,}", _with_share(plan, "parameters", ",")),
        ("weights on disk", human_bytes(report.source["bytes"]), human_bytes(report.artifact["bytes"])),
        ("operations of routed experts per token", f"{plan['dense_flops']:,}", _with_share(plan, "flops", ",")),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    sections = [
        f"---\n{write_yaml({'library_name': 'transformers', 'tags': list(_TAGS[:3])})}---",
        f"# {_base(report.model)}, latent experts, untrained\n\n"
        "**The weights are random.** A Mixture-of-Experts model whose routed experts are latent (Mixture of Latent Experts, "
        "[arXiv 2503.23100](https://arxiv.org/abs/2503.23100)), initialised by `molae_compress` to be trained from scratch.",
        "\n".join(
            [
                "## Beside its dense twin\n",
                "| | dense | this model |",
                "|---|--:|--:|",
                *(f"| {name} | {before} | {after} |" for name, before, after in rows),
            ]
        ),
        _LOADING,
        "## How it was made\n\n```bash\nmolae-compress init recipe.yaml --output model\n```\n\n"
        f"with `recipe.yaml` of this folder (fingerprint `{report.recipe_fingerprint}`):\n\n"
        f"```yaml\n{write_yaml(report.recipe)}```\n\nSoftware: {versions}.",
        _layer_table(report),
    ]
    return "\n\n".join(sections) + "\n"


def comparison(report: Report) -> list[tuple[str, str, str]]:
    """What changed, as rows (figure, original, compressed); only figures that are known."""
    plan, evaluation = report.plan, report.evaluation or {}
    flops = [sum(layer[key] for layer in plan["layers"]) for key in ("dense_flops", "flops")]
    stored = report.source.get("stored_bytes", report.source["bytes"])
    rows = [
        ("parameters in routed experts", f"{plan['dense_parameters']:,}", _with_share(plan, "parameters", ",")),
        ("weights on disk", human_bytes(stored), human_bytes(report.artifact["bytes"])),
        ("operations of routed experts per token", f"{flops[0]:,}", f"{flops[1]:,} ({_percent(flops[1], flops[0])})"),
    ]
    figures = (
        ("perplexity", "original_perplexity", "perplexity", "{:.3f}"),
        ("KL divergence from the original (nats per token)", None, "kl", "{:.4g}"),
        ("same most likely token as the original", None, "top1_agreement", "{:.1%}"),
    )
    for name, before, after, form in figures:
        if evaluation.get(after) is not None:
            original = evaluation.get(before) if before else None
            rows.append((name, "" if original is None else form.format(original), form.format(evaluation[after])))
    when = " of the compression, before fine-tuning" if report.finetuned else ""
    if report.err_h is not None:
        rows.append((f"err_h (error relative to the residual stream, over layers){when}", "", f"{report.err_h:.4g}"))
    if report.prediction is not None:
        rows.append((f"KL divergence as predicted before solving{when}", "", f"{report.prediction['kl']:.4g}"))
        rows.append((f"err_h as predicted before solving{when}", "", f"{report.prediction['err_h']:.4g}"))
    return rows


def _front_matter(base: str | None, base_readme: str | None) -> dict[str, Any]:
    kept = {key: value for key, value in _read_front_matter(base_readme or "").items() if key in _KEPT_KEYS}
    relation = {"base_model": base, "base_model_relation": "quantized"} if base and _HUB_ID.fullmatch(base) else {}
    return {**kept, "library_name": "transformers", **relation, "tags": list(_TAGS)}


def _read_front_matter(readme: str) -> dict[str, Any]:
    """The front matter of a card; empty if there is none that YAML can read."""
    match = _FRONT_MATTER.match(readme.removeprefix("\ufeff"))
    try:
        content = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def _base(model: str | None) -> str | None:
    """The hub id of the original, or the name of its folder."""
    if model is None:
        return None
    is_hub_id = _HUB_ID.fullmatch(model) and not Path(model).is_dir()
    return model if is_hub_id else Path(model).expanduser().resolve().name


def _introduction(base: str | None) -> str:
    is_hub_id = base is not None and _HUB_ID.fullmatch(base)
    origin = f"[{base}](https://huggingface.co/{base})" if is_hub_id else f"`{base}`" if base else "A model"
    return (
        f"# {base.rpartition('/')[2] if base else 'Model'}, latent experts\n\n"
        f"{origin} with its routed experts compressed into latent experts by `molae_compress`: projections into a "
        "smaller space that experts share, and small matrices of each expert inside it (Mixture of Latent Experts, "
        "[arXiv 2503.23100](https://arxiv.org/abs/2503.23100))."
    )


def _measured(report: Report) -> str:
    rows = [f"| {name} | {before} | {after} |" for name, before, after in comparison(report)]
    note = ""
    if report.evaluation:
        asked = report.recipe.get("evaluate") or {}
        sources = ", ".join(f"`{source}`" for source in _listed(asked.get("data")))
        note = f"\n\nMeasured on {report.evaluation['tokens']:,} tokens{f' of {sources}' if sources else ''}."
    table = "\n".join(["| | original | compressed |", "|---|--:|--:|", *rows])
    return f"## What changed\n\n{table}{note}"


def _making(report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return (
        "## How it was made\n\n"
        "```bash\nmolae-compress apply recipe.yaml --output compressed-model\n```\n\n"
        f"with `recipe.yaml` of this folder (fingerprint `{report.recipe_fingerprint}`):\n\n"
        f"```yaml\n{write_yaml(report.recipe)}```\n\n"
        f"Source checkpoint: fingerprint `{report.source['fingerprint']}`. Software: {versions}."
    )


def _calibration(report: Report) -> str:
    found = report.calibration
    if found is None:
        text = "None: the compression was data-free, it looked at the weights alone."
    else:
        sources = ", ".join(f"`{source}`" for source in found.sources) or "text handed over in Python"
        own = f"{found.self_generated:,} that the model wrote itself" if found.self_generated else ""
        text = f"{found.windows - found.self_generated:,} from {sources}" if found.sha256 else ""
        text = f"{found.tokens:,} tokens in {found.windows:,} windows: {' and '.join(part for part in (text, own) if part)}."
        if found.sha256:
            text += f"\n\nSHA-256 of the text: `{found.sha256}`"
    return f"## Calibration text\n\n{text}"


def _finetuning(report: Report) -> str:
    """What was trained after the compression, one line for each training."""
    lines = []
    for entry in report.finetuned:
        trained = "; ".join(f"{way}: {', '.join(f'`{name}`' for name in names)}" for way, names in entry["trained"].items())
        settings = entry["settings"]
        parts = {"kl_weight": "the KL divergence from the original", "language_weight": "the language-model loss"}
        loss = " and ".join(f"{settings[key]:g} times {name}" for key, name in parts.items() if settings[key])
        change = ""
        if entry["loss_before"] is not None:
            change = (
                f" On examples set aside it went from {entry['loss_before']:.4g} to {entry['loss_after']:.4g} per token."
            )
        lines.append(f"- {trained}. {entry['steps']:,} steps on {entry['tokens']:,} tokens, minimising {loss}.{change}")
    return "\n".join(
        [
            "## Fine-tuning",
            "",
            "Trained as a whole after the compression; errors of single modules in this card are those before.",
            "",
            *lines,
        ]
    )


def _warnings(report: Report) -> str:
    return "\n".join(["## Warnings of the run", "", *(f"- {warning}" for warning in report.warnings)])


def _limits(report: Report) -> str:
    method = report.source.get("quantization")
    exactness = f"dequantised from {method} to bfloat16 where they are quantised there" if method else "bit for bit"
    names = {name for entry in report.finetuned for names in entry["trained"].values() for name in names}
    ways = {way for entry in report.finetuned for way in entry["trained"]}
    routers = (report.routers is not None and bool(report.routers["changed"])) or "router" in ways
    changed, kept = ("routed experts and routers", "Shared") if routers else ("routed experts", "Routers, shared")
    if others := sorted(name for name in names if "." not in name and name != "router"):
        changed = f"{changed}, and the layers {', '.join(others)}"
        return _LIMITS.format(changed=changed, kept="All other layers: shared", exactness=exactness)
    return _LIMITS.format(changed=changed, kept=kept, exactness=exactness)


def _layer_table(report: Report) -> str:
    planned = {layer["name"]: layer for layer in report.plan["layers"]}
    rows = [f"| {' | '.join(_layer_row(layer, planned[layer.name]))} |" for layer in report.layers]
    return "\n".join(
        [
            "## Layer by layer",
            "",
            "<details>",
            "<summary>Form, ranks and errors of every experts module</summary>",
            "",
            "| module | form | group in/out | rank in/out | kept | err_h | relative error | unseen experts |",
            "|---|---|--:|--:|--:|--:|--:|--:|",
            *rows,
            "",
            "</details>",
        ]
    )


def _layer_row(layer: LayerReport, planned: Mapping[str, Any]) -> Iterator[str]:
    yield f"`{layer.name}`"
    yield from shape_columns(layer.shape)
    yield _percent(planned["parameters"], planned["dense_parameters"])
    for value in (layer.err_h, layer.relative_error):
        yield "" if value is None else f"{value:.3g}"
    yield str(layer.unseen_experts) if layer.tokens_per_expert else ""


def shape_columns(shape: Mapping[str, Any] | None) -> tuple[str, str, str]:
    """Form, experts per group and ranks of a module, the latter two as input/output side."""
    if shape is None:
        return "dense", "", ""
    return described(shape_from_dict(dict(shape), name=""))


def _with_share(plan: Mapping[str, Any], key: str, form: str) -> str:
    return f"{plan[key]:{form}} ({_percent(plan[key], plan[f'dense_{key}'])})"


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.1%}"


def _listed(value: str | Sequence[str] | None) -> Sequence[str]:
    return [value] if isinstance(value, str) else value or []
