#include "paths.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include "scope.h"

enum { LINKS_MAX = 40, RACES_MAX = 100 };

static int open_in_root(int root, const char *path, uint64_t flags) {
    struct open_how how = {
        .flags = flags | O_CLOEXEC,
        .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS,
    };
    // EAGAIN: something was renamed on the way (openat2(2)); try anew, but not for ever
    for (int i = 0;; i++) {
        int fd = (int)syscall(SYS_openat2, root, *path ? path : "/", &how, sizeof how);
        if (fd >= 0 || errno != EAGAIN || i == RACES_MAX)
            return fd;
    }
}

int path_find(int root, const char *path) {
    return open_in_root(root, path, O_PATH);
}

int path_enter(int root, const char *path) {
    return open_in_root(root, path, O_PATH | O_DIRECTORY);
}

// A walk that creates: `done` is a path without links that exists, `rest` is what is still to go.
struct walk {
    int root;
    char done[PATH_MAX];
    char rest[PATH_MAX];
    int links;
};

// Takes the first part off `rest`; false at the end.
static bool next_part(struct walk *walk, char part[NAME_MAX + 1]) {
    size_t skip = strspn(walk->rest, "/");
    size_t length = strcspn(walk->rest + skip, "/");
    if (length == 0 || length > NAME_MAX)
        return false;
    memcpy(part, walk->rest + skip, length);
    part[length] = '\0';
    memmove(walk->rest, walk->rest + skip + length, strlen(walk->rest + skip + length) + 1);
    return true;
}

static int follow(struct walk *walk, int link, struct error *error) {
    char target[PATH_MAX], rest[PATH_MAX];
    ssize_t length = readlinkat(link, "", target, sizeof target - 1);
    if (length < 0)
        return fail(error, errno, "readlink");
    target[length] = '\0';
    memcpy(rest, walk->rest, sizeof rest);
    if (++walk->links > LINKS_MAX ||
        snprintf(walk->rest, sizeof walk->rest, "%s/%s", target, rest) >= (int)sizeof walk->rest)
        return fail(error, ELOOP, "readlink");
    if (target[0] == '/')
        walk->done[0] = '\0';
    return 0;
}

static int create(struct walk *walk, const char *part, enum path_kind kind, struct error *error) {
    autoclose int parent = open_in_root(walk->root, walk->done, O_PATH | O_DIRECTORY);
    if (parent < 0)
        return fail(error, errno, "open /%s", walk->done);
    if (kind == PATH_DIRECTORY) {
        if (mkdirat(parent, part, 0755) < 0 && errno != EEXIST)
            return fail(error, errno, "mkdir %s/%s", walk->done, part);
    } else {
        autoclose int file = openat(parent, part, O_CREAT | O_EXCL | O_WRONLY | O_NOFOLLOW | O_CLOEXEC, 0644);
        if (file < 0 && errno != EEXIST)
            return fail(error, errno, "create %s/%s", walk->done, part);
    }
    return 0;
}

// One part further: into it, up, along a link, or into what is created for it.
static int step(struct walk *walk, const char *part, enum path_kind kind, struct error *error) {
    size_t length = strlen(walk->done);
    if (strcmp(part, ".") == 0)
        return 0;
    if (strcmp(part, "..") == 0) {
        char *slash = strrchr(walk->done, '/');
        if (slash)
            *slash = '\0';
        return 0;
    }
    if (snprintf(walk->done + length, sizeof walk->done - length, "/%s", part) >=
        (int)(sizeof walk->done - length))
        return fail(error, ENAMETOOLONG, "mkdir");
    autoclose int found = open_in_root(walk->root, walk->done, O_PATH | O_NOFOLLOW);
    if (found < 0 && errno != ENOENT)
        return fail(error, errno, "open %s", walk->done);
    if (found < 0) {
        walk->done[length] = '\0';
        if (create(walk, part, kind, error) < 0)
            return -1;
        walk->done[length] = '/';
        return 0;
    }
    struct stat status;
    if (fstat(found, &status) < 0)
        return fail(error, errno, "stat %s", walk->done);
    if (!S_ISLNK(status.st_mode))
        return 0;
    walk->done[length] = '\0';
    return follow(walk, found, error);
}

int path_make(int root, const char *path, enum path_kind kind, struct error *error) {
    int fd = path_find(root, path);
    if (fd >= 0)
        return fd;
    struct walk walk = {.root = root};
    if (errno != ENOENT || snprintf(walk.rest, sizeof walk.rest, "%s", path) >= (int)sizeof walk.rest)
        return fail(error, errno, "open %s", path);
    char part[NAME_MAX + 1];
    while (next_part(&walk, part)) {
        bool last = walk.rest[strspn(walk.rest, "/")] == '\0';
        if (step(&walk, part, last ? kind : PATH_DIRECTORY, error) < 0)
            return -1;
    }
    fd = path_find(root, walk.done);
    return fd >= 0 ? fd : fail(error, errno, "open %s", path);
}

int path_parent(int root, const char *path, const char **name, struct error *error) {
    char parent[PATH_MAX];
    const char *slash = strrchr(path, '/');
    *name = slash ? slash + 1 : path;
    if (!**name || !strcmp(*name, ".") || !strcmp(*name, "..") || strlen(path) >= sizeof parent)
        return fail(error, EINVAL, "path %s", path);
    snprintf(parent, sizeof parent, "/%.*s", slash ? (int)(slash - path) : 0, path);
    return path_make(root, parent, PATH_DIRECTORY, error);
}
