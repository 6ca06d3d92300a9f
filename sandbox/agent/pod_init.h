// The first process of the PID namespace that containers of the pod share: it reaps their orphans and keeps
// the namespace alive. It executes this same program again, so it holds no memory of the agent, with an empty
// root and without any capability.
#pragma once

#include "error.h"

struct agent;

#define POD_INIT_NAME "husk-pod-init"

// Returns the pidfd of the pod's init, which is started on first use.
int pod_init_find(struct agent *agent, struct error *error);

// To be called when it has been reaped; the next use starts another one.
void pod_init_set_ended(struct agent *agent);

// What the program does under this name.
_Noreturn void pod_init_main(void);
