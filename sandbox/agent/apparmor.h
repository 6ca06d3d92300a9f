// AppArmor profiles: how they come into the guest's kernel, and a process into one of them.
#pragma once

#include "protocol.h"

// Loads the policy that the container brings along, if it does.
int apparmor_load(const Start *start, struct error *error);

// The next exec of the caller enters the process's profile, if it has one. Needs the guest's own /proc.
int apparmor_enter(const Process *process, struct error *error);
