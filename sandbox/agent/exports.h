// Exports: what the host mounts in a share, mounted once in the agent's mount namespace for all containers.
#pragma once

#include "agent.h"
#include "protocol.h"

int exports_mount(const struct agent *agent, const MountExports *request, struct error *error);

// Unmounts all exports of a share but the named ones.
int exports_keep(const struct agent *agent, const KeepExports *request, struct error *error);

// To be called before mounts of the share are unmounted. Such a mount is a separate file system in the guest
// (a FUSE submount). Linux does not wait for files that were closed a moment ago and are still being released
// when such a file system is unmounted: it finds their inodes busy, and a kernel built to check for that (as
// Debian's is) stops the process at that point. So this waits for a reply of the share, which comes after
// those to all earlier requests. A file that was being read ahead is released only after that, hence several
// replies.
void exports_settle(const struct agent *agent);
