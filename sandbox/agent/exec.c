#include "exec.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "cgroup.h"
#include "pty.h"
#include "reply.h"
#include "scope.h"

struct exec *exec_find(struct agent *agent, const char *container_id, const char *id) {
    for (struct exec *exec = agent->execs; exec; exec = exec->next)
        if (!strcmp(exec->id, id) && !strcmp(exec->container_id, container_id))
            return exec;
    return NULL;
}

// ----------------------------------------------------------------------------------- streams

int exec_frame(struct agent *agent, const struct frame *frame) {
    for (struct exec *exec = agent->execs; exec; exec = exec->next) {
        int handled = input_stream_frame(&exec->input, frame);
        for (int i = 0; i < 2 && !handled; i++)
            handled = output_stream_frame(&exec->outputs[i], agent, frame);
        // with its other descriptor closed too, the terminal is hung up
        if (handled && exec->terminal && frame->kind == FRAME_RESET)
            input_stream_refuse(&exec->input, agent);
        if (handled)
            return handled;
    }
    return 0;
}

// ------------------------------------------------------------------------------------ ending

static void remove_group(struct container *container, const char *name) {
    if (unlinkat(container->cgroup, name, AT_REMOVEDIR) < 0 && errno == EBUSY)
        container->exec_leftovers++;
}

