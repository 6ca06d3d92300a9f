// Grants a file a capability, and shows which capabilities a process got by its execution.
//
//   capable grant FILE        give FILE cap_net_bind_service=ep, as setcap(8) does
//   capable granted FILE      print the attribute's length, or "none"
//   capable as UID FILE ...   become this user, without groups, and execute FILE
//   capable effective         print the effective capabilities as a hexadecimal number

#include <errno.h>
#include <grp.h>
#include <linux/capability.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/xattr.h>
#include <unistd.h>

static const char NAME[] = "security.capability";

static int failed(const char *what) {
    printf("%s: %s\n", what, strerror(errno));
    return 1;
}

static int grant(const char *file) {
    struct vfs_cap_data data = {
        .magic_etc = VFS_CAP_REVISION_2 | VFS_CAP_FLAGS_EFFECTIVE,
        .data[0].permitted = 1U << CAP_NET_BIND_SERVICE,
    };
    return setxattr(file, NAME, &data, sizeof data, 0) < 0 ? failed("setxattr") : 0;
}

static int granted(const char *file) {
    ssize_t length = getxattr(file, NAME, NULL, 0);
    if (length < 0 && errno != ENODATA)
        return failed("getxattr");
    if (length < 0)
        puts("none");
    else
        printf("%zd\n", length);
    return 0;
}

static int as(unsigned user, char **argv) {
    if (setgroups(0, NULL) < 0 || setgid(user) < 0 || setuid(user) < 0)
        return failed("setuid");
    execv(argv[0], argv);
    return failed("execv");
}

static int effective(void) {
    char line[256];
    FILE *status = fopen("/proc/self/status", "re");
    while (status && fgets(line, sizeof line, status))
        if (!strncmp(line, "CapEff:", 7))
            printf("%llx\n", strtoull(line + 7, NULL, 16));
    return status ? 0 : failed("status");
}

int main(int argc, char **argv) {
    if (argc == 3 && !strcmp(argv[1], "grant"))
        return grant(argv[2]);
    if (argc == 3 && !strcmp(argv[1], "granted"))
        return granted(argv[2]);
    if (argc > 3 && !strcmp(argv[1], "as"))
        return as((unsigned)atoi(argv[2]), argv + 3);
    if (argc == 2 && !strcmp(argv[1], "effective"))
        return effective();
    fputs("usage: capable grant FILE | granted FILE | as UID FILE ... | effective\n", stderr);
    return 2;
}
