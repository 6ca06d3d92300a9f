#include "disks.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "error.h"
#include "modules.h"
#include "reply.h"
#include "scope.h"

enum { SERIAL_MAX = 20, SECTOR = 512 }; // VIRTIO_BLK_ID_BYTES; the unit of /sys/block/NAME/size

static ssize_t read_attribute(const char *disk, const char *name, char *text, size_t size) {
    char path[PATH_MAX];
    snprintf(path, sizeof path, "/sys/block/%s/%s", disk, name);
    autoclose int file = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length = file < 0 ? -1 : read(file, text, size - 1);
    if (length < 0)
        return -1;
    while (length > 0 && isspace((unsigned char)text[length - 1]))
        length--;
    text[length] = '\0';
    return length;
}

static bool has_serial(const char *disk, const char *serial) {
    char text[SERIAL_MAX + 2];
    return read_attribute(disk, "serial", text, sizeof text) > 0 && strcmp(text, serial) == 0;
}

// The node in /dev is made before the disk appears in /sys, and its numbers are the disk's.
static int describe(const char *disk, DiskFound *found, struct error *error) {
    char path[PATH_MAX], size[32];
    struct stat node;
    snprintf(path, sizeof path, "/dev/%s", disk);
    if (stat(path, &node) < 0 || !S_ISBLK(node.st_mode) ||
        read_attribute(disk, "size", size, sizeof size) < 0)
        return fail_about(error, ENODEV, "disk", disk);
    found->major = major(node.st_rdev);
    found->minor = minor(node.st_rdev);
    found->size = strtoull(size, NULL, 10) * SECTOR;
    return 0;
}

void disks_find(struct agent *agent, uint32_t request, const char *serial) {
    struct error error = {0};
    if (!agent->test)
        modules_request("virtio_blk"); // loaded already, but for the first disk; or built in
    DIR *disks = opendir("/sys/block");
    struct dirent *entry;
    while (disks && (entry = readdir(disks)))
        if (*serial && has_serial(entry->d_name, serial)) {
            Reply reply = HUSK__GUEST__V1__REPLY__INIT;
            DiskFound found = HUSK__GUEST__V1__DISK_FOUND__INIT;
            found.name = entry->d_name;
            if (describe(entry->d_name, &found, &error) == 0) {
                reply.body_case = HUSK__GUEST__V1__REPLY__BODY_DISK;
                reply.disk = &found;
                reply_send(agent, request, &reply);
            } else {
                reply_failure(agent, request, &error);
            }
            closedir(disks);
            return;
        }
    if (disks)
        closedir(disks);
    fail_about(&error, ENODEV, "disk", serial);
    reply_failure(agent, request, &error);
}
