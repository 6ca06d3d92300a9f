// Giving back cached inodes: for each that the guest's kernel knows of a share, the host holds a descriptor.
#pragma once

#include "agent.h"
#include "error.h"

// Starts a child that drops unused dentries and inodes, and does not wait for it. Does nothing while an
// earlier one runs, and in standalone mode.
int inodes_release(struct agent *agent, struct error *error);
