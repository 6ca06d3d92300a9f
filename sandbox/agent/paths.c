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

static int resolve(int root, const char *path, uint64_t flags, uint64_t links) {
    struct open_how how = {
        .flags = flags | O_CLOEXEC,
        .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | links,
    };
    // EAGAIN: something on the path was renamed meanwhile (openat2(2)); retry, up to a limit
    for (int i = 0;; i++) {
        int fd = (int)syscall(SYS_openat2, root, *path ? path : "/", &how, sizeof how);
        if (fd >= 0 || errno != EAGAIN || i == RACES_MAX)
            return fd;
    }
}

static int open_in_root(int root, const char *path, uint64_t flags) {
    return resolve(root, path, flags, 0);
}

int path_plain(int root, const char *path) {
    return resolve(root, path, O_PATH, RESOLVE_NO_SYMLINKS);
}

int path_find(int root, const char *path) {
    return open_in_root(root, path, O_PATH);
}

int path_enter(int root, const char *path) {
    return open_in_root(root, path, O_PATH | O_DIRECTORY);
}

// A lookup that creates: `done` is an existing path without links, `rest` is still to be resolved.
struct lookup {
    int root;
    char done[PATH_MAX];
    char rest[PATH_MAX];
    int links;
};

// Removes the first part from `rest`; false at the end.
static bool next_part(struct lookup *lookup, char part[NAME_MAX + 1]) {
    size_t skip = strspn(lookup->rest, "/");
    size_t length = strcspn(lookup->rest + skip, "/");
    if (length == 0 || length > NAME_MAX)
        return false;
    memcpy(part, lookup->rest + skip, length);
    part[length] = '\0';
    memmove(lookup->rest, lookup->rest + skip + length, strlen(lookup->rest + skip + length) + 1);
    return true;
}

static int follow(struct lookup *lookup, int link, struct error *error) {
    char target[PATH_MAX], rest[PATH_MAX];
    ssize_t length = readlinkat(link, "", target, sizeof target - 1);
    if (length < 0)
        return fail(error, errno, "readlink");
    target[length] = '\0';
    memcpy(rest, lookup->rest, sizeof rest);
    if (++lookup->links > LINKS_MAX ||
        snprintf(lookup->rest, sizeof lookup->rest, "%s/%s", target, rest) >= (int)sizeof lookup->rest)
        return fail(error, ELOOP, "readlink");
    if (target[0] == '/')
        lookup->done[0] = '\0';
    return 0;
}

static int create(struct lookup *lookup, const char *part, enum path_kind kind, struct error *error) {
    autoclose int parent = open_in_root(lookup->root, lookup->done, O_PATH | O_DIRECTORY);
    if (parent < 0)
        return fail(error, errno, "open /%s", lookup->done);
    if (kind == PATH_DIRECTORY) {
        if (mkdirat(parent, part, 0755) < 0 && errno != EEXIST)
            return fail(error, errno, "mkdir %s/%s", lookup->done, part);
    } else {
        autoclose int file = openat(parent, part, O_CREAT | O_EXCL | O_WRONLY | O_NOFOLLOW | O_CLOEXEC, 0644);
        if (file < 0 && errno != EEXIST)
            return fail(error, errno, "create %s/%s", lookup->done, part);
    }
    return 0;
}

// Resolves one more part: enters it, goes up, follows a link, or creates it.
static int step(struct lookup *lookup, const char *part, enum path_kind kind, struct error *error) {
    size_t length = strlen(lookup->done);
    if (strcmp(part, ".") == 0)
        return 0;
    if (strcmp(part, "..") == 0) {
        char *slash = strrchr(lookup->done, '/');
        if (slash)
            *slash = '\0';
        return 0;
    }
    if (snprintf(lookup->done + length, sizeof lookup->done - length, "/%s", part) >=
        (int)(sizeof lookup->done - length))
        return fail(error, ENAMETOOLONG, "mkdir");
    autoclose int found = open_in_root(lookup->root, lookup->done, O_PATH | O_NOFOLLOW);
    if (found < 0 && errno != ENOENT)
        return fail(error, errno, "open %s", lookup->done);
    if (found < 0) {
        lookup->done[length] = '\0';
        if (create(lookup, part, kind, error) < 0)
            return -1;
        lookup->done[length] = '/';
        return 0;
    }
    struct stat status;
    if (fstat(found, &status) < 0)
        return fail(error, errno, "stat %s", lookup->done);
    if (!S_ISLNK(status.st_mode))
        return 0;
    lookup->done[length] = '\0';
    return follow(lookup, found, error);
}

int path_make(int root, const char *path, enum path_kind kind, struct error *error) {
    int fd = path_find(root, path);
    if (fd >= 0)
        return fd;
    struct lookup lookup = {.root = root};
    if (errno != ENOENT || snprintf(lookup.rest, sizeof lookup.rest, "%s", path) >= (int)sizeof lookup.rest)
        return fail(error, errno, "open %s", path);
    char part[NAME_MAX + 1];
    while (next_part(&lookup, part)) {
        bool last = lookup.rest[strspn(lookup.rest, "/")] == '\0';
        if (step(&lookup, part, last ? kind : PATH_DIRECTORY, error) < 0)
            return -1;
    }
    fd = path_find(root, lookup.done);
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
