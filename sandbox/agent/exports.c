#include "exports.h"

#include <errno.h>
#include <fcntl.h>
#include <mntent.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/statfs.h>
#include <unistd.h>

#include "buffer.h"
#include "mounts.h"
#include "paths.h"
#include "scope.h"

enum { FENCES = 4 };

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

// Appends the points of exports that are not kept, each with its terminating zero byte. An unmount changes
// the table, but no other export's point.
static void find_unused(const KeepExports *request, struct buffer *points) {
    FILE *table = setmntent("/proc/self/mounts", "re");
    for (struct mntent *entry; table && (entry = getmntent(table));)
        if (!is_kept(request, entry->mnt_dir))
            buffer_append(points, entry->mnt_dir, strlen(entry->mnt_dir) + 1);
    if (table)
        endmntent(table);
}

int exports_keep(const struct agent *agent, const KeepExports *request, struct error *error) {
    struct buffer points = {0};
    int result = 0;
    if (refuse_in_test(agent, error) < 0)
        return -1;
    find_unused(request, &points);
    if (buffer_length(&points))
        exports_settle(agent);
    while (result == 0 && buffer_length(&points)) {
        const char *point = (const char *)points.data + points.start;
        if (umount2(point, MNT_DETACH | UMOUNT_NOFOLLOW) < 0)
            result = fail_about(error, errno, "unmount", point);
        buffer_consume(&points, strlen(point) + 1);
    }
    buffer_free(&points);
    return result;
}
