"""Converts the security part of requests: namespaces, users, capabilities, profiles. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from cri.fields import absolute, absolutes, checked_ids, one_of, optional_id
from cri.proto import runtime_v1_pb2 as pb
from sandbox.errors import InvalidSpec
from sandbox.host.ids import ID_MAX, IdRange
from sandbox.spec import (
    AppArmor,
    AppArmorKind,
    GroupsPolicy,
    PidMode,
    Seccomp,
    SeccompKind,
    SecuritySpec,
    UserNamespace,
)

PROFILE_NAME_MAX = 512  # bytes; the agent writes "exec NAME" to the guest's kernel
_GROUPS = {pb.Merge: GroupsPolicy.MERGE, pb.Strict: GroupsPolicy.STRICT}


def security_spec(security: pb.LinuxContainerSecurityContext, at: str) -> SecuritySpec:
    """Convert the security context of a container. Raises InvalidSpec."""
    refuse_selinux(security.selinux_options, f"{at}.selinux_options")
    one_of(
        pb.SupplementalGroupsPolicy, security.supplemental_groups_policy, f"{at}.supplemental_groups_policy"
    )
    options = security.namespace_options
    check_namespaces(options, f"{at}.namespace_options")
    run_as_user = optional_id(security, "run_as_user", at)
    run_as_group = optional_id(security, "run_as_group", at)
    if run_as_group is not None and run_as_user is None and not security.run_as_username:
        raise InvalidSpec(
            f"{at}.run_as_group", "is set without a user", "run_as_user or run_as_username as well"
        )
    return SecuritySpec(
        privileged=security.privileged,
        add_capabilities=tuple(security.capabilities.add_capabilities),
        drop_capabilities=tuple(security.capabilities.drop_capabilities),
        ambient_capabilities=tuple(security.capabilities.add_ambient_capabilities),
        pid_mode=pid_mode(options, f"{at}.namespace_options"),
        pid_target=options.target_id,
        host_network=options.network == pb.NODE,
        host_ipc=options.ipc == pb.NODE,
        run_as_user=run_as_user,
        run_as_username=security.run_as_username,
        run_as_group=run_as_group,
        supplemental_groups=checked_ids(security.supplemental_groups, f"{at}.supplemental_groups"),
        groups_policy=_GROUPS[security.supplemental_groups_policy],
        readonly_rootfs=security.readonly_rootfs,
        no_new_privs=security.no_new_privs,
        masked_paths=absolutes(security.masked_paths, f"{at}.masked_paths"),
        readonly_paths=absolutes(security.readonly_paths, f"{at}.readonly_paths"),
        seccomp=seccomp(security, at),
        apparmor=apparmor(security, at, older=security.apparmor_profile),
        user_namespace=user_namespace(options, f"{at}.namespace_options"),
    )


def check_namespaces(options: pb.NamespaceOption, at: str) -> None:
    """Check the modes. NODE passes, as the pod's handler decides on it. Raises InvalidSpec."""
    for field in ("network", "pid", "ipc"):
        mode = one_of(pb.NamespaceMode, getattr(options, field), f"{at}.{field}")
        if mode not in ("POD", "NODE") and field != "pid":
            raise InvalidSpec(f"{at}.{field}", f"{mode}: the containers of a pod share it", "POD, NODE")
    if options.target_id and options.pid != pb.TARGET:
        raise InvalidSpec(f"{at}.target_id", "is set without pid TARGET", "an empty id")


def user_namespace(options: pb.NamespaceOption, at: str) -> UserNamespace | None:
    """Return the user namespace of a pod, with one range that begins at 0; None for NODE, here the VM's.

    Raises InvalidSpec.
    """
    userns, at = options.userns_options, f"{at}.userns_options"
    mode = one_of(pb.NamespaceMode, userns.mode, f"{at}.mode")
    if not options.HasField("userns_options") or mode == "NODE":
        for field in ("uids", "gids"):
            if getattr(userns, field):
                raise InvalidSpec(f"{at}.{field}", f"are set, but the mode is {mode}", "an empty list")
        return None
    if mode != "POD":
        raise InvalidSpec(f"{at}.mode", f"{mode}: the containers of a pod share it", "POD, NODE")
    return UserNamespace(
        uids=(_id_range(userns.uids, f"{at}.uids"),), gids=(_id_range(userns.gids, f"{at}.gids"),)
    )


def _id_range(ranges: Sequence[pb.IDMapping], at: str) -> IdRange:
    if len(ranges) != 1:
        raise InvalidSpec(at, f"has {len(ranges)} mappings", "one")
    (only,) = ranges
    if only.container_id != 0:
        raise InvalidSpec(f"{at}[0].container_id", f"the range begins at {only.container_id}", "0")
    if not 0 < only.length <= ID_MAX or only.host_id + only.length - 1 > ID_MAX:
        raise InvalidSpec(
            f"{at}[0].length",
            f"{only.length} ids from {only.host_id} on are out of range",
            f"1 or more ids up to {ID_MAX}",
        )
    return IdRange(inside=0, outside=only.host_id, length=only.length)


