#include "refresh.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "container.h"
#include "exports.h"
#include "paths.h"
#include "scope.h"

// Lists the directory that holds `path`: the host is asked for each name in the first part of a list, cached
// or not (READDIRPLUS). A name that leads to another file by now is dropped, and what is mounted there with
// it.
static void refresh_name(int root, char *path) {
    char *slash = strrchr(path, '/');
    if (!slash)
        return;
    *slash = '\0';
    autoclose int parent = path_enter(root, path);
    int fd = parent < 0 ? -1 : openat(parent, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    autoclosedir DIR *list = fd >= 0 ? fdopendir(fd) : NULL;
    if (!list) {
        if (fd >= 0)
            close(fd);
        return;
    }
    for (struct dirent *entry; (entry = readdir(list)) && strcmp(entry->d_name, slash + 1) != 0;)
        ;
    struct stat unused; // asks the host once the name is no longer believed
    fstatat(fd, slash + 1, &unused, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT);
}

int refresh_names(struct agent *agent, const RefreshNames *request, struct error *error) {
    const struct container *container = container_find(agent, request->container_id);
    char path[PATH_MAX];
    if (!container || container->process.state != PROCESS_RUNNING)
        return fail_about(error, ESRCH, "refresh", "container is not running");
    snprintf(path, sizeof path, "/proc/%d/root", container->process.pid);
    pid_t pid = fork();
    if (pid < 0)
        return fail(error, errno, "fork");
    if (pid > 0)
        return 0;
    autoclose int root = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
    exports_settle(agent);
    for (size_t i = 0; root >= 0 && i < request->n_paths; i++)
        refresh_name(root, request->paths[i]);
    _exit(0);
}

// Asks for the attributes; if they have changed, the kernel drops the cached content. Then causes IN_OPEN,
// IN_MODIFY and IN_CLOSE_WRITE, without a write: that could undo one of the host.
static void refresh_content(const char *path) {
    struct statx unused;
    autoclose int file = open(path, O_WRONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (file >= 0 && statx(file, "", AT_EMPTY_PATH | AT_STATX_FORCE_SYNC, STATX_BASIC_STATS, &unused) == 0)
        fallocate(file, FALLOC_FL_KEEP_SIZE, 0, 1);
}

int refresh_file(struct agent *agent, const RefreshFile *request, struct error *error) {
    if (agent->test && geteuid() != 0)
        return fail(error, EPERM, "refresh"); // there are no namespaces to do it in
    pid_t pid = fork();
    if (pid < 0)
        return fail(error, errno, "fork");
    if (pid > 0)
        return 0;
    refresh_content(request->path);
    _exit(0);
}
