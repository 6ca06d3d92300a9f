// cgroup v2 directories, by descriptor. A container may have its part mounted writable, so nothing in
// there is believed: names are looked up beneath the descriptor and links do not exist in cgroupfs.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "buffer.h"
#include "protocol.h"

enum { CGROUP_READ_MAX = 64 * 1024 };

// mkdir and open; fails with EEXIST if it is there.
int cgroup_make(int parent, const char *name, struct error *error);

// With `lenient`, files that do not exist (controllers that the machine lacks) are left out.
int cgroup_write_files(int cgroup, CgroupFile **files, size_t count, bool lenient, struct error *error);

int cgroup_write(int cgroup, const char *file, const char *value); // -1 with errno set

// Appends what the file holds, at most CGROUP_READ_MAX bytes; nothing if it is not there.
void cgroup_read(int directory, const char *file, struct buffer *into);

// The number behind `key` in a flat-keyed file such as memory.events, read from its start; 0: not there.
uint64_t cgroup_value(int file, const char *key);

// Calls `act` for every process of the cgroup and of what is beneath.
void cgroup_each_process(int cgroup, void (*act)(pid_t pid, void *context), void *context);

int cgroup_kill(int cgroup);
int cgroup_signal(int cgroup, int signal);       // every process of it and of what is beneath
int cgroup_remove(int parent, const char *name); // with all beneath; -1 with EBUSY while anything lives in it

int cgroup_attach_device_filter(int cgroup, const ProtobufCBinaryData *program, struct error *error);
