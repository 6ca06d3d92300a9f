#include "huge.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "configure.h"
#include "guest.h"
#include "scope.h"

#define POOL "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"

enum { FIND_MS = 3000, FIND_STEP_MS = 20 };

// Requests `count` pages; returns how many the kernel has reserved then.
static long request_pages(int pool, long count) {
    char text[32] = "";
    int length = snprintf(text, sizeof text, "%ld", count);
    if (pwrite(pool, text, (size_t)length, 0) < 0 || pread(pool, text, sizeof text - 1, 0) < 0)
        return -1;
    return strtol(text, NULL, 10);
}

static int reserve(uint32_t count, struct error *error) {
    char text[32] = "";
    autoclose int pool = open(POOL, O_RDWR | O_CLOEXEC);
    if (pool < 0 || pread(pool, text, sizeof text - 1, 0) < 0)
        return fail(error, errno, "huge pages");
    long before = strtol(text, NULL, 10), found = before;
    for (int waited = 0; found < (long)count; waited += FIND_STEP_MS) {
        found = request_pages(pool, (long)count);
        if (found < (long)count && waited >= FIND_MS) {
            request_pages(pool, before);
            return fail(error, ENOMEM, "huge pages: %ld of %" PRIu32 " available", found, count);
        }
        if (found < (long)count)
            nanosleep(&(struct timespec){.tv_nsec = FIND_STEP_MS * 1000000L}, NULL);
    }
    return 0;
}

static int make_directory(const HugeDirectory *directory, struct error *error) {
    char path[PATH_MAX];
    if (!*directory->name || *directory->name == '.' || strchr(directory->name, '/') ||
        strlen(directory->name) > NAME_MAX)
        return fail_about(error, EINVAL, "huge pages", directory->name);
    snprintf(path, sizeof path, "%s/%s", GUEST_HUGE, directory->name);
    if (mkdir(path, 0700) < 0)
        return errno == EEXIST ? 0 : fail(error, errno, "huge pages");
    if (chown(path, directory->uid, directory->gid) < 0 || chmod(path, directory->mode & 07777) < 0)
        return fail(error, errno, "huge pages");
    return 0;
}

int huge_pages(struct agent *agent, const HugePages *request, struct error *error) {
    if (agent->test && geteuid() != 0)
        return fail(error, EPERM, "huge pages"); // there are no namespaces to do it in
    // in standalone mode the pool is the machine's
    if (!agent->test && reserve(request->count, error) < 0)
        return -1;
    if (request->n_directories == 0)
        return 0;
    if (mkdir(GUEST_HUGE, 0755) < 0 && errno != EEXIST)
        return fail(error, errno, "huge pages");
    if (!is_mounted(GUEST_HUGE) &&
        mount("hugetlbfs", GUEST_HUGE, "hugetlbfs", MS_NOSUID | MS_NODEV, "pagesize=2M,mode=0755") < 0)
        return fail(error, errno, "mount huge pages");
    for (size_t i = 0; i < request->n_directories; i++)
        if (make_directory(request->directories[i], error) < 0)
            return -1;
    return 0;
}
