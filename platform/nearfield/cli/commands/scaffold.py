"""`nearfield new`."""

from __future__ import annotations

from pathlib import Path

import click
from nearfield.cli.output import json_option, print_json

KINDS = ("generate", "embed", "tensor", "remote", "custom")


@click.command
@click.argument("name")
@click.option(
    "--engine",
    type=click.Choice(KINDS),
    default="generate",
    show_default=True,
    help="What computes: a language model, embeddings, ONNX, an upstream, a class of your own.",
)
@json_option
def new(name: str, engine: str, as_json: bool) -> int:
    """Start a project in ./NAME: a model's config, ready to run or to edit.

    With --engine custom also an engine: one Python class, with a working example in it. Nothing
    that exists is overwritten.

    \b
    nearfield new mine
    nearfield new shout --engine custom && nearfield up shout/shout.yaml
    """
    from nearfield.cli.templates import project

    directory = Path(name)
    files = project(directory.name, engine, directory.resolve())
    if existing := sorted(file for file in files if (directory / file).exists()):
        raise click.ClickException(
            f"{directory / existing[0]} exists, and nothing is overwritten: choose another name"
        )
    directory.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        # Exclusive, so that not even a race overwrites anything.
        with (directory / file).open("x", encoding="utf-8") as target:
            target.write(text)
    config = directory / f"{directory.name}.yaml"
    if as_json:
        print_json({"files": [str(directory / file) for file in files], "config": str(config)})
        return 0
    for file in files:
        click.echo(f"wrote {directory / file}")
    click.echo(f"\nNext: nearfield check {config} && nearfield up {config}")
    return 0
