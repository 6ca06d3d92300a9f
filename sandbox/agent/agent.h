// The agent's state, which all its parts share.
#pragma once

#include <sys/types.h>

#include "channel.h"
#include "loop.h"

struct accept;
struct attachment;
struct connection;
struct container;
struct dial;
struct exec;
struct listener;
struct observer;

enum { PHASES_MAX = 16 };

struct agent {
    struct loop loop;
    struct channel channel;
    struct source signals;
    struct container *containers;
    struct exec *execs;
    struct attachment *attachments;
    struct dial *dials;             // that are connecting
    struct connection *connections; // dialled and accepted
    struct listener *listeners;     // of sockets that stand for the host's
    struct accept *accepts;         // requests that wait for a connection to one of these
    int attachment_count;
    const struct observer *observer; // sees every container's output, besides its log
    pid_t pod_init; // of the PID namespace that containers of the pod share; 0: not started yet
    int pod_init_pidfd;
    pid_t inode_releaser; // the child that drops caches; 0: none

    int cgroup;            // directory that holds the containers' cgroups
    int own_pid_namespace; // to return to after a fork into another one
    int executable;        // the agent's program
    int null;              // /dev/null
    int oom_score_adj;     // the agent's, which children inherit

    char *submounts; // path of the share in which the host mounts file systems; NULL: there is none

    bool test;    // standalone mode, on a developer's machine: leave that machine as it is
    bool lenient; // skip cgroup files that do not exist
    bool configured;
    bool stopping;

    struct {
        const char *name;
        uint64_t at_ns;
    } phases[PHASES_MAX];
    int phase_count;
};

// Records a moment of the boot. `name` must stay valid. Beyond PHASES_MAX nothing is recorded.
void agent_record_phase(struct agent *agent, const char *name);
