#include "derived.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#include "cgroup.h"
#include "error.h"
#include "scope.h"

// One of `cost` bytes of memory is allowed each, `least` to `most` of them (0: without bound).
struct limit {
    const char *path; // below /proc/sys
    uint64_t cost, least, most;
    uint64_t last; // as the kernel or we have set it; 0: not known, as of a module that was not loaded
};

// The costs are the kernel's: fork.c, file_table.c, inotify_user.c, fanotify_user.c, eventpoll.c, and half of
// the threads for each kind of namespace. min_free_kbytes it sets again by itself.
static struct limit limits[] = {
    {"kernel/threads-max", 128 << 10, 20, 0, 0},
    {"fs/file-max", 10 << 10, 8192, 0, 0},
    {"fs/inotify/max_user_watches", 100 * 1280, 8192, 1 << 20, 0},
    {"fs/fanotify/max_user_marks", 100 * 1280, 8192, 1 << 20, 0},
    {"fs/epoll/max_user_watches", 25 * 192, 0, 0, 0},
    {"user/max_user_namespaces", 256 << 10, 0, 0, 0},
    {"user/max_pid_namespaces", 256 << 10, 0, 0, 0},
    {"user/max_uts_namespaces", 256 << 10, 0, 0, 0},
    {"user/max_ipc_namespaces", 256 << 10, 0, 0, 0},
    {"user/max_net_namespaces", 256 << 10, 0, 0, 0},
    {"user/max_mnt_namespaces", 256 << 10, 0, 0, 0},
    {"user/max_cgroup_namespaces", 256 << 10, 0, 0, 0},
    {"user/max_time_namespaces", 256 << 10, 0, 0, 0},
    {"net/netfilter/nf_conntrack_buckets", 128 << 10, 1024, 0, 0},
    {"net/netfilter/nf_conntrack_max", 128 << 10, 1024, 0, 0},
};

enum { LIMITS = sizeof limits / sizeof limits[0], PAGE = 4096 };

static uint64_t known_memory;
static rlim_t known_processes;

static uint64_t memory_now(void) {
    struct sysinfo info;
    return sysinfo(&info) == 0 ? (uint64_t)info.totalram * info.mem_unit : 0;
}

static int open_setting(const char *path, int flags) {
    char full[128];
    snprintf(full, sizeof full, "/proc/sys/%s", path);
    return open(full, flags | O_CLOEXEC);
}

static uint64_t read_setting(const char *path) {
    char text[32] = "";
    autoclose int file = open_setting(path, O_RDONLY);
    return file >= 0 && read(file, text, sizeof text - 1) > 0 ? strtoull(text, NULL, 10) : 0;
}

static void write_setting(const char *path, const char *value) {
    autoclose int file = open_setting(path, O_WRONLY);
    if (file < 0 || write(file, value, strlen(value)) < 0)
        console_log("%s: %s", path, strerror(errno));
}

// nf_conntrack_core.c has two steps besides.
static uint64_t derive(const struct limit *limit, uint64_t memory) {
    if (strstr(limit->path, "conntrack") && memory > 1ULL << 30)
        return memory > 4ULL << 30 ? 262144 : 65536;
    uint64_t value = memory / limit->cost;
    if (limit->most && value > limit->most)
        value = limit->most;
    return value < limit->least ? limit->least : value;
}

static void raise_limit(struct limit *limit, uint64_t memory) {
    uint64_t now = read_setting(limit->path), value = derive(limit, memory);
    if (!now || (limit->last && now != limit->last) || now >= value)
        return;
    char text[32];
    snprintf(text, sizeof text, "%" PRIu64, value);
    write_setting(limit->path, text);
    limit->last = read_setting(limit->path);
}

// Pages of all sockets of a protocol: where memory gets low, where it is under pressure, and the most.
static void raise_sockets(const char *path, uint64_t share, uint64_t before, uint64_t memory) {
    char text[96] = "";
    uint64_t low = 0, pressure = 0, most = 0, value = memory / PAGE / share;
    {
        autoclose int file = open_setting(path, O_RDONLY);
        if (file < 0 || read(file, text, sizeof text - 1) <= 0 ||
            sscanf(text, "%" SCNu64 " %" SCNu64 " %" SCNu64, &low, &pressure, &most) != 3)
            return;
    }
    // the kernel's own are of the pages that were free; values above those of all pages were set since
    if (pressure > before / PAGE / share || most != 2 * low || pressure >= value)
        return;
    snprintf(text, sizeof text, "%" PRIu64 " %" PRIu64 " %" PRIu64, value / 4 * 3, value, value / 4 * 6);
    write_setting(path, text);
}

static void raise_processes(pid_t pid, void *context) {
    const struct rlimit *wanted = context;
    for (int resource = RLIMIT_NPROC;; resource = RLIMIT_SIGPENDING) {
        struct rlimit now;
        if (prlimit(pid, (enum __rlimit_resource)resource, NULL, &now) == 0 &&
            now.rlim_cur == known_processes && now.rlim_max == known_processes)
            prlimit(pid, (enum __rlimit_resource)resource, wanted, NULL);
        if (resource == RLIMIT_SIGPENDING)
            return;
    }
}

void derived_begin(void) {
    struct rlimit processes;
    known_memory = memory_now();
    for (size_t i = 0; i < LIMITS; i++)
        limits[i].last = read_setting(limits[i].path);
    if (getrlimit(RLIMIT_NPROC, &processes) == 0)
        known_processes = processes.rlim_max;
}

void derived_follow(const struct agent *agent) {
    uint64_t memory = agent->test ? 0 : memory_now(), before = known_memory;
    if (memory <= before)
        return;
    known_memory = memory;
    for (size_t i = 0; i < LIMITS; i++)
        raise_limit(&limits[i], memory);
    raise_sockets("net/ipv4/tcp_mem", 16, before, memory);
    raise_sockets("net/ipv4/udp_mem", 8, before, memory);
    rlim_t processes = memory / (256 << 10); // half of the threads, as the kernel gives process 1
    if (processes <= known_processes)
        return;
    struct rlimit wanted = {processes, processes};
    raise_processes(0, &wanted); // the agent, of which everything to come inherits
    cgroup_each_process(agent->cgroup, raise_processes, &wanted);
    known_processes = processes;
}
