// The containers, from Start to Remove. One that has ended is kept, with its log, until it is removed.
#pragma once

#include "agent.h"
#include "log.h"
#include "process.h"

enum { ID_MAX = 128, WAITERS_MAX = 8 };

// The cgroup of an exec, beneath its container's.
struct exec_group {
    int directory; // -1: none
    bool killed;   // some kernels also kill what is cloned into it later (seen with 6.18)
    char name[32];
};

struct container {
    struct container *next;
    struct agent *agent;
    char id[ID_MAX + 1];
    struct process process;
    bool shared_pids; // its processes do not end with its first one
    bool has_files;   // in GUEST_FILES/<id>
    bool has_stdin;   // attachments may write to it
    bool terminal;    // stdio[0] is the master of its tty
    struct log log;
    struct stdio_reader stdio[2]; // stdout and stderr
    int stdin_pipe;               // kept open so that the container's stdin stays open; -1: none
    int cgroup;
    int mounts; // its mount namespace, see `detach_mounts`; -1: not held
    struct source memory_events;
    uint32_t oom_kills;
    struct source cgroup_events; // open while a removal waits for the last process
    unsigned execs;              // whose process has not ended
    unsigned exec_serial;        // number in the name of the next exec's cgroup
    unsigned exec_leftovers;     // cgroups of ended execs that were not empty when they were to be removed
    struct exec_group spare;     // of the last exec, for the next one
    bool removing;
    uint32_t waiters[WAITERS_MAX]; // requests to answer when it is removed
    int waiter_count;
};

// Whether `id` can name a directory: 1 to ID_MAX letters, digits, '-', '_' and '.', not starting with '.'.
bool is_id(const char *id);

struct container *container_find(struct agent *agent, const char *id); // NULL: there is none
struct container *container_of_log(struct agent *agent, uint32_t stream);

// Replies once exec has succeeded or failed; after a failure nothing of the container is left.
void container_start(struct agent *agent, uint32_t request, const Start *start);

// Kills the container's processes; replies once all have ended and the container is gone.
void container_remove(struct agent *agent, uint32_t request, const char *id);

int container_resize(struct container *container, const Resize *size, struct error *error);
int container_signal(struct container *container, int signal, bool all, struct error *error);

// To be called when the first process has been reaped.
void container_set_ended(struct container *container, int wait_status);

// Continues a removal that may have been waiting for a process to end. May free the container.
void container_continue_removal(struct container *container);

void container_pump(struct container *container);
bool container_has_work(const struct container *container);

// The connection was lost: undoes starts that have not been answered.
void container_disconnect(struct container *container);

// Fills `exited`, which then points into the container.
void container_describe(struct container *container, Exited *exited);
