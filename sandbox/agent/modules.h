// Kernel modules, out of /modules of the initramfs.
#pragma once

// The kernel runs a program of this name to request a module: modprobe -q -- NAME.
#define MODPROBE_NAME "/sbin/modprobe"

// Loads the modules that the file at `path` lists, one name a line, in that order, and logs those that fail.
// Returns the number of failures, or -1 where there is no such list.
int modules_load(const char *path);

// Loads the requested module and what it depends on, if the initramfs has it. Ends the process.
_Noreturn void modprobe_main(int argc, char **argv);
