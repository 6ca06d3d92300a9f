#include "userspace.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "scope.h"

typedef Husk__Guest__V1__IdRange IdRange;

enum { MAP_MAX = 4096 }; // the kernel reads one page

static uint32_t outside(IdRange *const *ranges, size_t count, uint32_t id) {
    if (count == 0)
        return id;
    for (size_t i = 0; i < count; i++)
        if (id >= ranges[i]->inside && id - ranges[i]->inside < ranges[i]->length)
            return ranges[i]->outside + (id - ranges[i]->inside);
    return (uint32_t)-1;
}

uint32_t userspace_uid(const Process *process, uint32_t uid) {
    return outside(process->uid_ranges, process->n_uid_ranges, uid);
}

uint32_t userspace_gid(const Process *process, uint32_t gid) {
    return outside(process->gid_ranges, process->n_gid_ranges, gid);
}

// One write, as a map can be written only once (user_namespaces(7)).
static int write_map(int self, const char *name, IdRange *const *ranges, size_t count) {
    char text[MAP_MAX];
    size_t length = 0;
    for (size_t i = 0; i < count; i++) {
        int added = snprintf(text + length, sizeof text - length, "%u %u %u\n", ranges[i]->inside,
                             ranges[i]->outside, ranges[i]->length);
        if (added < 0 || (size_t)added >= sizeof text - length)
            return E2BIG;
        length += (size_t)added;
    }
    autoclose int file = openat(self, name, O_WRONLY | O_CLOEXEC);
    return file < 0 || write(file, text, length) != (ssize_t)length ? errno : 0;
}

// Only a process outside the namespace that has the capabilities may map ids: this child does so once its
// parent is inside.
static _Noreturn void map_ids(const Process *process, int self, int inside) {
    char byte;
    if (read(inside, &byte, 1) < 0)
        _exit(EIO);
    int failed = write_map(self, "uid_map", process->uid_ranges, process->n_uid_ranges);
    if (!failed)
        failed = write_map(self, "gid_map", process->gid_ranges, process->n_gid_ranges);
    _exit(failed);
}

int userspace_make(const Process *process, int self, struct error *error) {
    int gate[2], status;
    if (pipe2(gate, O_CLOEXEC) < 0)
        return fail(error, errno, "user namespace");
    pid_t helper = fork();
    if (helper == 0) {
        close(gate[1]);
        map_ids(process, self, gate[0]);
    }
    int failed = helper < 0 || unshare(CLONE_NEWUSER | CLONE_NEWNS) < 0 ? errno : 0;
    close(gate[0]);
    close(gate[1]);
    if (helper > 0 && waitpid(helper, &status, 0) == helper && !failed)
        failed = WIFEXITED(status) ? WEXITSTATUS(status) : EIO;
    return failed ? fail(error, failed, "user namespace") : 0;
}

int userspace_join(int pidfd, struct error *error) {
    return setns(pidfd, CLONE_NEWUSER) < 0 ? fail(error, errno, "join user namespace") : 0;
}
