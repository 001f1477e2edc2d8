"""The command line: parse, call one function, print.

Exit codes: 0 done, 1 the job failed, 2 wrong usage or configuration, 130 interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import click
import typer

from fedtune.errors import FedtuneError, UsageError

app = typer.Typer(
    name="fedtune",
    help="Federated and on-device fine-tuning: clients train small adapters, data stays home.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

DebugFlag = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ClientOption = Annotated[
    str | None, typer.Option(help="With the private part of this client of a simulation.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


@app.command(
    epilog="Examples:  fedtune simulate  |  fedtune simulate --references  |  "
    "fedtune simulate --data notes.csv --partition column:hospital  |  "
    "fedtune simulate --set train.lr=1e-3 --rounds 20  |  "
    "fedtune simulate --set secagg.enabled=false  |  "
    "fedtune simulate --drop 0.2 --drop-at sign  |  "
    "fedtune simulate --resume runs/hospitals"
)
def simulate(
    preset: Annotated[
        str | None, typer.Option(help="A packaged configuration.", show_default="hospitals")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A federation.toml instead of a preset.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="A folder with one sub-folder per client, or one file to divide."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model: a Hugging Face folder or hub id.")
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option(help="iid, dirichlet:ALPHA, column:NAME or shards:N."),
    ] = None,
    clients: Annotated[int | None, typer.Option(help="Number of clients.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Number of rounds.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all that is random.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Set any configuration key."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder to make.", show_default="runs/NAME")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this folder.")] = None,
    references: Annotated[
        bool,
        typer.Option(
            "--references",
            help="Also train what to compare with: all data in one place, each client alone, "
            "the untouched base with a linear head.",
        ),
    ] = False,
    wire: Annotated[
        bool,
        typer.Option("--wire", help="Pass every message through Flower's network format."),
    ] = False,
    drop: Annotated[
        float,
        typer.Option(
            min=0, max=0.99, help="Rehearse failures: this share of a round's clients disappears."
        ),
    ] = 0.0,
    drop_at: Annotated[
        str,
        typer.Option(help="At which stage: advertise, share, train, sign or reveal."),
    ] = "train",
    policy: Annotated[
        Path | None,
        typer.Option(help="A client.toml whose [policy] every simulated site follows."),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Processes that train clients; 0: none besides this one.",
            show_default="one per core",
        ),
    ] = None,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Simulate a federation on this machine."""
    from fedtune.simulation import commands

    request = commands.SimulateRequest(
        preset=preset,
        config=config,
        data=data,
        base=base,
        partition=partition,
        clients=clients,
        rounds=rounds,
        seed=seed,
        settings=tuple(settings or ()),
        out=out,
        resume=resume,
        references=references,
        wire=wire,
        drop=drop,
        drop_at=drop_at,
        policy=policy,
        workers=workers,
    )
    raise typer.Exit(commands.simulate(request, as_json))


@app.command(
    "eval",
    epilog="Examples:  fedtune eval runs/hospitals --data new_notes.csv",
)
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    data: Annotated[Path, typer.Option(help="A file with texts and labels.")],
    text_column: Annotated[str, typer.Option(help="Column of the text.")] = "text",
    label_column: Annotated[str, typer.Option(help="Column of the label.")] = "label",
    client: ClientOption = None,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Evaluate the adapter of a run on a file."""
    from fedtune.simulation import results

    raise typer.Exit(results.evaluate(run, data, text_column, label_column, as_json, client))


@app.command(epilog="Examples:  fedtune export runs/hospitals --format merged --out model/")
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    kind: Annotated[
        str,
        typer.Option("--format", help="merged: the adapter folded into the base; adapter: PEFT."),
    ] = "merged",
    client: ClientOption = None,
    debug: DebugFlag = False,
) -> None:
    """Write the model of a run in another form."""
    from fedtune.simulation import results

    raise typer.Exit(results.export(run, out, kind, client))


@app.command(epilog="Examples:  fedtune report runs/hospitals")
def report(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Print the tables of a run and write its report.html again."""
    from fedtune.simulation import commands

    raise typer.Exit(commands.report(run, as_json))


