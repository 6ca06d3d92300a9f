#include "standalone.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent.h"
#include "cgroup.h"
#include "scope.h"

static void must(int result, const char *what) {
    if (result < 0)
        panic("%s: %s", what, strerror(errno));
}

static int open_socket(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path)
        panic("%s: too long for a unix socket", path);
    memcpy(address.sun_path, path, strlen(path) + 1);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    must(fd, "socket");
    unlink(path);
    must(bind(fd, (struct sockaddr *)&address, sizeof address), path);
    must(listen(fd, 4), path);
    return fd;
}

// Stays outside the namespaces: forwards SIGTERM and SIGINT, and exits with the agent's status.
static _Noreturn void supervise(pid_t agent, const sigset_t *waited) {
    for (;;) {
        int number = 0, status;
        sigwait(waited, &number);
        if (number == SIGTERM || number == SIGINT)
            kill(agent, SIGTERM);
        if (waitpid(agent, &status, WNOHANG) == agent)
            _exit(WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status));
    }
}

static void enter_namespaces(void) {
    sigset_t waited;
    sigemptyset(&waited);
    sigaddset(&waited, SIGCHLD);
    sigaddset(&waited, SIGTERM);
    sigaddset(&waited, SIGINT);
    sigprocmask(SIG_BLOCK, &waited, NULL);
    must(unshare(CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWUTS | CLONE_NEWIPC), "unshare");
    must(mount(NULL, "/", NULL, MS_PRIVATE | MS_REC, NULL), "private mounts");
    pid_t agent = fork();
    must(agent, "fork");
    if (agent > 0)
        supervise(agent, &waited);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    must(mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL), "/proc");
    must(mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755"), "/run");
}

static void open_cgroup(struct agent *agent, const char *path) {
    struct error error = {0};
    autoclose int parent = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    must(parent, path);
    agent->cgroup = cgroup_make(parent, "husk", &error);
    if (agent->cgroup < 0)
        panic("%s/husk: %s", path, error.message);
}

int standalone_open(struct agent *agent, const struct standalone *standalone) {
    int listener = open_socket(standalone->listen);
    agent->test = true;
    agent->cgroup = -1;
    if (standalone->cgroup)
        open_cgroup(agent, standalone->cgroup);
    if (geteuid() == 0)
        enter_namespaces();
    return listener;
}
