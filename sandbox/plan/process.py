"""The first process of a container, and its execs. Pure."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence

from msgspec.structs import replace

from sandbox.apparmor.profile import Policy
from sandbox.capabilities import capability_sets
from sandbox.errors import InvalidSpec
from sandbox.plan.paths import checked, container_path
from sandbox.plan.users import ResolvedUser
from sandbox.plan.values import ContainerPlan, ProcessPlan, Rlimit
from sandbox.seccomp.profile import Filter
from sandbox.spec import ContainerSpec, ImageDefaults

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TERM = b"xterm"
UMASK = 0o022

RLIMIT_NOFILE = 7  # asm-generic/resource.h
# As systemd gives a service: enough for servers, and not a million for programs that close every possible
# descriptor. PID 1 of a kernel has 1024 and 4096.
_NOFILE = (1024, 524288)
_OOM_SCORES = (-1000, 1000)


def compile_process(
    container: ContainerSpec,
    defaults: ImageDefaults,
    user: ResolvedUser,
    hostname: str,
    seccomp: Filter,
    apparmor: Policy,
) -> ProcessPlan:
    """Return the container's first process. Raises InvalidSpec with the field."""
    caps = capability_sets(container.security)
    space = container.security.user_namespace
    return ProcessPlan(
        argv=_argv(container, defaults),
        env=_environment(container, defaults, user, hostname),
        cwd=_cwd(container, defaults),
        uid=user.uid,
        gid=user.gid,
        groups=user.groups,
        cap_bounding=caps.bounding,
        cap_permitted=caps.permitted,
        cap_effective=caps.effective,
        cap_inheritable=caps.inheritable,
        cap_ambient=caps.ambient,
        rlimits=(Rlimit(resource=RLIMIT_NOFILE, soft=_NOFILE[0], hard=_NOFILE[1]),),
        no_new_privs=container.security.no_new_privs,
        seccomp=seccomp.bpf,
        seccomp_flags=seccomp.flags,
        oom_score_adj=_oom_score(container),
        tty=container.tty,
        umask=UMASK,
        make_cwd=True,
        uid_ranges=space.uids if space else (),
        gid_ranges=space.gids if space else (),
        apparmor=apparmor.profile,
    )


def compile_exec(
    plan: ContainerPlan, argv: Sequence[str], *, tty: bool = False, rows: int = 0, columns: int = 0
) -> ProcessPlan:
    """Return an exec: `argv` with the user, capabilities, filters, environment and working directory of the
    container's first process.

    `rows` and `columns` are the terminal's size; 0: the default. Raises InvalidSpec for an empty `argv`.
    """
    if not argv:
        raise InvalidSpec("cmd", "is empty", "a program and its arguments")
    env = plan.process.env
    if tty and not any(entry.startswith(b"TERM=") for entry in env):
        env = (*env, b"TERM=" + TERM)
    return replace(
        plan.process,
        argv=tuple(checked(word, f"cmd[{number}]") for number, word in enumerate(argv)),
        env=env,
        tty=tty,
        rows=rows,
        columns=columns,
        make_cwd=False,
    )


def _argv(container: ContainerSpec, defaults: ImageDefaults) -> tuple[str, ...]:
    """Return the program and its arguments.

    `command` replaces ENTRYPOINT and, given alone, drops CMD; `args` replaces CMD (CRI, ContainerConfig;
    the table in Kubernetes, "Define a Command and Arguments for a Container").
    """
    if container.command:
        argv = [*container.command, *container.args]
    else:
        argv = [*defaults.entrypoint, *(container.args or defaults.cmd)]
    if not argv or not argv[0]:
        raise InvalidSpec(
            "config.command", "no program: neither command, args nor the image names one", "a program to run"
        )
    return tuple(checked(word, "config.command or config.args") for word in argv)


def _environment(
    container: ContainerSpec, defaults: ImageDefaults, user: ResolvedUser, hostname: str
) -> tuple[bytes, ...]:
    """Return the defaults, then the image's variables, then the client's: the last of a name counts.

    HOME is the user's home directory unless the image or the client sets it, as with OCI runtimes.
    """
    merged = {b"PATH": PATH.encode(), b"HOSTNAME": hostname.encode()}
    if container.tty:
        merged[b"TERM"] = TERM
    for entry in defaults.env:
        name, equals, value = entry.encode("utf-8", "surrogatepass").partition(b"=")
        if name and equals and b"\0" not in entry.encode("utf-8", "surrogatepass"):
            merged[name] = value
    for number, (name_text, value) in enumerate(container.envs):
        merged[_env_name(name_text, value, f"config.envs[{number}]")] = value
    merged.setdefault(b"HOME", user.home.encode())
    return tuple(name + b"=" + value for name, value in merged.items())


def _env_name(name: str, value: bytes, field: str) -> bytes:
    checked(name, f"{field}.key")
    if not name or "=" in name:
        raise InvalidSpec(f"{field}.key", f"{name!r} is not a valid name of a variable", "a name without =")
    if b"\0" in value:
        raise InvalidSpec(f"{field}.value", f"the value of {name} has a zero byte")
    return name.encode()


def _cwd(container: ContainerSpec, defaults: ImageDefaults) -> str:
    if container.working_dir:
        return container_path(container.working_dir, "config.working_dir")
    # a relative WORKDIR is relative to the root, as with Docker
    return container_path(posixpath.join("/", defaults.working_dir), "the image's WorkingDir")


def _oom_score(container: ContainerSpec) -> int:
    score = container.resources.oom_score_adj
    low, high = _OOM_SCORES
    if not low <= score <= high:
        raise InvalidSpec(
            "config.linux.resources.oom_score_adj", f"{score} is out of range", f"{low} to {high}"
        )
    return score
