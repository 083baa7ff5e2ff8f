"""`nearfield`: the command line. Commands are imported when they are run, so help is quick."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence

import click
from nearfield.core.errors import BadRequest, NearfieldError

# name → (module with a function of that name, what `nearfield --help` says about it)
COMMANDS = {
    "new": ("scaffold", "Start a project: a model's config, and an engine if you want your own."),
    "check": ("check", "Check config files before anything is deployed."),
    "plan": ("plan", "Plan where a model should run: hardware, region, replicas, cost."),
    "up": ("up", "Run a region on this machine, with models in it; or several, with gateways."),
    "serve": ("serve", "Add models to the running region, or upgrade them."),
    "models": ("status", "List the models of the region: where, in which state."),
    "status": ("status", "Show the region, or all of them: endpoints, models, processes."),
    "gateway": ("gateway", "Run a gateway: what clients reach, before any number of regions."),
    "notices": ("notices", "Pass a spot machine's interruption notice on to Ray."),
    "route": ("route", "Show where a request would go now, and why."),
    "simulate": ("simulate", "Run a scenario through the production policy, in simulated time."),
    "pools": ("pools", "Price isolation: shared, fair-queued, dedicated pools for products."),
    "rm": ("serve", "Remove models from the region."),
    "tenants": ("tenants", "Who calls and is billed, where their data may be, their limits."),
    "keys": ("keys", "API keys: create, list, rotate, revoke, export; passport secrets."),
    "usage": ("usage", "Sum what tenants, models, regions or keys used."),
    "down": ("down", "Stop the region, or all of them, and everything in it."),
}

EXIT_FAILED = 1
EXIT_INVALID = 2
EXIT_INTERRUPTED = 130


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"nearfield.cli.commands.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            meant = f" Did you mean {close[0]}?" if close else ""
            raise click.UsageError(f"There is no command {args[0]!r}.{meant}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # Click would import every command for its first line.
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_text) for name, (_, help_text) in COMMANDS.items()])


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        click.echo(f"nearfield {version('nearfield')}")
        ctx.exit()


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 96},
    epilog="Start here: nearfield up",
)
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show it."
)
@click.pass_context
def nearfield(ctx: click.Context) -> None:
    """Serve models on Ray behind the OpenAI and Open Inference APIs.

    \b
    nearfield up                     two real models on this machine, in one command
    nearfield new mine               a config of your own, in ./mine
    nearfield check mine/mine.yaml   what is wrong with it, before anything runs
    nearfield serve mine/mine.yaml   into the region that `nearfield up` runs

    Every command takes --json. Exit codes: 0 done, 1 failed, 2 wrong usage or invalid config.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Errors go to stderr, each with its remedy."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = nearfield.main(args=arguments, prog_name="nearfield", standalone_mode=False)
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "nearfield"
        return _fail(f"{error.format_message()} See: {where} --help", EXIT_INVALID, arguments)
    except click.ClickException as error:
        return _fail(error.format_message(), EXIT_FAILED, arguments)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", EXIT_INTERRUPTED, arguments)
    except BadRequest as error:
        return _fail(error.message, EXIT_INVALID, arguments, error.code)
    except NearfieldError as error:
        return _fail(error.message, EXIT_FAILED, arguments, error.code)
    return result if isinstance(result, int) else 0


def _fail(message: str, exit_code: int, arguments: Sequence[str], code: str | None = None) -> int:
    if "--json" in arguments:
        click.echo(json.dumps({"error": {"message": message, "code": code}}))
    click.echo(f"{click.style('error:', fg='red', bold=True)} {message}", err=True)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
