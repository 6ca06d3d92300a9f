// The last steps inside the container: from the agent's identity to the wanted one, and exec.
#pragma once

#include "protocol.h"

// Returns only with an error.
int become(const Process *process, struct error *error);
