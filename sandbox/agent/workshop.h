// The agent as an ordinary process, for tests: `husk-agent --listen unix:PATH`.
//
// As root it becomes PID 1 of namespaces of its own (PID, mount, network, UTS, IPC) with a /run of its
// own, so nothing of the machine's mounts, network, names or clock is touched, and all that it started
// ends with it. Unprivileged it speaks the protocol, and every Start fails.
#pragma once

struct agent;

struct workshop {
    const char *listen; // path of the socket
    const char *cgroup; // directory in which "husk" is made; NULL: no containers
};

// Opens the socket and moves into the namespaces; returns in the process that is to serve.
int workshop_open(struct agent *agent, const struct workshop *workshop);
