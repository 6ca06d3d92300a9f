// Releases resources at the end of their scope.
#pragma once

#include <dirent.h>
#include <stdlib.h>
#include <unistd.h>

static inline void scope_close(int *fd) {
    if (*fd >= 0)
        close(*fd);
}

static inline void scope_free(void *pointer) {
    free(*(void **)pointer);
}

static inline void scope_closedir(DIR **directory) {
    if (*directory)
        closedir(*directory);
}

#define autoclose __attribute__((cleanup(scope_close)))
#define autofree __attribute__((cleanup(scope_free)))
#define autoclosedir __attribute__((cleanup(scope_closedir)))

// Returns the descriptor and clears the variable, so that the scope does not close it.
static inline int take_fd(int *fd) {
    int value = *fd;
    *fd = -1;
    return value;
}

static inline void close_fd(int *fd) {
    scope_close(fd);
    *fd = -1;
}
