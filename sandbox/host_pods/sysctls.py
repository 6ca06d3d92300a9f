"""The sysctls of a pod without a VM: those of its namespaces, and no others. Pure."""

from __future__ import annotations

from sandbox.errors import InvalidSpec
from sandbox.plan.configure import compile_sysctls, sysctl_path
from sandbox.spec import PodSpec

_FIELD = "config.linux.sysctls"
# ipc_namespaces(7)
_OF_IPC = ("kernel/msg", "kernel/sem", "kernel/shm", "fs/mqueue/")


def pod_sysctls(spec: PodSpec) -> dict[str, str]:
    """Return values by path relative to /proc/sys. Raises InvalidSpec for one that would change the node."""
    for name in spec.sysctls:
        path, field = sysctl_path(name), f"{_FIELD}[{name!r}]"
        if path.startswith("net/"):
            if spec.host_network:
                raise InvalidSpec(field, "the pod has the node's network", "no net.* sysctls")
        elif not path.startswith(_OF_IPC):
            raise InvalidSpec(
                field,
                "it is the node's in a pod without a VM",
                "net.*, kernel.shm*, kernel.msg*, kernel.sem, fs.mqueue.*",
            )
        elif spec.host_ipc:
            raise InvalidSpec(field, "the pod has the node's IPC", "no sysctls of IPC")
    sysctls = compile_sysctls(spec.sysctls, defaults=not spec.host_network)
    return {sysctl.path: sysctl.value for sysctl in sysctls}
