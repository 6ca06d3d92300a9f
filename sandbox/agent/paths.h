// Paths inside a container's root file system. The image chose the links in it, and other containers may
// change shared volumes at the same time, so every lookup is openat2(2) with RESOLVE_IN_ROOT, and all
// further work uses the resulting descriptor.
#pragma once

#include "error.h"

enum path_kind { PATH_DIRECTORY, PATH_FILE };

// Returns an O_PATH descriptor of `path` beneath `root`, links followed within it; -1 with errno set.
int path_find(int root, const char *path);

// Same, but fails (ELOOP) where the path has a link.
int path_plain(int root, const char *path);

// Same as path_find, of a directory. Triggers an automount on it.
int path_enter(int root, const char *path);

// Same as path_find, and creates what is missing: directories (0755), and the last part as `kind` (a file
// 0644).
int path_make(int root, const char *path, enum path_kind kind, struct error *error);

// Returns the directory that holds the last part of `path` (made where missing); `name` points at that part.
int path_parent(int root, const char *path, const char **name, struct error *error);
