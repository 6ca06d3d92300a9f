// Turns a VM into a pod. First what is the same for every pod, shares and shared memory; then names, clock,
// entropy, sysctls and network. Each may be sent again after it has failed half-way.
#pragma once

#include "protocol.h"

struct agent;

int prepare_vm(struct agent *agent, const Prepare *prepare, struct error *error);
int configure_pod(struct agent *agent, const Configure *configure, struct error *error);

// Brings hot-plugged CPUs online until `count` are. Waits up to 5 s for them to appear.
int online_cpus(struct agent *agent, uint32_t count, struct error *error);

// Whether something is mounted on `path`.
bool is_mounted(const char *path);
