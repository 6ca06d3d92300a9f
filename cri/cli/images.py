"""`husk image`: calls of the running daemon, which is the only writer of the image store."""

from __future__ import annotations

import argparse
import getpass
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from google.protobuf.message import Message

from cri.cli.client import Client
from cri.cli.progress import reporter
from cri.proto import husk_v1_pb2 as husk
from cri.proto import runtime_v1_pb2 as pb

IMAGES = husk.DESCRIPTOR.services_by_name["Images"]
RUNTIME_SERVICE = pb.DESCRIPTOR.services_by_name["RuntimeService"]
IMAGE_SERVICE = pb.DESCRIPTOR.services_by_name["ImageService"]


def add_commands(image: argparse.ArgumentParser, common: argparse.ArgumentParser) -> None:
    """Add the verbs of `husk image` to its parser. Each sets `run_with`, called as run_with(client, args)."""
    commands = image.add_subparsers(title="commands", metavar="COMMAND", required=True)
    pull = commands.add_parser("pull", parents=[common], help="pull an image from its registry")
    pull.add_argument("image", help="reference: name, and a tag or a digest")
    pull.add_argument("--username", default="", help="user name for the registry")
    pull.add_argument(
        "--password-stdin",
        action="store_true",
        help="read the password from standard input (default: prompt for it)",
    )
    pull.set_defaults(run_with=_pull)
    load = commands.add_parser("import", parents=[common], help="import an image from a file")
    load.add_argument("path", type=Path, help="OCI layout (directory or tar) or docker-archive tar")
    load.add_argument("--name", default="", help="name of the image, in place of those in the file")
    load.set_defaults(run_with=_import)
    ls = commands.add_parser("ls", parents=[common], help="list images")
    ls.add_argument("--quiet", action="store_true", help="print ids only")
    ls.add_argument(
        "--pulling", action="store_true", help="list the pulls and imports under way, the kubelet's too"
    )
    ls.set_defaults(run_with=_list)
    rm = commands.add_parser("rm", parents=[common], help="remove images and all their names")
    rm.add_argument("images", nargs="+", metavar="image", help="name, digest or id")
    rm.set_defaults(run_with=_remove)


def _pull(client: Client, args: argparse.Namespace) -> int:
    password = ""
    if args.username:
        password = sys.stdin.readline().rstrip("\n") if args.password_stdin else getpass.getpass()
    request = husk.PullRequest(image=args.image, username=args.username, password=password)
    return _follow(client, "Pull", request)


def _import(client: Client, args: argparse.Namespace) -> int:
    return _follow(client, "Import", husk.ImportRequest(path=str(args.path.resolve()), name=args.name))


def _follow(client: Client, method: str, request: Message) -> int:
    with reporter() as report:
        made = []
        for progress in client.stream(IMAGES, method, request):
            if progress.HasField("done"):
                made.append(progress.done)
            else:
                report.report(progress)
    for image in made:
        print(image.image_id, *image.names)
    return 0


def _list_transfers(client: Client) -> int:
    answer = client.call(IMAGES, "ListTransfers", husk.ListTransfersRequest())
    rows = [("NAME", "LAYERS", "RECEIVED", "OF", "SECONDS")]
    for each in answer.transfers:
        layers = f"{each.layers_stored}/{each.layers}" if each.layers else "-"
        received, total = (f"{count / 1e6:.1f} MB" for count in (each.bytes_received, each.bytes_total))
        rows.append((each.name, layers, received, total, f"{each.running_ms / 1000:.0f}"))
    print(*_columns(rows), sep="\n")
    return 0


def _list(client: Client, args: argparse.Namespace) -> int:
    if args.pulling:
        return _list_transfers(client)
    answer = client.call(IMAGE_SERVICE, "ListImages", pb.ListImagesRequest())
    for id, reason in _set_aside(client).items():
        print(f"{id}: set aside, pull it again or remove it: {reason}", file=sys.stderr)
    if args.quiet:
        for image in answer.images:
            print(image.id)
        return 0
    rows = [("NAME", "IMAGE ID", "SIZE")]
    rows += [
        (name, image.id.removeprefix("sha256:")[:12], f"{image.size / 1e6:.1f} MB")
        for image in answer.images
        for name in (image.repo_tags or image.repo_digests or ["<none>"])
    ]
    print(*_columns(rows), sep="\n")
    return 0


def _set_aside(client: Client) -> dict[str, str]:
    """Return why stored images cannot be used, by id."""
    status = client.call(RUNTIME_SERVICE, "Status", pb.StatusRequest(verbose=True))
    reasons: dict[str, str] = json.loads(status.info.get("quarantined", "{}")).get("image", {})
    return reasons


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ((f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return ["   ".join(cells).rstrip() for cells in padded]


def _remove(client: Client, args: argparse.Namespace) -> int:
    """Remove every image that exists; return 1 when one of the names did not."""
    code = 0
    for name in args.images:
        spec = pb.ImageSpec(image=name)
        known = client.call(IMAGE_SERVICE, "ImageStatus", pb.ImageStatusRequest(image=spec))
        aside = {} if known.HasField("image") else _set_aside(client)
        if aside or known.HasField("image"):
            client.call(IMAGE_SERVICE, "RemoveImage", pb.RemoveImageRequest(image=spec))
        # only the daemon knows the names of what was set aside
        gone = aside.keys() - _set_aside(client).keys() if aside else set()
        for id in (known.image.id,) if known.HasField("image") else gone:
            print(id)
        if not known.HasField("image") and not gone:
            print(f"{name}: no such image", file=sys.stderr)
            code = 1
    return code
