"""The images that critest pulls, under its names, made of Debian packages.

Its specs need commands that are separate files (masking /bin/ls must hide ls and nothing else), nginx with
its PID file, a set-user-id program, and users and groups that only the image defines.
"""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

from tests.kit.debian import libraries_of, unpacked
from tests.kit.images import Form, Image, Layer, helper, mark, pause
from tests.kit.registry import Registry

HOSTS = ("registry.k8s.io", "gcr.io", "k8s.gcr.io")  # critest's images are named after these
E2E = "e2e-test-images"
STAGING = "k8s-staging-cri-tools"
# of the image that one spec pulls by digest; only the original image has it
FIXED_DIGEST = "9700f9a2f5bf2c45f2f605a0bd3bce7cf37420ec9d3ed50ac2758413308766bf"

PASSWD = """root:x:0:0:root:/root:/bin/sh
www-data:x:33:33::/var/www:/bin/false
nobody:x:65534:65534::/:/bin/false
"""
GROUP = "root:x:0:\nwww-data:x:33:\nnogroup:x:65534:\n"
# commands that Debian's busybox is built without
PGREP = """#!/bin/sh
for entry in /proc/[0-9]*; do
    if grep -q "$1" "$entry/comm" 2>/dev/null; then echo "${entry#/proc/}"; found=yes; fi
done
[ "$found" = yes ]
"""
IPCS = """#!/bin/sh
cat /proc/sysvipc/shm
"""


@cache
def userland() -> Layer:
    """Return a layer with Debian's dynamic busybox, whose shell looks up commands on disk.

    (The static one runs its built-in commands.) Each command is a hard link, as masking a symbolic link would
    mask the whole busybox.
    """
    program = unpacked("busybox") / "bin/busybox"
    if not program.exists():
        program = unpacked("busybox") / "usr/bin/busybox"
    layer = add_program(Layer(), program, "bin/busybox")
    names = subprocess.run([str(program), "--list"], check=True, capture_output=True, text=True).stdout
    for name in names.split():
        if name != "busybox":
            layer.hardlink(f"bin/{name}", "bin/busybox")
    layer.add("bin/pgrep", PGREP, mode=0o755).add("bin/ipcs", IPCS, mode=0o755)
    layer.add("etc/passwd", PASSWD).add("etc/group", GROUP)
    for folder in ("dev", "proc", "sys", "root", "home", "mnt", "run", "var/log", "var/lib", "usr/bin"):
        layer.directory(folder)
    return layer.directory("tmp", 0o1777).symlink("var/run", "/run")


def add_program(layer: Layer, program: Path, path: str) -> Layer:
    """Add a dynamic program with all libraries that it loads."""
    layer.add(path, program.read_bytes(), mode=0o755)
    for name, file in libraries_of(program).items():
        layer.add(name, file.read_bytes(), mode=0o755)
    return layer


def box(word: str, *more: Layer, user: str = "", architecture: str = "amd64") -> Image:
    return Image((userland(), *more, mark(word)), cmd=("sh",), user=user, architecture=architecture)


def nginx(port: int, page: str) -> Image:
    layer = add_program(Layer(), unpacked("nginx") / "usr/sbin/nginx", "usr/sbin/nginx")
    for folder in ("var/lib/nginx", "var/log/nginx"):
        layer.directory(folder)
    layer.add(
        "etc/nginx/nginx.conf",
        f"""user www-data;
daemon off;
worker_processes 1;
pid /run/nginx.pid;
error_log stderr;
events {{ worker_connections 128; }}
http {{
    access_log /dev/stdout;
    server {{
        listen {port};
        listen [::]:{port};
        return 200 "{page}\\n";
    }}
}}
""",
    )
    return Image((userland(), layer), cmd=("nginx",), stop_signal="SIGQUIT")


def httpd() -> Image:
    layer = Layer().add("www/index.html", "It works!\n")
    cmd = ("sh", "-c", "echo httpd started; exec httpd -f -v -p 80 -h /www")
    return Image((userland(), layer), form=Form.DOCKER, cmd=cmd)


def climber() -> Image:
    """Return an image with a set-user-id program that prints its effective user id."""
    layer = Layer().add("usr/bin/effective", helper("effective"), mode=0o4755)
    script = '#!/bin/sh\neffective | sed "s/.* euid=\\([0-9]*\\) .*/Effective uid: \\1/"\n'
    layer.add("usr/bin/nnp", script, mode=0o755)
    return Image((userland(), layer), entrypoint=("nnp",))


def member() -> Image:
    """Return an image whose user has a group that only the image defines."""
    layer = Layer().add("etc/passwd", PASSWD + "default-user:x:1000:1000::/home:/bin/sh\n")
    layer.add("etc/group", GROUP + "default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n")
    return Image((userland(), layer), cmd=("sh",), user="1000")


def push_all(registry: Registry) -> str:
    """Push all images. Returns the digest (64 digits) that replaces the one fixed in a spec."""
    platforms = [box("busybox", architecture=name) for name in ("arm64", "amd64")]
    registry.push_index(f"{E2E}/busybox", "1.29-2", platforms)
    registry.push(f"{E2E}/nginx", "1.14-2", nginx(80, "nginx"))
    registry.push(f"{E2E}/httpd", "2.4.39-4", httpd())
    registry.push(f"{E2E}/nonewprivs", "1.3", climber())
    registry.push(f"{STAGING}/hostnet-nginx-amd64", "latest", nginx(12003, "host network"))
    registry.push(f"{STAGING}/test-image-latest", "latest", box("latest"))
    for tag in ("test", "all"):
        registry.push(f"{STAGING}/test-image-tag", tag, box(tag))
    for number in "123":
        registry.push(f"{STAGING}/test-image-{number}", "latest", box(number))
        registry.push(f"{STAGING}/test-image-tags", number, box("tags"))
    registry.push(f"{STAGING}/test-image-user-uid", "latest", box("uid", user="1002"))
    registry.push(f"{STAGING}/test-image-user-username", "latest", box("name", user="www-data"))
    registry.push(f"{STAGING}/test-image-user-uid-group", "latest", box("uid group", user="1003:1003"))
    named = box("name group", user="www-data:www-data")
    registry.push(f"{STAGING}/test-image-user-username-group", "latest", named)
    registry.push(f"{STAGING}/test-image-predefined-group", "latest", member())
    registry.push("pause", "3.9", pause())
    return registry.push(f"{STAGING}/test-image-digest", "test", box("digest")).removeprefix("sha256:")
