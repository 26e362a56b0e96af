"""The docs as a site: what mkdocs asks while it builds one, see mkdocs.yml.

A page has the place in the site that it has in the repository, so every link between pages leads to the same page here
and there. The reference is no file: it is written while the site is built, from the names that are public and from the
`--help` of each command. Neither torch nor transformers is loaded.
"""

from __future__ import annotations

import ast
import html
import inspect
import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import click

import moeify
from moeify.cli import COMMANDS, main
from moeify.config.choice import words

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md", "docs/*.json", "benchmarks/**/*.json",
         "docs/*.css", "docs/*.js", "examples/*/*.png")  # fmt: skip
NOT_IN_THE_SITE = re.compile(r"^## (?:Pages|The tree)\n.*?(?=^## )", re.MULTILINE | re.DOTALL)  # of README.md
NARROWER = {"76.25em": "70em", "76.234375em": "69.984375em"}  # from where on the theme shows the navigation
LINK = re.compile(r"(?<=\]\()[\w./-]+(?=\))")

# The public names of moeify by the modules that they live in.
SECTIONS = {
    "Convert": ("config", "conversion", "plan", "errors"),
    "Prove": ("proving",),
    "Load": ("hub",),
    "Train": ("training",),
    "Share experts among ranks": ("parallel",),
    "Export, and let other tools see the experts": ("export", "contract"),
}
PASSES = ("find_ffn.FindFFN", "insert_moe.InsertMoE", "insert_losses.InsertLosses", "lower.Lower", "pipeline.Pipeline",
          "base.Rewrite", "base.Pass")  # fmt: skip
WHOLE = {"MoEConfig", "LayerStats", "VerifyReport", "Plan"}  # classes of which the members are of interest, too


def sources() -> list[str]:
    """Return what the site shows of the repository: pages, and what they link to."""
    found = {path for pattern in SHOWN for path in ROOT.glob(pattern)}
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def generated() -> dict[str, str]:
    """Return the pages that are no files, by the places that they have."""
    return {
        "docs/commands.md": commands(),
        "docs/python.md": python(),
        "docs/choices.md": choices(),
        "docs/pass-classes.md": "# Passes\n\nHow to write one: [passes.md](passes.md).\n\n"
        + "\n".join(entry(f"moeify.passes.{name}") for name in PASSES),
    }


def commands() -> str:
    """Return a page on the command line: what `--help` says of every command."""
    context = click.Context(main, info_name="moeify")
    parts = [
        "# Commands",
        "What `moeify COMMAND --help` says. Results go to stdout, everything else to stderr. The exit code is 0 when "
        "all is done, 1 when something was refused or failed, 2 after wrong usage.",
    ]
    for name in COMMANDS:
        command = main.get_command(context, name)
        assert command is not None
        inside = click.Context(command, info_name=f"moeify {name}")
        usage = " ".join(command.collect_usage_pieces(inside))
        records = [record for each in command.get_params(inside) if (record := each.get_help_record(inside))]
        rows = [f"| `{option}` | {_cell(text)} |" for option, text in records if text]
        said = html.escape(inspect.cleandoc(command.help or ""), quote=False)
        table = "\n".join(["| option | what it does |", "|---|---|", *rows])
        parts += [f"## {name}", f"```text\nmoeify {name} {usage}\n```", said, table]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;").replace("*", "&#42;")


def python() -> str:
    """Return a page on every public name of moeify, for mkdocstrings to fill in."""
    homes = {name: home.partition(".")[0] for name, home in moeify._HOME.items()}
    parts = ["# Python\n\nEvery public name of `moeify`. Importing it loads neither torch nor transformers.\n"]
    for title, packages in SECTIONS.items():
        names = [name for package in packages for name, home in homes.items() if home == package]
        parts += [f"## {title}\n", *(entry(f"moeify.{name}", whole=name in WHOLE) for name in names)]
    return "\n".join([*parts, "## Advice of the papers\n", entry("moeify.training.recipes", whole=True)])


def choices() -> str:
    """Return a page on routers and methods."""
    parts = [
        "# Routers and methods\n\nThe options of a router or a method go into the settings as an object, "
        '`router=moeify.routers.Sigmoid(bias_rate=1e-3)`; its word, `router="sigmoid"`, means the defaults.\n'
    ]
    for package, base in (("routers", "Router"), ("methods", "Method")):
        parts.append(f"## {package.capitalize()}\n")
        for word in words(f"moeify.{package}"):
            name = "".join(part.capitalize() for part in word.split("_"))
            said = ast.get_docstring(ast.parse((ROOT / f"moeify/{package}/{word}.py").read_text())) or ""
            parts.append(f"### `moeify.{package}.{name}`\n\nIts word is `{word}`.\n")
            parts.append(f"{said.partition('Shape suffixes')[0]}\n")
            parts.append(entry(f"moeify.{package}.{word}.{name}", heading=False))
        parts.append(entry(f"moeify.config.contracts.{base}Choice", whole=True))
    return "\n".join(parts)


def entry(path: str, *, whole: bool = False, heading: bool = True) -> str:
    """Return what mkdocstrings replaces by an object's docstring.

    Args:
        path: Of the object.
        whole: Show its members, too.
        heading: Begin with its name.
    """
    members = {"inherited_members": True} if whole else {"members": False}
    options = {"show_root_heading": heading, "show_root_toc_entry": heading, **members}
    return f"::: {path}\n    options: {json.dumps(options)}\n"


def on_files(files: Any, config: Any) -> Any:
    """Give mkdocs the pages of the whole repository in the place of those in docs/."""
    file: Any = import_module("mkdocs.structure.files").File
    for each in [each for each in files if each.src_dir == config["docs_dir"]]:
        files.remove(each)
    for path in sources():
        files.append(file.generated(config, path, abs_src_path=str(ROOT / path)))
    for path, text in generated().items():
        files.append(file.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leave out of README.md what the navigation shows, and let links to a folder lead to its README.md."""
    path = page.file.src_uri
    text = NOT_IN_THE_SITE.sub("", markdown) if path == "README.md" else markdown
    if "\n## " not in text and path not in generated():
        page.meta["hide"] = ["toc"]  # it would be empty
    folder = (ROOT / path).parent
    return LINK.sub(lambda link: f"{link[0]}/README.md" if (folder / link[0]).is_dir() else link[0], text)


def on_post_build(config: Any) -> None:
    """Show the navigation beside the page on windows of 1,120 pixels, too: the theme begins at 1,220."""
    found = 0
    for path in Path(config["site_dir"], "assets").rglob("*.min.*s"):
        text = path.read_text()
        for theirs, ours in NARROWER.items():
            found += theirs in text
            text = text.replace(theirs, ours)
        path.write_text(text)
    if found < len(NARROWER):
        raise ValueError(f"the theme has other widths than {', '.join(NARROWER)}: look for them in its main.css")
