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
    int terminal;         // master of its tty, until its owner takes it over; -1: none
    struct source status; // the child's reports while it starts
    bool failed;
    struct error error;
    uint32_t request; // to answer once the start has succeeded or failed; 0: answered
    int exit_code;    // 128 + signal where a signal ended it
    int64_t ended_at; // wall clock, ns
};

// Where a new process starts.
struct placement {
    uint64_t flags;    // CLONE_NEW*
    int cgroup;        // directory descriptor; -1: the agent's
    int pid_namespace; // pidfd of a process whose PID namespace is joined; -1: the agent's own or a new one
    int own_pid_namespace; // the agent's, to return to
};

// Forks into the placement. Returns 0 in the child, the pid in the agent, -1 with `error`.
pid_t process_fork(const struct placement *placement, int *pidfd, struct error *error);

// Makes the socket over which the child reports; the child's end goes to `child`.
int process_prepare(struct process *process, struct child *child, struct error *error);

// Reads what the child has reported so far. Returns whether the start has succeeded or failed.
bool process_poll(struct process *process, struct loop *loop);

void process_set_ended(struct process *process, struct loop *loop, int wait_status);
void process_close(struct process *process, struct loop *loop);
