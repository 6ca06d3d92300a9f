// The last steps inside the container: from the agent's identity to the wanted one, and exec.
#pragma once

#include "protocol.h"

// The way into the container's user namespace, if it has one: of its first process /proc/self as the guest
// sees it, of any other one the first one's pidfd. The other one is -1.
struct entrance {
    int self;
    int container;
};

// Returns only with an error. Closes the entrance.
int become(const Process *process, struct entrance *entrance, struct error *error);