// Removes the cgroups of ended execs whose background processes have ended since.
static void remove_leftovers(struct container *container) {
    if (container->exec_leftovers == 0)
        return;
    container->exec_leftovers = 0;
    int fd = openat(container->cgroup, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    autoclosedir DIR *directory = fd >= 0 ? fdopendir(fd) : NULL;
    for (struct dirent *entry; directory && (entry = readdir(directory));)
        if (!strncmp(entry->d_name, "husk-exec.", 10) &&
            (container->spare.directory < 0 || strcmp(entry->d_name, container->spare.name)))
            remove_group(container, entry->d_name);
}

// Keeps the cgroup for the next exec, or removes it: making and removing one takes a tenth of an exec.
static void recycle_group(struct exec_group *group, struct container *container) {
    if (group->directory < 0)
        return;
    if (container && !group->killed && container->spare.directory < 0) {
        container->spare = *group;
        group->directory = -1;
    } else {
        close_fd(&group->directory);
        if (container)
            remove_group(container, group->name);
    }
}

// Whether the cgroup still exists and is empty: a background process may have stayed in it.
static bool is_empty(const struct exec_group *group) {
    autoclose int events = openat(group->directory, "cgroup.events", O_RDONLY | O_CLOEXEC);
    return events >= 0 && cgroup_value(events, "populated") == 0;
}

// Its process does not run any more, or was never made: a removal of the container need not wait for it.
static void uncount(struct exec *exec, struct container *container) {
    if (container && exec->counted)
        container->execs--;
    exec->counted = false;
}

static void release(struct exec *exec) {
    struct agent *agent = exec->agent;
    struct exec **link = &agent->execs;
    while (*link != exec)
        link = &(*link)->next;
    *link = exec->next;
    for (int i = 0; i < 2; i++)
        output_stream_close(&exec->outputs[i], agent);
    input_stream_close(&exec->input, agent);
    loop_close(&agent->loop, &exec->cgroup_events);
    process_close(&exec->process, &agent->loop);
    struct container *container = container_find(agent, exec->container_id);
    uncount(exec, container);
    recycle_group(&exec->cgroup, container);
    if (container)
        remove_leftovers(container);
    free(exec);
}

static void finish(struct exec *exec) {
    struct agent *agent = exec->agent;
    if (exec->process.failed) {
        if (exec->process.request)
            reply_failure(agent, exec->process.request, &exec->process.error);
    } else if (agent->channel.greeted) {
        Event event = HUSK__GUEST__V1__EVENT__INIT;
        Exited exited = HUSK__GUEST__V1__EXITED__INIT;
        struct container *container = container_find(agent, exec->container_id);
        if (container)
            exited.oom_kills = (uint32_t)cgroup_value(container->memory_events.fd, "oom_kill");
        exited.container_id = exec->container_id;
        exited.exec_id = exec->id;
        exited.exit_code = exec->process.exit_code;
        exited.at_ns = exec->process.ended_at;
        event.body_case = HUSK__GUEST__V1__EVENT__BODY_EXITED;
        event.exited = &exited;
        send_event(agent, &event);
    }
    release(exec);
}

static void announce(struct exec *exec) {
    struct agent *agent = exec->agent;
    if (!exec->process.request)
        return;
    reply_started(agent, exec->process.request, exec->process.pid);
    exec->process.request = 0;
    input_stream_begin(&exec->input, &agent->channel, INPUT_WINDOW);
}

// The master of a terminal serves both directions, each with its own descriptor and source.
static void take_terminal(struct exec *exec) {
    struct loop *loop = &exec->agent->loop;
    if (exec->process.terminal < 0)
        return;
    if (exec->input.stream) {
        exec->input.source.fd = fcntl(exec->process.terminal, F_DUPFD_CLOEXEC, 3);
        if (exec->input.source.fd >= 0)
            loop_add(loop, &exec->input.source, EPOLLOUT);
        else
            input_stream_refuse(&exec->input, exec->agent);
    }
    exec->outputs[0].source.fd = take_fd(&exec->process.terminal);
    exec->outputs[0].readable = true;
    loop_add(loop, &exec->outputs[0].source, EPOLLIN);
}

void exec_set_ended(struct exec *exec, int wait_status) {
    struct agent *agent = exec->agent;
    process_set_ended(&exec->process, &agent->loop, wait_status);
    struct container *container = container_find(agent, exec->container_id);
    uncount(exec, container);
    if (!exec->process.failed) {
        take_terminal(exec);
        announce(exec);
        input_stream_close(&exec->input, agent);
    } else {
        for (int i = 0; i < 2; i++)
            loop_close(&agent->loop, &exec->outputs[i].source);
    }
    exec_pump(exec);
    if (container)
        container_continue_removal(container);
}

// Watches for the end of the last process that was killed.
static void watch_cgroup(struct exec *exec) {
    if (exec->cgroup_events.fd >= 0)
        return;
    exec->cgroup_events.fd = openat(exec->cgroup.directory, "cgroup.events", O_RDONLY | O_CLOEXEC);
    if (exec->cgroup_events.fd >= 0)
        loop_add(&exec->agent->loop, &exec->cgroup_events, EPOLLPRI);
}

int exec_signal(struct exec *exec, int signal, bool all, struct error *error) {
    int failed;
    if (all && signal == SIGKILL) {
        exec->cgroup.killed = true;
        watch_cgroup(exec);
    }
    if (all) // also after the process itself has ended, for its background processes
        failed = signal == SIGKILL ? cgroup_kill(exec->cgroup.directory)
                                   : cgroup_signal(exec->cgroup.directory, signal);
    else if (exec->process.state == PROCESS_ENDED)
        return fail_about(error, ESRCH, "signal", "exec has ended");
    else
        failed = kill(exec->process.pid, signal);
    return failed < 0 ? fail(error, errno, "signal") : 0;
}

int exec_resize(struct exec *exec, const Resize *size, struct error *error) {
    if (!exec->terminal || exec->outputs[0].source.fd < 0)
        return fail_about(error, ENOTTY, "resize", "exec has no terminal");
    return pty_resize(exec->outputs[0].source.fd, size->rows, size->columns, error);
}

// ---------------------------------------------------------------------------------- starting

static void status_ready(struct source *source, uint32_t events) {
    (void)events;
    struct process *process = container_of(source, struct process, status);
    struct exec *exec = container_of(process, struct exec, process);
    if (!process_poll(process, &exec->agent->loop) || process->failed)
        return;
    take_terminal(exec);
    announce(exec);
}

static void cgroup_events_ready(struct source *source, uint32_t events) {
    (void)source, (void)events; // exec_pump reads the file on every turn
}

static struct exec *make(struct container *container, uint32_t request, const Exec *message) {
    struct agent *agent = container->agent;
    struct exec *exec = memory_get(sizeof *exec);
    *exec = (struct exec){
        .agent = agent,
        .next = agent->execs,
        .cgroup = {.directory = -1},
        .cgroup_events = {.fd = -1, .ready = cgroup_events_ready},
        .process = {.pidfd = -1,
                    .terminal = -1,
                    .request = request,
                    .status = {.fd = -1, .ready = status_ready}},
        .counted = true,
        .terminal = message->process->tty,
        .reply_on_exit = message->reply_on_exit && !message->process->tty && !message->stdin_stream,
        .input = input_stream_make(message->stdin_stream),
        .outputs = {output_stream_make(message->stdout_stream, message->window),
                    output_stream_make(message->stderr_stream, message->window)},
    };
    snprintf(exec->container_id, sizeof exec->container_id, "%s", message->container_id);
    snprintf(exec->id, sizeof exec->id, "%s", message->exec_id);
    agent->execs = exec;
    container->execs++;
    return exec;
}

static int open_pipe(struct loop *loop, struct source *ours, int *theirs, bool output, struct error *error) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) < 0)
        return fail(error, errno, "pipe");
    ours->fd = ends[output ? 0 : 1];
    *theirs = ends[output ? 1 : 0];
    if (fcntl(ours->fd, F_SETFL, O_NONBLOCK) < 0)
        return fail(error, errno, "pipe");
    loop_add(loop, ours, output ? EPOLLIN : EPOLLOUT);
    return 0;
}

static int prepare_streams(struct exec *exec, const Exec *message, struct child *child, struct error *error) {
    struct loop *loop = &exec->agent->loop;
    if (message->process->tty)
        return 0;
    if (message->stdin_stream && open_pipe(loop, &exec->input.source, &child->stdio[0], false, error) < 0)
        return -1;
    for (int i = 0; i < 2; i++)
        if (exec->outputs[i].stream &&
            open_pipe(loop, &exec->outputs[i].source, &child->stdio[i + 1], true, error) < 0)
            return -1;
    return 0;
}

