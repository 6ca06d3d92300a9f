// Kernel modules: those of the start, out of /modules of the initramfs, and those that the host offers.
#pragma once

#include <stdbool.h>
#include <stdint.h>

// The kernel runs a program of this name to request a module: modprobe -q -- NAME.
#define MODPROBE_NAME "/sbin/modprobe"

// Loads the modules of the start, and makes nodes of the devices whose drivers are loaded when they are
// opened.
void modules_boot(void);

// Loads what the host offers for `name`: see sandbox/guest_image/modules.py. Returns the number of modules
// that could not be loaded, or -1 where nothing is known of the name.
int modules_request(const char *name);

// Loads what a sysctl, a path below /proc/sys, needs. Returns whether anything was.
bool modules_of_sysctl(const char *path);

// Loads what a node's kernel has loaded for a container with these effective capabilities, once.
void modules_of_capabilities(uint64_t effective);

// Loads the requested module and what it depends on. Ends the process.
_Noreturn void modprobe_main(int argc, char **argv);
