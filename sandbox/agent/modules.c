#include "modules.h"

#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <linux/capability.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "error.h"
#include "guest.h"
#include "scope.h"

// Dashes and underscores are equal (modprobe(8)).
static void normalize(char *name) {
    for (; *name; name++)
        if (*name == '-')
            *name = '_';
}

static bool is_loaded(const char *file) {
    const char *name = strrchr(file, '/');
    name = name ? name + 1 : file;
    char path[PATH_MAX];
    int length = (int)strcspn(name, ".");
    int prefix = snprintf(path, sizeof path, "/sys/module/");
    snprintf(path + prefix, sizeof path - (size_t)prefix, "%.*s/initstate", length, name);
    normalize(path + prefix);
    return access(path, F_OK) == 0;
}

static int load(const char *directory, const char *name) {
    char path[PATH_MAX];
    if (is_loaded(name))
        return 0;
    snprintf(path, sizeof path, "%s/%s", directory, name);
    autoclose int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file >= 0 && (syscall(SYS_finit_module, file, "", 0) == 0 || errno == EEXIST))
        return 0;
    console_log("module %s: %s", name, strerror(errno));
    return 1;
}

static void make_node(const char *line) {
    char name[64], path[PATH_MAX];
    unsigned major, minor;
    if (sscanf(line, "%63s %u %u", name, &major, &minor) != 3)
        return;
    snprintf(path, sizeof path, "/dev/%s", name);
    char *slash = strrchr(path + strlen("/dev/"), '/');
    if (slash) {
        *slash = '\0';
        mkdir(path, 0755);
        *slash = '/';
    }
    mknod(path, S_IFCHR | 0600, makedev(major, minor));
}

static void load_at_start(const char *name) {
    load("/modules", name);
}

static void for_each_line(const char *path, void (*action)(const char *)) {
    autofree char *line = NULL;
    size_t size = 0;
    FILE *lines = fopen(path, "re");
    if (!lines)
        return;
    while (getline(&line, &size, lines) > 0) {
        line[strcspn(line, "\n")] = '\0';
        if (*line)
            action(line);
    }
    fclose(lines);
}

void modules_boot(void) {
    for_each_line("/modules/order", load_at_start);
    for_each_line("/modules/devices", make_node);
}

static bool matches(char *alias, const char *wanted) {
    normalize(alias);
    return strchr(alias, '*') ? fnmatch(alias, wanted, 0) == 0 : !strcmp(alias, wanted);
}

int modules_request(const char *name) {
    char wanted[256];
    if (!*name || snprintf(wanted, sizeof wanted, "%s", name) >= (int)sizeof wanted)
        return -1;
    normalize(wanted);
    autofree char *line = NULL;
    size_t size = 0;
    FILE *aliases = fopen(GUEST_MODULES "/aliases", "re");
    if (!aliases)
        return -1;
    int failed = -1;
    while (getline(&line, &size, aliases) > 0) {
        char *state = NULL, *alias = strtok_r(line, " \n", &state);
        if (!alias || !matches(alias, wanted))
            continue;
        failed = failed < 0 ? 0 : failed;
        for (char *file; (file = strtok_r(NULL, " \n", &state));)
            failed += load(GUEST_MODULES, file);
    }
    fclose(aliases);
    return failed;
}

bool modules_of_sysctl(const char *path) {
    char request[PATH_MAX];
    if (snprintf(request, sizeof request, "sysctl:%s", path) >= (int)sizeof request)
        return false;
    for (char *slash; modules_request(request) < 0; *slash = '\0')
        if (!(slash = strrchr(request, '/')))
            return false;
    return true;
}

void modules_of_capabilities(uint64_t effective) {
    static const char stamp[] = GUEST_RUN "/net-admin";
    if (!(effective >> CAP_NET_ADMIN & 1) || access(stamp, F_OK) == 0)
        return;
    modules_request("capability:net_admin");
    autoclose int made = open(stamp, O_CREAT | O_WRONLY | O_CLOEXEC, 0600);
    (void)made;
}

void modprobe_main(int argc, char **argv) {
    const char *name = argc > 1 ? argv[argc - 1] : "";
    exit(modules_request(name) == 0 ? EXIT_SUCCESS : EXIT_FAILURE);
}
