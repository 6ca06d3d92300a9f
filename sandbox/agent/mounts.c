#include "mounts.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>

#include "guest.h"
#include "paths.h"
#include "scope.h"

static const uint64_t PROPAGATION = MS_PRIVATE | MS_SLAVE | MS_SHARED | MS_UNBINDABLE;

// MS_* of mount(2) as MOUNT_ATTR_* of mount_setattr(2).
static struct mount_attr attributes_of(uint64_t flags) {
    static const struct {
        uint64_t flag, attribute;
    } table[] = {
        {MS_RDONLY, MOUNT_ATTR_RDONLY},         {MS_NOSUID, MOUNT_ATTR_NOSUID},
        {MS_NODEV, MOUNT_ATTR_NODEV},           {MS_NOEXEC, MOUNT_ATTR_NOEXEC},
        {MS_NODIRATIME, MOUNT_ATTR_NODIRATIME}, {MS_NOSYMFOLLOW, MOUNT_ATTR_NOSYMFOLLOW},
    };
    struct mount_attr attributes = {0};
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++)
        if (flags & table[i].flag)
            attributes.attr_set |= table[i].attribute;
    if (flags & (MS_NOATIME | MS_STRICTATIME | MS_RELATIME)) {
        attributes.attr_clr = MOUNT_ATTR__ATIME; // one field of several bits: cleared, then set
        attributes.attr_set |= flags & MS_NOATIME       ? MOUNT_ATTR_NOATIME
                               : flags & MS_STRICTATIME ? MOUNT_ATTR_STRICTATIME
                                                        : MOUNT_ATTR_RELATIME;
    }
    return attributes;
}

static int set_attributes(int tree, bool recursive, struct mount_attr attributes) {
    if (!attributes.attr_set && !attributes.attr_clr && !attributes.propagation)
        return 0;
    return mount_setattr(tree, "", AT_EMPTY_PATH | (recursive ? AT_RECURSIVE : 0), &attributes,
                         sizeof attributes);
}

// Sets propagation and recursive read-only of a mount, which may be attached already.
static int finish(int tree, const Mount *mount) {
    struct mount_attr propagation = {.propagation = mount->propagation & PROPAGATION};
    struct mount_attr readonly = {.attr_set = mount->recursive_readonly ? MOUNT_ATTR_RDONLY : 0};
    if (set_attributes(tree, true, readonly) < 0)
        return -1;
    return set_attributes(tree, mount->propagation & MS_REC, propagation);
}

