// Huge pages of the pod: how many are set aside, and the volumes that lie on them.
#pragma once

#include "agent.h"

// Idempotent. Waits for memory that was just plugged in to appear.
int huge_pages(struct agent *agent, const HugePages *wish, struct error *error);
