#include "cgroup.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "scope.h"

enum { DEPTH_MAX = 64 }; // of the cgroups that a container nests in its own

int cgroup_make(int parent, const char *name, struct error *error) {
    if (mkdirat(parent, name, 0755) < 0)
        return fail(error, errno, "cgroup");
    int cgroup = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (cgroup < 0) {
        fail(error, errno, "cgroup");
        unlinkat(parent, name, AT_REMOVEDIR);
    }
    return cgroup;
}

int cgroup_write(int cgroup, const char *file, const char *value) {
    autoclose int fd = openat(cgroup, file, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    return write(fd, value, strlen(value)) < 0 ? -1 : 0;
}

int cgroup_write_files(int cgroup, CgroupFile **files, size_t count, bool lenient, struct error *error) {
    for (size_t i = 0; i < count; i++) {
        const char *name = files[i]->name;
        if (strchr(name, '/') || *name == '.')
            return fail(error, EINVAL, "cgroup %s", name);
        if (cgroup_write(cgroup, name, files[i]->value) < 0 &&
            !(lenient && (errno == ENOENT || errno == EACCES)))
            return fail(error, errno, "cgroup %s", name);
    }
    return 0;
}

void cgroup_read(int directory, const char *file, struct buffer *into) {
    autoclose int fd = openat(directory, file, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    for (size_t left = CGROUP_READ_MAX; fd >= 0 && left > 0;) {
        size_t piece = left < 4096 ? left : 4096;
        ssize_t got = read(fd, buffer_reserve(into, piece), piece);
        if (got <= 0)
            return;
        into->end += (size_t)got;
        left -= (size_t)got;
    }
}

uint64_t cgroup_value(int file, const char *key) {
    char text[1024];
    ssize_t length = file >= 0 ? pread(file, text, sizeof text - 1, 0) : -1;
    if (length <= 0)
        return 0;
    text[length] = '\0';
    size_t size = strlen(key);
    for (const char *line = text; line; line = strchr(line, '\n'), line = line ? line + 1 : NULL)
        if (!strncmp(line, key, size) && line[size] == ' ')
            return strtoull(line + size, NULL, 10);
    return 0;
}

int cgroup_kill(int cgroup) {
    return cgroup_write(cgroup, "cgroup.kill", "1");
}

// Calls `act` for the directory and for each beneath it, the deepest first.
static int each_beneath(int parent, const char *name, int depth,
                        int (*act)(int parent, const char *name, void *context), void *context) {
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    autoclosedir DIR *directory = fd >= 0 ? fdopendir(fd) : NULL;
    if (!directory)
        return fd < 0 && errno == ENOENT ? 0 : -1;
    for (struct dirent *entry; depth < DEPTH_MAX && (entry = readdir(directory));)
        if (entry->d_type == DT_DIR && strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
            each_beneath(fd, entry->d_name, depth + 1, act, context);
    return act(parent, name, context);
}

static int remove_one(int parent, const char *name, void *unused) {
    (void)unused;
    return unlinkat(parent, name, AT_REMOVEDIR) < 0 && errno != ENOENT ? -1 : 0;
}

int cgroup_remove(int parent, const char *name) {
    // nearly always it is empty, and one call is enough
    if (remove_one(parent, name, NULL) == 0)
        return 0;
    return errno == EBUSY ? each_beneath(parent, name, 0, remove_one, NULL) : -1;
}

struct visitor {
    void (*act)(pid_t pid, void *context);
    void *context;
};

static int visit_one(int parent, const char *name, void *context) {
    const struct visitor *visitor = context;
    autoclose int cgroup = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    struct buffer text = {0};
    cgroup_read(cgroup, "cgroup.procs", &text);
    buffer_append(&text, "", 1);
    char *at = (char *)text.data + text.start, *end;
    for (long pid; (pid = strtol(at, &end, 10)) > 0 && end != at; at = end)
        visitor->act((pid_t)pid, visitor->context);
    buffer_free(&text);
    return 0;
}

void cgroup_each_process(int cgroup, void (*act)(pid_t pid, void *context), void *context) {
    each_beneath(cgroup, ".", 0, visit_one, &(struct visitor){act, context});
}

static void signal_one(pid_t pid, void *signal) {
    kill(pid, *(int *)signal);
}

int cgroup_signal(int cgroup, int signal) {
    cgroup_each_process(cgroup, signal_one, &signal);
    return 0;
}

static int bpf(int command, union bpf_attr *attributes) {
    return (int)syscall(SYS_bpf, command, attributes, sizeof *attributes);
}

int cgroup_attach_device_filter(int cgroup, const ProtobufCBinaryData *program, struct error *error) {
    if (program->len == 0)
        return 0;
    static const char license[] = "Apache-2.0";
    union bpf_attr load = {
        .prog_type = BPF_PROG_TYPE_CGROUP_DEVICE,
        .insn_cnt = (uint32_t)(program->len / sizeof(struct bpf_insn)),
        .insns = (uint64_t)(uintptr_t)program->data,
        .license = (uint64_t)(uintptr_t)license,
    };
    autoclose int loaded = bpf(BPF_PROG_LOAD, &load);
    if (loaded < 0)
        return fail(error, errno, "device filter");
    union bpf_attr attach = {
        .target_fd = (uint32_t)cgroup,
        .attach_bpf_fd = (uint32_t)loaded,
        .attach_type = BPF_CGROUP_DEVICE,
    };
    if (bpf(BPF_PROG_ATTACH, &attach) < 0)
        return fail(error, errno, "device filter");
    return 0;
}
