// A container's user namespace, where it has one: maps ids, and lets processes enter it.
//
// The guest's root makes all mounts before the namespace is entered. Entering copies them once more: a
// container whose capabilities allow it may mount in its copy.
#pragma once

#include "protocol.h"

static inline bool userspace_wanted(const Process *process) {
    return process->n_uid_ranges > 0;
}

// Map an id of the container to the guest's: the same id where there is no namespace, (uint32_t)-1 for one
// that is not mapped.
uint32_t userspace_uid(const Process *process, uint32_t uid);
uint32_t userspace_gid(const Process *process, uint32_t gid);

// Makes the namespace, with a mount namespace that belongs to it, and enters both. `self` is the caller's
// directory in the guest's /proc.
int userspace_make(const Process *process, int self, struct error *error);

// Enters the user namespace of a running process.
int userspace_join(int pidfd, struct error *error);
