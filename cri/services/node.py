"""The rpcs of the RuntimeService about the runtime as a whole."""

from __future__ import annotations

from cri.ports import Networks, Node
from cri.proto import runtime_v1_pb2 as pb
from cri.responses.info import info_json
from sandbox.host.cgroup import Driver

RUNTIME_NAME = "husk"
RUNTIME_API_VERSION = "v1"
KUBELET_API_VERSION = "0.1.0"

_DRIVERS = {Driver.SYSTEMD: pb.SYSTEMD, Driver.CGROUPFS: pb.CGROUPFS}


class NodeCalls:
    """Version, Status, RuntimeConfig and UpdateRuntimeConfig."""

    def __init__(self, node: Node, networks: Networks, version: str) -> None:
        self._node = node
        self._networks = networks
        self._version = version

    async def Version(self, request: pb.VersionRequest) -> pb.VersionResponse:
        """Return names and versions. The request may name any version: the only API is v1."""
        return pb.VersionResponse(
            version=KUBELET_API_VERSION,
            runtime_name=RUNTIME_NAME,
            runtime_version=self._version,
            runtime_api_version=RUNTIME_API_VERSION,
        )

    async def Status(self, request: pb.StatusRequest) -> pb.StatusResponse:
        """Return readiness, handlers and features; `verbose` adds the map `info`."""
        response = pb.StatusResponse(
            status=pb.RuntimeStatus(conditions=[self._runtime_condition(), self._network_condition()]),
            runtime_handlers=[self._handler(name) for name in self._node.handlers()],
            features=pb.RuntimeFeatures(
                supplemental_groups_policy=self._node.features.supplemental_groups_policy,
                mount_options=self._node.features.mount_options,
            ),
        )
        if request.verbose:
            facts = await self._node.describe()
            response.info.update({key: info_json(value) for key, value in facts.items()})
        return response

    def _runtime_condition(self) -> pb.RuntimeCondition:
        condition = self._node.condition()
        return pb.RuntimeCondition(
            type="RuntimeReady",
            status=condition.ready,
            reason=condition.reason,
            message=condition.message,
        )

    def _network_condition(self) -> pb.RuntimeCondition:
        status = self._networks.status()
        return pb.RuntimeCondition(
            type="NetworkReady", status=status.ready, reason=status.reason, message=status.message
        )

    def _handler(self, name: str) -> pb.RuntimeHandler:
        features = pb.RuntimeHandlerFeatures(
            recursive_read_only_mounts=self._node.features.recursive_read_only_mounts,
            user_namespaces=self._node.features.user_namespaces,
        )
        return pb.RuntimeHandler(name=name, features=features)

    async def RuntimeConfig(self, request: pb.RuntimeConfigRequest) -> pb.RuntimeConfigResponse:
        """Return the cgroup driver. A kubelet reads it once, and names cgroup parents in that form."""
        driver = _DRIVERS[self._node.cgroup_driver]
        return pb.RuntimeConfigResponse(linux=pb.LinuxRuntimeConfiguration(cgroup_driver=driver))

    async def UpdateRuntimeConfig(
        self, request: pb.UpdateRuntimeConfigRequest
    ) -> pb.UpdateRuntimeConfigResponse:
        """Take the node's pod CIDR over into the networks' configuration, if the request has one."""
        cidr = request.runtime_config.network_config.pod_cidr
        if cidr:
            self._networks.update_pod_cidr(cidr)
        return pb.UpdateRuntimeConfigResponse()
