#include "process.h"

#include <errno.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "clock.h"
#include "scope.h"

pid_t process_fork(const struct placement *placement, int *pidfd, struct error *error) {
    // joining a PID namespace affects children only (setns(2)): so the agent joins it for the clone, returns,
    // and stays the parent
    if (placement->pid_namespace >= 0 && setns(placement->pid_namespace, CLONE_NEWPID) < 0)
        return fail(error, errno, "join PID namespace");
    struct clone_args arguments = {
        .flags = placement->flags | CLONE_PIDFD | (placement->cgroup >= 0 ? CLONE_INTO_CGROUP : 0),
        .pidfd = (uint64_t)(uintptr_t)pidfd,
        .exit_signal = SIGCHLD,
        .cgroup = (uint64_t)(placement->cgroup >= 0 ? placement->cgroup : 0),
    };
    pid_t pid = (pid_t)syscall(SYS_clone3, &arguments, sizeof arguments);
    if (pid == 0)
        return 0;
    int reason = errno;
    if (placement->pid_namespace >= 0 && setns(placement->own_pid_namespace, CLONE_NEWPID) < 0)
        panic("cannot return to the agent's PID namespace: %s", strerror(errno));
    return pid > 0 ? pid : fail(error, reason, "clone");
}

int process_prepare(struct process *process, struct child *child, struct error *error) {
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        return fail(error, errno, "socketpair");
    process->status.fd = pair[0];
    child->status = pair[1];
    return 0;
}

static void receive_terminal(struct process *process, struct msghdr *message) {
    struct cmsghdr *header = CMSG_FIRSTHDR(message);
    if (header && header->cmsg_type == SCM_RIGHTS && process->terminal < 0)
        memcpy(&process->terminal, CMSG_DATA(header), sizeof process->terminal);
}

bool process_poll(struct process *process, struct loop *loop) {
    while (process->status.fd >= 0) {
        struct error report;
        char control[CMSG_SPACE(sizeof(int))];
        struct iovec bytes = {.iov_base = &report, .iov_len = sizeof report};
        struct msghdr message = {
            .msg_iov = &bytes, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
        ssize_t size = recvmsg(process->status.fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (size < 0 && errno == EAGAIN)
            return false;
        if (size == 1) {
            receive_terminal(process, &message);
            continue;
        }
        if (size == (ssize_t)sizeof report) {
            process->failed = true;
            process->error = report;
        }
        loop_close(loop, &process->status);
        if (process->state == PROCESS_STARTING && !process->failed)
            process->state = PROCESS_RUNNING;
    }
    return true;
}

void process_set_ended(struct process *process, struct loop *loop, int wait_status) {
    process_poll(process, loop);
    loop_close(loop, &process->status); // a grandchild may still hold the other end
    process->state = PROCESS_ENDED;
    process->ended_at = wall_ns();
    process->exit_code = WIFSIGNALED(wait_status) ? 128 + WTERMSIG(wait_status) : WEXITSTATUS(wait_status);
    close_fd(&process->pidfd);
}

void process_close(struct process *process, struct loop *loop) {
    loop_close(loop, &process->status);
    close_fd(&process->pidfd);
    close_fd(&process->terminal);
}