// Each exec has a cgroup beneath the container's, so that a timeout finds the whole tree of processes.
static int prepare_cgroup(struct exec *exec, struct container *container, struct error *error) {
    struct exec_group *group = &exec->cgroup;
    if (container->spare.directory >= 0) {
        bool empty = is_empty(&container->spare);
        *group = container->spare;
        container->spare.directory = -1;
        if (empty)
            return 0;
        close_fd(&group->directory);
        container->exec_leftovers++;
    }
    for (int attempts = 0; attempts < 16; attempts++) {
        snprintf(group->name, sizeof group->name, "husk-exec.%u", container->exec_serial++);
        group->directory = cgroup_make(container->cgroup, group->name, error);
        if (group->directory >= 0 || error->number != EEXIST) // the container may have made one of this name
            break;
    }
    return group->directory < 0 ? -1 : 0;
}

static int launch(struct exec *exec, struct container *container, const Exec *message, struct child *child,
                  struct error *error) {
    struct agent *agent = exec->agent;
    if (prepare_cgroup(exec, container, error) < 0 || prepare_streams(exec, message, child, error) < 0 ||
        process_prepare(&exec->process, child, error) < 0)
        return -1;
    struct placement placement = {
        .cgroup = exec->cgroup.directory,
        .pid_namespace = container->process.pidfd,
        .own_pid_namespace = agent->own_pid_namespace,
    };
    pid_t pid = process_fork(&placement, &exec->process.pidfd, error);
    if (pid == 0)
        child_exec(message->process, child);
    if (pid < 0)
        return -1;
    exec->process.pid = pid;
    if (!exec->reply_on_exit) // otherwise its end shows whether it started
        loop_add(&agent->loop, &exec->process.status, EPOLLIN);
    return 0;
}

static int check(struct agent *agent, const Exec *message, struct error *error) {
    struct container *container = container_find(agent, message->container_id);
    if (!container || container->process.state != PROCESS_RUNNING)
        return fail_about(error, ESRCH, "container", container ? "is not running" : "is unknown");
    if (!is_id(message->exec_id) || !message->process)
        return fail_about(error, EINVAL, "exec request", "id or process");
    if (exec_find(agent, message->container_id, message->exec_id))
        return fail_about(error, EEXIST, "exec request", message->exec_id);
    return 0;
}

void exec_start(struct agent *agent, uint32_t request, const Exec *message) {
    struct error error = {0};
    if (check(agent, message, &error) < 0) {
        reply_failure(agent, request, &error);
        return;
    }
    struct container *container = container_find(agent, message->container_id);
    struct exec *exec = make(container, request, message);
    struct child child = {
        .stdio = {-1, -1, -1},
        .status = -1,
        .container = container->process.pidfd,
        .null = agent->null,
        .oom_score_adj = agent->oom_score_adj,
        .id = container->id,
    };
    int failed = launch(exec, container, message, &child, &error);
    for (int i = 0; i < 3; i++)
        close_fd(&child.stdio[i]);
    close_fd(&child.status);
    if (failed < 0) {
        reply_failure(agent, request, &error);
        release(exec);
    }
}

// -------------------------------------------------------------------------------- every turn

// Output may be sent only after the reply, unless that comes with the exit.
static bool may_send(const struct exec *exec) {
    return exec->process.state != PROCESS_STARTING || exec->reply_on_exit;
}

void exec_pump(struct exec *exec) {
    bool ended = exec->process.state == PROCESS_ENDED;
    if (exec->input.source.fd >= 0 && exec->process.state == PROCESS_RUNNING)
        input_stream_pump(&exec->input, exec->agent);
    for (int i = 0; i < 2 && may_send(exec); i++)
        output_stream_pump(&exec->outputs[i], exec->agent, ended, exec->reply_on_exit && !ended);
    bool dying = exec->cgroup_events.fd >= 0 && cgroup_value(exec->cgroup_events.fd, "populated") > 0;
    if (ended && exec->outputs[0].source.fd < 0 && exec->outputs[1].source.fd < 0 && !dying)
        finish(exec);
}

bool exec_has_work(const struct exec *exec) {
    bool ended = exec->process.state == PROCESS_ENDED;
    for (int i = 0; i < 2 && may_send(exec); i++)
        if (output_stream_has_work(&exec->outputs[i], &exec->agent->channel, ended))
            return true;
    return false;
}

void exec_disconnect(struct exec *exec) {
    exec->process.request = 0;
    exec->process.failed = true; // its exit is not reported
    exec->input.stream = 0;
    exec->input.ended = true;
    for (int i = 0; i < 2; i++)
        output_stream_close(&exec->outputs[i], exec->agent);
    exec->cgroup.killed = true;
    cgroup_kill(exec->cgroup.directory);
    if (exec->process.state == PROCESS_ENDED)
        release(exec);
}
