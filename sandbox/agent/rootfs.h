// A container's mount tree, built in its mount namespace from the flat plan of Start.
#pragma once

#include "protocol.h"

// Everything before pivot_root. Returns a descriptor of the new root.
int rootfs_prepare(const Start *start, const char *id, struct error *error);

// Binds the terminal that is this process's stdin over /dev/console.
int rootfs_console(int root, struct error *error);

// Makes the root read-only if the plan says so, and replaces the guest's root with it.
int rootfs_enter(int root, const Start *start, struct error *error);
