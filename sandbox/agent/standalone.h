// Standalone mode: the agent as an ordinary process, for tests: `husk-agent --listen unix:PATH`.
//
// As root it becomes PID 1 of new namespaces (PID, mount, network, UTS, IPC) with its own /run, so the
// machine's mounts, network, names and clock stay as they are, and everything that it started ends with it.
// Unprivileged it speaks the protocol, and every Start fails.
#pragma once

struct agent;

struct standalone {
    const char *listen; // path of the socket
    const char *cgroup; // directory in which "husk" is made; NULL: no containers
};

// Opens the socket and enters the namespaces. Returns the listening socket, in the process that is to serve.
int standalone_open(struct agent *agent, const struct standalone *standalone);
