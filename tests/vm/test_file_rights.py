"""Who may do what with files: supplementary groups, setgid and sticky directories, ACLs, lost set-id bits; as
on the host, no looser and no stricter, on a root filesystem and on a volume."""

from __future__ import annotations

import json
import stat
import struct
import sys
from pathlib import Path

import pytest

from cri.proto import runtime_v1_pb2 as api
from tests.conftest import Site
from tests.kit.cri import Cri, Pod
from tests.kit.daemon import acls_on_volumes
from tests.kit.registry import HOST
from tests.kit.scratch import scratch_dir

pytestmark = pytest.mark.vm

BUSYBOX = f"{HOST}/husk/busybox:1"
SLEEP = ("sleep", "3600")
USER, GROUP, OTHER = 1000, 2000, 1001

ACL_USER_OBJ, ACL_USER, ACL_GROUP_OBJ, ACL_GROUP, ACL_MASK, ACL_OTHER = 1, 2, 4, 8, 16, 32


def acl(*entries: tuple[int, int, int]) -> bytes:
    """Return an ACL as an extended attribute holds it: version 2, then (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY = 2**32 - 1
USER_MAY = acl(
    (ACL_USER_OBJ, 6, NOBODY),
    (ACL_USER, 6, USER),
    (ACL_GROUP_OBJ, 0, NOBODY),
    (ACL_MASK, 6, NOBODY),
    (ACL_OTHER, 0, NOBODY),
)
GROUP_MAY_NOT = acl(
    (ACL_USER_OBJ, 6, NOBODY),
    (ACL_GROUP_OBJ, 6, NOBODY),
    (ACL_GROUP, 0, GROUP),
    (ACL_MASK, 6, NOBODY),
    (ACL_OTHER, 6, NOBODY),
)
INHERITED = acl(
    (ACL_USER_OBJ, 7, NOBODY),
    (ACL_USER, 6, OTHER),
    (ACL_GROUP_OBJ, 5, NOBODY),
    (ACL_MASK, 7, NOBODY),
    (ACL_OTHER, 0, NOBODY),
)

PREPARE = f"""
import os, sys
os.umask(0)
os.chdir(sys.argv[1])
def directory(name, mode, uid=0, gid=0):
    os.mkdir(name); os.chown(name, uid, gid); os.chmod(name, mode)
def file(name, mode, uid=0, gid=0):
    open(name, "w").write("content\\n"); os.chown(name, uid, gid); os.chmod(name, mode)
directory("shared", 0o2775, 0, {GROUP})
directory("private", 0o700)
directory("readable", 0o755)
directory("sticky", 0o1777)
file("sticky/theirs", 0o666, {OTHER}, {OTHER})
file("secret", 0o600)
file("group", 0o660, 0, {GROUP})
file("setid", 0o6777)
file("named", 0o600)
os.setxattr("named", "system.posix_acl_access", {USER_MAY!r})
file("denied", 0o666)
os.setxattr("denied", "system.posix_acl_access", {GROUP_MAY_NOT!r})
directory("inheriting", 0o777)
os.setxattr("inheriting", "system.posix_acl_default", {INHERITED!r})
"""

DESCRIBE = """
import os, sys
os.chdir(sys.argv[1])
for name in sys.argv[2:]:
    status = os.lstat(name)
    attributes = sorted(os.listxattr(name, follow_symlinks=False))
    print(name, status.st_uid, status.st_gid, oct(status.st_mode), *attributes)
