#include "live.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "configure.h"
#include "container.h"
#include "guest.h"
#include "scope.h"

// The host sends at most 16 MiB for a pod; while a tree is replaced, the old and the new one exist.
#define OPTIONS "mode=0755,size=48m,nr_inodes=20000"

enum { DEPTH_MAX = 32, MODE_MASK = 07777 };

// ------------------------------------------------------------------------------------ lookups

// A container with CAP_SYS_ADMIN can make its bind writable: nothing in a tree is followed or trusted.
static int open_beneath(int tree, const char *path, uint64_t flags) {
    struct open_how how = {
        .flags = flags | O_CLOEXEC | O_NOFOLLOW,
        .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV,
    };
    return (int)syscall(SYS_openat2, tree, path, &how, sizeof how);
}

// Whether every part of `path` is a name.
static bool is_path(const char *path) {
    int depth = 0;
    if (strlen(path) >= PATH_MAX)
        return false;
    for (const char *part = path;; part++) {
        size_t length = strcspn(part, "/");
        if (length == 0 || length > NAME_MAX || ++depth > DEPTH_MAX || (length == 1 && *part == '.') ||
            (length == 2 && part[0] == '.' && part[1] == '.'))
            return false;
        part += length;
        if (!*part)
            return true;
    }
}

// Returns the directory that holds the last part of `path`; `name` points at that part.
static int open_parent(int tree, const char *path, const char **name) {
    char parent[PATH_MAX];
    const char *slash = strrchr(path, '/');
    *name = slash ? slash + 1 : path;
    if (!slash)
        return open_beneath(tree, ".", O_RDONLY | O_DIRECTORY);
    snprintf(parent, sizeof parent, "%.*s", (int)(slash - path), path);
    return open_beneath(tree, parent, O_RDONLY | O_DIRECTORY);
}

static void temporary_name(const char *name, char temporary[NAME_MAX + 1]) {
    if (snprintf(temporary, NAME_MAX + 1, "%s_tmp", name) > NAME_MAX)
        snprintf(temporary, NAME_MAX + 1, ".husk_tmp");
}

// ------------------------------------------------------------------------------------ removal

static int remove_name(int parent, const char *name, int depth);

static int empty_directory(int directory, int depth) {
    int fd = openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    autoclosedir DIR *list = fd >= 0 ? fdopendir(fd) : NULL;
    if (!list) {
        if (fd >= 0)
            close(fd);
        return -1;
    }
    for (struct dirent *entry; (entry = readdir(list));)
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0 &&
            remove_name(directory, entry->d_name, depth) < 0)
            return -1;
    return 0;
}

// Removes a file, or a directory with what is in it. A missing one is not a failure.
static int remove_name(int parent, const char *name, int depth) {
    if (unlinkat(parent, name, 0) == 0 || errno == ENOENT)
        return 0;
    if (errno != EISDIR)
        return -1;
    if (unlinkat(parent, name, AT_REMOVEDIR) == 0)
        return 0;
    if (errno != ENOTEMPTY || depth > DEPTH_MAX)
        return -1;
    autoclose int directory = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (directory < 0 || empty_directory(directory, depth + 1) < 0)
        return -1;
    return unlinkat(parent, name, AT_REMOVEDIR);
}

// ------------------------------------------------------------------------------------ changes

// Of an open file or directory. Unchanged ones are not set: each would be an inotify event.
static int set_attributes(int file, const FileChange *change) {
    struct stat status;
    if (fstat(file, &status) < 0)
        return -1;
    mode_t mode = change->mode & MODE_MASK;
    bool owned = status.st_uid == change->uid && status.st_gid == change->gid;
    if (!owned && fchown(file, change->uid, change->gid) < 0)
        return -1;
    // a change of the owner clears the set-id bits
    return (!owned || (status.st_mode & MODE_MASK) != mode) ? fchmod(file, mode) : 0;
}

static int make_directory(int parent, const char *name, const FileChange *change) {
    if (mkdirat(parent, name, 0700) < 0 && errno != EEXIST)
        return -1;
    autoclose int directory = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    return directory < 0 ? -1 : set_attributes(directory, change);
}

