#include "rootfs.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "guest.h"
#include "mounts.h"
#include "paths.h"
#include "scope.h"
#include "userspace.h"

static int bind_root(const Start *start, struct error *error) {
    if (start->rootfs_propagation && mount(NULL, "/", NULL, start->rootfs_propagation, NULL) < 0)
        return fail(error, errno, "propagation of /");
    // pivot_root(2) requires a mount point
    if (mount(start->rootfs, start->rootfs, NULL, MS_BIND | MS_REC, NULL) < 0)
        return fail_about(error, errno, "rootfs", start->rootfs);
    int root = open(start->rootfs, O_PATH | O_DIRECTORY | O_CLOEXEC);
    return root >= 0 ? root : fail_about(error, errno, "rootfs", start->rootfs);
}

static int make_device(int root, const Process *process, const Device *device, struct error *error) {
    const char *name;
    autoclose int parent = path_parent(root, device->path, &name, error);
    if (parent < 0)
        return -1;
    dev_t number = makedev(device->major, device->minor);
    if (mknodat(parent, name, (device->type & S_IFMT) | (device->mode & 07777), number) < 0) {
        struct stat there;
        if (errno != EEXIST || fstatat(parent, name, &there, AT_SYMLINK_NOFOLLOW) < 0)
            return fail(error, errno, "device %s", device->path);
        if ((there.st_mode & S_IFMT) != (device->type & S_IFMT) || there.st_rdev != number)
            return fail(error, EEXIST, "device %s", device->path);
    }
    if (fchownat(parent, name, userspace_uid(process, device->uid), userspace_gid(process, device->gid),
                 AT_SYMLINK_NOFOLLOW) < 0)
        return fail(error, errno, "device %s", device->path);
    return 0;
}

// Keeps what exists already: an image may contain its own /dev.
static int make_link(int root, const Link *link, struct error *error) {
    const char *name;
    autoclose int parent = path_parent(root, link->path, &name, error);
    if (parent < 0)
        return -1;
    if (symlinkat(link->target, parent, name) < 0 && errno != EEXIST && errno != EROFS)
        return fail(error, errno, "link %s", link->path);
    return 0;
}

static int write_content(const Process *process, const File *file, const char *path, struct error *error) {
    autoclose int fd = open(path, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600);
    if (fd < 0 || write(fd, file->content.data, file->content.len) != (ssize_t)file->content.len ||
        fchmod(fd, file->mode & 07777) < 0 ||
        fchown(fd, userspace_uid(process, 0), userspace_gid(process, 0)) < 0)
        return fail(error, errno, "file %s", file->path);
    return 0;
}

static int place_file(int root, const Start *start, const char *id, size_t number, struct error *error) {
    const File *file = start->files[number];
    char path[PATH_MAX];
    snprintf(path, sizeof path, GUEST_FILES "/%s/%zu", id, number);
    if (write_content(start->process, file, path, error) < 0)
        return -1;
    autoclose int target = path_make(root, file->path, PATH_FILE, error);
    if (target < 0)
        return -1;
    if (mount_bind(AT_FDCWD, path, target, file->readonly ? MOUNT_ATTR_RDONLY : 0, error) < 0)
        return fail(error, error->number, "file %s", file->path);
    return 0;
}

static int make_cwd(int root, const Process *process, struct error *error) {
    if (!process->make_cwd || !*process->cwd)
        return 0;
    autoclose int made = path_make(root, process->cwd, PATH_DIRECTORY, error);
    struct stat status;
    if (made < 0)
        return fail(error, error->number, "cwd");
    // it belongs to the guest's root, which has no id in the container, only if it was made here
    if (userspace_wanted(process) && fstat(made, &status) == 0 && status.st_uid == 0 &&
        fchownat(made, "", userspace_uid(process, 0), userspace_gid(process, 0), AT_EMPTY_PATH) < 0)
        return fail(error, errno, "cwd");
    return 0;
}

static int restrict_paths(int root, const Start *start, struct error *error) {
    for (size_t i = 0; i < start->n_readonly_paths; i++)
        if (mount_freeze(root, start->readonly_paths[i], error) < 0)
            return -1;
    for (size_t i = 0; i < start->n_masked_paths; i++)
        if (mount_mask(root, start->masked_paths[i], error) < 0)
            return -1;
    return 0;
}

int rootfs_prepare(const Start *start, const char *id, struct error *error) {
    autoclose int root = bind_root(start, error);
    if (root < 0)
        return -1;
    for (size_t i = 0; i < start->n_mounts; i++)
        if (mount_apply(root, start->mounts[i], error) < 0)
            return -1;
    for (size_t i = 0; i < start->n_devices; i++)
        if (make_device(root, start->process, start->devices[i], error) < 0)
            return -1;
    for (size_t i = 0; i < start->n_links; i++)
        if (make_link(root, start->links[i], error) < 0)
            return -1;
    for (size_t i = 0; i < start->n_files; i++)
        if (place_file(root, start, id, i, error) < 0)
            return -1;
    if (make_cwd(root, start->process, error) < 0 || restrict_paths(root, start, error) < 0)
        return -1;
    return take_fd(&root);
}

int rootfs_console(int root, struct error *error) {
    char slave[PATH_MAX];
    ssize_t length = readlink("/proc/self/fd/0", slave, sizeof slave - 1);
    if (length < 0)
        return fail(error, errno, "/dev/console");
    slave[length] = '\0'; // "/dev/pts/0", possibly with the path of the root that holds this devpts before it
    const char *name = strrchr(slave, '/');
    char inside[64];
    snprintf(inside, sizeof inside, "/dev/pts%s", name ? name : "");
    autoclose int source = path_find(root, inside);
    if (source < 0)
        return fail(error, errno, "/dev/console");
    autoclose int target = path_make(root, "/dev/console", PATH_FILE, error);
    if (target < 0)
        return -1;
    return mount_bind(source, "", target, 0, error) < 0 ? fail(error, error->number, "/dev/console") : 0;
}

int rootfs_enter(int root, const Start *start, struct error *error) {
    struct mount_attr readonly = {.attr_set = MOUNT_ATTR_RDONLY};
    if (start->readonly_rootfs && mount_setattr(root, "", AT_EMPTY_PATH, &readonly, sizeof readonly) < 0)
        return fail(error, errno, "read-only rootfs");
    // the old root is then stacked over the new one (pivot_root(2), "pivot_root(".", ".")")
    if (fchdir(root) < 0 || syscall(SYS_pivot_root, ".", ".") < 0)
        return fail(error, errno, "pivot_root");
    // the unmount of the old root must not propagate to the guest
    if (start->rootfs_propagation && mount(NULL, ".", NULL, MS_SLAVE | MS_REC, NULL) < 0)
        return fail(error, errno, "pivot_root");
    if (umount2(".", MNT_DETACH) < 0 || chdir("/") < 0)
        return fail(error, errno, "pivot_root");
    return 0;
}