"""


@pytest.fixture(params=["volume", "rootfs"])
def where(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Files:
    """The prepared files, seen by the host and by a container whose user has a supplementary group."""

    def __init__(self, site: Site, cri: Cri, pod: Pod, where: str, groups: tuple[int, ...]) -> None:
        self._site, self._cri = site, cri
        security = api.LinuxContainerSecurityContext(
            run_as_user=api.Int64Value(value=USER),
            run_as_group=api.Int64Value(value=USER),
            supplemental_groups=groups,
        )
        folder = scratch_dir("rights")
        folder.chmod(0o755)
        self.container = cri.create(
            pod,
            BUSYBOX,
            SLEEP,
            linux=api.LinuxContainerConfig(security_context=security),
            mounts=[api.Mount(container_path="/data", host_path=str(folder))] if where == "volume" else [],
        )
        if where == "rootfs":
            verbose = cri.call("ContainerStatus", container_id=self.container, verbose=True)
            folder = Path(json.loads(verbose.info["info"])["rootfs"]) / "data"
            site.namespace.run("mkdir", "-m", "755", str(folder))
        self._folder = folder
        self._python(PREPARE)
        cri.start(self.container)

    def _python(self, script: str, *arguments: str) -> str:
        return str(self._site.namespace.run(sys.executable, "-c", script, str(self._folder), *arguments))

    def sh(self, script: str) -> str:
        """Run a script in /data, and return what it printed, or "denied"."""
        result = self._cri.exec(self.container, "sh", "-c", f"cd /data && umask 022 && {script}")
        if result.code == 0:
            return result.stdout.strip()
        refused = ("Permission denied", "Operation not permitted", "can't")
        assert any(text in result.stderr for text in refused), result
        return "denied"

    def status(self, *names: str) -> dict[str, tuple[int, int, int, list[str]]]:
        """Return owner, group, mode and extended attributes of files as the host has them."""
        lines = (line.split() for line in self._python(DESCRIBE, *names).splitlines())
        return {
            name: (int(uid), int(gid), int(mode, 8), [each for each in attributes if "acl" in each])
            for name, uid, gid, mode, *attributes in lines
        }


@pytest.fixture
def member(site: Site, cri: Cri, pod: Pod, where: str) -> Files:
    return Files(site, cri, pod, where, (GROUP,))


@pytest.fixture
def stranger(site: Site, cri: Cri, pod: Pod, where: str) -> Files:
    return Files(site, cri, pod, where, ())


def test_member_of_a_group_creates_in_its_setgid_directory(member: Files) -> None:
    made = "touch f && mkdir d && ln -s f s && mkfifo p && echo x >f && mv f g && ln g h && touch d/f"
    assert member.sh(f"cd shared && {made} && echo done") == "done"
    found = member.status("shared/g", "shared/h", "shared/d", "shared/s", "shared/p", "shared/d/f")
    assert {(uid, gid) for uid, gid, _, _ in found.values()} == {(USER, GROUP)}
    assert stat.S_IMODE(found["shared/d"][2]) == 0o2755
    assert stat.S_IMODE(found["shared/g"][2]) == 0o644
    assert member.sh("echo more >>group && tail -1 group") == "more"
    assert member.sh("touch mine-not") == "denied"
    assert member.sh("cd sticky && touch mine && chgrp 2000 mine && echo done") == "done"
    assert member.sh("cd sticky && chown 1001 mine") == "denied"


def test_stranger_to_a_group_cannot_create_in_its_directory(stranger: Files) -> None:
    for attempt in (
        "touch shared/f",
        "mkdir shared/d",
        "ln -s x shared/s",
        "mkfifo shared/p",
        "ln sticky/theirs shared/h",
        "echo x >>group",
        "cat group",
    ):
        assert stranger.sh(attempt) == "denied", attempt


def test_member_cannot_do_what_its_rights_do_not_allow(member: Files) -> None:
    """The server keeps its capabilities: the guest's kernel alone refuses."""
    for attempt in (
        "touch private/f",
        "mkdir private/d",
        "touch readable/f",
        "mkdir readable/d",
        "ln -s x readable/s",
        "mkfifo readable/p",
        "mv sticky/theirs readable/x",
        "ls private",
        "cat secret",
        "echo x >secret",
        "rm readable/../secret",
        "chmod 777 secret",
        "mknod sticky/null c 1 3",
    ):
        assert member.sh(attempt) == "denied", attempt


def test_sticky_directory_protects_the_files_of_others(member: Files) -> None:
    assert member.sh("rm -f sticky/theirs") == "denied"
    assert member.sh("mv sticky/theirs sticky/x") == "denied"
    assert member.sh("cd sticky && touch own && rm own && echo done") == "done"


def test_access_list_is_enforced(member: Files, where: str) -> None:
    """On volumes by a module for the distribution's kernel; not by other kernels (docs/limits.md)."""
    if where == "volume" and not acls_on_volumes():
        assert member.sh("cat named") == "denied"
        assert member.sh("cat denied") == "content"
        return
    assert member.sh("cat named && echo more >>named") == "content"
    assert member.sh("cat denied") == "denied"
    assert member.sh("echo more >denied") == "denied"


def test_access_list_that_names_another_group_does_not_concern_a_stranger(stranger: Files) -> None:
    assert stranger.sh("cat denied") == "content"


def test_default_access_list_is_inherited(member: Files, where: str) -> None:
    assert member.sh("cd inheriting && touch f && mkdir d && echo done") == "done"
    found = member.status("inheriting/f", "inheriting/d")
    assert found["inheriting/f"][:2] == (USER, USER)
    assert found["inheriting/f"][3] == ["system.posix_acl_access"]
    assert found["inheriting/d"][3] == ["system.posix_acl_access", "system.posix_acl_default"]
    if where == "rootfs" or acls_on_volumes():  # a default list takes the place of the umask, acl(5)
        modes = [stat.S_IMODE(found[name][2]) for name in ("inheriting/f", "inheriting/d")]
        assert modes == [0o660, 0o770]


def test_write_by_another_user_takes_the_set_id_bits(member: Files) -> None:
    assert member.sh("echo more >>setid && echo done") == "done"
    assert stat.S_IMODE(member.status("setid")["setid"][2]) == 0o777