def mount_ids(mount: pb.Mount, at: str) -> UserNamespace | None:
    """Return the id mappings of a mount; None without any. Raises InvalidSpec."""
    if not mount.uidMappings and not mount.gidMappings:
        return None
    return UserNamespace(
        uids=(_id_range(mount.uidMappings, f"{at}.uidMappings"),),
        gids=(_id_range(mount.gidMappings, f"{at}.gidMappings"),),
    )


def pid_mode(options: pb.NamespaceOption, at: str) -> PidMode:
    """Return the mode of the PID namespace. Raises InvalidSpec for TARGET without a target."""
    if options.pid == pb.TARGET and not options.target_id:
        raise InvalidSpec(f"{at}.target_id", "is missing for pid TARGET", "the id of a container")
    return PidMode[pb.NamespaceMode.Name(options.pid)]


def seccomp(security: pb.LinuxSandboxSecurityContext | pb.LinuxContainerSecurityContext, at: str) -> Seccomp:
    """Return the seccomp profile. The field `seccomp` wins over the older string; neither means unconfined.

    Raises InvalidSpec.
    """
    if not security.HasField("seccomp"):
        return _older_seccomp(security.seccomp_profile_path, f"{at}.seccomp_profile_path")
    profile = security.seccomp
    kind = _profile_type(profile, f"{at}.seccomp")
    if kind == "Localhost":
        path = profile.localhost_ref.removeprefix("localhost/")
        return Seccomp(kind=SeccompKind.LOCALHOST, path=absolute(path, f"{at}.seccomp.localhost_ref"))
    if profile.localhost_ref:
        raise InvalidSpec(f"{at}.seccomp.localhost_ref", f"is set with {kind}", "an empty path, or Localhost")
    return Seccomp(kind=SeccompKind.UNCONFINED if kind == "Unconfined" else SeccompKind.RUNTIME_DEFAULT)


def _older_seccomp(path: str, at: str) -> Seccomp:
    if path in ("", "unconfined"):
        return Seccomp()
    if path in ("runtime/default", "docker/default"):
        return Seccomp(kind=SeccompKind.RUNTIME_DEFAULT)
    if path.startswith("localhost/"):
        return Seccomp(kind=SeccompKind.LOCALHOST, path=absolute(path.removeprefix("localhost/"), at))
    raise InvalidSpec(
        at, f"{path!r} is not a valid profile", "unconfined, runtime/default, localhost/<absolute path>"
    )


def apparmor(
    security: pb.LinuxSandboxSecurityContext | pb.LinuxContainerSecurityContext, at: str, older: str = ""
) -> AppArmor:
    """Return the AppArmor profile. `apparmor` wins over the older string; neither means unconfined.

    Raises InvalidSpec.
    """
    if not security.HasField("apparmor"):
        return _older_apparmor(older, f"{at}.apparmor_profile")
    profile = security.apparmor
    kind = _profile_type(profile, f"{at}.apparmor")
    if kind == "Localhost":
        name = profile.localhost_ref.removeprefix("localhost/")
        return _local_profile(name, f"{at}.apparmor.localhost_ref")
    if profile.localhost_ref:
        raise InvalidSpec(
            f"{at}.apparmor.localhost_ref", f"is set with {kind}", "an empty name, or Localhost"
        )
    return AppArmor(kind=AppArmorKind.UNCONFINED if kind == "Unconfined" else AppArmorKind.RUNTIME_DEFAULT)


def _older_apparmor(profile: str, at: str) -> AppArmor:
    if profile in ("", "unconfined"):
        return AppArmor()
    if profile == "runtime/default":
        return AppArmor(kind=AppArmorKind.RUNTIME_DEFAULT)
    if profile.startswith("localhost/"):
        return _local_profile(profile.removeprefix("localhost/"), at)
    raise InvalidSpec(
        at, f"{profile!r} is not a valid profile", "unconfined, runtime/default, localhost/<name>"
    )


def _local_profile(name: str, at: str) -> AppArmor:
    # whether the profile is loaded is checked where the host is read (sandbox.apparmor)
    if not name or "\0" in name or len(name.encode()) > PROFILE_NAME_MAX:
        raise InvalidSpec(
            at,
            f"{name[:80]!r} is not a valid name of a profile",
            f"a name of at most {PROFILE_NAME_MAX} bytes",
        )
    return AppArmor(kind=AppArmorKind.LOCALHOST, name=name)


def _profile_type(profile: pb.SecurityProfile, at: str) -> str:
    return one_of(pb.SecurityProfile.ProfileType, profile.profile_type, f"{at}.profile_type")


def refuse_selinux(options: pb.SELinuxOption, at: str) -> None:
    """Raise InvalidSpec if a label is set."""
    for field in ("user", "role", "type", "level"):
        if getattr(options, field):
            raise InvalidSpec(f"{at}.{field}", "the guest has no SELinux", "an empty label")
