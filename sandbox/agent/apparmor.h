// AppArmor: loads profiles into the guest's kernel, and lets a process enter one.
#pragma once

#include "protocol.h"

// Loads the container's compiled policy, if it has one.
int apparmor_load(const Start *start, struct error *error);

// Makes the caller's next exec enter the process's profile, if it has one. Needs the guest's /proc.
int apparmor_enter(const Process *process, struct error *error);
