#include "inodes.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/close_range.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"
#include "scope.h"

// How many inodes of FUSE file systems are in memory, in the form "N node=...".
#define COUNT "/sys/kernel/slab/fuse_inode/objects"

// A kernel that finds a dentry referenced since the last pass only takes note of that (dentry_lru_isolate),
// and ends when a pass frees nothing: the first write frees what was not used lately, the second the rest.
enum { PASSES = 2 };

enum { SHORTEST_NS = 1000000, LONGEST_NS = 1000000000 }; // between counts

static int drop(int file) {
    for (int pass = 0; pass < PASSES; pass++)
        if (write(file, "2", 1) < 0)
            return -1;
    return 0;
}

static int open_drop_caches(void) {
    return open("/proc/sys/vm/drop_caches", O_WRONLY | O_CLOEXEC);
}

int inodes_release(struct agent *agent, struct error *error) {
    if (agent->test || agent->inode_releaser > 0)
        return 0;
    // a child, as this takes a while, and waits for the host where a share answers slowly
    pid_t pid = fork();
    if (pid == 0)
        _exit(drop(open_drop_caches()) < 0);
    agent->inode_releaser = pid;
    return pid < 0 ? fail(error, errno, "fork") : 0;
}

static uint64_t count(int file) {
    char text[32] = "";
    return pread(file, text, sizeof text - 1, 0) > 0 ? strtoull(text, NULL, 10) : 0;
}

// Sleeps for a quarter of the time in which `left` inodes are added if each takes as long as a count of them:
// many may come with one answer of the host, so that each takes less. What counting costs is thus four parts
// in `left`, on a fast machine and on a slow one.
static void pause_for(uint64_t left, uint64_t count_ns) {
    uint64_t ns = left / 4 * count_ns;
    ns = ns < SHORTEST_NS ? SHORTEST_NS : ns > LONGEST_NS ? LONGEST_NS : ns;
    nanosleep(&(struct timespec){.tv_sec = (time_t)(ns / LONGEST_NS), .tv_nsec = (long)(ns % LONGEST_NS)},
              NULL);
}

// What is in use stays, so after a drop `base` is the lowest count since, and the next drop comes when half
// of `most` has been added. Freed inodes are counted until an RCU grace period has passed.
static _Noreturn void keep(uint64_t most) {
    prctl(PR_SET_NAME, "inodes");
    close_range(STDERR_FILENO + 1, ~0U, 0);
    // before all containers: they could add inodes while it waits for a CPU
    if (sched_setscheduler(0, SCHED_FIFO, &(struct sched_param){.sched_priority = 1}) < 0)
        setpriority(PRIO_PROCESS, 0, -20);
    int counter = open(COUNT, O_RDONLY | O_CLOEXEC), dropper = open_drop_caches();
    uint64_t base = 0, fastest_ns = LONGEST_NS;
    while (counter >= 0 && dropper >= 0) {
        uint64_t begun_ns = monotonic_ns(), now = count(counter), took_ns = monotonic_ns() - begun_ns;
        if (took_ns < fastest_ns)
            fastest_ns = took_ns;
        if (now < base)
            base = now;
        uint64_t bound = base + most / 2 > most ? base + most / 2 : most;
        if (now < bound) {
            pause_for(bound - now, fastest_ns);
            continue;
        }
        if (drop(dropper) < 0)
            break;
        base = count(counter);
    }
    _exit(1);
}

int inodes_keep_below(struct agent *agent, uint64_t most, struct error *error) {
    if (agent->test || most == 0 || access(COUNT, R_OK) < 0)
        return 0;
    pid_t pid = fork();
    if (pid == 0)
        keep(most);
    return pid < 0 ? fail(error, errno, "fork") : 0;
}
