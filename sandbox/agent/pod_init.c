#include "pod_init.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <linux/close_range.h>
#include <linux/sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent.h"
#include "guest.h"
#include "process.h"
#include "scope.h"

static _Noreturn void run(struct agent *agent) {
    char *argv[] = {POD_INIT_NAME, NULL}, *environment[] = {NULL};
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    sigprocmask(SIG_SETMASK, &child, NULL); // stays blocked across exec, so that none gets lost
    for (int i = 0; i < 3; i++)
        dup2(agent->null, i);
    syscall(SYS_execveat, agent->executable, "", argv, environment, AT_EMPTY_PATH);
    _exit(127);
}

int pod_init_find(struct agent *agent, struct error *error) {
    if (agent->pod_init)
        return agent->pod_init_pidfd;
    struct placement placement = {
        .flags = CLONE_NEWPID | CLONE_NEWNS,
        .cgroup = -1,
        .pid_namespace = -1,
        .own_pid_namespace = agent->own_pid_namespace,
    };
    int pidfd = -1;
    pid_t pid = process_fork(&placement, &pidfd, error);
    if (pid == 0)
        run(agent);
    if (pid < 0)
        return -1;
    agent->pod_init = pid;
    agent->pod_init_pidfd = pidfd;
    return pidfd;
}

void pod_init_set_ended(struct agent *agent) {
    console_log("the pod's init has ended");
    agent->pod_init = 0;
    close_fd(&agent->pod_init_pidfd);
}

static void drop_privileges(void) {
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct none[2] = {0};
    close_range(3, ~0U, 0);
    if (chdir(GUEST_EMPTY) < 0 || syscall(SYS_pivot_root, ".", ".") < 0 || umount2(".", MNT_DETACH) < 0)
        panic("pod init: empty root: %s", strerror(errno));
    if (setgroups(0, NULL) < 0 || prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 ||
        prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0 || syscall(SYS_capset, &header, none) < 0)
        panic("pod init: privileges: %s", strerror(errno));
}

void pod_init_main(void) {
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    drop_privileges();
    for (;;) {
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ;
        sigwaitinfo(&child, NULL);
    }
}
