#include "exports.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <mntent.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/statfs.h>
#include <unistd.h>

#include "mounts.h"
#include "paths.h"
#include "scope.h"

enum { FENCES = 4, UNMOUNTS_MAX = 4096 };

void exports_settle(const struct agent *agent) {
    struct statfs unused;
    for (int i = 0; agent->submounts && i < FENCES; i++)
        statfs(agent->submounts, &unused);
}

static int mount_export(const Export *export, struct error *error) {
    autoclose int top = open(export->path, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (top < 0)
        return fail_about(error, errno, "export", export->path);
    for (size_t i = 0; i < export->n_submounts; i++) {
        autoclose int found = path_enter(top, export->submounts[i]);
        (void)found;
    }
    for (size_t i = 0; i < export->n_parts; i++) {
        const ExportPart *part = export->parts[i];
        autoclose int place = path_plain(top, part->path);
        if (place < 0)
            return fail_about(error, errno, "export", part->path);
        if (mount_bind(AT_FDCWD, part->source, place, 0, error) < 0)
            return fail_about(error, error->number, "export", part->path);
    }
    return 0;
}

static int refuse_in_test(const struct agent *agent, struct error *error) {
    // there are no namespaces to do it in
    return agent->test && geteuid() != 0 ? fail(error, EPERM, "exports") : 0;
}

int exports_mount(const struct agent *agent, const MountExports *request, struct error *error) {
    if (refuse_in_test(agent, error) < 0)
        return -1;
    for (size_t i = 0; i < request->n_exports; i++)
        if (mount_export(request->exports[i], error) < 0)
            return -1;
    return 0;
}

static bool is_kept(const KeepExports *request, const char *point) {
    size_t length = strlen(request->share);
    if (strncmp(point, request->share, length) != 0 || point[length] != '/' ||
        strchr(point + length + 1, '/'))
        return true; // not an export of the share
    for (size_t i = 0; i < request->n_names; i++)
        if (!strcmp(point + length + 1, request->names[i]))
            return true;
    return false;
}

// Copies the point of an export that is not kept; false: there is none.
static bool find_unused(const KeepExports *request, char point[PATH_MAX]) {
    FILE *table = setmntent("/proc/self/mounts", "re");
    bool found = false;
    for (struct mntent *entry; table && !found && (entry = getmntent(table));) {
        found = !is_kept(request, entry->mnt_dir);
        if (found)
            snprintf(point, PATH_MAX, "%s", entry->mnt_dir);
    }
    if (table)
        endmntent(table);
    return found;
}

int exports_keep(const struct agent *agent, const KeepExports *request, struct error *error) {
    char point[PATH_MAX];
    if (refuse_in_test(agent, error) < 0)
        return -1;
    // each unmount changes the table, so it is read again
    for (int i = 0; i < UNMOUNTS_MAX && find_unused(request, point); i++) {
        if (i == 0)
            exports_settle(agent);
        if (umount2(point, MNT_DETACH | UMOUNT_NOFOLLOW) < 0)
            return fail_about(error, errno, "unmount", point);
    }
    return 0;
}