@app.command(
    epilog="Examples:  fedtune init > federation.toml  |  fedtune init my-federation  |  "
    "fedtune init my-federation --example 4"
)
def init(
    folder: Annotated[
        Path | None, typer.Argument(help="The folder of a federation to make.")
    ] = None,
    preset: Annotated[str, typer.Option(help="The preset to start from.")] = "hospitals",
    example: Annotated[
        int | None,
        typer.Option(help="With so many sites, their data and keys: a rehearsal on this machine."),
    ] = None,
    port: Annotated[int, typer.Option(help="The port of a rehearsal's server.")] = 9092,
    debug: DebugFlag = False,
) -> None:
    """Make the files of a federation, or print a preset as a configuration file to edit."""
    from fedtune.config import PRESETS, load_preset

    if folder is None:
        load_preset(preset)
        typer.echo((PRESETS / f"{preset}.toml").read_text(), nl=False)
        return
    from fedtune.deploy import init as making

    if example is None:
        making.init_folder(folder, preset)
        typer.echo(f"{folder}: edit federation.toml, then go by README.md")
        return
    making.init_rehearsal(folder, preset, example, port)
    typer.echo(
        f"{folder}: start fedtune server {folder}/federation.toml, and for each folder in "
        f"{folder}/sites fedtune client FOLDER/client.toml"
    )


@app.command(epilog="Examples:  fedtune server my-federation/federation.toml")
def server(
    federation: Annotated[Path, typer.Argument(help="federation.toml, server.toml beside it.")],
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Run a federation with clients on other machines, or go on with it."""
    from fedtune.deploy import commands

    raise typer.Exit(commands.server(federation, as_json))


@app.command(epilog="Examples:  fedtune client client.toml  |  fedtune client client.toml --once")
def client(
    file: Annotated[Path, typer.Argument(help="The site's client.toml.")],
    once: Annotated[bool, typer.Option("--once", help="End when the run is over.")] = False,
    debug: DebugFlag = False,
) -> None:
    """Take part in a federation as one site, until stopped."""
    from fedtune.deploy import commands

    raise typer.Exit(commands.client(file, once))


@app.command(
    epilog="Examples:  fedtune doctor client.toml  |  fedtune doctor client.toml --measure  |  "
    "fedtune doctor my-federation/federation.toml  |  fedtune doctor"
)
def doctor(
    file: Annotated[
        Path | None,
        typer.Argument(help="A site's client.toml or the server's federation.toml."),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="At a site: train a few steps, to time them."),
    ] = False,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Check this machine before it takes part: software, keys, network, data, room."""
    from fedtune.deploy.doctor import command

    raise typer.Exit(command.doctor(file, measure, as_json, debug))


keys = typer.Typer(help="Make keys, certificates and the roster.", no_args_is_help=True)
app.add_typer(keys, name="keys")


@keys.command(
    "server", epilog="Examples:  fedtune keys server server-keys --host fedtune.example.org"
)
def keys_server(
    folder: Annotated[Path, typer.Argument(help="A new folder, on the server.")],
    host: Annotated[
        list[str], typer.Option(help="Name or address by which sites reach the server.")
    ],
    debug: DebugFlag = False,
) -> None:
    """An authority, a certificate for the server, and its identity."""
    from fedtune.deploy.keys import make_server_keys

    make_server_keys(folder, host)
    typer.echo(f"{folder}/ca.crt is for the sites; everything else stays here")


@keys.command(
    "certificate",
    epilog="Examples:  fedtune keys certificate server-keys  |  "
    "fedtune keys certificate server-keys --host fedtune.example.org --host 10.0.0.7",
)
def keys_certificate(
    folder: Annotated[Path, typer.Argument(help="The server's folder of keys.")],
    host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name or address by which sites reach the server.",
            show_default="those of the old certificate",
        ),
    ] = None,
    debug: DebugFlag = False,
) -> None:
    """A new certificate for the server, by the authority that sites know already."""
    from fedtune.deploy.keys import renew_certificate

    end = renew_certificate(folder, host or ()).not_valid_after_utc
    typer.echo(f"{folder}/server.crt: good until {end:%Y-%m-%d}; start the server again to use it")


@keys.command("site", epilog="Examples:  fedtune keys site keys --name clinic-1")
def keys_site(
    folder: Annotated[Path, typer.Argument(help="A new folder, at the site.")],
    name: Annotated[str, typer.Option(help="The site's name.")],
    debug: DebugFlag = False,
) -> None:
    """A site's identity and transport key."""
    from fedtune.deploy.keys import make_site_keys

    typer.echo(f"{make_site_keys(folder, name)} is for the operator; everything else stays here")


