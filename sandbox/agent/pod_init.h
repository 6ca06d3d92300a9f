// The first process of the PID namespace that containers of the pod share: it reaps their orphans and
// keeps the namespace alive. It runs this same program anew, so it holds no memory of the agent, with
// an empty root and without any capability.
#pragma once

#include "error.h"

struct agent;

#define POD_INIT_NAME "husk-pod-init"

// The pidfd of the pod's init, started if there is none.
int pod_init_find(struct agent *agent, struct error *error);

void pod_init_ended(struct agent *agent);

// What the program does under this name.
_Noreturn void pod_init_main(void);
