"""Names that the host and the guest agree on: the directories shared with a VM and where it mounts them."""

from __future__ import annotations

ROOTFS_TAG = "rootfs"
VOLUMES_TAG = "volumes"
GUEST_ROOTFS = "/run/husk/rootfs"
MODULES_NAME = "modules"  # in the share of root filesystems; the agent knows it as GUEST_MODULES
GUEST_VOLUMES = "/run/husk/volumes"
UNCACHED_TAG = "uncached"  # what is shared once a container of the pod needs it, see `vm_pods.uncached`
GUEST_UNCACHED = "/run/husk/uncached"
SHM_BYTES = 64 << 20  # of a pod's /dev/shm: 64 MiB, as with every container runtime