@keys.command("roster", epilog="Examples:  fedtune keys roster my-federation clinic-*.toml")
def keys_roster(
    folder: Annotated[Path, typer.Argument(help="The federation's folder.")],
    sites: Annotated[list[Path], typer.Argument(help="The sites' public.toml files.")],
    debug: DebugFlag = False,
) -> None:
    """The roster of a federation, from the public files of its sites."""
    from fedtune.config import load_server
    from fedtune.deploy.keys import make_roster

    listen = load_server(folder / "server.toml").server
    members = make_roster(folder / listen.roster, folder / listen.keys, sites)
    typer.echo(
        f"{folder / listen.roster}: {members.roster.clients} sites, digest "
        f"{members.roster.digest.hex()}; tell it to the sites on another way than the file"
    )


edge = typer.Typer(help="Artifacts for devices that train without PyTorch.", no_args_is_help=True)
app.add_typer(edge, name="edge")


@edge.command(
    "build",
    epilog="Examples:  fedtune edge build my-federation/federation.toml -o artifacts  |  "
    "fedtune edge build federation.toml -o artifacts --set base.path=/models/base  |  "
    "fedtune edge build federation.toml -o artifacts --kit kit",
)
def edge_build(
    federation: Annotated[Path, typer.Argument(help="The federation's configuration.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder.")] = Path("artifacts"),
    kit: Annotated[
        Path | None,
        typer.Option(help='What `nano kit` made, with base.placement = "server".'),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Set any configuration key."),
    ] = None,
    debug: DebugFlag = False,
) -> None:
    """Export base model, adapter and head as training graphs, once, on a workstation."""
    from fedtune.deploy import edge_commands

    raise typer.Exit(edge_commands.build(federation, out, settings or (), kit))


