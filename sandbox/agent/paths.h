// Paths inside a container's root file system. The image chose the links in it and other containers may
// change shared volumes meanwhile, so every look-up is openat2(2) with RESOLVE_IN_ROOT and all further
// work goes through the descriptor that came of it.
#pragma once

#include "error.h"

enum path_kind { PATH_DIRECTORY, PATH_FILE };

// An O_PATH descriptor of `path` beneath `root`, links followed within it; -1 with errno set.
int path_find(int root, const char *path);

// The same, of a directory, and what is to be mounted on it once it is entered has been mounted.
int path_enter(int root, const char *path);

// The same, with missing directories, and the last part itself, created (0755 and 0644).
int path_make(int root, const char *path, enum path_kind kind, struct error *error);

// The directory that holds the last part of `path` (made where missing); `name` points at that part.
int path_parent(int root, const char *path, const char **name, struct error *error);
