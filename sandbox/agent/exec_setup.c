#include "exec_setup.h"

#include <errno.h>
#include <grp.h>
#include <limits.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "buffer.h"
#include "scope.h"
#include "userspace.h"

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

static int begin_session(const Process *process, struct error *error) {
    if (setsid() < 0)
        return fail(error, errno, "setsid");
    if (process->tty && ioctl(STDIN_FILENO, TIOCSCTTY, 0) < 0)
        return fail(error, errno, "terminal");
    return 0;
}

static int set_limits(const Process *process, struct error *error) {
    for (size_t i = 0; i < process->n_rlimits; i++) {
        struct rlimit limit = {.rlim_cur = process->rlimits[i]->soft, .rlim_max = process->rlimits[i]->hard};
        if (prlimit(0, (int)process->rlimits[i]->resource, &limit, NULL) < 0)
            return fail(error, errno, "rlimit %u", process->rlimits[i]->resource);
    }
    return 0;
}

static int enter_directory(const Process *process, struct error *error) {
    const char *cwd = *process->cwd ? process->cwd : "/";
    char name[PATH_MAX];
    if (chdir(cwd) < 0)
        return fail_about(error, errno, "chdir", cwd);
    // "(unreachable)...": outside of the root, as through a link to a leaked descriptor (getcwd(2))
    if (syscall(SYS_getcwd, name, sizeof name) < 0 || name[0] != '/')
        return fail_about(error, EPERM, "chdir", cwd);
    return 0;
}

// A pipe belongs to the user who made it, but the process may open it again as /dev/stdout.
static int chown_pipes(const Process *process, struct error *error) {
    uid_t owner = userspace_uid(process, process->uid);
    for (int fd = 0; owner && fd < 3; fd++) {
        struct stat status;
        if (fstat(fd, &status) == 0 && S_ISFIFO(status.st_mode) && fchown(fd, owner, (gid_t)-1) < 0)
            return fail(error, errno, "stdio");
    }
    return 0;
}

// Closes the entry: no descriptor from outside the container may be open when cwd is chosen.
static int enter_user_namespace(const Process *process, struct userspace_entry *entry, struct error *error) {
    int failed = 0;
    if (userspace_wanted(process))
        failed = entry->self >= 0 ? userspace_make(process, entry->self, error)
                                  : userspace_join(entry->container, error);
    close_fd(&entry->self);
    close_fd(&entry->container);
    return failed;
}

static int drop_bounding(uint64_t kept, struct error *error) {
    for (unsigned long capability = 0; capability < 64; capability++) {
        if (kept >> capability & 1)
            continue;
        if (prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0)
            return errno == EINVAL ? 0 : fail(error, errno, "bounding set"); // EINVAL: past the last one
    }
    return 0;
}

static int set_ids(const Process *process, struct error *error) {
    if (setgroups(process->n_groups, process->groups) < 0)
        return fail(error, errno, "setgroups");
    if (setresgid(process->gid, process->gid, process->gid) < 0)
        return fail(error, errno, "setgid");
    if (process->uid && prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) < 0)
        return fail(error, errno, "keepcaps");
    if (setresuid(process->uid, process->uid, process->uid) < 0)
        return fail(error, errno, "setuid");
    return 0;
}

static int set_capabilities(const Process *process, struct error *error) {
    uint64_t permitted = process->cap_permitted, effective = process->cap_effective;
    // A filter without no_new_privs needs CAP_SYS_ADMIN (seccomp(2)). It is added to none of the sets that
    // pass through exec, so exec drops it (capabilities(7)); and the filter need not allow capset.
    if (process->seccomp.len && !process->no_new_privs) {
        permitted |= 1ULL << CAP_SYS_ADMIN;
        effective |= 1ULL << CAP_SYS_ADMIN;
    }
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2];
    for (int i = 0; i < 2; i++)
        data[i] = (struct __user_cap_data_struct){
            .permitted = (uint32_t)(permitted >> (32 * i)),
            .effective = (uint32_t)(effective >> (32 * i)),
            .inheritable = (uint32_t)(process->cap_inheritable >> (32 * i)),
        };
    if (syscall(SYS_capset, &header, data) < 0)
        return fail(error, errno, "capset");
    for (unsigned long capability = 0; capability < 64; capability++)
        if (process->cap_ambient >> capability & 1 &&
            prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0) < 0)
            return fail(error, errno, "ambient capabilities");
    return 0;
}

