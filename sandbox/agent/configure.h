// What a VM becomes a pod by: names, clock, entropy, shares, sysctls and network. It may be sent again
// after it has failed half-way.
#pragma once

#include "protocol.h"

struct agent;

int configure_pod(struct agent *agent, const Configure *configure, struct error *error);

// Steps the clock when it is off by more than 50 ms.
void configure_clock(const struct agent *agent, int64_t wall_ns);
