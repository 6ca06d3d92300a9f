#include "apparmor.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

#include "scope.h"

enum { COMMAND_MAX = 1024 };

static int refuse(const char *profile, int number, struct error *error) {
    fail_about(error, number, "apparmor", profile);
    if (number == ENOENT || number == ENODEV) // the kernel's interface is missing, not a profile
        snprintf(error->message, sizeof error->message, "%.120s: the guest's kernel has no AppArmor",
                 profile);
    return -1;
}

// Returns the kernel's securityfs, a detached mount that no container can see.
static int open_securityfs(void) {
    autoclose int context = fsopen("securityfs", FSOPEN_CLOEXEC);
    if (context < 0 || fsconfig(context, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0)
        return -1;
    return fsmount(context, FSMOUNT_CLOEXEC, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC);
}

int apparmor_load(const Start *start, struct error *error) {
    const ProtobufCBinaryData *policy = &start->apparmor_policy;
    const char *profile = start->process->apparmor;
    if (!policy->len)
        return 0;
    autoclose int securityfs = open_securityfs();
    autoclose int file = securityfs < 0 ? -1 : openat(securityfs, "apparmor/.replace", O_WRONLY | O_CLOEXEC);
    if (file < 0)
        return refuse(profile, errno, error);
    if (write(file, policy->data, policy->len) != (ssize_t)policy->len) { // the kernel loads it in one write
        fail(error, errno, "apparmor");
        snprintf(error->message, sizeof error->message, "%.120s: the guest's kernel refuses its policy: %s",
                 profile, strerror(errno));
        return -1;
    }
    return 0;
}

int apparmor_enter(const Process *process, struct error *error) {
    char command[COMMAND_MAX];
    if (!*process->apparmor)
        return 0;
    int length = snprintf(command, sizeof command, "exec %s", process->apparmor);
    if (length >= (int)sizeof command)
        return fail_about(error, ENAMETOOLONG, "apparmor", process->apparmor);
    autoclose int file = open("/proc/self/attr/apparmor/exec", O_WRONLY | O_CLOEXEC);
    if (file < 0)
        return refuse(process->apparmor, errno, error);
    if (write(file, command, (size_t)length) < 0)
        return fail_about(error, errno, "apparmor", process->apparmor);
    return 0;
}
