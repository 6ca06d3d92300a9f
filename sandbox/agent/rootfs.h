// A container's mount tree, built in its own mount namespace from the flat plan of Start.
#pragma once

#include "protocol.h"

// Everything up to pivot_root. Returns a descriptor of the new root.
int rootfs_prepare(const Start *start, const char *id, struct error *error);

// Binds the terminal that is this process's stdin over /dev/console.
int rootfs_console(int root, struct error *error);

// Makes the root read-only if it shall be, and exchanges it for the guest's.
int rootfs_enter(int root, const Start *start, struct error *error);
