// The last steps inside the container: from the agent's identity to the process's, and exec.
#pragma once

#include "protocol.h"

// The way into the container's user namespace, if it has one. One of the two is -1.
struct userspace_entry {
    int self;      // its first process: /proc/self, as the guest sees it
    int container; // further processes: pidfd of the first one
};

// Returns only with an error (-1). Closes the entry.
int exec_setup(const Process *process, struct userspace_entry *entry, struct error *error);
