// Reading again what the guest's kernel has cached of the host's files, when the host says that it changed
// them: virtio-fs believes names and attributes for a second, and does not report changes.
#pragma once

#include "agent.h"
#include "protocol.h"

// Both return at once: a child does it, as a share may answer slowly.
int refresh_names(struct agent *agent, const RefreshNames *request, struct error *error);
int refresh_file(struct agent *agent, const RefreshFile *request, struct error *error);
