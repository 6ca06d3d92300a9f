// Kernel modules, out of /modules of the initramfs.
#pragma once

// The kernel starts a program of this name when it wants a module: modprobe -q -- NAME.
#define MODPROBE_NAME "/sbin/modprobe"

// Load the modules that the file at `path` lists, one name a line, in that order; which of them could not be
// is told on the console. Returns how many those are, or -1 where there is no such list.
int modules_load(const char *path);

// What the kernel asked for, or what it needs first, if it is among what came along; ends the process.
_Noreturn void modprobe_main(int argc, char **argv);
