// The containers, from Start to Remove. A container that has ended stays, with its log, until removed.
#pragma once

#include "log.h"
#include "process.h"

struct agent;

enum { ID_MAX = 128, WAITERS_MAX = 8 };

// The cgroup of an exec, beneath its container's.
struct exec_group {
    int directory; // -1: there is none
    bool killed;   // some kernels also kill at once whoever is cloned into it later (seen with 6.18)
    char name[32];
};

struct container {
    struct container *next;
    struct agent *agent;
    char id[ID_MAX + 1];
    struct process process;
    bool shared_pids; // its processes do not end with its first one
    bool has_files;   // in GUEST_FILES/<id>
    bool has_stdin;   // somebody may speak to it
    bool terminal;    // taps[0] is the master of its tty
    struct log log;
    struct tap taps[2];
    int stdin_pipe; // kept open so that the container's stdin is; -1: none
    int cgroup;
    int mounts; // its mount namespace, see `let_mounts_go`
    struct source memory_events;
    uint32_t oom_kills;
    struct source population; // cgroup.events, while removal waits for its last process
    unsigned exec_serial;     // names the cgroups of execs
    unsigned exec_leftovers;  // such cgroups that were not empty when they were wanted again
    struct exec_group spare;  // of the last exec, for the next one
    bool removing;
    uint32_t waiters[WAITERS_MAX]; // requests that removal answers
    int waiter_count;
};

bool is_id(const char *id); // fit for a directory's name

struct container *container_find(struct agent *agent, const char *id);
struct container *container_of_log(struct agent *agent, uint32_t stream);

void container_start(struct agent *agent, uint32_t request, const Start *start);
void container_remove(struct agent *agent, uint32_t request, const char *id);
int container_resize(struct container *container, const Resize *size, struct error *error);
int container_signal(struct container *container, int signal, bool all, struct error *error);

void container_ended(struct container *container, int wait_status);
void container_pump(struct container *container);
bool container_has_work(const struct container *container);

// Goes on with a removal that may have been waiting.
void container_continue(struct container *container);

// The connection is gone: starts that were not answered are undone.
void container_disconnect(struct container *container);

void container_describe(struct container *container, Exited *exited);
