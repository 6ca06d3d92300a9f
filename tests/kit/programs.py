"""Images with programs of Debian packages: each with its libraries, at the paths where Debian has them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from tests.kit.debian import libraries_of, unpacked
from tests.kit.images import Image, Layer, Packing, base_layer, helper

WHERE = "/usr/sbin:/usr/bin:/sbin:/bin"
PLUGINS = "xtables"  # of iptables, a directory among the libraries
LEGACY, NFT = "xtables-legacy-multi", "xtables-nft-multi"


def installed(name: str) -> Path:
    """Return the path of an installed program. Raises FileNotFoundError."""
    found = shutil.which(name, path=WHERE)
    if found is None:
        raise FileNotFoundError(f"{name}, of a package of tests/packages.txt")
    return Path(found).resolve()


def programs_layer(programs: Mapping[str, Path], more: Iterable[Path] = ()) -> Layer:
    """Return a layer with programs, by their paths in it, and what they and `more` need."""
    layer = Layer(packing=Packing.PLAIN)
    for place, program in programs.items():
        layer.add(place, program.read_bytes(), mode=0o755)
    libraries: dict[str, Path] = {}
    for program in (*programs.values(), *more):
        if program.read_bytes()[:4] == b"\x7fELF":
            libraries |= _libraries(program)
    for place, library in libraries.items():
        layer.add(place, library.read_bytes(), mode=0o755)
    return layer


def _libraries(program: Path) -> dict[str, Path]:
    try:
        return libraries_of(program)
    except Exception:  # ldd fails for a static program
        if b"/ld-linux" in program.read_bytes()[:8192]:
            raise
        return {}


def _add_iptables(layer: Layer) -> Layer:
    plugins = next(path for path in Path("/usr/lib").glob(f"*/{PLUGINS}") if path.is_dir())
    for plugin in plugins.iterdir():
        if not plugin.is_symlink():
            layer.add(str(plugin), plugin.read_bytes(), mode=0o755)
    for plugin in plugins.iterdir():
        if plugin.is_symlink():
            layer.symlink(str(plugin), str(plugin.readlink()))
    for family in ("iptables", "ip6tables"):
        layer.symlink(f"usr/sbin/{family}-legacy", LEGACY).symlink(f"usr/sbin/{family}", NFT)
        layer.symlink(f"usr/sbin/{family}-save", NFT)
    return layer


@cache
def network_tools() -> Image:
    """Return busybox with iproute2, iptables, nft, mke2fs and the helper `family`."""
    names = ("ip", "tc", "nft", "mke2fs", LEGACY, NFT)
    layer = _add_iptables(programs_layer({f"usr/sbin/{name}": installed(name) for name in names}))
    layer.add("usr/bin/family", helper("family"), mode=0o755)
    return Image((base_layer(), layer), cmd=("sh",))


@cache
def docker() -> Image:
    """Return busybox with Docker as Debian has it, and what it needs."""
    own = ("usr/bin/docker", "usr/sbin/dockerd", "usr/sbin/docker-proxy")
    programs = {name: unpacked("docker.io") / name for name in own}
    programs |= {f"usr/bin/{name}": installed(name) for name in ("containerd", "containerd-shim-runc-v2")}
    programs |= {f"usr/sbin/{name}": installed(name) for name in ("runc", "ip", LEGACY, NFT)}
    return Image((base_layer(), _add_iptables(programs_layer(programs))), cmd=("sh",))


@cache
def node_exporter() -> Image:
    """Return busybox with Prometheus' exporter of a node's figures, as Debian has it."""
    own = "usr/bin/prometheus-node-exporter"
    layer = programs_layer({own: unpacked("prometheus-node-exporter") / own})
    return Image((base_layer(), layer), cmd=(f"/{own}",))
