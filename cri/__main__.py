"""The command `husk`. Exit status: 0 done, 1 failed (the reason on standard error), 2 wrong usage
or configuration."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from cri.config import DEFAULT_FILE, DEFAULT_ROOT, Config, ConfigError, load, to_toml
from cri.version import version


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        code: int = args.run(args)
    except ConfigError as error:
        print(f"husk: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; there is nobody to tell
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    group = common.add_argument_group("which daemon")
    group.add_argument("--config", type=Path, metavar="FILE", help=f"configuration ({DEFAULT_FILE})")
    group.add_argument("--root", default="", metavar="DIR", help=f"state ({DEFAULT_ROOT})")
    group.add_argument("--socket", default="", metavar="PATH", help="CRI socket (RUN/husk.sock)")

    parser = argparse.ArgumentParser(prog="husk", description="A CRI runtime: each pod is a micro-VM.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    serve = commands.add_parser("serve", parents=[common], help="run the daemon")
    serve.set_defaults(run=_serve)
    doctor = commands.add_parser("doctor", parents=[common], help="examine this host")
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(run=_doctor)
    config = commands.add_parser("config", parents=[common], help="print the configuration in force")
    config.set_defaults(run=_config)
    commands.add_parser("version", help="print the version").set_defaults(run=_version)
    trace = commands.add_parser("trace", parents=[common], help="show where a pod's start spent its time")
    trace.add_argument("pod", help="its name, id or the beginning of an id")
    form = trace.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_const", dest="form", const="json", help="for programs")
    form.add_argument("--html", action="store_const", dest="form", const="html", help="a page of one file")
    trace.set_defaults(run=_trace)
    _add_guest(commands.add_parser("guest", help="what VMs boot"), common)
    _add_image(commands.add_parser("image", help="the daemon's images"), common)
    return parser


def _add_guest(guest: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    commands = guest.add_subparsers(metavar="COMMAND", required=True)
    build = commands.add_parser("build", parents=[common], help="make the kernel and initramfs of VMs")
    which = build.add_mutually_exclusive_group()
    which.add_argument("--kernel", type=Path, help="a kernel image instead of the distribution's")
    which.add_argument(
        "--kernel-source", action="store_true", help="compile a small kernel from the distribution's source"
    )
    build.add_argument("--modules", type=Path, help="its /lib/modules/VERSION")
    build.set_defaults(run=_guest_build)


def _add_image(image: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    from cri.cli.images import add_commands

    add_commands(image, common)
    image.set_defaults(run=_image)


def _load(args: argparse.Namespace) -> Config:
    return load(args.config, root=_absolute(args.root), socket=_absolute(args.socket))


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if path else ""


# ------------------------------------------------------------------------------------ commands


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
        return 2  # what the configuration says cannot be had
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
    print(f"husk {version()}")
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
            start = trace.ask(client, args.pod)
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
