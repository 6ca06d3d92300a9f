// Limits that the kernel derives from the machine's memory once, at boot: threads, open files, watches and
// such. Memory that is added later does not raise them.
#pragma once

#include "agent.h"

// Notes what the kernel derived. Once, before anything may change it.
void derived_begin(void);

// Derives them again, as the kernel does, if there is more memory than before, for the processes that run
// too. A limit that was changed since stays. Does nothing in standalone mode. Cheap.
void derived_follow(const struct agent *agent);
