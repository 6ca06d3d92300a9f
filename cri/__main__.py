"""The command `husk`: parses its arguments and runs one verb.

Exit status: 0 success; 1 the command failed, or `husk doctor` found what must be fixed (the reason is on
standard error); 2 wrong usage or configuration, an address of it that cannot be bound included; 130
interrupted by SIGINT.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from cri.config import DEFAULT_FILE, DEFAULT_ROOT, Config, ConfigError, load, to_toml

EXIT_STATUS = """\
exit status:
  0    success
  1    the command failed, or `husk doctor` found something that must be fixed
  2    wrong usage or configuration, or an address of the configuration that cannot be bound
  130  interrupted
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with these arguments (default: of the process) and return its exit status.

    Raises SystemExit with status 2 for wrong usage and 0 for --help, as argparse does.
    """
    args = _parser().parse_args(arguments)
    try:
        code: int = args.run(args)
    except ConfigError as error:
        print(f"husk: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output is gone; an error about that would reach no one
        return 1
    return code


# -------------------------------------------------------------------------------------- arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="husk",
        description="A Kubernetes CRI runtime in which every pod sandbox is a micro-VM.",
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_daemon_options(parser, top=True)
    common = argparse.ArgumentParser(add_help=False)
    _add_daemon_options(common, top=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    serve = commands.add_parser("serve", parents=[common], help="run the daemon")
    serve.set_defaults(run=_serve)
    doctor = commands.add_parser("doctor", parents=[common], help="check what this host has and lacks")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(run=_doctor)
    config = commands.add_parser("config", parents=[common], help="print the configuration in force")
    config.set_defaults(run=_config)
    version = commands.add_parser("version", parents=[common], help="print versions and the commit")
    version.add_argument("--json", action="store_true", help="print JSON")
    version.set_defaults(run=_version)
    trace = commands.add_parser(
        "trace", parents=[common], help="show how long each phase of a pod's start took"
    )
    trace.add_argument("pod", help="its name, its id, or the first characters of its id")
    form = trace.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_const", dest="form", const="json", help="print JSON")
    form.add_argument(
        "--html", action="store_const", dest="form", const="html", help="print a self-contained HTML page"
    )
    trace.set_defaults(run=_trace)
    ps = commands.add_parser(
        "ps", parents=[common], help="list what is held on this host, by owner, without the daemon"
    )
    ps.add_argument("--json", action="store_true", help="print JSON")
    ps.set_defaults(run=_ps)
    _add_guest(commands.add_parser("guest", parents=[common], help="build what VMs boot"), common)
    _add_image(commands.add_parser("image", parents=[common], help="manage the daemon's images"), common)
    return parser


def _add_daemon_options(parser: argparse.ArgumentParser, *, top: bool) -> None:
    """Add the options that every verb takes, before and after it.

    After the verb they have no default: argparse would write it over a value that came before.
    """
    group = parser.add_argument_group("configuration")
    for option, metavar, kind, default, help in (
        ("--config", "FILE", Path, None, f"configuration file (default: {DEFAULT_FILE}, if it exists)"),
        ("--root", "DIR", str, "", f"directory of the daemon's state (default: {DEFAULT_ROOT})"),
        ("--socket", "PATH", str, "", "CRI socket (default: husk.sock in the run directory)"),
    ):
        value = default if top else argparse.SUPPRESS
        group.add_argument(option, metavar=metavar, type=kind, default=value, help=help)


def _add_guest(guest: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    commands = guest.add_subparsers(title="commands", metavar="COMMAND", required=True)
    build = commands.add_parser("build", parents=[common], help="build the guest's kernel and initramfs")
    which = build.add_mutually_exclusive_group()
    which.add_argument(
        "--kernel", type=Path, metavar="FILE", help="use this kernel image, not the distribution's"
    )
    which.add_argument(
        "--kernel-source", action="store_true", help="compile a small kernel from the distribution's source"
    )
    which.add_argument(
        "--kernel-package", default="", metavar="NAME", help="use this package of the distribution's"
    )
    build.add_argument(
        "--modules", type=Path, metavar="DIR", help="the /lib/modules/VERSION that belongs to --kernel"
    )
    build.set_defaults(run=_guest_build)


def _add_image(image: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    from cri.cli.images import add_commands

    add_commands(image, common)
    image.set_defaults(run=_image)


def _load(args: argparse.Namespace) -> Config:
    return load(args.config, root=_absolute(args.root), socket=_absolute(args.socket))


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if path else ""


# ------------------------------------------------------------------------------------------ verbs


def _serve(args: argparse.Namespace) -> int:
    config = _load(args)
    import uvloop

    from cri import daemon
    from cri.lock import DirectoryTaken, hold
    from cri.log_format import setup_logging
    from cri.metrics_server import MetricsNotServed
    from cri.server import SocketTaken
    from cri.streaming.server import StreamingNotServed

    setup_logging(config.log.level, config.log.format)
    try:
        with hold([Path(config.root), Path(config.run)]):
            uvloop.run(daemon.run(config))
    except (MetricsNotServed, StreamingNotServed) as error:
        _failed(error)
        return 2  # an address or a certificate of the configuration cannot be used
    except (DirectoryTaken, SocketTaken, OSError) as error:
        return _failed(error)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from cri.cli import doctor

    findings = asyncio.run(doctor.examine(doctor.Host(_load(args))))
    print(doctor.as_json(findings) if args.json else "\n".join(doctor.as_text(findings)))
    return 1 if doctor.failed(findings) else 0


def _config(args: argparse.Namespace) -> int:
    print(to_toml(_load(args)), end="")
    return 0


def _version(args: argparse.Namespace) -> int:
    from cri import version

    facts = version.facts()
    print(version.as_json(facts) if args.json else "\n".join(version.as_text(facts)))
    return 0


def _ps(args: argparse.Namespace) -> int:
    from cri.cli import ps
    from sandbox.holdings import Places, find_holdings

    config = _load(args)
    places = Places(
        root=Path(config.root),
        run=Path(config.run),
        cgroup_root=config.cgroup_root,
        cni_conf=Path(config.cni.conf_dir),
    )
    try:
        found = find_holdings(places)
    except OSError as error:
        return _failed(error)
    print(ps.as_json(found) if args.json else "\n".join(ps.as_text(found)))
    return 0


def _guest_build(args: argparse.Namespace) -> int:
    from sandbox.errors import SandboxError
    from sandbox.guest_image import build

    def progress(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    root = Path(_load(args).root)
    try:
        image = asyncio.run(
            build.build(
                root,
                kernel=args.kernel,
                modules=args.modules,
                from_source=args.kernel_source,
                package=args.kernel_package,
                progress=progress,
            )
        )
    except (SandboxError, OSError) as error:
        return _failed(error)
    print(image.kernel.parent)
    return 0


def _image(args: argparse.Namespace) -> int:
    from cri.cli.client import CallFailed, Client

    try:
        with Client(Path(_load(args).socket)) as client:
            code: int = args.run_with(client, args)
    except CallFailed as error:
        return _failed(error)
    return code


def _trace(args: argparse.Namespace) -> int:
    from cri.cli import trace, trace_page
    from cri.cli.client import CallFailed, Client

    try:
        with Client(Path(_load(args).socket)) as client:
            start = trace.fetch(client, args.pod)
    except (CallFailed, trace.NoSuchPod) as error:
        return _failed(error)
    match args.form:
        case "json":
            print(trace.as_json(start))
        case "html":
            print(trace_page.as_html(start), end="")
        case _:
            print(*trace.as_text(start, width=shutil.get_terminal_size().columns), sep="\n")
    return 0


def _failed(error: Exception) -> int:
    print(f"husk: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
