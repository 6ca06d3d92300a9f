#include "container.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "cgroup.h"
#include "exports.h"
#include "guest.h"
#include "pod_init.h"
#include "pty.h"
#include "reply.h"
#include "scope.h"

bool is_id(const char *id) {
    size_t length = strlen(id);
    return length > 0 && length <= ID_MAX && id[0] != '.' &&
           strspn(id, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.") == length;
}

struct container *container_find(struct agent *agent, const char *id) {
    for (struct container *container = agent->containers; container; container = container->next)
        if (!strcmp(container->id, id))
            return container;
    return NULL;
}

struct container *container_of_log(struct agent *agent, uint32_t stream) {
    for (struct container *container = agent->containers; container; container = container->next)
        if (container->log.stream == stream)
            return container;
    return NULL;
}

// ------------------------------------------------------------------------------------ ending

static void remove_files(const struct container *container) {
    char path[sizeof GUEST_FILES + ID_MAX + 2];
    snprintf(path, sizeof path, GUEST_FILES "/%s", container->id);
    autoclosedir DIR *directory = opendir(path);
    for (struct dirent *entry; directory && (entry = readdir(directory));)
        unlinkat(dirfd(directory), entry->d_name, 0);
    rmdir(path);
}

// The agent holds the mount namespace beyond the container's processes (see exports_settle).
static void detach_mounts(struct container *container) {
    if (container->mounts >= 0)
        exports_settle(container->agent);
    close_fd(&container->mounts);
}

static void release(struct container *container) {
    struct agent *agent = container->agent;
    struct container **link = &agent->containers;
    while (*link != container)
        link = &(*link)->next;
    *link = container->next;
    if (container->log.stream && agent->channel.greeted)
        channel_send(&agent->channel, FRAME_CLOSE, container->log.stream, NULL, 0);
    for (int i = 0; i < 2; i++)
        stdio_reader_close(&container->stdio[i], &agent->loop);
    loop_close(&agent->loop, &container->memory_events);
    loop_close(&agent->loop, &container->cgroup_events);
    process_close(&container->process, &agent->loop);
    close_fd(&container->stdin_pipe);
    detach_mounts(container);
    close_fd(&container->spare.directory);
    close_fd(&container->cgroup);
    log_free(&container->log);
    free(container);
}

static void wait_until_empty(struct container *container) {
    cgroup_kill(container->cgroup);
    if (container->cgroup_events.fd >= 0)
        return;
    container->cgroup_events.fd = openat(container->cgroup, "cgroup.events", O_RDONLY | O_CLOEXEC);
    if (container->cgroup_events.fd >= 0)
        loop_add(&container->agent->loop, &container->cgroup_events, EPOLLPRI);
}

void container_continue_removal(struct container *container) {
    struct agent *agent = container->agent;
    if (!container->removing || container->process.state != PROCESS_ENDED || container->execs)
        return;
    if (container->spare.directory >= 0)
        unlinkat(container->cgroup, container->spare.name, AT_REMOVEDIR);
    if (cgroup_remove(agent->cgroup, container->id) < 0) {
        if (errno == EBUSY) {
            wait_until_empty(container);
            return;
        }
        console_log("cgroup of %s: %s", container->id, strerror(errno));
    }
    if (container->has_files)
        remove_files(container);
    for (int i = 0; i < container->waiter_count; i++)
        reply_done(agent, container->waiters[i]);
    if (container->process.failed && container->process.request)
        reply_failure(agent, container->process.request, &container->process.error);
    release(container);
}

static void cgroup_events_ready(struct source *source, uint32_t events) {
    (void)events;
    struct container *container = container_of(source, struct container, cgroup_events);
    if (cgroup_value(source->fd, "populated") == 0)
        container_continue_removal(container);
}

void container_remove(struct agent *agent, uint32_t request, const char *id) {
    struct container *container = container_find(agent, id);
    if (!container) {
        reply_done(agent, request);
        return;
    }
    if (container->waiter_count == WAITERS_MAX) {
        struct error error = {0};
        fail_about(&error, EBUSY, "remove", "too many removals of it are under way");
        reply_failure(agent, request, &error);
        return;
    }
    container->waiters[container->waiter_count++] = request;
    container->removing = true;
    if (container->process.state != PROCESS_ENDED || container->execs)
        cgroup_kill(container->cgroup);
    container_continue_removal(container);
}

void container_describe(struct container *container, Exited *exited) {
    exited->container_id = container->id;
    exited->exec_id = "";
    exited->exit_code = container->process.exit_code;
    exited->oom_kills = (uint32_t)cgroup_value(container->memory_events.fd, "oom_kill");
    exited->at_ns = container->process.ended_at;
}

// The start has succeeded: replies, unless that was done.
static void announce(struct container *container) {
    struct agent *agent = container->agent;
    if (container->process.terminal >= 0)
        stdio_reader_open(&container->stdio[0], &agent->loop, take_fd(&container->process.terminal),
                          "stdout");
    if (container->process.request)
        reply_started(agent, container->process.request, container->process.pid);
    container->process.request = 0;
}

void container_set_ended(struct container *container, int wait_status) {
    struct agent *agent = container->agent;
    process_set_ended(&container->process, &agent->loop, wait_status);
    if (container->process.failed) { // undo it before the reply, so that a new attempt may come at once
        container->removing = true;
        container_continue_removal(container);
        return;
    }
    announce(container); // it may have ended before its start was polled
    if (container->shared_pids)
        cgroup_kill(container->cgroup);
    for (int i = 0; i < 2; i++)
        log_drain(&container->log, &container->stdio[i], &agent->loop, true);
    agent->observer->ended(container);
    container->log.finished = true;
    close_fd(&container->stdin_pipe);
    Event event = HUSK__GUEST__V1__EVENT__INIT;
    Exited exited = HUSK__GUEST__V1__EXITED__INIT;
    container_describe(container, &exited);
    event.body_case = HUSK__GUEST__V1__EVENT__BODY_EXITED;
    event.exited = &exited;
    send_event(agent, &event);
    container_continue_removal(container);
}

int container_signal(struct container *container, int signal, bool all, struct error *error) {
    if (container->process.state == PROCESS_ENDED)
        return fail_about(error, ESRCH, "signal", "container has ended");
    int failed = !all                ? kill(container->process.pid, signal)
                 : signal == SIGKILL ? cgroup_kill(container->cgroup)
                                     : cgroup_signal(container->cgroup, signal);
    return failed < 0 ? fail(error, errno, "signal") : 0;
}

int container_resize(struct container *container, const Resize *size, struct error *error) {
    if (!container->terminal || container->stdio[0].source.fd < 0)
        return fail_about(error, ENOTTY, "resize", "container has no terminal");
    return pty_resize(container->stdio[0].source.fd, size->rows, size->columns, error);
}

// ---------------------------------------------------------------------------------- starting

static void status_ready(struct source *source, uint32_t events) {
    (void)events;
    struct process *process = container_of(source, struct process, status);
    struct container *container = container_of(process, struct container, process);
    if (process_poll(process, &container->agent->loop) && !process->failed)
        announce(container); // a failure is handled when the child has ended
}

static void stdio_ready(struct source *source, uint32_t events) {
    (void)events;
    container_of(source, struct stdio_reader, source)->readable = true;
}

static void memory_events_ready(struct source *source, uint32_t events) {
    (void)events;
    struct container *container = container_of(source, struct container, memory_events);
    uint32_t kills = (uint32_t)cgroup_value(source->fd, "oom_kill");
    if (kills <= container->oom_kills)
        return;
    container->oom_kills = kills;
    Event event = HUSK__GUEST__V1__EVENT__INIT;
    Husk__Guest__V1__Oom oom = HUSK__GUEST__V1__OOM__INIT;
    oom.container_id = container->id;
    event.body_case = HUSK__GUEST__V1__EVENT__BODY_OOM;
    event.oom = &oom;
    // a container can cause these without end: none is queued for a host that does not read
    if (channel_space(&container->agent->channel) > 0)
        send_event(container->agent, &event);
}

static struct container *make(struct agent *agent, const Start *start, uint32_t request) {
    struct container *container = memory_get(sizeof *container);
    *container = (struct container){
        .agent = agent,
        .next = agent->containers,
        .process = {.pidfd = -1,
                    .terminal = -1,
                    .request = request,
                    .status = {.fd = -1, .ready = status_ready}},
        .has_stdin = start->stdin,
        .terminal = start->process->tty,
        .stdin_pipe = -1,
        .cgroup = -1,
        .mounts = -1,
        .spare = {.directory = -1},
        .memory_events = {.fd = -1, .ready = memory_events_ready},
        .cgroup_events = {.fd = -1, .ready = cgroup_events_ready},
        .log = {.stream = start->log_stream, .credit = start->log_window, .wanted = start->log_stream != 0},
    };
    for (int i = 0; i < 2; i++)
        container->stdio[i] = (struct stdio_reader){
            .source = {.fd = -1, .ready = stdio_ready}, .container = container, .observer = agent->observer};
    snprintf(container->id, sizeof container->id, "%s", start->id);
    agent->containers = container;
    return container;
}

static int prepare_cgroup(struct container *container, const Start *start, struct error *error) {
    container->cgroup = cgroup_make(container->agent->cgroup, container->id, error);
    if (container->cgroup < 0)
        return -1;
    if (cgroup_write_files(container->cgroup, start->cgroup, start->n_cgroup, container->agent->lenient,
                           error) < 0)
        return -1;
    container->memory_events.fd = openat(container->cgroup, "memory.events", O_RDONLY | O_CLOEXEC);
    if (container->memory_events.fd >= 0)
        loop_add(&container->agent->loop, &container->memory_events, EPOLLPRI);
    return cgroup_attach_device_filter(container->cgroup, &start->device_filter, error);
}

static int prepare_files(struct container *container, const Start *start, struct error *error) {
    char path[sizeof GUEST_FILES + ID_MAX + 2];
    if (start->n_files == 0)
        return 0;
    snprintf(path, sizeof path, GUEST_FILES "/%s", container->id);
    if (mkdir(path, 0755) < 0 && errno != EEXIST)
        return fail(error, errno, "files");
    container->has_files = true;
    return 0;
}

// The container's ends of the pipes go to `child`, the agent's ends to stdio and stdin_pipe.
static int prepare_output(struct container *container, const Start *start, struct child *child,
                          struct error *error) {
    static const char *const names[] = {"stdout", "stderr"};
    for (int i = 0; i < 2 && !start->process->tty; i++) {
        int ends[2];
        if (pipe2(ends, O_CLOEXEC) < 0 || fcntl(ends[0], F_SETFL, O_NONBLOCK) < 0)
            return fail(error, errno, "pipe");
        stdio_reader_open(&container->stdio[i], &container->agent->loop, ends[0], names[i]);
        child->stdio[i + 1] = ends[1];
    }
    if (start->stdin && !start->process->tty) {
        int ends[2];
        if (pipe2(ends, O_CLOEXEC) < 0)
            return fail(error, errno, "pipe");
        child->stdio[0] = ends[0];
        container->stdin_pipe = ends[1];
        if (fcntl(container->stdin_pipe, F_SETFL, O_NONBLOCK) < 0)
            return fail(error, errno, "pipe");
    }
    return 0;
}

static int place(struct container *container, const Start *start, struct placement *placement,
                 struct error *error) {
    struct agent *agent = container->agent;
    *placement = (struct placement){
        .flags = CLONE_NEWNS,
        .cgroup = container->cgroup,
        .pid_namespace = -1,
        .own_pid_namespace = agent->own_pid_namespace,
    };
    struct container *target;
    switch (start->pid_namespace) {
    case HUSK__GUEST__V1__PID_NAMESPACE__POD:
        container->shared_pids = true;
        placement->pid_namespace = pod_init_find(agent, error);
        return placement->pid_namespace < 0 ? -1 : 0;
    case HUSK__GUEST__V1__PID_NAMESPACE__TARGET:
        container->shared_pids = true;
        target = container_find(agent, start->pid_target);
        if (!target || target->process.state != PROCESS_RUNNING)
            return fail_about(error, ESRCH, "pid namespace", "target container is not running");
        placement->pid_namespace = target->process.pidfd;
        return 0;
    default:
        placement->flags |= CLONE_NEWPID;
        return 0;
    }
}

static int launch(struct container *container, const Start *start, struct child *child, struct error *error) {
    struct placement placement;
    if (prepare_cgroup(container, start, error) < 0 || prepare_files(container, start, error) < 0 ||
        prepare_output(container, start, child, error) < 0 ||
        process_prepare(&container->process, child, error) < 0 ||
        place(container, start, &placement, error) < 0)
        return -1;
    pid_t pid = process_fork(&placement, &container->process.pidfd, error);
    if (pid == 0)
        child_start(start, child);
    if (pid < 0)
        return -1;
    container->process.pid = pid;
    if (container->agent->submounts) {
        char path[64];
        snprintf(path, sizeof path, "/proc/%d/ns/mnt", pid);
        container->mounts = open(path, O_RDONLY | O_CLOEXEC);
    }
    loop_add(&container->agent->loop, &container->process.status, EPOLLIN);
    return 0;
}

static int check(struct agent *agent, const Start *start, struct error *error) {
    if (!is_id(start->id) || !start->process || start->rootfs[0] != '/')
        return fail_about(error, EINVAL, "start", "id, process or rootfs");
    if (agent->test && start->apparmor_policy.len) // the kernel is the machine's
        return fail_about(error, EPERM, "apparmor", start->process->apparmor);
    if (container_find(agent, start->id))
        return fail_about(error, EEXIST, "start", start->id);
    return 0;
}

void container_start(struct agent *agent, uint32_t request, const Start *start) {
    struct error error = {0};
    if (check(agent, start, &error) < 0) {
        reply_failure(agent, request, &error);
        return;
    }
    struct container *container = make(agent, start, request);
    struct child child = {
        .stdio = {-1, -1, -1},
        .status = -1,
        .container = -1,
        .null = agent->null,
        .oom_score_adj = agent->oom_score_adj,
        .id = container->id,
    };
    int failed = launch(container, start, &child, &error);
    for (int i = 0; i < 3; i++)
        close_fd(&child.stdio[i]);
    close_fd(&child.status);
    if (failed < 0) { // no process was made
        container->process.state = PROCESS_ENDED;
        container->process.failed = true;
        container->process.error = error;
        container->log.stream = 0;
        container->removing = true;
        container_continue_removal(container);
    }
}

// -------------------------------------------------------------------------------- every turn

void container_pump(struct container *container) {
    for (int i = 0; i < 2; i++)
        if (container->stdio[i].source.fd >= 0)
            log_drain(&container->log, &container->stdio[i], &container->agent->loop, false);
    if (!container->process.request) // the reply to its start comes before its output
        log_send(&container->log, &container->agent->channel);
}

bool container_has_work(const struct container *container) {
    if (log_can_drain(&container->log, container->stdio, 2))
        return true;
    return !container->process.request && log_can_send(&container->log, &container->agent->channel);
}

void container_disconnect(struct container *container) {
    container->log.stream = 0;
    container->waiter_count = 0;
    container->process.request = 0;
    if (container->process.state != PROCESS_STARTING)
        return;
    if (process_poll(&container->process, &container->agent->loop) && !container->process.failed) {
        announce(container);
        return;
    }
    container->process.failed = true; // undone when the child has ended
    container->removing = true;
    cgroup_kill(container->cgroup);
}