@edge.command(
    "verify",
    epilog="Examples:  fedtune edge verify artifacts  |  "
    "fedtune edge verify artifacts --digest 5f0c... --json",
)
def edge_verify(
    folder: Annotated[Path, typer.Argument(help="The artifacts.")],
    digest: Annotated[
        str | None, typer.Option(help="SHA-256 that `edge build` printed.", show_default="any")
    ] = None,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Whether this machine computes what PyTorch did: exit code 0 if so, 1 if not."""
    from fedtune.deploy import edge_commands

    raise typer.Exit(edge_commands.check(folder, digest, as_json))


nano = typer.Typer(help="Models that are too big to leave the server.", no_args_is_help=True)
app.add_typer(nano, name="nano")


@nano.command(
    "pretrain-connector",
    epilog="Examples:  fedtune nano pretrain-connector -o connector.safetensors  |  "
    "fedtune nano pretrain-connector -o connector.safetensors --data public/captions.csv",
)
def nano_pretrain_connector(
    out: Annotated[Path, typer.Option("--out", "-o", help="A new file.")] = Path(
        "connector.safetensors"
    ),
    data: Annotated[
        Path | None,
        typer.Option(
            help="Public images: a file with the columns image and caption.",
            show_default="the public part of easy-VQA",
        ),
    ] = None,
    base: Annotated[str, typer.Option(help="The language model.")] = "SmolLM2-135M-Instruct",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1500,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Pretrain the connector from image features to a language model's embeddings, centrally."""
    from fedtune.simulation.nano_commands import PretrainRequest
    from fedtune.simulation.nano_commands import pretrain_connector as run

    raise typer.Exit(run(PretrainRequest(out, base, data, steps, seed), as_json))


@nano.command(
    "kit",
    epilog="Examples:  fedtune nano kit my-federation/federation.toml -o kit  |  "
    "fedtune nano kit federation.toml -o kit --texts public/questions.csv",
)
def nano_kit(
    federation: Annotated[Path, typer.Argument(help="The federation's configuration.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder.")] = Path("kit"),
    texts: Annotated[
        Path | None,
        typer.Option(
            help="A file with the column question: only these words get an embedding.",
            show_default="the whole vocabulary",
        ),
    ] = None,
    debug: DebugFlag = False,
) -> None:
    """Make what sites need of a base model that they do not hold."""
    from fedtune.deploy import nano_commands

    raise typer.Exit(nano_commands.kit(federation, out, texts))


@nano.command(
    "emulator",
    epilog="Example:  fedtune nano emulator federation.toml -o emulator --texts "
    "public/questions.csv",
)
def nano_emulator(
    federation: Annotated[Path, typer.Argument(help="The federation's configuration.")],
    texts: Annotated[Path, typer.Option(help="Public questions: a file with the column question.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder.")] = Path("emulator"),
    debug: DebugFlag = False,
) -> None:
    """Make the smaller model that sites train against, of some of the base model's layers."""
    from fedtune.deploy import nano_commands

    raise typer.Exit(nano_commands.emulator(federation, out, texts))


audit = typer.Typer(help="Check the audit logs of a server and of sites.", no_args_is_help=True)
app.add_typer(audit, name="audit")


@audit.command(
    "verify",
    epilog="Examples:  fedtune audit verify run/audit.jsonl --roster roster.toml  |  "
    "fedtune audit verify audit.jsonl --roster roster.toml --name clinic-1 --head 27:5f0c...",
)
def audit_verify(
    file: Annotated[Path, typer.Argument(help="An audit.jsonl.")],
    roster: Annotated[Path | None, typer.Option(help="Has the key of the log's writer.")] = None,
    public_key: Annotated[
        str | None, typer.Option(help="The writer's Ed25519 key as digits, instead of a roster.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Whose log it must be.", show_default="whose it says it is"),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER:SHA256", help="An entry that you were told of and that must be there."
        ),
    ] = None,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Whether a log is what its writer wrote: exit code 0 if so, 1 if not."""
    from fedtune.deploy import audit_commands

    raise typer.Exit(audit_commands.verify(file, roster, public_key, name, head, as_json))


@audit.command(
    "compare",
    epilog="Examples:  fedtune audit compare run/audit.jsonl clinic-1.jsonl --roster roster.toml",
)
def audit_compare(
    server: Annotated[Path, typer.Argument(help="The server's audit.jsonl.")],
    site: Annotated[Path, typer.Argument(help="A site's audit.jsonl.")],
    roster: Annotated[Path, typer.Option(help="Has the keys of both.")],
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Whether a server and a site say the same of the same rounds: exit code 0 if so, 1 if not."""
    from fedtune.deploy import audit_commands

    raise typer.Exit(audit_commands.compare(server, site, roster, as_json))


privacy = typer.Typer(
    help="Plan differential privacy before anything is trained.", no_args_is_help=True
)
app.add_typer(privacy, name="privacy")


@privacy.command(
    epilog="Examples:  fedtune privacy plan --unit client --epsilon 8 --clients 100  |  "
    "fedtune privacy plan --unit record --epsilon 3 --examples 2000  |  "
    "fedtune privacy plan --unit record --noise-multiplier 1.1 --rounds 20"
)
def plan(
    unit: Annotated[
        str | None, typer.Option(help="Whose presence is hidden: client or record.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="The budget of the whole run.")] = None,
    delta: Annotated[float | None, typer.Option(help="Probability of the exception.")] = None,
    noise_multiplier: Annotated[
        float | None, typer.Option(help="Noise in units of the clip norm, instead of a budget.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Number of rounds.")] = None,
    clients: Annotated[int | None, typer.Option(help="Clients per round.")] = None,
    examples: Annotated[int, typer.Option(help="Training examples of one client.")] = 400,
    parameters: Annotated[int, typer.Option(help="Size of the adapter.")] = 100_000,
    preset: Annotated[str, typer.Option(help="A packaged configuration.")] = "hospitals",
    config: Annotated[
        Path | None, typer.Option(help="A federation.toml instead of a preset.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Set any configuration key."),
    ] = None,
    as_json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Which noise an epsilon needs, or which epsilon a noise gives."""
    from fedtune.simulation import plan as planning

    request = planning.PlanRequest(
        preset=preset,
        config=config,
        unit=unit,
        epsilon=epsilon,
        delta=delta,
        noise_multiplier=noise_multiplier,
        rounds=rounds,
        clients=clients,
        examples=examples,
        parameters=parameters,
        settings=tuple(settings or ()),
    )
    raise typer.Exit(planning.plan(request, as_json))


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Federated and on-device fine-tuning: clients train small adapters, data stays home."""
    if version:
        import importlib.metadata

        typer.echo(importlib.metadata.version("fedtune"))
        raise typer.Exit


def main() -> None:
    """Run the command line; errors of fedtune end in one line and an exit code."""
    try:
        sys.exit(app(standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        _complain(error.format_message(), error.exit_code)
    except FedtuneError as error:
        if "--debug" in sys.argv:
            raise
        _complain(str(error), 2 if isinstance(error, UsageError) else 1)
    except (KeyboardInterrupt, click.Abort):
        _complain("interrupted", 130)


def _complain(text: str, code: int) -> None:
    """One line on stderr, whatever the text quotes, and the exit code."""
    print(f"fedtune: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
