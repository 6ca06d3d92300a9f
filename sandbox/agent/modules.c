#include "modules.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "error.h"
#include "scope.h"

static int load(const char *name) {
    char path[PATH_MAX];
    snprintf(path, sizeof path, "/modules/%s", name);
    autoclose int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file >= 0 && (syscall(SYS_finit_module, file, "", 0) == 0 || errno == EEXIST))
        return 0;
    console_log("module %s: %s", name, strerror(errno));
    return 1;
}

int modules_load(const char *path) {
    autofree char *line = NULL;
    size_t size = 0;
    FILE *order = fopen(path, "re");
    if (!order)
        return -1;
    int failed = 0;
    while (getline(&line, &size, order) > 0) {
        line[strcspn(line, "\n")] = '\0';
        if (*line)
            failed += load(line);
    }
    fclose(order);
    return failed;
}

void modprobe_main(int argc, char **argv) {
    const char *name = argc > 1 ? argv[argc - 1] : "";
    char path[PATH_MAX];
    if (!*name || strchr(name, '/'))
        exit(EXIT_FAILURE);
    snprintf(path, sizeof path, "/modules/load/%s", name);
    exit(modules_load(path) == 0 ? EXIT_SUCCESS : EXIT_FAILURE);
}
