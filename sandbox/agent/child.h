// What a forked child does between clone and exec: it enters or makes the container. A failure is reported
// over a close-on-exec socket, whose end of file means that exec has succeeded.
//
// In a shared PID namespace other containers see the child. It is not dumpable, has closed every descriptor
// of the agent but the ones named here, and its copy of the channel's token reads as zeros.
#pragma once

#include "protocol.h"

struct child {
    int stdio[3];      // -1: /dev/null, or the terminal
    int status;        // socket to report over
    int container;     // of an exec: pidfd of the container's first process
    int null;          // /dev/null
    int oom_score_adj; // the inherited one
    const char *id;    // of the container
};

// Makes the container's mount tree and runs its first process.
_Noreturn void child_start(const Start *start, struct child *child);

// Joins the container's namespaces and runs one more process in it.
_Noreturn void child_exec(const Process *process, struct child *child);

// Messages of the status socket: a struct error, or this one byte with the terminal's master attached.
enum { STATUS_TERMINAL = 'T' };
