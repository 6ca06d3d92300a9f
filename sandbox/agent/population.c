#include "population.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include "cgroup.h"
#include "scope.h"

struct count {
    ProcessCount *population;
    bool files;
    uint32_t *files_left;
};

static bool is_socket(int directory, const char *name) {
    char target[8];
    return readlinkat(directory, name, target, sizeof target) == sizeof target &&
           !memcmp(target, "socket:[", sizeof target);
}

static void count_files(pid_t pid, const struct count *count) {
    char path[32];
    snprintf(path, sizeof path, "/proc/%d/fd", (int)pid);
    autoclosedir DIR *directory = opendir(path);
    for (struct dirent *entry; directory && *count->files_left > 0 && (entry = readdir(directory));) {
        if (entry->d_name[0] == '.')
            continue;
        --*count->files_left;
        count->population->files++;
        count->population->sockets += is_socket(dirfd(directory), entry->d_name);
    }
}

static void count_one(pid_t pid, void *context) {
    const struct count *count = context;
    count->population->processes++;
    if (count->files)
        count_files(pid, count);
}

void population_count(int cgroup, ProcessCount *population, bool files, uint32_t *files_left) {
    cgroup_each_process(cgroup, count_one, &(struct count){population, files, files_left});
}

static void set_score(pid_t pid, void *score) {
    char path[48];
    snprintf(path, sizeof path, "/proc/%d/oom_score_adj", (int)pid);
    autoclose int file = open(path, O_WRONLY | O_CLOEXEC);
    if (file >= 0)
        dprintf(file, "%d", *(int *)score); // it may be ending right now
}

void population_set_oom_score(int cgroup, int score) {
    for (int look = 0; look < 2; look++)
        cgroup_each_process(cgroup, set_score, &score);
}
