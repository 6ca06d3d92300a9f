// Giving back cached inodes: for each that the guest's kernel knows of a share, the host holds a descriptor.
#pragma once

#include "agent.h"
#include "error.h"

// Starts a child that drops unused dentries and inodes, and does not wait for it. Does nothing while an
// earlier one runs, and in standalone mode.
int inodes_release(struct agent *agent, struct error *error);

// Starts a child that does the same for ever, each time when about `most` inodes of shares are in memory.
// Does nothing where most is 0, the kernel does not count them, and in standalone mode.
int inodes_keep_below(struct agent *agent, uint64_t most, struct error *error);