static bool has_content(int file, const ProtobufCBinaryData *content) {
    struct stat status;
    uint8_t block[4096];
    if (fstat(file, &status) < 0 || (size_t)status.st_size != content->len)
        return false;
    for (size_t at = 0; at < content->len;) {
        ssize_t count = pread(file, block, sizeof block, (off_t)at);
        if (count <= 0 || (size_t)count > content->len - at || memcmp(block, content->data + at, count) != 0)
            return false;
        at += (size_t)count;
    }
    return true;
}

// Overwrites before it truncates, so that a reader never sees an empty file.
static int write_content(int file, const ProtobufCBinaryData *content) {
    for (size_t at = 0; at < content->len;) {
        ssize_t count = pwrite(file, content->data + at, content->len - at, (off_t)at);
        if (count <= 0)
            return -1;
        at += (size_t)count;
    }
    struct stat status;
    if (fstat(file, &status) < 0)
        return -1;
    return (size_t)status.st_size == content->len ? 0 : ftruncate(file, (off_t)content->len);
}

static int create_file(int parent, const char *name, const FileChange *change) {
    autoclose int file = openat(parent, name, O_CREAT | O_EXCL | O_RDWR | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (file < 0 || write_content(file, &change->content) < 0 || set_attributes(file, change) < 0)
        return -1;
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT},
                                {change->mtime_ns / 1000000000, change->mtime_ns % 1000000000}};
    return change->mtime_ns > 0 ? futimens(file, times) : 0;
}

static int replace_file(int parent, const char *name, const FileChange *change) {
    char temporary[NAME_MAX + 1];
    temporary_name(name, temporary);
    if (remove_name(parent, temporary, 0) < 0 || create_file(parent, temporary, change) < 0)
        return -1;
    return renameat(parent, temporary, parent, name);
}

