#include "process_count.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "cgroup.h"
#include "scope.h"

enum { PASSES = 2 };

struct counting {
    ProcessCount *count;
    bool files;
    uint32_t *files_left;
};

static bool is_socket(int directory, const char *name) {
    char target[8];
    return readlinkat(directory, name, target, sizeof target) == sizeof target &&
           !memcmp(target, "socket:[", sizeof target);
}

static void count_files(pid_t pid, const struct counting *counting) {
    char path[32];
    snprintf(path, sizeof path, "/proc/%d/fd", (int)pid);
    autoclosedir DIR *directory = opendir(path);
    for (struct dirent *entry; directory && *counting->files_left > 0 && (entry = readdir(directory));) {
        if (entry->d_name[0] == '.')
            continue;
        --*counting->files_left;
        counting->count->files++;
        counting->count->sockets += is_socket(dirfd(directory), entry->d_name);
    }
}

static void count_one(pid_t pid, void *context) {
    const struct counting *counting = context;
    counting->count->processes++;
    if (counting->files)
        count_files(pid, counting);
}

void process_count(int cgroup, ProcessCount *count, bool files, uint32_t *files_left) {
    cgroup_each_process(cgroup, count_one, &(struct counting){count, files, files_left});
}

static void set_score(pid_t pid, void *score) {
    char path[48];
    snprintf(path, sizeof path, "/proc/%d/oom_score_adj", (int)pid);
    autoclose int file = open(path, O_WRONLY | O_CLOEXEC);
    if (file >= 0)
        dprintf(file, "%d", *(int *)score); // fails if the process is ending right now: no matter
}

void process_set_oom_scores(int cgroup, int score) {
    for (int pass = 0; pass < PASSES; pass++)
        cgroup_each_process(cgroup, set_score, &score);
}
