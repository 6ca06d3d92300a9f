#include "serve.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent.h"
#include "attach.h"
#include "cgroup.h"
#include "connection.h"
#include "container.h"
#include "dial.h"
#include "exec.h"
#include "pod_init.h"
#include "request.h"
#include "scope.h"
#include "sockets.h"

enum { FLUSH_MS = 1000 };

// Children stay zombies until they are waited for here, so a recorded pid never means another process.
static void reap(struct agent *agent, pid_t pid, int status) {
    if (pid == agent->pod_init) {
        pod_init_set_ended(agent);
        return;
    }
    if (pid == agent->inode_releaser) {
        agent->inode_releaser = 0;
        return;
    }
    for (struct container *container = agent->containers; container; container = container->next)
        if (container->process.pid == pid && container->process.state != PROCESS_ENDED) {
            container_set_ended(container, status);
            return;
        }
    for (struct exec *exec = agent->execs; exec; exec = exec->next)
        if (exec->process.pid == pid && exec->process.state != PROCESS_ENDED) {
            exec_set_ended(exec, status);
            return;
        }
}

static void signals_ready(struct source *source, uint32_t events) {
    (void)events;
    struct agent *agent = container_of(source, struct agent, signals);
    struct signalfd_siginfo info;
    while (read(source->fd, &info, sizeof info) == sizeof info)
        if (info.ssi_signo == SIGTERM && agent->test)
            agent->stopping = true;
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;)
        reap(agent, pid, status);
}

static int must_open(const char *path, int flags) {
    int fd = open(path, flags | O_CLOEXEC);
    if (fd < 0)
        panic("%s: %s", path, strerror(errno));
    return fd;
}

static int read_oom_score(void) {
    char text[16] = "";
    autoclose int file = open("/proc/self/oom_score_adj", O_RDONLY | O_CLOEXEC);
    if (file >= 0 && read(file, text, sizeof text - 1) < 0)
        return 0;
    return atoi(text);
}

void serve_open(struct agent *agent) {
    sigset_t watched;
    sigemptyset(&watched);
    sigaddset(&watched, SIGCHLD);
    sigaddset(&watched, SIGTERM);
    sigprocmask(SIG_BLOCK, &watched, NULL);
    signal(SIGPIPE, SIG_IGN);
    // containers may share a PID namespace with the agent's children: keep /proc/PID of these closed to them
    if (geteuid() == 0)
        prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    loop_open(&agent->loop);
    agent->signals =
        (struct source){.fd = signalfd(-1, &watched, SFD_CLOEXEC | SFD_NONBLOCK), .ready = signals_ready};
    loop_add(&agent->loop, &agent->signals, EPOLLIN);
    agent->observer = &attach_observer;
    agent->pod_init_pidfd = -1;
    agent->null = must_open("/dev/null", O_RDWR);
    agent->own_pid_namespace = must_open("/proc/self/ns/pid", O_RDONLY);
    agent->executable = must_open("/proc/self/exe", O_PATH);
    agent->oom_score_adj = read_oom_score();
    channel_open(&agent->channel, &agent->loop, agent, request_resync, request_frame);
}

// Moves what had to wait for space in the channel, credit or input, as far as it can go now.
static void pump(struct agent *agent) {
    for (struct exec *exec = agent->execs, *next; exec; exec = next) {
        next = exec->next;
        exec_pump(exec);
    }
    for (struct container *container = agent->containers; container; container = container->next)
        container_pump(container);
    attach_pump(agent);
    dial_pump(agent);
    connection_pump(agent);
    sockets_pump(agent);
    channel_flush(&agent->channel);
}

// Whether there is work that needs no new event: one turn does a bounded amount of it.
static bool has_work(const struct agent *agent) {
    if (agent->channel.readable)
        return true;
    for (const struct container *container = agent->containers; container; container = container->next)
        if (container_has_work(container))
            return true;
    for (const struct exec *exec = agent->execs; exec; exec = exec->next)
        if (exec_has_work(exec))
            return true;
    return attach_has_work(agent) || connection_has_work(agent);
}

// Sends what is queued, for as long as the host reads, then kills the containers.
static void flush_and_kill(struct agent *agent) {
    struct pollfd link = {.fd = agent->channel.link.fd, .events = POLLOUT};
    channel_flush(&agent->channel);
    while (buffer_length(&agent->channel.out) > 0 && poll(&link, 1, FLUSH_MS) == 1 &&
           (link.revents & POLLOUT)) {
        agent->channel.writable = true;
        channel_flush(&agent->channel);
    }
    for (struct container *container = agent->containers; container; container = container->next)
        cgroup_kill(container->cgroup);
}

void serve_run(struct agent *agent) {
    while (!agent->stopping) {
        loop_turn(&agent->loop, has_work(agent) ? 0 : attach_timeout_ms(agent));
        channel_read(&agent->channel);
        pump(agent);
    }
    flush_and_kill(agent);
}
