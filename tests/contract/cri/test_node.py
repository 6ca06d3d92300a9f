"""Version, Status and the runtime's configuration."""

from __future__ import annotations

import json

from cri.ports import Condition
from cri.proto import runtime_v1_pb2 as pb
from network.attach import NetworkStatus
from tests.contract.cri.runtime import (
    Runtime,
)


async def test_version_names_runtime_and_api(runtime: Runtime) -> None:
    answer = await runtime.call("Version", pb.VersionRequest(version="0.1.0"))
    assert (answer.runtime_name, answer.runtime_version, answer.runtime_api_version) == ("husk", "9.9", "v1")
    assert answer.version


async def test_status_has_both_conditions_and_the_handlers(runtime: Runtime) -> None:
    answer = await runtime.call("Status")
    assert {condition.type: condition.status for condition in answer.status.conditions} == {
        "RuntimeReady": True,
        "NetworkReady": True,
    }
    assert [handler.name for handler in answer.runtime_handlers] == ["", "small"]
    assert not answer.runtime_handlers[0].features.user_namespaces
    assert answer.features.supplemental_groups_policy
    assert not answer.info


async def test_status_of_a_node_that_is_not_ready_has_the_reasons(runtime: Runtime) -> None:
    runtime.networks.state = NetworkStatus(ready=False, reason="NoConfig", message="no CNI configuration")
    runtime.node.state = Condition(ready=False, reason="NoGuest", message="husk guest build")
    answer = await runtime.call("Status", pb.StatusRequest(verbose=True))
    conditions = {condition.type: condition for condition in answer.status.conditions}
    assert (conditions["NetworkReady"].status, conditions["NetworkReady"].reason) == (False, "NoConfig")
    assert conditions["RuntimeReady"].message == "husk guest build"
    assert json.loads(answer.info["accelerator"]) == {"name": "tcg", "reason": "no /dev/kvm"}


async def test_runtime_config_has_the_cgroup_driver_and_takes_the_pod_cidr(runtime: Runtime) -> None:
    answer = await runtime.call("RuntimeConfig")
    assert answer.linux.cgroup_driver == pb.CGROUPFS
    config = pb.RuntimeConfig(network_config=pb.NetworkConfig(pod_cidr="10.1.0.0/24"))
    await runtime.call("UpdateRuntimeConfig", pb.UpdateRuntimeConfigRequest(runtime_config=config))
    assert runtime.networks.cidr == "10.1.0.0/24"
    await runtime.call("UpdateRuntimeConfig")
    assert runtime.networks.cidr == "10.1.0.0/24", "an empty update changes nothing"
