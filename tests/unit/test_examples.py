"""The files in examples/ are valid: by the CRI's messages and our translation, Kubernetes's as YAML."""

from __future__ import annotations

from pathlib import Path

import yaml
from google.protobuf.json_format import Parse

from cri.proto import runtime_v1_pb2 as pb
from cri.translate import container_spec, pod_spec

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def read_pod() -> pb.PodSandboxConfig:
    return Parse((EXAMPLES / "pod.json").read_text(), pb.PodSandboxConfig())


def read_container() -> pb.ContainerConfig:
    return Parse((EXAMPLES / "container.json").read_text(), pb.ContainerConfig())


def test_example_pod_is_accepted_by_the_translation() -> None:
    spec = pod_spec(read_pod(), "")
    assert (spec.name, spec.hostname) == ("hello", "hello")
    assert [port.host_port for port in spec.port_mappings] == [8080]


def test_example_container_is_accepted_by_the_translation() -> None:
    spec = container_spec(read_container())
    assert spec.log_path == "web.log"
    assert [mount.container_path for mount in spec.mounts] == ["/www"]


def test_example_kubernetes_pod_names_the_runtime_class_of_deploy() -> None:
    pod = yaml.safe_load((EXAMPLES / "pod.yaml").read_text())
    runtime_class = yaml.safe_load((ROOT / "deploy/kubernetes/runtimeclass.yaml").read_text())
    assert pod["kind"] == "Pod"
    assert pod["spec"]["runtimeClassName"] == runtime_class["metadata"]["name"]
