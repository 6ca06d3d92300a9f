"""A plan rendered as `runtimeSpec` of crictl inspect, bytes that are not UTF-8 included."""

from __future__ import annotations

import json

from sandbox.host import mount_flags
from sandbox.plan.oci import runtime_spec
from sandbox.plan.values import CgroupFile, ContainerPlan, DevicePlan, MountPlan, ProcessPlan


def test_plan_is_rendered_as_runtime_spec() -> None:
    process = ProcessPlan(
        argv=("sh", "-c", "true"),
        env=(b"A=b", b"B=\xff"),
        cwd="/srv",
        uid=7,
        gid=8,
        groups=(9,),
        cap_effective=1 << 5,
        oom_score_adj=-3,
        no_new_privs=True,
    )
    bind = mount_flags.MS_BIND | mount_flags.MS_REC | mount_flags.MS_RDONLY
    plan = ContainerPlan(
        id="c",
        rootfs="/run/husk/rootfs/c",
        process=process,
        readonly_rootfs=True,
        masked_paths=("/proc/kcore",),
        devices=(DevicePlan("/dev/fuse", 10, 229),),
        mounts=(
            MountPlan(
                source="proc", target="/proc", type="proc", flags=mount_flags.MS_NOSUID, data="hidepid=2"
            ),
            MountPlan(
                source="/v/1",
                target="/v",
                flags=bind,
                recursive_readonly=True,
                propagation=mount_flags.MS_SLAVE | mount_flags.MS_REC,
            ),
        ),
        cgroup=(
            CgroupFile(name="io.max", value="8:0 rbps=1"),
            CgroupFile(name="io.max", value="8:16 rbps=2"),
            CgroupFile(name="memory.max", value="5"),
        ),
    )
    spec = json.loads(json.dumps(runtime_spec(plan)))
    assert spec["root"] == {"path": "/run/husk/rootfs/c", "readonly": True}
    rendered = spec["process"]
    assert (rendered["args"], rendered["cwd"], rendered["oomScoreAdj"]) == (["sh", "-c", "true"], "/srv", -3)
    assert rendered["env"] == ["A=b", "B=\ufffd"]
    assert rendered["user"] == {"uid": 7, "gid": 8, "additionalGids": [9], "umask": 0}
    assert rendered["capabilities"]["effective"] == ["CAP_KILL"]
    assert rendered["capabilities"]["ambient"] == []
    assert spec["mounts"] == [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "hidepid=2"]},
        {
            "destination": "/v",
            "type": "bind",
            "source": "/v/1",
            "options": ["rbind", "ro", "rro", "rslave"],
        },
    ]
    linux = spec["linux"]
    assert linux["devices"] == [
        {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o666, "uid": 0, "gid": 0}
    ]
    assert linux["maskedPaths"] == ["/proc/kcore"]
    assert linux["resources"]["unified"] == {"io.max": "8:0 rbps=1\n8:16 rbps=2", "memory.max": "5"}
