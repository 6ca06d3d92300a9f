// A container's user namespace, where it has one: the ids inside and outside of it, and the way in.
//
// All mounts are made by the guest's root before it is entered, and once more copied in there: a container
// whose capabilities allow it may mount in its own copy.
#pragma once

#include "protocol.h"

static inline bool userspace_wanted(const Process *process) {
    return process->n_uid_ranges > 0;
}

// What an id inside is outside; the id itself where there is no namespace, and (uint32_t)-1 for none.
uint32_t userspace_uid(const Process *process, uint32_t uid);
uint32_t userspace_gid(const Process *process, uint32_t gid);

// Makes the namespace, with a mount namespace that belongs to it. `self` is the caller's directory in the
// guest's /proc.
int userspace_make(const Process *process, int self, struct error *error);

// Joins that of a running process.
int userspace_join(int pidfd, struct error *error);
