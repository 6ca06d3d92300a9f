"""Requests as values: the rules that the CRI states, and refusals that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict

from cri.proto import runtime_v1_pb2 as pb
from cri.translate import container_spec, pod_spec, resources
from sandbox.errors import InvalidSpec
from sandbox.host.ids import IdRange
from sandbox.spec import (
    AppArmor,
    AppArmorKind,
    ContainerSpec,
    GroupsPolicy,
    PidMode,
    PodSpec,
    Propagation,
    Seccomp,
    SeccompKind,
    UserNamespace,
)

METADATA = {"name": "web", "uid": "u1", "namespace": "default"}


def pod(**config: object) -> PodSpec:
    return pod_spec(ParseDict({"metadata": METADATA} | config, pb.PodSandboxConfig()), "")


def secure_pod(**security: object) -> PodSpec:
    return pod(linux={"securityContext": security})


def container(**config: object) -> ContainerSpec:
    content: Mapping[str, object] = {"metadata": {"name": "c"}, "image": {"image": "i"}} | config
    return container_spec(ParseDict(dict(content), pb.ContainerConfig()))


def secure(**security: object) -> ContainerSpec:
    return container(linux={"securityContext": security})


def mounted(**mount: object) -> ContainerSpec:
    return container(mounts=[{"containerPath": "/c", "hostPath": "/h"} | mount])


@pytest.mark.parametrize(
    ("limit", "overhead", "parent"), [(0, 0, "/pods/a"), (64, 32, "/pods/a"), (0, 32, "/pods/a"), (64, 0, "")]
)
def test_cgroup_parent_without_overhead_is_not_used_for_a_vm(limit: int, overhead: int, parent: str) -> None:
    linux = {
        "cgroupParent": "/pods/a",
        "resources": {"memoryLimitInBytes": limit},
        "overhead": {"memoryLimitInBytes": overhead},
    }
    assert pod(linux=linux).cgroup_parent == parent


def test_minimal_pod_has_defaults() -> None:
    spec = pod()
    assert (spec.name, spec.uid, spec.namespace, spec.attempt) == ("web", "u1", "default", 0)
    # proto3: what is absent has the zero value, and that is POD
    assert spec.pid_mode is PidMode.POD


def test_pod_network_options_are_converted() -> None:
    spec = pod(
        hostname="web-0",
        dnsConfig={"servers": ["10.0.0.10"], "searches": ["svc"], "options": ["ndots:5"]},
        portMappings=[{"protocol": "UDP", "containerPort": 53, "hostPort": 5353, "hostIp": "127.0.0.1"}],
        linux={"cgroupParent": "/kubepods/podu1", "sysctls": {"net.ipv4.ip_forward": "1"}},
    )
    assert spec.dns.options == ("ndots:5",)
    mapping = spec.port_mappings[0]
    assert (mapping.protocol, mapping.container_port, mapping.host_port) == ("udp", 53, 5353)
    assert (spec.cgroup_parent, spec.sysctls) == ("/kubepods/podu1", {"net.ipv4.ip_forward": "1"})


@pytest.mark.parametrize("missing", ["name", "uid", "namespace"])
def test_pod_without_a_name_is_refused(missing: str) -> None:
    metadata = {key: value for key, value in METADATA.items() if key != missing}
    with pytest.raises(InvalidSpec) as caught:
        pod(metadata=metadata)
    assert caught.value.field == f"config.metadata.{missing}"


@pytest.mark.parametrize("kind", ["network", "pid", "ipc"])
def test_host_namespaces_are_passed_to_the_handler(kind: str) -> None:
    options = {kind: "NODE"}
    assert secure_pod(namespaceOptions=options).host_namespaces == (kind,)
    security = secure(namespaceOptions=options).security
    assert (security.host_network, security.host_ipc, security.pid_mode is PidMode.NODE) == tuple(
        kind == each for each in ("network", "ipc", "pid")
    )


def test_host_namespace_with_user_namespace_is_refused() -> None:
    space = {"mode": "POD", "uids": [MAPPING], "gids": [MAPPING]}
    with pytest.raises(InvalidSpec, match="cannot be combined with network NODE") as caught:
        secure_pod(namespaceOptions={"network": "NODE", "usernsOptions": space})
    at = "config.linux.security_context.namespace_options"
    assert caught.value.field == f"{at}.userns_options.mode"


def test_cgroup_parent_without_overhead_is_used_for_a_pod_without_a_vm() -> None:
    linux = {"cgroupParent": "/kubepods/podu1", "resources": {"memoryLimitInBytes": 1 << 20}}
    assert pod(linux=linux).cgroup_parent == ""
    security = {"namespaceOptions": {"network": "NODE"}}
    assert pod(linux=linux | {"securityContext": security}).cgroup_parent == "/kubepods/podu1"


def test_pid_mode_is_converted() -> None:
    assert secure_pod(namespaceOptions={"pid": "CONTAINER"}).pid_mode is PidMode.CONTAINER
    assert secure(namespaceOptions={"pid": "CONTAINER"}).security.pid_mode is PidMode.CONTAINER
    target = secure(namespaceOptions={"pid": "TARGET", "targetId": "abc"}).security
    assert (target.pid_mode, target.pid_target) == (PidMode.TARGET, "abc")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"pid": "TARGET"}, "target_id"),
        ({"targetId": "abc"}, "target_id"),
        ({"network": "CONTAINER"}, "network"),
        ({"ipc": "TARGET"}, "ipc"),
        ({"usernsOptions": {"mode": "POD"}}, "userns_options.uids"),
        ({"usernsOptions": {"mode": "NODE", "uids": [{"length": 1}]}}, "userns_options.uids"),
    ],
)
def test_invalid_namespace_mode_is_refused(options: object, field: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        secure(namespaceOptions=options)
    assert caught.value.field == f"config.linux.security_context.namespace_options.{field}"


def test_pid_target_of_a_pod_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="cannot have TARGET"):
        secure_pod(namespaceOptions={"pid": "TARGET", "targetId": "x"})


@pytest.mark.parametrize(
    ("security", "expected"),
    [
        ({}, Seccomp()),
        ({"seccomp": {"profileType": "RuntimeDefault"}}, Seccomp(kind=SeccompKind.RUNTIME_DEFAULT)),
        ({"seccomp": {"profileType": "Unconfined"}}, Seccomp()),
        (
            {"seccomp": {"profileType": "Localhost", "localhostRef": "/var/p.json"}},
            Seccomp(kind=SeccompKind.LOCALHOST, path="/var/p.json"),
        ),
        ({"seccompProfilePath": "runtime/default"}, Seccomp(kind=SeccompKind.RUNTIME_DEFAULT)),
        ({"seccompProfilePath": "docker/default"}, Seccomp(kind=SeccompKind.RUNTIME_DEFAULT)),
        ({"seccompProfilePath": "unconfined"}, Seccomp()),
        (
            {"seccompProfilePath": "localhost//var/p.json"},
            Seccomp(kind=SeccompKind.LOCALHOST, path="/var/p.json"),
        ),
        # the newer field wins
        ({"seccomp": {"profileType": "Unconfined"}, "seccompProfilePath": "runtime/default"}, Seccomp()),
    ],
)
def test_seccomp_profile_in_both_fields_is_converted(security: dict[str, Any], expected: Seccomp) -> None:
    assert secure(**security).security.seccomp == expected
    assert secure_pod(**security).seccomp == expected


@pytest.mark.parametrize(
    ("security", "field"),
    [
        ({"seccompProfilePath": "localhost/p.json"}, "seccomp_profile_path"),
        ({"seccompProfilePath": "strict"}, "seccomp_profile_path"),
        ({"seccomp": {"profileType": "Localhost"}}, "seccomp.localhost_ref"),
        ({"apparmor": {"profileType": "Localhost"}}, "apparmor.localhost_ref"),
        ({"apparmor": {"profileType": "Localhost", "localhostRef": "localhost/"}}, "apparmor.localhost_ref"),
        ({"apparmor": {"profileType": "Localhost", "localhostRef": "a\0b"}}, "apparmor.localhost_ref"),
        ({"apparmor": {"profileType": "Localhost", "localhostRef": "é" * 300}}, "apparmor.localhost_ref"),
        ({"apparmor": {"profileType": "Unconfined", "localhostRef": "p"}}, "apparmor.localhost_ref"),
        ({"apparmorProfile": "localhost/"}, "apparmor_profile"),
        ({"apparmorProfile": "docker/default"}, "apparmor_profile"),
        ({"selinuxOptions": {"level": "s0"}}, "selinux_options.level"),
        ({"runAsGroup": {"value": 1}}, "run_as_group"),
        ({"runAsUser": {"value": -1}}, "run_as_user"),
        ({"runAsUser": {"value": 1 << 32}}, "run_as_user"),
        ({"supplementalGroups": [1, -1]}, "supplemental_groups[1]"),
        ({"maskedPaths": ["proc"]}, "masked_paths[0]"),
    ],
)
def test_unsupported_security_option_is_refused(security: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        secure(**security)
    assert caught.value.field == f"config.linux.security_context.{field}"


LOADED = AppArmor(kind=AppArmorKind.LOCALHOST, name="p/q")


@pytest.mark.parametrize(
    ("security", "expected"),
    [
        ({}, AppArmor()),
        ({"apparmor": {}}, AppArmor(kind=AppArmorKind.RUNTIME_DEFAULT)),
        ({"apparmor": {"profileType": "Unconfined"}}, AppArmor()),
        ({"apparmor": {"profileType": "Localhost", "localhostRef": "p/q"}}, LOADED),
        ({"apparmor": {"profileType": "Localhost", "localhostRef": "localhost/p/q"}}, LOADED),
    ],
)
def test_apparmor_profile_is_converted(security: dict[str, Any], expected: AppArmor) -> None:
    assert secure(**security).security.apparmor == expected
    assert secure_pod(**security).apparmor == expected


@pytest.mark.parametrize(
    ("older", "expected"),
    [
        ("", AppArmor()),
        ("unconfined", AppArmor()),
        ("runtime/default", AppArmor(kind=AppArmorKind.RUNTIME_DEFAULT)),
        ("localhost/p/q", LOADED),
    ],
)
def test_apparmor_profile_in_the_older_field_is_converted(older: str, expected: AppArmor) -> None:
    assert secure(apparmorProfile=older).security.apparmor == expected
    newer = {"apparmor": {"profileType": "Unconfined"}}
    assert secure(apparmorProfile=older, **newer).security.apparmor == AppArmor(), "which wins"


def test_users_and_groups_are_converted() -> None:
    security = secure(
        runAsUsername="www",
        runAsGroup={"value": 0},
        supplementalGroups=[7, 8],
        supplementalGroupsPolicy="Strict",
    ).security
    assert (security.run_as_user, security.run_as_username, security.run_as_group) == (None, "www", 0)
    assert (security.supplemental_groups, security.groups_policy) == ((7, 8), GroupsPolicy.STRICT)


@pytest.mark.parametrize(
    ("number", "name"),
    [(0, ""), (23, "SIGTERM"), (35, "SIGRTMIN"), (38, "SIGRTMIN+3"), (51, "SIGRTMAX-14"), (65, "SIGRTMAX")],
)
def test_stop_signal_is_converted(number: int, name: str) -> None:
    assert container(stopSignal=number).stop_signal == name


def test_unknown_enum_value_is_refused() -> None:
    config = ParseDict({"metadata": {"name": "c"}, "image": {"image": "i"}}, pb.ContainerConfig())
    config.mounts.add(container_path="/c", host_path="/h", propagation=9)
    with pytest.raises(InvalidSpec) as caught:
        container_spec(config)
    assert caught.value.field == "config.mounts[0].propagation"
    assert "9 is unknown" in str(caught.value)


MAPPING = {"containerId": 0, "hostId": 1000, "length": 100000}


def test_user_namespace_is_converted() -> None:
    options = {"usernsOptions": {"mode": "POD", "uids": [MAPPING], "gids": [MAPPING]}}
    ids = IdRange(inside=0, outside=1000, length=100000)
    space = UserNamespace(uids=(ids,), gids=(ids,))
    assert secure_pod(namespaceOptions=options).user_namespace == space
    assert secure_pod(namespaceOptions={"usernsOptions": {"mode": "NODE"}}).user_namespace is None
    assert secure_pod(namespaceOptions={}).user_namespace is None
    mappings = {"uidMappings": [MAPPING], "gidMappings": [MAPPING]}
    assert mounted(**mappings).mounts[0].ids == space


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"mode": "CONTAINER"}, "mode"),
        ({"mode": "TARGET"}, "mode"),
        ({"mode": "POD"}, "uids"),
        ({"mode": "POD", "uids": [MAPPING, MAPPING], "gids": [MAPPING]}, "uids"),
        ({"mode": "POD", "uids": [MAPPING]}, "gids"),
        ({"mode": "POD", "uids": [MAPPING | {"containerId": 1}], "gids": [MAPPING]}, "uids[0].container_id"),
        ({"mode": "POD", "uids": [MAPPING | {"length": 0}], "gids": [MAPPING]}, "uids[0].length"),
        ({"mode": "POD", "uids": [MAPPING | {"hostId": 2**32 - 2}], "gids": [MAPPING]}, "uids[0].length"),
        ({"mode": "NODE", "uids": [MAPPING]}, "uids"),
    ],
)
def test_invalid_user_namespace_is_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        secure_pod(namespaceOptions={"usernsOptions": options})
    at = "config.linux.security_context.namespace_options.userns_options"
    assert caught.value.field == f"{at}.{field}"


def test_cdi_devices_come_from_field_and_annotations() -> None:
    annotations = {"cdi.k8s.io/plugin_a": "v/c=1,v/c=2", "other": "v/c=3"}
    requests = container(CDIDevices=[{"name": "v/c=0"}], annotations=annotations).cdi_devices
    at = "config.annotations['cdi.k8s.io/plugin_a']"
    assert [(request.name, request.field) for request in requests] == [
        ("v/c=0", "config.CDI_devices[0].name"),
        ("v/c=1", at),
        ("v/c=2", at),
    ]


def test_mount_is_converted() -> None:
    mount = mounted(readonly=True, propagation="PROPAGATION_HOST_TO_CONTAINER", selinuxRelabel=True).mounts[0]
    assert (mount.host_path, mount.container_path, mount.readonly) == ("/h", "/c", True)
    assert (mount.propagation, mount.selinux_relabel) == (Propagation.HOST_TO_CONTAINER, True)
    assert mounted(readonly=True, recursiveReadOnly=True).mounts[0].recursive_readonly
    assert mounted(mountOptions=["nosuid", "noexec"]).mounts[0].options == ("nosuid", "noexec")


def test_image_volume_is_converted() -> None:
    source = {"image": "sha256:1", "userSpecifiedImage": "tool"}
    mount = mounted(hostPath="", readonly=True, image=source, imageSubPath="usr/bin").mounts[0]
    assert (mount.image, mount.user_specified_image, mount.host_path) == ("sha256:1", "tool", "")
    assert (mount.image_sub_path, mount.readonly) == ("usr/bin", True)


@pytest.mark.parametrize(
    ("mount", "field"),
    [
        ({"hostPath": ""}, "host_path"),
        ({"containerPath": "c"}, "container_path"),
        ({"image": {"image": "x"}, "hostPath": ""}, "readonly"),
        ({"image": {"image": "x"}, "readonly": True}, "host_path"),
        ({"image": {}, "hostPath": "", "readonly": True}, "image.image"),
        ({"image": {"image": "x"}, "hostPath": "", "readonly": True, "imageSubPath": "/x"}, "image_sub_path"),
        (
            {"image": {"image": "x"}, "hostPath": "", "readonly": True, "imageSubPath": "a/../.."},
            "image_sub_path",
        ),
        ({"imageSubPath": "x"}, "image_sub_path"),
        ({"mountOptions": ["noexec", "bind"]}, "mount_options[1]"),
        ({"uidMappings": [{"length": 1}]}, "gidMappings"),
        ({"gidMappings": [{"length": 1}]}, "uidMappings"),
        ({"uidMappings": [{"length": 1, "containerId": 1}]}, "uidMappings[0].container_id"),
        ({"propagation": "PROPAGATION_BIDIRECTIONAL"}, "propagation"),
        ({"recursiveReadOnly": True}, "recursive_read_only"),
        (
            {"recursiveReadOnly": True, "readonly": True, "propagation": "PROPAGATION_HOST_TO_CONTAINER"},
            "recursive_read_only",
        ),
    ],
)
def test_unsupported_mount_is_refused(mount: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        mounted(**mount)
    assert caught.value.field == f"config.mounts[0].{field}"


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"windows": {}}, "windows"),
        ({"image": {}}, "image.image"),
        ({"workingDir": "srv"}, "working_dir"),
        ({"envs": [{"key": "A=B"}]}, "envs[0].key"),
        ({"envs": [{"key": "A", "value": "AA=="}]}, "envs[0].value"),
        (
            {"devices": [{"containerPath": "/dev/a", "hostPath": "/dev/b", "permissions": "x"}]},
            "devices[0].permissions",
        ),
        ({"linux": {"resources": {"oomScoreAdj": 1001}}}, "linux.resources.oom_score_adj"),
        ({"linux": {"resources": {"cpuShares": -1}}}, "linux.resources.cpu_shares"),
    ],
)
def test_invalid_container_is_refused(config: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        container(**config)
    assert caught.value.field == f"config.{field}"


@pytest.mark.parametrize(
    ("mapping", "field"),
    [
        ({"hostPort": 1}, "container_port"),
        ({"containerPort": 70000}, "container_port"),
        ({"hostPort": -1}, "host_port"),
    ],
)
def test_invalid_port_is_refused(mapping: object, field: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        pod(portMappings=[mapping])
    assert caught.value.field == f"config.port_mappings[0].{field}"


def test_device_without_permissions_has_all() -> None:
    assert (
        container(devices=[{"containerPath": "/dev/a", "hostPath": "/dev/b"}]).devices[0].permissions == "rwm"
    )


def test_environment_values_are_bytes() -> None:
    assert container(envs=[{"key": "A", "value": "/w=="}]).envs == (("A", b"\xff"),)


def test_limits_that_mean_unlimited_are_accepted() -> None:
    wire = pb.LinuxContainerResources(cpu_quota=-1, memory_swap_limit_in_bytes=-1)
    assert (resources(wire, "linux").cpu_quota, resources(wire, "linux").memory_swap_limit) == (-1, -1)