static int install_filter(const Process *process, struct error *error) {
    if (process->no_new_privs && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return fail(error, errno, "no_new_privs");
    if (!process->seccomp.len)
        return 0;
    struct sock_fprog program = {
        .len = (unsigned short)(process->seccomp.len / sizeof(struct sock_filter)),
        .filter = (struct sock_filter *)process->seccomp.data,
    };
    if (process->seccomp.len % sizeof(struct sock_filter) ||
        process->seccomp.len / sizeof(struct sock_filter) > BPF_MAXINSNS)
        return fail(error, EINVAL, "seccomp");
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, process->seccomp_flags, &program) < 0)
        return fail(error, errno, "seccomp");
    return 0;
}

// A NULL-terminated copy of the environment; the message's values are not terminated.
static char **make_environment(const Process *process) {
    size_t size = 0;
    for (size_t i = 0; i < process->n_env; i++)
        size += process->env[i].len + 1;
    char **environment = memory_get((process->n_env + 1) * sizeof *environment);
    char *at = memory_get(size);
    for (size_t i = 0; i < process->n_env; i++) {
        environment[i] = at;
        if (process->env[i].len)
            memcpy(at, process->env[i].data, process->env[i].len);
        at += process->env[i].len + 1;
    }
    return environment;
}

static const char *search_path(char **environment) {
    for (; *environment; environment++)
        if (!strncmp(*environment, "PATH=", 5))
            return *environment + 5;
    return DEFAULT_PATH;
}

// Joins the first entry of a search path and `name`; false: the result is too long.
static bool join_first(char full[PATH_MAX], const char *path, const char *name) {
    int length = (int)strcspn(path, ":");
    return snprintf(full, PATH_MAX, "%.*s%s%s", length, path, length ? "/" : "", name) < PATH_MAX;
}

// Returns the search path from the first entry that holds `name` on; all of it where none does. This saves
// time: a failing execve(2) has made a new address space and copied the environment before it opens the file.
static const char *skip_missing(const char *path, const char *name) {
    for (const char *rest = path;; rest++) {
        char full[PATH_MAX];
        struct stat status;
        if (!join_first(full, rest, name) || stat(full, &status) == 0 ||
            (errno != ENOENT && errno != ENOTDIR))
            return rest;
        rest += strcspn(rest, ":");
        if (!*rest)
            return path;
    }
}

// Like execvp(3) with this search path, but without running other files by a shell.
static int run(const char *path, char **argv, char **environment, struct error *error) {
    const char *name = argv[0];
    int reason = ENOENT;
    if (strchr(name, '/')) {
        execve(name, argv, environment);
        return fail_about(error, errno, "exec", name);
    }
    for (; *name; path++) {
        char full[PATH_MAX];
        if (join_first(full, path, name)) {
            execve(full, argv, environment);
            if (errno != ENOENT && errno != ENOTDIR)
                reason = errno; // a file was found: that says more than ENOENT
            if (errno != ENOENT && errno != ENOTDIR && errno != EACCES)
                break;
        }
        path += strcspn(path, ":");
        if (!*path)
            break;
    }
    return fail_about(error, reason, "exec", name);
}

int exec_setup(const Process *process, struct userspace_entry *entry, struct error *error) {
    if (process->n_argv == 0)
        return fail_about(error, EINVAL, "exec", "no command");
    char **argv = memory_get((process->n_argv + 1) * sizeof *argv);
    memcpy(argv, process->argv, process->n_argv * sizeof *argv);
    char **environment = make_environment(process);
    if (begin_session(process, error) < 0 || set_limits(process, error) < 0 ||
        chown_pipes(process, error) < 0 || enter_user_namespace(process, entry, error) < 0 ||
        enter_directory(process, error) < 0 || drop_bounding(process->cap_bounding, error) < 0 ||
        set_ids(process, error) < 0 || set_capabilities(process, error) < 0)
        return -1;
    umask(process->umask ? process->umask : 0022);
    // before the filter, which need not allow stat(2)
    const char *path = skip_missing(search_path(environment), argv[0]);
    if (install_filter(process, error) < 0)
        return -1;
    return run(path, argv, environment, error);
}
