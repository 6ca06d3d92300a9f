// Huge pages of the pod: reserves them, and makes the directories of the volumes on them.
#pragma once

#include "agent.h"
#include "protocol.h"

// Idempotent. Waits up to 3 s for memory that was just hot-plugged to appear.
int huge_pages(struct agent *agent, const HugePages *request, struct error *error);
