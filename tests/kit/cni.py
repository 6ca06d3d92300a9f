"""CNI configuration for a test namespace: a bridge with IPv4 and IPv6, host-local leases, portmap."""

from __future__ import annotations

import json
from pathlib import Path

BRIDGE = "husk-test0"
PLUGINS = Path("/usr/lib/cni")  # of Debian's containernetworking-plugins


def write_bridge(directory: Path, leases: Path) -> Path:
    """Write a conflist to `directory`, with leases as files in `leases`; returns `directory`."""
    bridge = {
        "type": "bridge",
        "bridge": BRIDGE,
        "isGateway": True,
        "ipMasq": True,
        "hairpinMode": True,
        "ipam": {
            "type": "host-local",
            "dataDir": str(leases),
            "ranges": [[{"subnet": "10.88.0.0/16"}], [{"subnet": "fd00:88::/64"}]],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        },
    }
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    conflist = {"cniVersion": "1.0.0", "name": "husk-test", "plugins": [bridge, portmap]}
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "10-husk-test.conflist").write_text(json.dumps(conflist, indent=1))
    return directory


def leases_in(leases: Path) -> frozenset[str]:
    """Return the addresses that host-local has leased."""
    held = (path.name for path in leases.rglob("*") if path.is_file())
    return frozenset(name for name in held if name[:1].isdigit() or ":" in name)
