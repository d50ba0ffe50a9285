"""Writes the recipe reference, a Markdown page, from the schema of the recipe.

`python -m molae_compress.report.schema_page docs/recipe-reference.md`
"""

from __future__ import annotations

import sys
from pathlib import Path

from molae_compress.recipe import Recipe, bundled_recipes, format_size
from molae_compress.recipe.recipe import PAPER
from molae_compress.recipe.refusals import Section, allowed_values, show
from molae_compress.recipe.sections import SECTIONS

_HEAD = """\
<!-- Generated from the schema: python -m molae_compress.report.schema_page docs/recipe-reference.md -->

# Recipe reference

A recipe is a YAML file that says what to compress, on which text, into which form, and how much to keep. Everything
that decides the result is in it; where and how a run happens is said by the flags of the command. Unknown keys are
refused, a key that is left out has the default below, and `recipe.yaml` beside a result holds all of them.

This is the recipe of the quickstart:

```yaml
{example}
```

These recipes come with the package: {bundled}. Their names work wherever the path of a recipe does.
`molae-compress recipe schema` prints the JSON schema, which editors use to check and complete a recipe.

## Top level
"""

_SOURCES = """\
## Sources of text

`calibration.data`, `finetune.data` and `evaluate.data` take one of these, or a list of them. Paths start at the current
directory.

| Source | What is read |
|---|---|
| `notes.txt` | The file, as one document. All text is UTF-8. |
| `folder/` | Its `.txt` files in order of their names, one document each. |
| `rows.jsonl` | One JSON object a line; its text is under `column`. |
| `rows.json` | A JSON list of texts, or of objects with the text under `column`. |
| `rows.parquet` | The column `column`. |
| `org/name` | The part `train` of a dataset of the Hugging Face hub. |
| `org/name[config](train[:5000])` | The same with a configuration, and another part: a split, or some rows of it. |
| `python-docs:calibration` | Python's own help topics but for every fifth: text to try things out with, offline. |
| `python-docs:heldout` | Every fifth of them, to evaluate on. |

Parquet files and hub datasets need the extra `molae-compress[data]`.

The documents of a source are tokenised, each followed by the model's end-of-text token, joined, and cut into windows
of `sequence_length` tokens that do not overlap. Each source contributes the same number of windows; where one is short,
the others fill in. Calibrate on a mixture: text of one narrow domain costs quality on all others. Where there is no
text at all, `calibration: {{self_generated: 256}}` has the model
[write it itself](how-it-works.md#text-that-the-model-writes).

## Sizes

A size is a number and a unit: `KB`, `MB`, `GB`, `TB` are powers of 1000, `KiB`, `MiB`, `GiB`, `TiB` powers of 1024.

## Overrides

`--set key.path=value` on the command line, and `overrides` in Python, replace single values; the value is read as YAML:
`--set budget.keep=0.5`, `--set calibration=null`, `--set 'calibration.data=[a.txt, b.jsonl]'`. A budget replaces a
budget of another kind, and the last one wins. Keys below `init.config` and `init.ranks` are set one by one:
`--set init.config.hidden_size=512`.

## What excludes what

- One of `budget.keep`, `budget.rank`, `budget.target_size` and `budget.max_kl`; the last needs `calibration`.
- `basis.profile: serving` is the layer form: groups are `auto` or `all`, and it excludes `gate_up: separate`,
  `down: dense` and `storage: interpolative`.
- `basis.down: dense` has no output basis: it excludes `output: combined` and `experts_per_output_group`.
- `basis.output: combined` needs `experts_per_output_group: all`.
- `refit.newton` above 0 excludes `cores: false` and `metric: input`.
- `refit.sequential`, `heal.block_steps` and `heal.router_steps` need `calibration`.
- `finetune` names at least one of `router`, `adapters` and `latent`, and has a weight above zero.
- No tensor is both in `finetune.latent` and adapted.
- `gate` needs `evaluate`.
- `method: paper` excludes `calibration` and fixes {paper}.
- `init` starts [a model from scratch](from-scratch.md): it excludes `calibration`, `finetune`, `evaluate`, `gate`, `heal`,
  values of `refit`, `budget.max_kl` and `budget.banks`, and takes either `init.model_type` or `model`.
"""


def recipe_reference() -> str:
    """The recipe reference as Markdown."""
    bundled = bundled_recipes()
    example = bundled["quickstart"].read_text(encoding="utf-8").strip()
    paper = ", ".join(f"`{place}.{key}: {show(value)}`" for place, fixed in PAPER.items() for key, value in fixed.items())
    parts = [_HEAD.format(example=example, bundled=", ".join(f"`{name}`" for name in bundled)), _table(Recipe), ""]
    for place, section in SECTIONS.items():
        parts += [f"## `{place}`\n", f"{section.__doc__}\n", _table(section), ""]
    return "\n".join([*parts, _SOURCES.format(paper=paper)])


def _table(section: type[Section]) -> str:
    """The keys of `section` that are not sections themselves."""
    properties = section.model_json_schema()["properties"]
    rows = ["| Key | Allowed | Default | Meaning |", "|---|---|---|---|"]
    for key, field in section.model_fields.items():
        if section is Recipe and key in SECTIONS:
            continue
        schema = properties[key]
        value = format_size(field.default) if "pattern" in schema else show(field.default)
        default = "required" if field.is_required() else f"`{value}`"
        rows.append(f"| `{key}` | {allowed_values(schema)} | {default} | {field.description} |")
    return "\n".join(rows)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(recipe_reference(), encoding="utf-8")