static int attach(int tree, int target) {
    return move_mount(tree, "", target, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
}

int mount_bind(int from, const char *source, int target, uint64_t attributes, struct error *error) {
    autoclose int tree = open_tree(
        from, source, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE | (*source ? 0 : AT_EMPTY_PATH));
    struct mount_attr wanted = {.attr_set = attributes};
    if (tree < 0 || set_attributes(tree, true, wanted) < 0 || attach(tree, target) < 0)
        return fail(error, errno, "bind");
    return 0;
}

static int find_target(int root, const Mount *mount, int source, struct error *error) {
    enum path_kind kind = PATH_DIRECTORY;
    struct stat status;
    switch (mount->make) {
    case HUSK__GUEST__V1__MOUNT__MAKE__NOTHING: {
        int fd = path_find(root, mount->target);
        return fd >= 0 ? fd : fail(error, errno, "mount %s", mount->target);
    }
    case HUSK__GUEST__V1__MOUNT__MAKE__FILE:
        kind = PATH_FILE;
        break;
    case HUSK__GUEST__V1__MOUNT__MAKE__LIKE_SOURCE:
        if (source >= 0 && fstat(source, &status) == 0 && !S_ISDIR(status.st_mode))
            kind = PATH_FILE;
        break;
    default:
        break;
    }
    return path_make(root, mount->target, kind, error);
}

// Triggers an automount at `path`, as open(2) with O_PATH alone would not.
static int open_place(const char *path) {
    return open_tree(AT_FDCWD, path, OPEN_TREE_CLOEXEC);
}

static int open_source(const Mount *mount) {
    size_t length = strlen(mount->within);
    if (length == 0 || !strcmp(mount->source, mount->within))
        return open_place(mount->source);
    if (strncmp(mount->source, mount->within, length) != 0 || mount->source[length] != '/') {
        errno = EINVAL;
        return -1;
    }
    autoclose int top = open_place(mount->within);
    return top < 0 ? -1 : path_plain(top, mount->source + length + 1);
}

// Mounts what virtio-fs announces beneath the source. One that is gone by now is not a failure: the host
// listed what existed at that time.
static void mount_submounts(int source, const Mount *mount) {
    for (size_t i = 0; i < mount->n_submounts; i++) {
        // O_DIRECTORY: O_PATH alone does not trigger the automount
        autoclose int found = path_enter(source, mount->submounts[i]);
        (void)found;
    }
}

// Gives the parts of the mount that are other mounts in the guest the flags of the whole.
static int finish_parts(int tree, const Mount *mount, struct error *error) {
    for (size_t i = 0; i < mount->n_parts; i++) {
        autoclose int part = path_plain(tree, mount->parts[i]);
        if (part < 0 || set_attributes(part, false, attributes_of(mount->flags)) < 0)
            return fail(error, errno, "mount %s/%s", mount->target, mount->parts[i]);
    }
    return 0;
}

// Binds a path of the root on itself: it then has separate flags, whatever those of the root become.
static int bind_itself(int root, const Mount *mount, struct error *error) {
    autoclose int target = find_target(root, mount, -1, error);
    if (target < 0)
        return -1;
    autoclose int tree = open_tree(target, "", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH);
    if (tree < 0 || set_attributes(tree, false, attributes_of(mount->flags)) < 0 || attach(tree, target) < 0)
        return fail(error, errno, "mount %s", mount->target);
    return 0;
}

static int apply_bind(int root, const Mount *mount, struct error *error) {
    if (!*mount->source)
        return bind_itself(root, mount, error);
    autoclose int source = open_source(mount);
    if (source < 0)
        return fail_about(error, errno, "mount source", mount->source);
    mount_submounts(source, mount);
    unsigned recursive = mount->flags & MS_REC ? AT_RECURSIVE : 0;
    autoclose int tree =
        open_tree(source, "", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH | recursive);
    if (tree < 0)
        return fail_about(error, errno, "mount source", mount->source);
    autoclose int target = find_target(root, mount, tree, error);
    if (target < 0)
        return -1;
    // a plain read-only bind leaves the mounts beneath it writable, as mount(8) does
    if (set_attributes(tree, false, attributes_of(mount->flags)) < 0 || finish(tree, mount) < 0 ||
        attach(tree, target) < 0)
        return fail(error, errno, "mount %s", mount->target);
    return finish_parts(tree, mount, error);
}

static int apply_file_system(int root, const Mount *plan, struct error *error) {
    autoclose int target = find_target(root, plan, -1, error);
    if (target < 0)
        return -1;
    // by the working directory: the descriptor was resolved safely, a path would be resolved again
    const char *source = *plan->source ? plan->source : plan->type;
    if (fchdir(target) < 0 || mount(source, ".", plan->type, plan->flags & ~(PROPAGATION | MS_REC),
                                    *plan->data ? plan->data : NULL) < 0)
        return fail(error, errno, "mount %s", plan->target);
    if (!plan->propagation && !plan->recursive_readonly)
        return 0;
    autoclose int mounted = path_find(root, plan->target);
    if (mounted < 0 || finish(mounted, plan) < 0)
        return fail(error, errno, "mount %s", plan->target);
    return 0;
}

int mount_apply(int root, const Mount *mount, struct error *error) {
    if (!*mount->type || mount->flags & MS_BIND)
        return apply_bind(root, mount, error);
    return apply_file_system(root, mount, error);
}

static bool is_missing(int number) {
    return number == ENOENT || number == ENOTDIR;
}

int mount_mask(int root, const char *path, struct error *error) {
    struct stat status;
    autoclose int target = path_find(root, path);
    if (target < 0)
        return is_missing(errno) ? 0 : fail(error, errno, "mask %s", path);
    if (fstat(target, &status) < 0)
        return fail(error, errno, "mask %s", path);
    int failed = S_ISDIR(status.st_mode) ? mount_bind(AT_FDCWD, GUEST_EMPTY, target, MOUNT_ATTR_RDONLY, error)
                                         : mount_bind(AT_FDCWD, "/dev/null", target, 0, error);
    return failed < 0 ? fail(error, error->number, "mask %s", path) : 0;
}

int mount_freeze(int root, const char *path, struct error *error) {
    autoclose int target = path_find(root, path);
    if (target < 0)
        return is_missing(errno) ? 0 : fail(error, errno, "read-only %s", path);
    if (mount_bind(target, "", target, MOUNT_ATTR_RDONLY, error) < 0)
        return fail(error, error->number, "read-only %s", path);
    return 0;
}
