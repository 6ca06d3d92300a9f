#include "child.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "apparmor.h"
#include "exec_setup.h"
#include "modules.h"
#include "pty.h"
#include "rootfs.h"
#include "scope.h"
#include "userspace.h"

// Closes every descriptor above stdio but these two.
static void keep_only(int a, int b) {
    int low = a < b ? a : b, high = a < b ? b : a;
    unsigned from = 3;
    if (low >= 3) {
        if (low > 3)
            close_range(from, (unsigned)low - 1, 0);
        from = (unsigned)low + 1;
    }
    if ((unsigned)high > from)
        close_range(from, (unsigned)high - 1, 0);
    close_range((unsigned)high + 1, ~0U, 0);
}

static int prepare(struct child *child, struct error *error) {
    sigset_t none;
    sigemptyset(&none);
    signal(SIGPIPE, SIG_DFL);
    sigprocmask(SIG_SETMASK, &none, NULL);
    umask(0);
    for (int i = 0; i < 3; i++)
        if (dup2(child->stdio[i] >= 0 ? child->stdio[i] : child->null, i) < 0)
            return fail(error, errno, "stdio");
    keep_only(child->status, child->container);
    return 0;
}

// Needs the guest's /proc, so it comes before the container's mounts.
static int set_oom_score(const Process *process, const struct child *child, struct error *error) {
    if (process->oom_score_adj == child->oom_score_adj)
        return 0;
    char text[16];
    int length = snprintf(text, sizeof text, "%d", process->oom_score_adj);
    autoclose int file = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (file < 0 || write(file, text, (size_t)length) < 0)
        return fail(error, errno, "oom_score_adj");
    return 0;
}

static int send_terminal(int status, int master, struct error *error) {
    char kind = STATUS_TERMINAL;
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int))];
    } control = {
        .header = {.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof(int))}};
    memcpy(CMSG_DATA(&control.header), &master, sizeof master);
    struct iovec bytes = {.iov_base = &kind, .iov_len = 1};
    struct msghdr message = {
        .msg_iov = &bytes, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    if (sendmsg(status, &message, MSG_NOSIGNAL) < 0)
        return fail(error, errno, "terminal");
    return 0;
}

// Opens a new terminal of the container as stdio, and sends its master to the agent.
static int open_terminal(int root, const Process *process, const struct child *child, struct error *error) {
    int slave = -1;
    autoclose int master = pty_open(root, process, &slave, error);
    if (master < 0 || send_terminal(child->status, master, error) < 0)
        return -1;
    for (int i = 0; i < 3; i++)
        if (dup2(slave, i) < 0)
            return fail(error, errno, "terminal");
    close(slave);
    return 0;
}

static int start(const Start *start, struct child *child, struct error *error) {
    if (prepare(child, error) < 0 || set_oom_score(start->process, child, error) < 0 ||
        apparmor_load(start, error) < 0 || apparmor_enter(start->process, error) < 0)
        return -1;
    if (!userspace_wanted(start->process)) // in a user namespace it has no effect on the pod's network
        modules_of_capabilities(start->process->cap_effective);
    // not by clone(2): then the namespace would be rooted at the agent's cgroup
    if (unshare(CLONE_NEWCGROUP) < 0)
        return fail(error, errno, "cgroup namespace");
    struct userspace_entry entry = {.self = -1, .container = -1};
    if (userspace_wanted(start->process)) {
        entry.self = open("/proc/self", O_PATH | O_DIRECTORY | O_CLOEXEC);
        if (entry.self < 0)
            return fail(error, errno, "/proc/self");
    }
    autoclose int root = rootfs_prepare(start, child->id, error);
    if (root < 0)
        return -1;
    if (start->process->tty &&
        (open_terminal(root, start->process, child, error) < 0 || rootfs_console(root, error) < 0))
        return -1;
    if (rootfs_enter(root, start, error) < 0)
        return -1;
    close_fd(&root); // no descriptor from outside may be open when cwd is chosen
    return exec_setup(start->process, &entry, error);
}

static int exec(const Process *process, struct child *child, struct error *error) {
    if (prepare(child, error) < 0 || set_oom_score(process, child, error) < 0 ||
        apparmor_enter(process, error) < 0)
        return -1;
    if (setns(child->container, CLONE_NEWNS | CLONE_NEWCGROUP) < 0)
        return fail(error, errno, "join container");
    struct userspace_entry entry = {.self = -1, .container = take_fd(&child->container)};
    if (process->tty) {
        autoclose int root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
        if (root < 0)
            return fail(error, errno, "terminal");
        if (open_terminal(root, process, child, error) < 0)
            return -1;
    }
    return exec_setup(process, &entry, error);
}

static _Noreturn void report_failure(int status, const struct error *error) {
    if (send(status, error, sizeof *error, MSG_NOSIGNAL) < 0)
        _exit(126);
    _exit(127);
}

void child_start(const Start *message, struct child *child) {
    struct error error = {0};
    start(message, child, &error);
    report_failure(child->status, &error);
}

void child_exec(const Process *process, struct child *child) {
    struct error error = {0};
    exec(process, child, &error);
    report_failure(child->status, &error);
}
