// A process that the agent started, from its clone to its end: a container's first one or an exec's.
//
//      starting ──(exec succeeded)──> running ──> ended
//          └────────(a step failed)──────────────> ended, with `error`
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "child.h"
#include "loop.h"

enum process_state { PROCESS_STARTING, PROCESS_RUNNING, PROCESS_ENDED };

struct process {
    enum process_state state;
    pid_t pid;
    int pidfd;
    int terminal;         // master of its tty until somebody takes it; -1: none
    struct source status; // the child's reports while it starts
    bool failed;
    struct error error;
    uint32_t request; // to be answered when the start is decided; 0: nobody waits
    int exit_code;    // 128 + signal where a signal ended it
    int64_t ended_at; // wall clock, ns
};

// Where the new process goes.
struct placement {
    uint64_t flags;    // CLONE_NEW*
    int cgroup;        // directory descriptor
    int pid_namespace; // pidfd of a process whose PID namespace is joined; -1: the agent's own or a new one
    int own_pid_namespace; // the agent's, to come back to
};

// Forks into the placement. Returns 0 in the child, the pid in the agent, -1 with `error`.
pid_t process_fork(const struct placement *placement, int *pidfd, struct error *error);

// Makes the socket over which the child reports; the child's side goes to `child`.
int process_prepare(struct process *process, struct child *child, struct error *error);

// Reads what the child has reported so far. True once the start is decided.
bool process_look(struct process *process, struct loop *loop);

void process_set_ended(struct process *process, struct loop *loop, int wait_status);
void process_close(struct process *process, struct loop *loop);
