"""README and documentation against the code: commands, flags, messages, links and examples."""

from __future__ import annotations

import ast
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from molae_compress.cli import main
from molae_compress.tensors import ExpertsSpec, LatentShape
from tests import supported_models
from tests.zoo import NO_BASIS, NO_LAYER_FORM

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "benchmarks" / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(
    r"(?P<mark><!-- tested -->\n)?^(?P<indent> *)```(?P<kind>\w+)\n(?P<code>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)
CODE_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, kind: str) -> Iterator[tuple[str, bool]]:
    """Code blocks of one kind, and whether they are marked as tested."""
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        if match["kind"] == kind:
            yield match["code"], match["mark"] is not None


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(page: Path) -> list[list[str]]:
    """Every shell command of the page's code blocks, as words, comments left out."""
    lines = [line for code, _ in blocks(page, "bash") for line in code.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def options(command: click.Command) -> set[str]:
    return {"--help", *(flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts))}


def all_options(command: click.Command) -> set[str]:
    inside = command.commands.values() if isinstance(command, click.Group) else ()
    return options(command).union(*(all_options(child) for child in inside))


def verb(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that `molae-compress WORDS` runs, and the words left for it."""
    command: click.Command = main
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        command, words = command.commands[words[0]], words[1:]
    return command, words


def slug(heading: str) -> str:
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())


def test_every_benchmark_is_described() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in (ROOT / "benchmarks").glob("*.py") if f"`{path.name}`" not in text] == []


@pages
def test_every_command_and_flag_exists(page: Path) -> None:
    for words in commands(page):
        if words[0] == "molae-compress":
            command, rest = verb(words[1:])
            flags = {word for word in rest if word.startswith("-")}
            assert not isinstance(command, click.Group), words
            assert flags <= options(command), words
        elif words[0] == "make":
            targets = {word for word in words[1:] if "=" not in word}
            assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        elif words[0] == "python" and words[1].endswith(".py"):
            source = (ROOT / words[1]).read_text(encoding="utf-8")
            assert all(f'"{word}"' in source for word in words if word.startswith("--")), words
    known = all_options(main)
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py"))
    for _, span in CODE_SPAN.findall(prose(page)):
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", span):
            assert flag in known or (page.parent.name == "benchmarks" and f'"{flag}"' in scripts) or flag == "--help", span


@pages
def test_every_key_path_of_a_recipe_exists(page: Path) -> None:
    from molae_compress.recipe.sections import SECTIONS

    for _, span in CODE_SPAN.findall(prose(page)):
        for place, key in re.findall(rf"(?<![\w./])({'|'.join(SECTIONS)})\.([a-z_]+)\b(?![.…])", span):
            assert key in SECTIONS[place].model_fields or key == "py", span


@pages
def test_every_internal_link_resolves(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", CODE_SPAN.sub("", prose(page))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", file.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, target


def messages() -> str:
    """Every text in the package, one a line, with … for what is filled in."""
    found: list[str] = []
    for path in sorted((ROOT / "molae_compress").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_every_message_quoted_is_one_of_ours() -> None:
    ours = messages()
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [
        span.strip()
        for line in text.splitlines()
        if line.startswith("- `")
        for _, span in CODE_SPAN.findall(line)
        if "…" in span or span.endswith(".")
    ]
    assert len(quoted) > 30
    assert [message for message in quoted if message not in ours] == []


def test_the_format_page_names_every_tensor() -> None:
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    names: set[str] = set()
    for has_gate, has_bias in ((True, True), (False, False)):
        spec = ExpertsSpec("experts", 0, 4, 8, 8, has_gate=has_gate, has_bias=has_bias)
        names |= LatentShape("layer", 8, 8, 4, 4).tensors(spec).keys()
        names |= LatentShape("grouped", 2, 2, 2, 1, storage="interpolative").tensors(spec).keys()
    names |= {"encode_gate", "encode_up", "core.gate", "core.up"}
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


def test_the_page_of_models_is_what_the_models_are() -> None:
    text = (ROOT / "docs" / "supported-models.md").read_text(encoding="utf-8")
    assert supported_models.page() == text, f"run `{supported_models.COMMAND}`"
    sections = dict(re.findall(r"^## (.+)\n\n((?:.|\n(?!## ))*)", text, re.MULTILINE))
    for title, refused in (("Without the profile `serving`", NO_LAYER_FORM), ("Refused", NO_BASIS)):
        listed = dict(re.findall(r"^- `(\w+)`: (.+)$", sections[title], re.MULTILINE))
        assert listed.keys() == refused.keys()
        assert all(reason in listed[name] for name, reason in refused.items())


@pages
def test_every_snippet_of_a_page_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"^(.+\.py):(\w+)$", text, re.MULTILINE)
    assert "8 <" not in text, "a formatter took a snippet for code"
    assert len(named) == (2 if page.name == "adapters.md" else 0)
    for file, section in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert source.count(f"# --8<-- [start:{section}]\n") == source.count(f"# --8<-- [end:{section}]\n") == 1


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The top of a repository in which the quickstart takes a second: the same model, hardly any text."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "recipes").mkdir()
    recipe = (ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
    recipe = re.sub(r"samples: \d+", "samples: 4", recipe)
    recipe = re.sub(r"sequence_length: \d+", "sequence_length: 64", recipe)
    (tmp_path / "recipes" / "quickstart.yaml").write_text(recipe, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_as_written(page: Path) -> int:
    """Runs the commands and the tested Python blocks of a page from top to bottom; returns how many there were."""
    count = 0
    for match in FENCE.finditer(page.read_text(encoding="utf-8")):
        if match["kind"] == "bash":
            for line in match["code"].splitlines():
                words = shlex.split(line, comments=True)
                if words[:1] == ["molae-compress"]:
                    done = CliRunner().invoke(main, words[1:])
                    assert done.exit_code == 0, f"{line}\n{done.output}"
                    count += 1
        elif match["mark"] is not None:
            exec(compile(match["code"], str(page), "exec"), {})
            count += 1
    return count


@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md", "docs/api.md", "docs/from-scratch.md"])
def test_examples_run_as_written(name: str, clone: Path) -> None:
    torch.manual_seed(0)
    assert run_as_written(ROOT / name) > 0
    assert os.listdir(clone / "build")
