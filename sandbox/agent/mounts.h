// Single mounts inside a container's new root. A bind is a detached copy that gets its flags before any
// process can see it (open_tree(2), mount_setattr(2), move_mount(2)).
#pragma once

#include <stdint.h>

#include "protocol.h"

int mount_apply(int root, const Mount *mount, struct error *error);

// Binds the tree at `source` (a path, or with "" the descriptor `from` itself) over the descriptor `target`,
// with these MOUNT_ATTR_* set.
int mount_bind(int from, const char *source, int target, uint64_t attributes, struct error *error);

// Hides `path`: a file with /dev/null, a directory with an empty one. A missing path is skipped.
int mount_mask(int root, const char *path, struct error *error);

// Makes `path` and what is beneath it read-only in place. A missing path is skipped.
int mount_freeze(int root, const char *path, struct error *error);
