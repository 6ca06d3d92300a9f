// The requests on containers' cgroups: limits that change, and figures that are read.
#pragma once

#include "agent.h"
#include "protocol.h"

int cgroup_requests_write(struct agent *agent, const WriteCgroup *write, struct error *error);

// Replies with the values.
void cgroup_requests_read(struct agent *agent, uint32_t request, const ReadCgroup *read);
