// Disks that the host plugs into the VM while it runs.
#pragma once

#include "agent.h"

// Replies with the disk of this serial number, or with ENODEV where the kernel has none yet: the host
// retries.
void disks_find(struct agent *agent, uint32_t request, const char *serial);
