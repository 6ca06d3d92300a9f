// The agent: everything that it knows, in one place.
#pragma once

#include "channel.h"
#include "container.h"
#include "exec.h"
#include "loop.h"
#include "protocol.h"

enum { PHASES_MAX = 16 };

struct agent {
    struct loop loop;
    struct channel channel;
    struct source signals;
    struct container *containers;
    struct exec *execs;
    struct attachment *attachments;
    struct dial *dials;
    int attachment_count, dial_count;
    pid_t pod_init; // of the PID namespace that containers of the pod share; 0: none yet
    int pod_init_pidfd;

    int cgroup;            // directory that holds the containers' cgroups
    int own_pid_namespace; // to come back to after a fork into another
    int executable;        // the agent's own program
    int null;              // /dev/null
    int oom_score_adj;     // the agent's own, which children inherit

    char *submounts; // the share in which the host mounts things; NULL: there is none

    bool test;    // an ordinary process on a developer's machine: that machine stays as it is
    bool lenient; // cgroup files that do not exist are left out
    bool configured;
    bool stopping;

    struct {
        const char *name;
        uint64_t at_ns;
    } phases[PHASES_MAX];
    int phase_count;
};

// Notes a moment of the boot.
void agent_phase(struct agent *agent, const char *name);

// Opens the loop, signals and descriptors. The channel still has to be linked.
void agent_open(struct agent *agent);

// Serves until told to stop.
void agent_serve(struct agent *agent);

void reply_failure(struct agent *agent, uint32_t request, struct error *error);
void reply_started(struct agent *agent, uint32_t request, pid_t pid);
void reply_done(struct agent *agent, uint32_t request);
void reply_send(struct agent *agent, uint32_t request, Reply *reply);
void send_event(struct agent *agent, Event *event);
void send_message(struct agent *agent, enum frame_kind kind, uint32_t stream,
                  const ProtobufCMessage *message);
