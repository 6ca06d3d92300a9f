// Copies of files of the host on a tmpfs of the guest, which follow the originals: configuration that
// programs watch. The host says what to change; containers bind the trees read-only.
#pragma once

#include "agent.h"
#include "protocol.h"

// Applies the changes in order, and prunes. Idempotent: what is as requested is not touched.
int live_change(struct agent *agent, const ChangeFiles *request, struct error *error);

// Removes all trees but those named.
int live_keep(struct agent *agent, const KeepTrees *request, struct error *error);