static int change_file(int parent, const char *name, const FileChange *change) {
    autoclose int file = openat(parent, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    struct stat status;
    if (file < 0)
        return errno == ENOENT ? create_file(parent, name, change) : -1;
    if (fstat(file, &status) < 0)
        return -1;
    if (!S_ISREG(status.st_mode)) {
        errno = EEXIST;
        return -1;
    }
    if (has_content(file, &change->content))
        return set_attributes(file, change);
    if (change->replace)
        return replace_file(parent, name, change);
    autoclose int writable = openat(parent, name, O_RDWR | O_NOFOLLOW | O_CLOEXEC);
    if (writable < 0 || write_content(writable, &change->content) < 0)
        return -1;
    return set_attributes(writable, change);
}

static int make_link(int parent, const char *name, const FileChange *change) {
    char target[PATH_MAX], temporary[NAME_MAX + 1];
    struct stat status;
    ssize_t length = readlinkat(parent, name, target, sizeof target - 1);
    if (length < 0 && errno == ENOENT) {
        if (symlinkat(change->target, parent, name) < 0)
            return -1;
    } else {
        target[length < 0 ? 0 : length] = '\0';
        if (length < 0 || strcmp(target, change->target) != 0) {
            temporary_name(name, temporary);
            if (remove_name(parent, temporary, 0) < 0 || symlinkat(change->target, parent, temporary) < 0 ||
                renameat(parent, temporary, parent, name) < 0)
                return -1;
        }
    }
    if (fstatat(parent, name, &status, AT_SYMLINK_NOFOLLOW) < 0)
        return -1;
    if (status.st_uid == change->uid && status.st_gid == change->gid)
        return 0;
    return fchownat(parent, name, change->uid, change->gid, AT_SYMLINK_NOFOLLOW);
}

static int apply(int tree, const FileChange *change) {
    const char *name;
    autoclose int parent = open_parent(tree, change->path, &name);
    if (parent < 0)
        return errno == ENOENT && change->kind == HUSK__GUEST__V1__FILE_CHANGE__KIND__REMOVE ? 0 : -1;
    switch (change->kind) {
    case HUSK__GUEST__V1__FILE_CHANGE__KIND__DIRECTORY:
        return make_directory(parent, name, change);
    case HUSK__GUEST__V1__FILE_CHANGE__KIND__FILE:
        return change_file(parent, name, change);
    case HUSK__GUEST__V1__FILE_CHANGE__KIND__LINK:
        return make_link(parent, name, change);
    case HUSK__GUEST__V1__FILE_CHANGE__KIND__REMOVE:
        return remove_name(parent, name, 0);
    default:
        errno = EINVAL;
        return -1;
    }
}

// -------------------------------------------------------------------------------------- pruning

static int compare(const void *left, const void *right) {
    return strcmp(*(char *const *)left, *(char *const *)right);
}

static bool is_kept(const ChangeFiles *request, const char *path) {
    return request->n_keep &&
           bsearch(&path, request->keep, request->n_keep, sizeof *request->keep, compare) != NULL;
}

// `path` is that of the directory, with PATH_MAX bytes, and as before when this returns.
static int prune(int directory, char *path, const ChangeFiles *request, int depth) {
    int fd = openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    autoclosedir DIR *list = fd >= 0 ? fdopendir(fd) : NULL;
    size_t length = strlen(path);
    if (!list) {
        if (fd >= 0)
            close(fd);
        return -1;
    }
    for (struct dirent *entry; (entry = readdir(list));) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        int added = snprintf(path + length, PATH_MAX - length, "%s%s", length ? "/" : "", entry->d_name);
        bool kept = added < (int)(PATH_MAX - length) && is_kept(request, path);
        int result = 0;
        if (!kept)
            result = remove_name(directory, entry->d_name, depth);
        else if (entry->d_type == DT_DIR && depth < DEPTH_MAX) {
            autoclose int beneath =
                openat(directory, entry->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
            result = beneath < 0 ? -1 : prune(beneath, path, request, depth + 1);
        }
        path[length] = '\0';
        if (result < 0)
            return -1;
    }
    return 0;
}

// ------------------------------------------------------------------------------------- requests

static int open_trees(struct agent *agent, struct error *error) {
    if (agent->test && geteuid() != 0)
        return fail(error, EPERM, "live files"); // there are no namespaces to do it in
    if (mkdir(GUEST_LIVE, 0755) < 0 && errno != EEXIST)
        return fail(error, errno, "live files");
    if (!is_mounted(GUEST_LIVE) && mount("tmpfs", GUEST_LIVE, "tmpfs", MS_NOSUID | MS_NODEV, OPTIONS) < 0)
        return fail(error, errno, "mount live files");
    int trees = open(GUEST_LIVE, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    return trees >= 0 ? trees : fail(error, errno, "live files");
}

int live_change(struct agent *agent, const ChangeFiles *request, struct error *error) {
    if (!is_id(request->tree))
        return fail_about(error, EINVAL, "live files", "name of the tree");
    for (size_t i = 0; i < request->n_changes; i++)
        if (!is_path(request->changes[i]->path))
            return fail_about(error, EINVAL, "live files", "path of a change");
    autoclose int trees = open_trees(agent, error);
    if (trees < 0)
        return -1;
    if (mkdirat(trees, request->tree, 0755) < 0 && errno != EEXIST)
        return fail(error, errno, "live files");
    autoclose int tree = openat(trees, request->tree, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (tree < 0)
        return fail(error, errno, "live files");
    for (size_t i = 0; i < request->n_changes; i++)
        if (apply(tree, request->changes[i]) < 0)
            return fail_about(error, errno, "live files", request->changes[i]->path);
    if (!request->prune)
        return 0;
    char path[PATH_MAX] = "";
    if (request->n_keep)
        qsort(request->keep, request->n_keep, sizeof *request->keep, compare);
    return prune(tree, path, request, 0) < 0 ? fail(error, errno, "live files") : 0;
}

int live_keep(struct agent *agent, const KeepTrees *request, struct error *error) {
    if (access(GUEST_LIVE, F_OK) < 0)
        return 0; // no tree was ever made
    autoclose int trees = open_trees(agent, error);
    int fd = trees >= 0 ? dup(trees) : -1;
    autoclosedir DIR *list = fd >= 0 ? fdopendir(fd) : NULL;
    if (!list) {
        if (fd >= 0)
            close(fd);
        return trees < 0 ? -1 : fail(error, errno, "live files");
    }
    for (struct dirent *entry; (entry = readdir(list));) {
        bool kept = *entry->d_name == '.';
        for (size_t i = 0; i < request->n_trees && !kept; i++)
            kept = strcmp(request->trees[i], entry->d_name) == 0;
        if (!kept && remove_name(trees, entry->d_name, 0) < 0)
            return fail(error, errno, "live files");
    }
    return 0;
}
