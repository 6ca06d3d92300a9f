// cgroup v2 directories, by descriptor. A container may have its part mounted writable, so its contents are
// not trusted: names are looked up beneath the descriptor, and cgroupfs has no links.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "buffer.h"
#include "protocol.h"

enum { CGROUP_READ_MAX = 64 * 1024 };

// Makes and opens a cgroup. Fails with EEXIST if it exists.
int cgroup_make(int parent, const char *name, struct error *error);

// Writes the files in order. With `lenient`, files that do not exist (of controllers that the machine lacks)
// are skipped.
int cgroup_write_files(int cgroup, CgroupFile **files, size_t count, bool lenient, struct error *error);

int cgroup_write(int cgroup, const char *file, const char *value); // -1 with errno set

// Appends the file's contents, at most CGROUP_READ_MAX bytes; nothing if it does not exist.
void cgroup_read(int directory, const char *file, struct buffer *into);

// Reads the number after `key` from a flat-keyed file such as memory.events; 0 if the key is not there.
uint64_t cgroup_value(int file, const char *key);

// Calls `act` for every process of the cgroup and of those nested in it.
void cgroup_each_process(int cgroup, void (*act)(pid_t pid, void *context), void *context);

int cgroup_kill(int cgroup);               // -1 with errno set
int cgroup_signal(int cgroup, int signal); // every process of it and of those nested in it

// Removes the cgroup and those nested in it; -1 with EBUSY while a process lives in one of them.
int cgroup_remove(int parent, const char *name);

int cgroup_attach_device_filter(int cgroup, const ProtobufCBinaryData *program, struct error *error);
